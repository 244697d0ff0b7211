"""Evaluation of a run's saved budgets: validation and probes, knowing only the run's directory.

It follows the training in the same process, after the training state is freed, and needs only a budget's weights.
Existing results are kept.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence

import torch

from aimscale.harness.data.store.index import DataError, ShardDataset, open_dataset
from aimscale.harness.data.store.overlap import refuse_overlap
from aimscale.harness.distributed.group import Group
from aimscale.harness.distributed.job import Job
from aimscale.harness.log.expected import read_expected
from aimscale.harness.log.loggers import Logger, expected_scalars, row_scalars
from aimscale.harness.probe.features.images import ProgressCallback
from aimscale.harness.probe.files import validation_name
from aimscale.harness.probe.pending_evaluations import Pending, pending_evaluations, pending_work, update_row
from aimscale.harness.probe.run import load_budget, probe_run
from aimscale.harness.run.budgets import saved_budgets
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import DivergedError
from aimscale.harness.train.validation import HeldOut, validate

_log = logging.getLogger(__name__)


def evaluate_run(
    run: RunDir, config: RunConfig, job: Job, loggers: Sequence[Logger] = (), *, with_probes: bool = True
) -> None:
    """Measure what a configuration asks for and a run's budgets lack; all ranks call this together.

    Args:
        config: the run's, with the measurements that are wanted now.
        loggers: the first rank's; from the first new measurement on, each budget is logged as a whole.
        with_probes: whether probes are measured now, and not by a later attempt on fewer devices.

    Raises:
        DivergedError: the loss of a budget is not finite.
        PreemptedError: a signal asked to stop.
    """
    group, report_progress = job.group, job.progress_callback()
    held_out: HeldOut | None = None
    is_new = False
    budgets = group.from_first(lambda: [each for each in saved_budgets(run) if each in config.evaluation.budgets])
    for budget in budgets:
        report_progress()
        owed = group.from_first(functools.partial(_entered, run, config, budget))
        if any(each.what == "validation" for each in owed):
            job.update_status(durable=False, phase=f"validate at {budget:,}", heartbeat=time.time())
            if held_out is None:
                held_out = open_held_out(config, group)
                group.from_first(functools.partial(_compare, config, held_out.dataset))
            _validate(run, config, group, budget, held_out, report_progress)
        if tasks := [each.section for each in owed if each.section and with_probes]:
            job.update_status(durable=False, phase=f"probe at {budget:,}", heartbeat=time.time())
            for _, entries in probe_run(run.path, budget, tasks, group=group, report_progress=report_progress):
                for entry in entries if group.is_first else ():
                    top1 = f"{100 * entry['top1']:.1f} %"
                    _log.info("budget %d: %s, %s top-1 %s", budget, entry["task"], entry["kind"], top1)
        is_new = is_new or bool(owed)
        if is_new and loggers:
            row = update_row(run, config, budget)
            scalars = row_scalars(row)
            if expected := read_expected(run):
                scalars |= expected_scalars(expected.budgets, budget, "val/loss")
            for logger in loggers:
                logger.log_values(budget, scalars)
    group.from_first(lambda: pending_work(run, config))  # notes that nothing is


def _entered(run: RunDir, config: RunConfig, budget: int) -> list[Pending]:
    """Update a budget's row from its files, and return its pending evaluations."""
    return list(pending_evaluations(run, config, budget, update_row(run, config, budget)))


def open_held_out(config: RunConfig, group: Group) -> HeldOut:
    """Open the validation images."""
    runtime, section = config.runtime, config.evaluation.validation
    dataset = open_dataset(section.path, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb)
    max_bad_fraction = config.training.data.max_bad_fraction
    return HeldOut(dataset, section, config.training.model, group, max_bad_fraction=max_bad_fraction)


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
    if config.training.optimiser.precision == "bf16":
        model.to(torch.bfloat16)  # as in training
    losses = validate(model, held_out, group, report_progress)
    if not math.isfinite(losses.loss):
        raise DivergedError(f"the validation loss at {budget} images is {losses.loss}; its weights diverged")

    def keep() -> None:
        losses.save(run.validation_file(budget), validation_name(run, config, budget))
        update_row(run, config, budget)
        _log.info("budget %d: validation loss %.4f +- %.4f", budget, losses.loss, losses.standard_error)

    group.from_first(keep)
