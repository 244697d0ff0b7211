"""Decisions: whether a worker starts a run or leaves it, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aimscale.aim.errors import UserError
from aimscale.harness.probe.pending_evaluations import Pending, pending_work
from aimscale.harness.run.config import load_run_config
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.state.attempts import may_retry
from aimscale.sweeps.state.record import RunRecord

Verdict = Literal["start", "resume", "finished", "running", "waiting", "cancelled", "failed", "damaged"]
"""Verdict on a run; `waiting` means that it needs another machine, or more time than this one has."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Verdict on one run."""

    run: Run
    record: RunRecord
    verdict: Verdict
    """Verdict; runs with `start` and `resume` are started, the others are skipped."""
    why: str = ""

    @property
    def startable(self) -> bool:
        """Whether the run can be started."""
        return self.verdict in ("start", "resume")


def decide(run: Run, record: RunRecord, *, holds_claim: bool = False) -> Decision:
    """Decide on a run by its directory; `holds_claim` tells that the caller holds its claim."""
    try:
        verdict, why = _verdict(run, record, holds_claim)
    except (UserError, OSError, ValueError) as error:
        verdict, why = "damaged", str(error)
    return Decision(run=run, record=record, verdict=verdict, why=why)


def _verdict(run: Run, record: RunRecord, holds_claim: bool) -> tuple[Verdict, str]:
    status = record.read_status()
    is_new = not record.config.exists() or status.state == "created"
    missing = [] if is_new else pending_work(record, run.config)
    if status.state == "finished" and not missing and not is_new:
        return "finished", ""
    if record.is_held():
        return "running", f"on {status.host}"
    if not holds_claim and record.is_claimed():
        worker = record.claimant()
        return "running", f"claimed on {worker.host}" if worker else "claimed"
    if record.cancelled.exists():
        return "cancelled", ""
    if is_new:
        return "start", ""
    # A failure counts only for the configuration that failed: with other probes or paths the run may start again.
    is_same = load_run_config(record.config) == run.config
    if status.state in ("failed", "diverged") and is_same and not may_retry(record):
        return "failed", f"{status.reason_class}: {status.reason}"
    record.read_attempts()  # raises if it is damaged: now, not after a job was submitted
    return "resume", describe_pending(missing) if status.state == "finished" else status.state


def describe_pending(missing: Sequence[Pending]) -> str:
    """Return a short description of the evaluations that are missing."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"to do: {missing[0]}{more}"
