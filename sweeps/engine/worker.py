"""A worker on any machine that sees the sweep's folder: takes the next free run or evaluation until none is left.

It starts what a launch would start, by the same locks and decisions, so that any number of workers and launches, here
and on Slurm, execute each run once between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aimscale.sweeps.engine.devices import default_slots, sharing, visible_gpus
from aimscale.sweeps.engine.evaluations import evaluation_jobs, unevaluated
from aimscale.sweeps.engine.local_queue import Command, LaunchResult, print_events, run_queue, worker_command
from aimscale.sweeps.engine.preflight import check_data
from aimscale.sweeps.engine.start import evaluation_command, planned, startable
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.slurm.commands import Queued
from aimscale.sweeps.state.job_kind import JobKind, training_jobs
from aimscale.sweeps.state.sweep_dir import prepare


@dataclass(frozen=True, kw_only=True)
class Worked:
    """What a worker did."""

    trained: tuple[str, ...]
    """Runs whose training it brought to its end."""
    evaluated: tuple[str, ...]
    """Runs whose evaluation it brought to its end."""
    failed: tuple[str, ...]
    """Runs that failed under it for good."""
    why: str
    """Why it left: `nothing is left`, `time is up` or `stopped`."""


def work(
    sweep: Sweep | str | Path,
    root: Path = Path("aimscale-runs"),
    *,
    hours: float | None = None,
    devices: int | None = None,
    command: Command = worker_command,
    check: Callable[[Sequence[Run]], None] = check_data,
) -> Worked:
    """Train and evaluate what is free until nothing is left, or until everything must be saved to end in time.

    Args:
        sweep: a sweep or its name.
        hours: time until the machine is gone.
        devices: cards (or, without cards, processes) to use; by default all.
        command: the program that executes a run.
        check: looks at the data of the runs that would start.

    Raises:
        SweepError, ConfigError, DataError: as `launch`.
    """
    started = time.time()
    loaded, runs, _ = planned(sweep, root)
    if devices is not None and devices < 1:
        raise SweepError(f"--devices must be 1 or more, not {devices}")
    check(startable(loaded, runs, Queued()))
    prepare(loaded, runs)
    gpus = visible_gpus()[:devices]
    training = training_jobs(loaded)
    until = float("inf")
    if hours is not None:
        # What runs must have saved when the time is up; of a short time, half is for that.
        until = started + 3600 * hours - min(max(map(training.stop_s, runs)), 1800 * hours)

    def execute(kind: JobKind, chosen: Sequence[Run], program: Command) -> LaunchResult:
        return run_queue(
            chosen,
            kind=kind,
            slots=devices or default_slots(runs, gpus),
            gpus=gpus,
            share=sharing(loaded) if gpus else None,
            command=program,
            report=print_events,
            is_queued=Queued(),
            until=until,
        )

    trained: dict[str, None] = {}
    evaluated: dict[str, None] = {}
    failed: dict[str, None] = {}
    why = ""
    while not why:
        training_result = execute(training, runs, command)
        results = [(trained, training_result)]
        if not training_result.interrupted:
            lacking = unevaluated(loaded, runs)
            results.append((evaluated, execute(evaluation_jobs(loaded), lacking, evaluation_command)))
        for done, result in results:
            done |= dict.fromkeys(result.finished)
            failed |= dict.fromkeys(result.failed)
            if result.interrupted:
                why = "stopped" if result.stopped_by else "time is up"
        if not any(result.finished or result.failed for _, result in results):
            why = why or "nothing is left"
    return Worked(trained=tuple(trained), evaluated=tuple(evaluated), failed=tuple(failed), why=why)
