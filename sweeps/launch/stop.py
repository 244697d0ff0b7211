"""Cancel runs politely, and clear failures for another try."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence

from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.runs.claims import RunRecord, launch_lock, local_claim_is_live
from aimscale.sweeps.runs.probe_record import ProbeRecord
from aimscale.sweeps.runs.retries import forgive
from aimscale.sweeps.slurm import commands as slurm


def cancel(sweep: Sweep, run_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take waiting runs out of the queue and tell running ones to save and end.

    Returns:
        One sentence for each run that was stopped, and for each that could not be.

    Raises:
        SweepError: the sweep was never launched, or Slurm does not answer.
    """
    if not sweep.directory.is_dir():
        raise SweepError(f"sweep '{sweep.name}' was never launched under {sweep.root}; there is nothing to cancel")
    done: list[str] = []
    failed: list[str] = []
    pending: list[str] = []
    running: list[str] = []
    with launch_lock(sweep):
        known: dict[str, slurm.JobInfo] | None = None
        for run_id, record in _records(sweep, run_ids):
            claim = record.read_claim()
            if claim is not None and claim.backend == "slurm" and claim.job_id:
                known = slurm.jobs() if known is None else known
                job = known.get(claim.job_id)
                if job is None or job.phase == "ended":
                    continue
                # Without its claim a job does not requeue itself, and one that only now starts ends at once.
                record.drop_claim()
                (pending if job.phase == "pending" else running).append(claim.job_id)
                if job.phase == "pending":
                    record.write_status(state="preempted", reason="cancelled while it waited", reason_class=None)
                done.append(
                    f"{run_id}: {'taken out of the queue' if job.phase == 'pending' else 'told to save and end'}"
                )
            elif record.is_held() or (claim is not None and local_claim_is_live(claim)):
                (done if _stop_local(record) else failed).append(f"{run_id}: {_local_sentence(record)}")
        slurm.cancel(pending)
        slurm.cancel(running, signal="USR2")
    return done, failed


def _records(sweep: Sweep, run_ids: Sequence[str]) -> Iterator[tuple[str, RunRecord]]:
    """Training and probe job of each run, with what to call them."""
    for run_id in run_ids:
        yield run_id, RunRecord(sweep.run_dir(run_id))
        probing = ProbeRecord.of(sweep.run_dir(run_id))
        if probing.path.is_dir():
            yield f"probes of {run_id}", probing


def _stop_local(record: RunRecord) -> bool:
    """Send SIGTERM to the process that executes a run on this machine."""
    status = record.checked_status()
    if status.host != socket.gethostname() or status.pid is None or not record.is_held():
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(status.pid, signal.SIGTERM)
    return True


def _local_sentence(record: RunRecord) -> str:
    status = record.checked_status()
    if status.host == socket.gethostname() and record.is_held():
        return "told to save and end (its queue may start it again; stop the queue with Ctrl-C)"
    where = status.host or "its queue's machine"
    return f"belongs to a queue on {where}; stop that with Ctrl-C there"


def retry(sweep: Sweep, run_ids: Sequence[str]) -> list[str]:
    """Clear the failure of failed and diverged runs; returns their ids."""
    cleared = []
    if sweep.directory.is_dir():
        with launch_lock(sweep):
            for run_id, record in _records(sweep, run_ids):
                if record.checked_status().state in ("failed", "diverged") and not record.is_held():
                    forgive(record)
                    cleared.append(run_id)
    return cleared
