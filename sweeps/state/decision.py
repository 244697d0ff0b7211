"""What a launch does with each run of a sweep: start it, or leave it and say why; and the kinds of jobs on a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aimscale.aim.errors import UserError
from aimscale.harness.probe.owed import Lacking, lacking
from aimscale.harness.run.directory import Status
from aimscale.harness.run.trunk import missing_budgets
from aimscale.sweeps.plan.costs import MIN_STOP_S, stop_seconds
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.state.claims import Claim, RunRecord, claim_run, local_claim_is_live
from aimscale.sweeps.state.retries import may_try_again
from aimscale.sweeps.state.sweep_dir import launch_lock_path

Verdict = Literal["start", "resume", "finished", "running", "queued", "failed", "damaged"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The verdict on one run."""

    run: Run
    record: RunRecord
    verdict: Verdict
    """What to do: `start` and `resume` are to be started, the others left alone."""
    why: str = ""

    @property
    def startable(self) -> bool:
        """Whether a process is to be started."""
        return self.verdict in ("start", "resume")


def decide(run: Run, record: RunRecord, is_queued: Callable[[Claim], bool]) -> Decision:
    """Look at a run's directory; `is_queued` says whether a Slurm claim's job is still known to the queue."""

    def verdict() -> tuple[Verdict, str]:
        status = record.checked_status()
        if not record.config.exists() or status.state == "created":
            return standing(record, status, is_queued) or ("start", "")
        missing = _lacking(run, record)
        if status.state == "finished" and not missing:
            return "finished", ""
        is_longer = f"lacks {missing[-1]}" if status.state == "finished" else status.state
        if found := standing(record, status, is_queued):
            return found
        record.load_config()  # a damaged one is named now, not after a job was submitted
        return "resume", is_longer

    return decision(run, record, verdict)


def _lacking(run: Run, record: RunRecord) -> list[Lacking]:
    try:
        return lacking(record, run.config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise record.damaged(record.results, error) from error


def budgets_left(run: Run, record: RunRecord) -> list[int]:
    """Budgets that are still to be trained.

    Raises:
        SweepError: a file that tells is damaged.
        RunDirError: no saved point of the trunk leads to one of them.
    """
    try:
        return missing_budgets(record, run.config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise record.damaged(record.results, error) from error


def decision(run: Run, record: RunRecord, verdict: Callable[[], tuple[Verdict, str]]) -> Decision:
    """The verdict that looking gives; `damaged` where the directory cannot be read or holds what it should not."""
    try:
        what, why = verdict()
    except UserError as error:
        what, why = "damaged", str(error)
    except OSError as error:
        what, why = "damaged", f"{error.filename or record.path} cannot be read ({error.strerror})"
    return Decision(run=run, record=record, verdict=what, why=why)


def note_finished(found: Decision) -> None:
    """Finish the status of work whose process was killed between its last result and its last word."""
    record = found.record
    if found.verdict != "finished" or not record.status.exists():
        return
    with contextlib.suppress(UserError):  # a status that is damaged says nothing about what is done
        if record.checked_status().state != "finished" and not record.is_held():
            record.write_status(state="finished", phase="", reason=None, reason_class=None)


def standing(
    record: RunRecord, status: Status, is_queued: Callable[[Claim], bool], *, forgive_failure: bool = False
) -> tuple[Verdict, str] | None:
    """Why unfinished work is left alone: it runs, waits, or failed for good; None where it is to be started."""
    if record.is_held():
        return "running", f"on {status.host}"
    claim = record.read_claim()
    if claim and (local_claim_is_live(claim) if claim.backend == "local" else is_queued(claim)):
        return "queued", f"by {claim.backend} {claim.job_id or claim.host}"
    if status.state in ("failed", "diverged") and not forgive_failure and not may_try_again(record):
        return "failed", f"{status.reason_class}: {status.reason}"
    record.read_attempts()  # where they are damaged, it is said now, not after a job was submitted
    return None


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """One kind of job on runs."""

    name: str
    """Goes into the names of Slurm's jobs."""
    lock: Path
    """Held while it is decided what is started."""
    record: Callable[[Run], RunRecord]
    """Where the job on a run keeps its status, claim, attempts and logs."""
    decide: Callable[[Run, RunRecord, Callable[[Claim], bool]], Decision]
    """Whether a run is to be started; the last argument says whether Slurm still knows a claim's job."""
    claim: Callable[[RunRecord, Run, Claim], None]
    """Claims a run that was decided upon, under the launch lock."""
    worker: tuple[str, ...]
    """Arguments of Python; the record's directory follows."""
    stop_s: Callable[[Run], int] = lambda run: MIN_STOP_S
    """Time that a run is given to save and end."""


def training_jobs(sweep: Sweep) -> JobKind:
    """Train the runs of a sweep."""
    return JobKind(
        name=f"aimscale-{sweep.name}",
        lock=launch_lock_path(sweep),
        record=lambda run: RunRecord(sweep.run_dir(run.run_id)),
        decide=decide,
        claim=claim_run,
        worker=("-m", "aimscale.harness.train"),
        stop_s=lambda run: stop_seconds(sweep, run),
    )
