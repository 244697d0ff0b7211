"""What a launcher does with a run: train it, or (`sweeps.engine.evaluations`) evaluate it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aimscale.sweeps.plan.device_fit import MIN_STOP_S, stop_seconds
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.state.claims import Claim, RunRecord, claim_run
from aimscale.sweeps.state.decision import Decision, decide
from aimscale.sweeps.state.sweep_dir import launch_lock_path


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
