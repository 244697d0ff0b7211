"""Cancel runs politely, and clear failures for another try."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
from collections.abc import Callable, Sequence

from aimscale.harness.run.files import process_started
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.claims import RunRecord, local_claim_is_live, records_of
from aimscale.sweeps.state.retries import forgive
from aimscale.sweeps.state.sweep_dir import launch_lock_path, lock_file


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
    told: dict[slurm.Phase, list[str]] = {"pending": [], "running": []}
    with lock_file(launch_lock_path(sweep)):
        ask = functools.cache(slurm.jobs)
        for record in _records(sweep, run_ids):
            try:
                _cancel_one(record, ask, told, done, failed)
            except slurm.SlurmError:
                raise
            except SweepError as error:
                failed.append(f"{record.title}: {error}")
        # A job that executes several runs goes on with the others.
        shared = {claim.job_id for path in sweep.runs_dir.iterdir() if (claim := RunRecord(path).find_claim())}
        slurm.cancel([job_id for job_id in told["pending"] if job_id not in shared])
        slurm.cancel(told["running"], signal="USR2")
    return done, failed


def _cancel_one(
    record: RunRecord,
    ask: Callable[[], dict[str, slurm.JobInfo]],
    told: dict[slurm.Phase, list[str]],
    done: list[str],
    failed: list[str],
) -> None:
    claim = record.read_claim()
    if claim is not None and claim.backend == "slurm" and claim.job_id:
        job = ask().get(claim.job_id)
        if job is None or job.phase == "ended":
            return
        # Without its claim a job does not requeue itself, and one that only now starts ends at once.
        record.drop_claim()
        told[job.phase].append(claim.job_id)
        if job.phase == "pending":
            record.write_status(state="preempted", reason="cancelled while it waited", reason_class=None)
        done.append(f"{record.title}: {'taken out of the queue' if job.phase == 'pending' else 'told to save and end'}")
    elif record.is_held() or (claim is not None and local_claim_is_live(claim)):
        was_told = _stop_local(record)
        (done if was_told else failed).append(f"{record.title}: {_local_sentence(record, was_told)}")


def _records(sweep: Sweep, run_ids: Sequence[str]) -> list[RunRecord]:
    """Training and evaluation job of each run."""
    return [record for run_id in run_ids for record in records_of(sweep.run_dir(run_id))]


def _stop_local(record: RunRecord) -> bool:
    """Send SIGTERM to the process that executes a run on this machine."""
    holder = record.read_holder()
    if holder is None or holder.host != socket.gethostname() or holder.pid <= 1 or holder.process_started is None:
        return False
    if process_started(holder.pid) != holder.process_started:
        return False  # it ended, and its pid may be a stranger's
    with contextlib.suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGTERM)
    return True


def _local_sentence(record: RunRecord, was_told: bool) -> str:
    if was_told:
        return "told to save and end (its queue may start it again; stop the queue with Ctrl-C)"
    holder, claim = record.read_holder(), record.read_claim()
    where = holder.host if holder else claim.host if claim else "its queue's machine"
    return f"belongs to a queue on {where}; stop that with Ctrl-C there"


def retry(sweep: Sweep, run_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """Clear the failure of failed and diverged runs.

    Returns:
        The runs whose failure was cleared, and a sentence for each that is damaged.
    """
    cleared: list[str] = []
    damaged: list[str] = []
    if sweep.directory.is_dir():
        with lock_file(launch_lock_path(sweep)):
            for record in _records(sweep, run_ids):
                try:
                    if record.checked_status().state in ("failed", "diverged") and not record.is_held():
                        forgive(record)
                        cleared.append(record.title)
                except SweepError as error:
                    damaged.append(f"{record.title}: {error}")
    return cleared, damaged
