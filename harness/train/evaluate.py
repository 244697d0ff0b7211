"""Evaluate the saved budgets of a run: validation, pictures, probes; knowing only the run's directory.

It follows the training in the same process, when the training states are gone, and needs a budget's weights alone.
What is there is not done again.
"""

from __future__ import annotations

import datetime
import fnmatch
import functools
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimscale.harness.data.store.index import DataError, ShardDataset, open_dataset
from aimscale.harness.data.stream.held_out import refuse_overlap
from aimscale.harness.device.distributed import Group
from aimscale.harness.device.job import Job
from aimscale.harness.probe.files import validation_name
from aimscale.harness.probe.run import load_budget, probe_run
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.trunk import saved_budgets
from aimscale.harness.train.validation import ValidationLosses, completions, validate


def evaluate_run(run: RunDir, config: RunConfig, group: Group, job: Job) -> None:
    """Measure what a configuration of the run asks for and its budgets lack; all ranks call this together.

    Args:
        config: of the run, with what is to be measured now.
        group: the ranks, which share the images.
        job: whose `status.json` tells how far it is, and which may be asked to stop wherever work is saved.

    Raises:
        UserError: data that cannot be used.
        PreemptedError: a signal asked to stop.
    """
    pause = job.pausing(group)
    for budget in group.from_first(lambda: [each for each in saved_budgets(run) if each in config.evaluation.budgets]):
        pause()
        job.tell(durable=False, phase=f"validate at {budget:,}", heartbeat=time.time())
        record_row(run, group, budget)
        if not group.from_first(functools.partial(is_validated, run, config, budget)):
            _validate(run, config, group, budget)
        job.tell(durable=False, phase=f"probe at {budget:,}", heartbeat=time.time())
        tasks = config.evaluation.probes
        for _, entries in probe_run(run.path, budget, tasks, group=group, pause=pause) if tasks else ():
            for entry in entries if group.is_first else ():
                print(f"{budget} {entry['task']} {entry['kind']} top-1 {100 * entry['top1']:.1f} %", flush=True)


def record_row(run: RunDir, group: Group, budget: int) -> None:
    """Make sure that a saved budget has its row, with what training saved with the weights.

    All ranks call this together.
    """
    if group.is_first:
        known = saved_budgets(run)[budget].get("row") or {"images_seen": budget}
        run.update_row(budget, lambda row: known | {"finished_at": _now()} if row is None else None)
    group.wait()


def is_validated(run: RunDir, config: RunConfig, budget: int) -> bool:
    """Whether the losses that are asked for, and their pictures, are there; the budget's row is brought up to them.

    Losses on other images or with other settings are measured again, and replaced.
    """
    current, name = run.validation_file(budget), validation_name(run, config, budget)
    row = next((row for row in run.read_rows() if row["images_seen"] == budget), {})
    if current.exists() and row.get("val_loss") is not None and fnmatch.fnmatch(row.get("validation", ""), name):
        return True
    measured = measured_by(current)
    if measured is None or not fnmatch.fnmatch(measured, name):
        return False
    _enter(run, budget)
    return True


def measured_by(path: Path) -> str | None:
    """The name of what a validation file holds (`probe.files.validation_name`); None where there is no such file."""
    try:
        with np.load(path) as arrays:
            return str(arrays["name"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _validate(run: RunDir, config: RunConfig, group: Group, budget: int) -> None:
    training, section, runtime = config.training, config.evaluation.validation, config.runtime
    dataset = open_dataset(section.path, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb)
    _refuse_overlap(config, dataset)
    model = load_budget(run, config, budget, group.device)
    if training.optimiser.precision == "bf16":
        model.to(torch.bfloat16)  # as it trained
    losses = validate(model, dataset, section, training.model, group)
    if group.is_first:
        pictures = completions(model, dataset, section, training.model, group.device)
        losses.save(run.validation_file(budget), validation_name(run, config, budget), pictures)
        _enter(run, budget)
        print(f"budget {budget}: validation loss {losses.loss:.4f} +- {losses.standard_error:.4f}", flush=True)
    group.wait()


def _refuse_overlap(config: RunConfig, held_out: ShardDataset) -> None:
    """Refuse validation images among the training images, where those are still available."""
    try:
        pools = [open_dataset(source.path) for source in config.training.data.sources]
    except DataError as error:
        print(f"validation images were not compared with training images: {error}", flush=True)
        return
    refuse_overlap(pools, held_out)


def _enter(run: RunDir, budget: int) -> None:
    """Bring a budget's row up to its validation file."""
    path = run.validation_file(budget)
    losses = ValidationLosses.load(path)
    columns: dict[str, Any] = {
        "val_loss": losses.loss,
        "val_loss_se": losses.standard_error,
        "val_num_images": len(losses.index),
        "validation": measured_by(path),
        "finished_at": _now(),
    }
    run.update_row(budget, lambda row: None if row is None else row | columns)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
