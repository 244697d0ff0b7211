"""Evaluation of a run's saved budgets: validation and probes, knowing only the run's directory.

A program of its own, `python -m aimscale.harness.evaluate RUN_DIR...`, which needs only a budget's weights: it may work
while the training goes on, on devices of its own. Several runs share one start. Existing results are kept.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from aimscale.aim.model import DTYPES
from aimscale.harness.data.store.index import DataError, ShardDataset, open_dataset
from aimscale.harness.data.stream.order import refuse_overlap
from aimscale.harness.distributed.group import Group
from aimscale.harness.distributed.job import Job, ProgressCallback, Ranks, execute_with, join_ranks
from aimscale.harness.log.loggers import Logger, expected_scalars, open_loggers, row_scalars
from aimscale.harness.probe.run import load_budget, probe_run
from aimscale.harness.results import Pending, pending_evaluations, pending_work, update_row, validation_name
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.expected import read_expected
from aimscale.harness.run.failures import DivergedError, memory_advice, work_in_turn
from aimscale.harness.run.schedule import saved_budgets
from aimscale.harness.validation import HeldOut, open_held_out, validate

_log = logging.getLogger(__name__)


def evaluate(paths: Sequence[Path]) -> int:
    """Evaluate the saved budgets of the runs in `paths`, and return the exit code (`work_in_turn`).

    What is saved while this goes on, by a training that goes on, is left to a later call. The loss of a rank ends it.

    Raises:
        UserError: the configuration or the data of the only run, or of one on several ranks, cannot be used.
        LockHeld: another process evaluates this run.
    """
    runs = [RunDir(path).evaluation for path in paths]
    with join_ranks(runs[0].logs, runs[0].load_config().runtime.device) as ranks:
        return work_in_turn(runs, lambda run: _evaluate_one(run, ranks), raises=ranks.group.world_size > 1)


def _evaluate_one(run: RunDir, ranks: Ranks) -> int:
    """Evaluate the saved budgets of a run, and return the exit code."""
    config = run.load_config()

    def work(job: Job) -> None:
        torch.set_num_threads(config.runtime.num_threads)
        loggers: list[Logger] = []
        job.group.broadcast_from_rank0(lambda: loggers.extend(job.exits.enter_context(open_loggers(run, config))))
        with memory_advice():
            evaluate_run(run, config, job, loggers)

    return execute_with(ranks, run, work)


def evaluate_run(run: RunDir, config: RunConfig, job: Job, loggers: Sequence[Logger] = ()) -> None:
    """Measure what a configuration asks for and a run's saved budgets lack; all ranks call this together.

    Args:
        config: the run's, with the measurements that are wanted now.
        loggers: the first rank's; each budget is logged as a whole.

    Raises:
        DivergedError: the loss of a budget is not finite.
        PreemptedError: a signal asked to stop.
    """
    group, report_progress = job.group, job.progress_callback()
    held_out: HeldOut | None = None
    budgets = group.broadcast_from_rank0(
        lambda: [each for each in saved_budgets(run) if each in config.evaluation.budgets]
    )
    for budget in budgets:
        report_progress()
        owed = group.broadcast_from_rank0(functools.partial(_entered, run, config, budget))
        if any(each.what == "validation" for each in owed):
            job.update_status(durable=False, phase=f"validate at {budget:,}", heartbeat=time.time())
            if held_out is None:
                held_out = open_held_out(config, group)
                group.broadcast_from_rank0(functools.partial(_compare, config, held_out.dataset))
            _validate(run, config, group, budget, held_out, report_progress)
        if tasks := [each.section for each in owed if each.section]:
            job.update_status(durable=False, phase=f"probe at {budget:,}", heartbeat=time.time())
            for _, entries in probe_run(run.root, budget, tasks, group=group, report_progress=report_progress):
                for entry in entries if group.is_first else ():
                    top1 = f"{100 * entry['top1']:.1f} %"
                    _log.info("budget %d: %s, %s top-1 %s", budget, entry["task"], entry["kind"], top1)
        if loggers:
            row = update_row(run, config, budget)
            scalars = row_scalars(row)
            if expected := read_expected(run):
                scalars |= expected_scalars(expected.budgets, budget, "val/loss")
            for logger in loggers:
                logger.log_values(budget, scalars)
    group.broadcast_from_rank0(lambda: pending_work(run, config))  # notes that nothing is


def _entered(run: RunDir, config: RunConfig, budget: int) -> list[Pending]:
    """Update a budget's row from its files, and return its pending evaluations."""
    return list(pending_evaluations(run, config, budget, update_row(run, config, budget)))


def _compare(config: RunConfig, held_out: ShardDataset) -> None:
    """Refuse validation images that are among the training images, if those are available."""
    runtime, sources = config.runtime, config.training.data.sources
    try:
        pools = [open_dataset(each.path, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb) for each in sources]
    except DataError as error:
        _log.warning("validation images were not compared with training images: %s", error)
    else:
        refuse_overlap(pools, held_out)


def _validate(
    run: RunDir, config: RunConfig, group: Group, budget: int, held_out: HeldOut, report_progress: ProgressCallback
) -> None:
    """Measure and save the validation loss of a budget."""
    model = load_budget(run, config, budget, group.device)
    model.to(DTYPES[config.training.optimiser.precision])  # as in training
    losses = validate(model, held_out, group, report_progress)
    if not math.isfinite(losses.loss):
        raise DivergedError(f"the validation loss at {budget} images is {losses.loss}; its weights diverged")

    def keep() -> None:
        losses.save(run.validation_file(budget), validation_name(run, config, budget))
        update_row(run, config, budget)
        _log.info("budget %d: validation loss %.4f +- %.4f", budget, losses.loss, losses.standard_error)

    group.broadcast_from_rank0(keep)
