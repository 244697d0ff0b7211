"""Evaluation jobs: validation and probes that a run's configuration asks for and its saved budgets lack.

A job works on one run and knows its directory alone (`harness.train.attempt`); its configuration, claim, status,
attempts and logs lie in `RUN/evaluating/`, beside those of training. Nothing of it trains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from aimscale.aim.errors import UserError
from aimscale.harness.run.config import ConfigError, load_run_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import write_text
from aimscale.harness.run.trunk import saved_budgets
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm.commands import afterany
from aimscale.sweeps.state.claims import EVALUATING, Claim, RunRecord
from aimscale.sweeps.state.decision import Decision, JobKind, Verdict, decide, decision, standing
from aimscale.sweeps.state.retries import forgive
from aimscale.sweeps.state.sweep_dir import launch_lock_path

if TYPE_CHECKING:
    from aimscale.sweeps.slurm.submit import SlurmLaunch, Submission

WORKER = ("-m", "aimscale.harness.train")

Place = Literal["inline", "jobs"]


def with_place(runs: Sequence[Run], place: Place | None) -> list[Run]:
    """The runs, evaluated there; None leaves what their configuration says."""
    if place is None:
        return list(runs)
    runtimes = [run.config.runtime.model_copy(update={"evaluate": place}) for run in runs]
    return [
        replace(run, config=run.config.model_copy(update={"runtime": runtime}))
        for run, runtime in zip(runs, runtimes, strict=True)
    ]


def unevaluated(sweep: Sweep, runs: Sequence[Run]) -> list[Run]:
    """Runs with a saved budget that lacks something, or that is damaged, which the decision on it then says."""

    def lacks(run: Run) -> bool:
        try:
            return bool(_missing(sweep, run))
        except UserError:
            return True

    return [run for run in runs if lacks(run)]


def _missing(sweep: Sweep, run: Run) -> list[str]:
    directory = RunDir(sweep.run_dir(run.run_id))
    if not saved_budgets(directory):
        return []
    from aimscale.harness.train.evaluate import missing_evaluations  # imports torch

    return missing_evaluations(directory, run.config)


def evaluation_jobs(sweep: Sweep, expected: Collection[str] = ()) -> JobKind:
    """Evaluate the runs of a sweep; `expected` are ids of runs whose budgets will be there when the job starts."""

    def decide_on(run: Run, record: RunRecord, is_queued: Callable[[Claim], bool]) -> Decision:
        def verdict() -> tuple[Verdict, str]:
            trained = RunRecord(sweep.run_dir(run.run_id))
            missing = _missing(sweep, run)
            if not missing and run.run_id not in expected:
                return "finished", ""
            training = decide(run, trained, is_queued)
            if run.config.runtime.evaluate == "inline" and training.verdict in ("running", "queued"):
                return training.verdict, "the run evaluates itself"
            is_other = not _same_evaluation(record, run)
            found = standing(record, record.checked_status(), is_queued, forgive_failure=is_other)
            return found or ("start", ", ".join(missing))

        return decision(run, record, verdict)

    return JobKind(
        name=f"aimscale-{sweep.name}-evaluation",
        lock=launch_lock_path(sweep),
        record=lambda run: RunRecord(sweep.run_dir(run.run_id) / EVALUATING),
        decide=decide_on,
        claim=_claim,
        worker=WORKER,
    )


def _same_evaluation(record: RunRecord, run: Run) -> bool:
    """Whether the job's last attempt was asked for the same."""
    try:
        return load_run_config(record.config).evaluation == run.config.evaluation
    except ConfigError:
        return False


def _claim(record: RunRecord, run: Run, claim: Claim) -> None:
    if record.path.exists() and not _same_evaluation(record, run):
        forgive(record)  # another question starts with a clean slate
    write_text(record.config, run.config.to_yaml())
    record.write_status(state="queued", reason=None, reason_class=None)
    record.write_claim(claim)


def evaluation_arrays(
    sweep: Sweep, runs: Sequence[Run], trained: SlurmLaunch, *, allow_dirty: bool, dry_run: bool
) -> Iterator[SlurmLaunch]:
    """Submit what evaluates the runs of a launch on Slurm; runs that evaluate themselves only where training is over.

    At once for budgets that are there, and behind the training of runs just submitted.

    Args:
        trained: what was submitted to train.
    """
    from aimscale.sweeps.slurm.submit import launch_slurm  # submitit is slow to import

    submit = functools.partial(launch_slurm, sweep, allow_dirty=allow_dirty, dry_run=dry_run)
    if lacking := unevaluated(sweep, [run for run in runs if run.run_id not in trained.started]):
        yield submit(lacking, kind=evaluation_jobs(sweep))
    last = {part.turn.lane: [part.job_id or "TRAINING_JOB"] for part in trained.submitted}  # at the end of each lane
    for part in trained.submitted:
        members = [run for run in runs if run.run_id in part.run_ids and run.config.runtime.evaluate == "jobs"]
        if members:
            after = _behind(part, trained.submitted) or afterany(last[part.turn.lane])
            kind = evaluation_jobs(sweep, expected=part.run_ids)
            submitted = submit(members, kind=kind, after=after, most=part.turn.limit)
            last[part.turn.lane] = [each.job_id or "EVALUATION_JOB" for each in submitted.submitted]
            yield submitted


def _behind(part: Submission, arrays: Sequence[Submission]) -> list[str]:
    """Slurm's words for waiting element by element, where there is one per run and all of them may run at once."""
    is_alone = sum(other.turn.lane == part.turn.lane for other in arrays) == 1
    by_element = is_alone and part.turn.limit >= part.num_jobs == len(part.run_ids) > 1
    return [f"aftercorr:{part.job_id or 'TRAINING_JOB'}"] if by_element else []
