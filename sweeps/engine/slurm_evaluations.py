"""Evaluation jobs on Slurm: at once for budgets that are there, and behind the training of runs just submitted."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from aimscale.sweeps.engine.evaluations import evaluation_jobs, unevaluated
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm.lanes import afterany
from aimscale.sweeps.slurm.submit import SlurmLaunch, launch_slurm


def evaluation_arrays(
    sweep: Sweep, runs: Sequence[Run], trained: SlurmLaunch, *, allow_dirty: bool, dry_run: bool
) -> Iterator[SlurmLaunch]:
    """Submit what evaluates the runs of a launch; runs that evaluate themselves only where training is over.

    Args:
        trained: what was submitted to train.
    """
    submit = functools.partial(launch_slurm, sweep, allow_dirty=allow_dirty, dry_run=dry_run)
    by_id = {run.run_id: run for run in runs}
    started = {run_id for part in trained.submitted for run_id in part.run_ids}
    if lacking := unevaluated(sweep, [run for run in runs if run.run_id not in started]):
        yield submit(lacking, kind=evaluation_jobs(sweep))
    last: dict[int, list[str]] = {}  # of each lane, what runs at its end
    for part in trained.submitted:
        last[part.turn.lane] = [part.job_id or "TRAINING_JOB"]
    for part in trained.submitted:
        members = [by_id[run_id] for run_id in part.run_ids if by_id[run_id].config.runtime.evaluate == "jobs"]
        if not members:
            continue
        # Element by element where there is one per run and all of them may run at once, else when all before it ended.
        is_alone = sum(other.turn.lane == part.turn.lane for other in trained.submitted) == 1
        by_element = is_alone and part.turn.limit >= part.num_jobs == len(part.run_ids) > 1
        after = [f"aftercorr:{part.job_id or 'TRAINING_JOB'}"] if by_element else afterany(last[part.turn.lane])
        kind = evaluation_jobs(sweep, expected=part.run_ids)
        submitted = submit(members, kind=kind, after=after, most=part.turn.limit)
        last[part.turn.lane] = [each.job_id or "EVALUATION_JOB" for each in submitted.submitted]
        yield submitted
