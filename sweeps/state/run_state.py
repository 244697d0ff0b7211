"""State of a run, by its directory and its locks: the one answer for `status`, `launch`, `cancel` and workers."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.results import Pending
from aimscale.harness.run.directory import Status
from aimscale.harness.run.failures import disk_sentence
from aimscale.harness.run.files import may_pass
from aimscale.harness.run.lock import Holder
from aimscale.harness.run.timeouts import FRESH_S
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.state.attempts import may_retry
from aimscale.sweeps.state.record import RunRecord

OF_PROGRAM = (
    *("state", "phase", "heartbeat", "started", "host", "pid", "reason", "reason_class", "failed_on", "attempt"),
    *("job_id", "claim"),
)
"""Fields of a status that tell of the program which wrote it, and not of how far the run is trained."""


class State(StrEnum):
    """State of a run, and what follows from it."""

    NOT_STARTED = "not started"
    QUEUED = "queued"
    """A pending Slurm job will take it."""
    WAITING = "waiting"
    """It needs more time than this worker has, another machine, or its training."""
    STARTING = "starting"
    """A worker has claimed it."""
    RUNNING = "running"
    LOST = "lost"
    """Its status is running, but no process executes it."""
    PAUSED = "paused"
    """Its progress is saved, and no worker continues it."""
    CANCELLED = "cancelled"
    FAILED = "failed"
    DIVERGED = "diverged"
    OFF_TRACK = "off-track"
    """Its loss left the forecast, and a launch with --stop-off-track ended it."""
    FINISHED = "finished"
    DAMAGED = "damaged"
    """Its directory cannot be read."""

    @property
    def startable(self) -> bool:
        """Whether the next worker starts the run."""
        return self in (State.NOT_STARTED, State.LOST, State.PAUSED)

    @property
    def active(self) -> bool:
        """Whether a process or a worker holds the run."""
        return self in (State.STARTING, State.RUNNING)

    @property
    def retryable(self) -> bool:
        """Whether nothing but `launch --retry` starts the run again."""
        return self in (State.CANCELLED, State.FAILED, State.DIVERGED, State.OFF_TRACK)

    @property
    def over(self) -> bool:
        """Whether nothing of the run is executed until a person acts."""
        return self.retryable or self in (State.FINISHED, State.DAMAGED)

    @property
    def needs_person(self) -> bool:
        """Whether a person has to find out why the run ended."""
        return self.over and self not in (State.FINISHED, State.CANCELLED)

    @property
    def advice(self) -> str:
        """Command that goes on with the run, if one does."""
        if self in (State.LOST, State.PAUSED):
            return "`aimscale launch` resumes it"
        return "`aimscale launch --retry` resumes it" if self.retryable else ""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of one run, and what was read to tell it."""

    run: Run
    """The run at the stage that the state is of, with the devices that it needs."""
    record: RunRecord
    """Its files of that stage."""
    state: State
    reason: str = ""
    """Reason of the state: where it runs, why it failed, what is missing."""
    status: Status = field(default_factory=Status)
    """Status that was written last; of an evaluation, with what the training wrote of itself."""
    missing: tuple[Pending, ...] = ()
    """Training and evaluations that the run lacks, at any stage."""
    attempts: tuple[dict[str, Any], ...] = ()
    """Its ended attempts at this stage, as `RunRecord.read_attempts`."""
    worker: Holder | None = None
    """Worker that claims it, or claimed it last; not read of a finished run."""
    may_pass: bool = False
    """Whether it counts as damaged because of an error that a file server gives for a while."""
    is_orphan: bool = False
    """Whether its program goes on although the worker that started it is gone, so that nobody would go on with it."""
    is_unlocked: bool = False
    """Whether another host wrote its status just now although its lock is not seen: `running` until that is old."""

    @property
    def sentence(self) -> str:
        """What there is to say of the run beside the name of its state: the reason, and what goes on with it."""
        return "; ".join(filter(None, (self.reason, self.state.advice)))

    @property
    def is_extended(self) -> bool:
        """Whether the run had finished, and the sweep file adds something to it."""
        return self.state is State.PAUSED and self.status.state == "finished"

    @property
    def job_id(self) -> str | None:
        """Slurm job of the worker that claims it, or claimed it last, if any."""
        return self.worker.facts.get("job_id") if self.worker else None

    @property
    def planned_action(self) -> str:
        """What a launch does with the run, or its state."""
        if self.is_extended:
            return "to extend" if any(each.what == "training" for each in self.missing) else "to evaluate"
        words = {State.NOT_STARTED: "new", State.LOST: "to resume", State.PAUSED: "to resume"}
        return words.get(self.state, "running" if self.state.active else self.state.value)


