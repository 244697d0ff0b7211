"""Evaluation jobs on Slurm: at once for budgets that are there, and behind the training of runs just submitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aimscale.sweeps.launch.evaluations import evaluation_jobs, unevaluated
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm.submit import SlurmLaunch, launch_slurm


def evaluation_arrays(
    sweep: Sweep, runs: Sequence[Run], trained: SlurmLaunch, *, allow_dirty: bool, dry_run: bool
) -> Iterator[SlurmLaunch]:
    """Submit what evaluates the runs of a launch; runs that evaluate themselves only where training is over.

    Args:
        sweep: with the resources to ask for.
        runs: all runs of the launch.
        trained: what was submitted to train.
        allow_dirty: submit uncommitted code.
        dry_run: only say what would be submitted.
    """
    by_id = {run.run_id: run for run in runs}
    started = {run_id for part in trained.submitted for run_id in part.run_ids}
    if lacking := unevaluated(sweep, [run for run in runs if run.run_id not in started]):
        kind = evaluation_jobs(sweep)
        yield launch_slurm(sweep, lacking, allow_dirty=allow_dirty, dry_run=dry_run, kind=kind)
    for part in trained.submitted:
        members = [by_id[run_id] for run_id in part.run_ids if by_id[run_id].config.runtime.evaluate == "jobs"]
        if members:
            kind = evaluation_jobs(sweep, expected=part.run_ids)
            # element by element of an array where there is one per run; else when all of it has ended
            word = "aftercorr" if part.num_jobs == len(part.run_ids) > 1 else "afterany"
            after = f"{word}:{part.job_id or 'TRAINING_JOB'}"
            yield launch_slurm(sweep, members, allow_dirty=allow_dirty, dry_run=dry_run, kind=kind, after=after)
