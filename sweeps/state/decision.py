"""State of a run, by its directory and its locks: the one answer for `status`, `launch`, `cancel` and workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from aimscale.aim.errors import UserError
from aimscale.harness.probe.pending_evaluations import Pending, pending_work
from aimscale.harness.run.config import load_run_config
from aimscale.harness.run.directory import Status
from aimscale.harness.run.lock import Holder
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.state.attempts import may_retry
from aimscale.sweeps.state.record import RunRecord

State = Literal[
    "not started", "queued", "waiting", "starting", "running", "lost", "paused", "cancelled", "failed", "diverged",
    "off-track", "finished", "damaged",
]  # fmt: skip
"""State of a run. `queued`: a pending Slurm job will take it; `waiting`: it needs more time than this worker has, or
another machine; `starting`: a worker has claimed it; `lost`: its status is running, but no process executes it;
`paused`: its progress is saved, and no worker continues it; `off-track`: its loss left the forecast, and a launch with
--stop-off-track ended it. The next worker starts runs that are not started, lost or paused."""


ENDED_BY_HAND = ("failed", "diverged", "off-track", "cancelled")
"""States that `launch --retry` clears."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """State of one run, and what was read to tell it."""

    run: Run
    """The run, with the devices that it needs for what is missing."""
    record: RunRecord
    state: State
    why: str = ""
    """Reason of the state: where it runs, why it failed, what is missing."""
    status: Status = field(default_factory=Status)
    """Status that the run wrote last."""
    missing: tuple[Pending, ...] = ()
    """Training and evaluations that it lacks."""
    attempts: tuple[dict[str, Any], ...] = ()
    """Its ended attempts, as `RunRecord.read_attempts`."""
    worker: Holder | None = None
    """Worker that claims it, or claimed it last."""

    @property
    def startable(self) -> bool:
        """Whether a worker would start it."""
        return self.state in ("not started", "lost", "paused")

    @property
    def is_active(self) -> bool:
        """Whether a process or a worker holds it."""
        return self.state in ("running", "starting")


def read_states(sweep: Sweep, runs: Sequence[Run], *, retry: bool = False) -> list[RunState]:
    """Read the states of runs; with `retry`, as they are when failures and cancellations are cleared."""
    states = [read_state(run, RunRecord(sweep.run_dir(run.run_id))) for run in runs]
    return [replace(each, state="paused") if retry and each.state in ENDED_BY_HAND else each for each in states]


def read_state(run: Run, record: RunRecord, *, holds_claim: bool = False) -> RunState:
    """Read the state of a run; `holds_claim` tells that the caller holds its claim."""
    try:
        return _read_state(run, record, holds_claim)
    except UserError as error:
        why = str(error)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{record.path} is damaged ({error!r}); repair it or move it away"
    return RunState(run=run, record=record, state="damaged", why=why, status=Status(reason=why))


def _read_state(run: Run, record: RunRecord, holds_claim: bool) -> RunState:
    status, attempts, worker = record.read_status(), record.read_attempts(), record.claimant()
    is_new = not record.config.exists() or status.state == "created"
    missing = [Pending(what="training", images_seen=budget) for budget in run.budgets]
    if not is_new:
        missing = pending_work(record, run.config)
    if missing and all(each.what != "training" for each in missing):
        run = replace(run, devices=run.probe_devices)

    def found(state: State, why: str | None = "") -> RunState:
        return RunState(
            run=run,
            record=record,
            state=state,
            why=why or "",
            status=status,
            missing=tuple(missing),
            attempts=tuple(attempts),
            worker=worker,
        )

    if record.is_held():
        return found("running", f"on {status.host}")
    if status.state == "finished" and not missing:
        return found("finished")
    if not holds_claim and record.is_claimed():
        return found("starting", f"claimed on {worker.host}" if worker else "claimed")
    failure = f"{status.reason_class}: {status.reason}"
    # A failure counts only for the configuration that failed: with other probes or paths the run may start again.
    has_failed = status.state in ("failed", "diverged") and not may_retry(attempts, status.reason_class)
    if has_failed and load_run_config(record.config) == run.config:
        return found("diverged" if status.state == "diverged" else "failed", failure)
    if status.state == "off-track":
        return found("off-track", status.reason)
    if record.cancelled.exists():
        return found("cancelled")
    if is_new:
        return found("not started")
    if status.state in ("running", "queued"):
        return found("lost", "its process is gone")
    if status.state == "finished":
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return found("paused", f"to do: {missing[0]}{more}")
    return found("paused", status.reason if status.state == "preempted" else failure)
