"""Looks of a worker at the sweep's folder and its runs: which errors of a file server may pass, and whether locks hold.

A run that cannot be read counts as damaged only after several looks. A run of another host whose lock is not seen is
left alone until its status is old: some file systems lock within each host alone, and say nothing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from aimscale.harness.run.timeouts import LOST_AFTER_S, RESCAN_S, SILENT_AFTER_S
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import SWEEP_RECORD, Sweep, SweepError
from aimscale.sweeps.state.record import stage_record
from aimscale.sweeps.state.run_state import RunState, State, read_stage

NUM_LOOKS = 3
"""Number of looks, `RESCAN_S` apart, after which an error of a file server that lasts counts as damage."""


@dataclass(kw_only=True)
class Looks:
    """Looks of one worker."""

    sweep: Sweep
    job_id: str | None
    """Id of the worker's Slurm job."""
    unseen: dict[str, float | None] = field(default_factory=dict)
    """Key of a stage -> heartbeat of a run of another host whose lock was not seen at the last look."""
    failed: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Run id, or "" for the sweep -> number of looks in a row that met an error, and the time of the last, s."""

    def read_state(self, run: Run) -> RunState:
        """Read the state of a run.

        Raises:
            SweepError: another host goes on with it, although its lock is not seen here.
        """
        run_state = read_stage(run, stage_record(self.sweep, run))
        before = self.unseen.pop(run.key, None)
        if not run_state.is_unlocked:
            return run_state
        if run_state.job_id is not None and run_state.job_id == self.job_id:  # before Slurm started this job again
            return replace(run_state, state=State.LOST, is_unlocked=False)
        self.unseen[run.key] = run_state.status.heartbeat
        if before not in (None, run_state.status.heartbeat):
            raise SweepError(
                f"{run_state.status.host} executes {run.run_id}, and {socket.gethostname()} does not see its lock, so "
                f"that two hosts could execute one run; mount {self.sweep.root} with locks that hold between hosts "
                f"(Lustre: flock, BeeGFS: tuneUseGlobalFileLocks = true), or choose another --root"
            )
        return run_state

    def find_problem(self) -> str | None:
        """Return what is wrong with the sweep's directory, if it is gone or cannot be read for good."""
        problem = "was moved or removed while it was in use"
        try:
            is_there = (self.sweep.directory / SWEEP_RECORD).is_file()
            self.succeed("")
        except OSError as error:
            is_there, problem = self.may_repeat(""), f"cannot be read any more ({error.strerror})"
        return None if is_there else f"{self.sweep.directory} {problem}"

    def may_repeat(self, what: str) -> bool:
        """Count a look at a run, or with "" at the sweep, that met an error which may pass; False after the last."""
        num, last = self.failed.get(what, (0, float("-inf")))
        if time.monotonic() - last >= RESCAN_S:
            num, last = num + 1, time.monotonic()
        self.failed[what] = num, last
        return num < NUM_LOOKS

    def succeed(self, what: str) -> None:
        """Forget the errors of earlier looks."""
        self.failed.pop(what, None)


def may_become_free(run_state: RunState, job_id: str | None = None) -> bool:
    """Return whether a worker may yet start a run: no device was free for it, it could not be read for a moment, its
    own worker is gone, silent or unseen, or belongs to an earlier start of the job `job_id`, which Slurm will end."""
    is_of_job = job_id is not None and run_state.job_id == job_id
    return (
        run_state.state.startable
        or run_state.may_pass
        or run_state.is_unlocked
        or (run_state.is_orphan and job_id is None and _age_s(run_state) < LOST_AFTER_S)
        or (run_state.state.active and (is_of_job or _is_silent(run_state)))
    )


def _is_silent(run_state: RunState) -> bool:
    return SILENT_AFTER_S < _age_s(run_state) < LOST_AFTER_S


def _age_s(run_state: RunState) -> float:
    """Return the time since the run's last sign of life, s."""
    heartbeat = run_state.status.heartbeat
    return float("inf") if heartbeat is None else time.time() - heartbeat


def describe_wait(awaited: RunState, others: Iterable[str], seconds: float) -> str:
    """Say what a worker without runs waits for, and since when; `others` are processes that use the devices."""
    name, host = awaited.run.run_id, awaited.status.host
    who = "is silent" if _is_silent(awaited) else "is executed by an earlier start of this job"
    what = f"{name} {who} on {host}, and is taken over once its process is gone"
    if awaited.is_orphan and not _is_silent(awaited):
        what = f"{name} is executed on {host} although its launch is gone, and what follows it is done once it ends"
    elif awaited.is_unlocked:
        what = f"{name} was at work on {host} just now, and is taken over unless it goes on"
    elif awaited.may_pass:
        what = f"{name} cannot be read or started, and is tried again ({awaited.reason})"
    elif awaited.state.startable:
        what = f"other launches of this user (process {' and '.join(others)}) use all devices of this machine, and "
        what += "runs start as these become free (to share, give each launch --devices)"
    since = f", for {seconds / 60:.0f} minutes" if seconds >= 60 else ""
    return f"waiting{since}: {what}; Ctrl-C ends this launch"
