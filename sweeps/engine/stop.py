"""Cancel runs politely: what a worker executes saves and ends, and no worker starts it before the next launch."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence

from aimscale.harness.run import lock
from aimscale.harness.run.files import process_started, write_text
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.decision import decide
from aimscale.sweeps.state.record import RunRecord


def cancel(sweep: Sweep, runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Mark runs that are not over as cancelled: workers, on whatever machine, let those that run save and end.

    Jobs that wait in Slurm are withdrawn where no run is left for them.

    Returns:
        One sentence for each run that was stopped, and for each that could not be; none where nobody is at work.

    Raises:
        SweepError: the sweep was never launched, or Slurm does not answer.
    """
    if not sweep.directory.is_dir():
        raise SweepError(f"sweep '{sweep.name}' was never launched under {sweep.root}; there is nothing to cancel")
    found_all = [decide(run, RunRecord(sweep.run_dir(run.run_id))) for run in plan(sweep)]
    waiting = _waiting_jobs(sweep)
    if not waiting and all(found.verdict != "running" for found in found_all):
        return [], []
    done: list[str] = []
    failed: list[str] = []
    chosen = {run.run_id for run in runs}
    for found in found_all:
        record = found.record
        if record.name not in chosen or found.verdict not in ("start", "resume", "running"):
            continue
        try:
            write_text(record.cancelled, "")
        except OSError as error:
            failed.append(f"{record.name}: {record.cancelled} cannot be written ({error.strerror})")
            continue
        if found.verdict != "running":
            done.append(f"{record.name}: not to be started before the next launch")
        elif record.is_claimed() or _told_directly(record):
            done.append(f"{record.name}: told to save and end")
        else:
            failed.append(f"{record.name}: its worker is gone and it runs on another machine; end it there")
    if all(found.record.cancelled.exists() for found in found_all if found.startable):
        slurm.cancel(waiting)
    return done, failed


def _waiting_jobs(sweep: Sweep) -> list[str]:
    """Jobs of the sweep that wait in Slurm."""
    if not (sweep.directory / "slurm").is_dir():
        return []
    from aimscale.sweeps.slurm.submit import elements  # submitit is slow to import

    return [each.job.job_id for each in elements(sweep, slurm.jobs()) if each.job.phase == "pending"]


def _told_directly(record: RunRecord) -> bool:
    """Tell a trainer of this machine whose worker is gone, or that was started by hand."""
    holder = lock.read_holder(record.path / "lock")
    if holder is None or holder.host != socket.gethostname() or holder.process_started is None:
        return False
    if process_started(holder.pid) != holder.process_started:
        return False  # it ended, and its pid may be a stranger's
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGTERM)
    return True