def read_state(run: Run, record: RunRecord, *, trust_note: bool = True) -> RunState:
    """Read the state of a run: that of its training, or once it is trained, that of its evaluation.

    Args:
        trust_note: see `pending_work`.
    """
    training = read_stage(run, record, trust_note=trust_note)
    if training.state is not State.FINISHED or not training.missing:
        return training
    return read_stage(run.evaluation, record.evaluation, missing=training.missing)


def read_stage(
    run: Run,
    record: RunRecord,
    *,
    holds_claim: bool = False,
    trust_note: bool = True,
    missing: Sequence[Pending] | None = None,
) -> RunState:
    """Read the state of a run at its stage.

    Args:
        record: of this stage.
        holds_claim: whether the caller holds its claim.
        trust_note: see `pending_work`.
        missing: everything that the run lacks, if that is known.
    """
    try:
        return _read_stage(run, record, holds_claim, trust_note, missing)
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return damaged_state(run, record, error)


def damaged_state(run: Run, record: RunRecord, error: Exception) -> RunState:
    """Return the state of a run whose directory gave an error."""
    reason = str(error)
    if not isinstance(error, UserError):
        reason = f"{record.path} is damaged ({error!r}); repair it or move it away"
        reason = (isinstance(error, OSError) and disk_sentence(error)) or reason
    return RunState(run=run, record=record, state=State.DAMAGED, reason=reason, may_pass=may_pass(error))


def _read_stage(
    run: Run, record: RunRecord, holds_claim: bool, trust_note: bool, missing: Sequence[Pending] | None
) -> RunState:
    status, attempts, is_evaluation = record.read_status(), record.read_attempts(), run.stage == "evaluate"
    trained = RunRecord(record.root).read_status() if is_evaluation else status
    is_new = trained.state == "created" or not (trained.state == "finished" or record.config.exists())
    if is_new:
        missing = [Pending(what="training", images_seen=budget) for budget in run.budgets]
    elif missing is None:
        missing = run.pending(record, trust_note=trust_note)
    to_train = [each for each in missing if each.what == "training"]
    to_do = [each for each in missing if each.what != "training"] if is_evaluation else to_train
    worker = record.claimant() if to_do or status.state != "finished" else None
    state, reason, is_unlocked = State.PAUSED, f"{status.reason_class}: {status.reason}", False
    is_held = record.is_held()
    # A failure counts only for the configuration that failed: with other probes or paths the run may start again.
    has_failed = status.state in ("failed", "diverged") and not may_retry(attempts, status.reason_class)
    if is_held:
        state, reason = State.RUNNING, f"on {status.host}"
    elif not to_do and to_train:
        state, reason = State.WAITING, "its training goes first"
    elif not to_do and (is_evaluation or status.state == "finished"):
        state, reason = State.FINISHED, ""
    elif not holds_claim and record.is_claimed():
        state, reason = State.STARTING, f"claimed on {worker.host}" if worker else "claimed"
    elif has_failed and run.is_configured(record):
        state = State(status.state)
    elif status.state == "off-track":
        state, reason = State.OFF_TRACK, status.reason or ""
    elif record.cancelled.exists():
        state, reason = State.CANCELLED, ""
    elif is_new:
        state, reason = State.NOT_STARTED, ""
    elif status.state == "running" and _is_fresh_elsewhere(status):
        state, reason, is_unlocked = State.RUNNING, f"on {status.host}, whose lock is not seen here", True
    elif status.state in ("running", "queued"):
        state, reason = State.LOST, (worker and worker.facts.get("ended")) or "its process is gone"
    elif status.state in ("created", "finished"):
        reason = f"to do: {to_do[0]}{f' and {len(to_do) - 1} more' if len(to_do) > 1 else ''}"
    elif status.state == "preempted":
        reason = status.reason or ""
    return RunState(
        run=run,
        record=record,
        state=state,
        reason=reason,
        status=_joined(trained, status) if is_evaluation else status,
        missing=tuple(missing),
        attempts=tuple(attempts),
        worker=worker,
        is_orphan=is_held and not (holds_claim or record.is_claimed()),
        is_unlocked=is_unlocked,
    )


def _joined(trained: Status, evaluated: Status) -> Status:
    """Join the statuses of both programs: how far the training came, and how the evaluation stands."""
    if evaluated.state == "created":
        return trained
    return replace(trained, **{name: getattr(evaluated, name) for name in OF_PROGRAM})


def _is_fresh_elsewhere(status: Status) -> bool:
    """Return whether another host wrote the status just now: file locks may hold within each host alone."""
    is_fresh = status.heartbeat is not None and abs(time.time() - status.heartbeat) < FRESH_S
    return is_fresh and status.host not in (None, socket.gethostname())
