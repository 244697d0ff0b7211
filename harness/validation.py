"""The pre-training loss on held-out images: of a budget, and at points of the trunk during training.

Every run of a sweep sees the same images with the same prefixes, and per-image losses are kept, so that two models can
be compared image by image: the published losses of 0.6B to 7B differ by 0.013 in all.

A point during training is measured on a copy of the weights, on the images and by the code of budgets, and written
once, as a line of `curve.jsonl`; a run resumed from an earlier checkpoint finds the line there. No row follows from it,
and a missing one is never made up for: its weights are gone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimscale.aim.model import AIM, DTYPES
from aimscale.harness.data.images import normalise
from aimscale.harness.data.store.dataset_info import find_info, require_images
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.stream.held_out import EvalImages, decoded_ahead, validation_prefixes
from aimscale.harness.device.memory import EVAL_TOKENS
from aimscale.harness.distributed.group import Group
from aimscale.harness.distributed.job import Job, ProgressCallback, ignore_progress
from aimscale.harness.log.loggers import Logger, expected_scalars, row_scalars
from aimscale.harness.results import VALIDATION_COLUMNS, validation_settings
from aimscale.harness.run.config import ModelSection, RunConfig, ValidationSection
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.expected import read_expected
from aimscale.harness.run.failures import DivergedError
from aimscale.harness.run.files import append_line, atomic_write, sealed
from aimscale.harness.run.schedule import validation_distance
from aimscale.harness.run.section import is_measurement
from aimscale.harness.run.timeouts import COLLECTIVE_TIMEOUT_S
from aimscale.harness.step.checkpoint import copied_model
from aimscale.harness.step.engine import Engine

_log = logging.getLogger(__name__)


class HeldOut:
    """Validation images for one model geometry, shared by ranks; threads decode them ahead of the model."""

    def __init__(
        self,
        dataset: ShardDataset,
        section: ValidationSection,
        model_section: ModelSection,
        group: Group,
        *,
        max_bad_fraction: float,
    ) -> None:
        require_images(dataset.path, dataset.info, section.num_images, max_bad_fraction)
        self.section, self.dataset, self._group = section, dataset, group
        self._images = EvalImages(
            dataset, model_section, centre_crop=section.centre_crop, max_bad_fraction=max_bad_fraction
        )
        self.indices = dataset.usable(None if section.num_images is None else np.arange(section.num_images))
        """Sample numbers, int64 (images,)."""
        self._own = np.arange(len(self.indices))[group.rank :: group.world_size]

    def passes(self, num_images: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield rows of `indices` and their normalised images, at most so many, on the device of the rank that they are
        shared to; without those that do not decode, and none where other ranks have more.

        Raises:
            DataError: on all ranks, after the last pass, if too many images do not decode.
        """
        most = -(-len(self.indices) // self._group.world_size)
        parts = [self._own[first : first + num_images] for first in range(0, most, num_images)]
        for rows, pixels in decoded_ahead(lambda rows: self._images.pixels(self.indices[rows]), parts):
            is_good = self._images.is_good(self.indices[rows])
            good, device = pixels[torch.from_numpy(is_good)], self._group.device
            good = good.pin_memory() if device.type == "cuda" else good
            yield rows[is_good], normalise(good.to(device, non_blocking=True))
        self._images.agree(self._group, self.indices)


def open_held_out(config: RunConfig, group: Group) -> HeldOut:
    """Open the validation images."""
    runtime, section = config.runtime, config.evaluation.validation
    dataset = open_dataset(section.path, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb)
    max_bad_fraction = config.training.data.max_bad_fraction
    return HeldOut(dataset, section, config.training.model, group, max_bad_fraction=max_bad_fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationLosses:
    """Losses by image; one row per image that decodes, in the folder's order."""

    index: np.ndarray
    """Sample number in the validation folder, int64."""
    loss_sum: np.ndarray
    """Sum over scored targets of their mean squared errors, float64."""
    num_targets: np.ndarray
    """Number of scored targets, float64."""

    @property
    def loss(self) -> float:
        """Mean over all scored targets."""
        return float(self.loss_sum.sum() / self.num_targets.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of `loss` as a ratio of two sums over images (delta method); images are the sampling unit."""
        residual = self.loss_sum - self.loss * self.num_targets
        num_images = len(residual)
        if num_images < 2:
            return float("inf")
        return float(np.sqrt((residual**2).sum() / (num_images - 1) / num_images) / self.num_targets.mean())

    @property
    def columns(self) -> dict[str, float]:
        """Columns of a row."""
        return dict(zip(VALIDATION_COLUMNS, (self.loss, self.standard_error, len(self.index)), strict=True))

    def save(self, path: Path, name: str = "") -> None:
        """Write the losses atomically to an npz file, with their `name` and a row's columns."""
        arrays: dict[str, Any] = {"name": name, **self.columns, **dataclasses.asdict(self)}
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)


@torch.no_grad()
def validate(
    model: AIM, held_out: HeldOut, group: Group, report_progress: ProgressCallback = ignore_progress
) -> ValidationLosses:
    """Compute per-image losses; ranks share the images, call `report_progress` together, and return all of them."""
    num_tokens, num_prefixes = model.config.num_tokens, held_out.section.num_prefixes
    prefix_lengths = validation_prefixes(len(held_out.indices), num_prefixes, model.config)
    # Losses and counts of each pass by image and prefix.
    passes, row_parts = (
        [torch.zeros(2, 0, num_prefixes, dtype=torch.float64, device=group.device)],
        [np.empty(0, dtype=int)],
    )
    for rows, images in held_out.passes(max(1, EVAL_TOKENS // (num_tokens * num_prefixes))):
        report_progress("validation")
        if len(rows):
            repeated = images.repeat_interleave(num_prefixes, dim=0)
            per_patch = torch.stack(model.per_patch_loss(repeated, prefix_lengths[rows].flatten(0, 1)))
            row_parts.append(rows)
            passes.append(per_patch.sum(2).double().view(2, len(rows), num_prefixes))
    mine = (np.concatenate(row_parts), *torch.cat(passes, dim=1).cpu().numpy())
    rows, losses, targets = (np.concatenate(part) for part in zip(*group.all_gather_object(mine), strict=True))
    order = np.argsort(rows)
    rows = rows[order]
    return ValidationLosses(
        index=held_out.indices[rows], loss_sum=losses[order].sum(1), num_targets=targets[order].sum(1)
    )


class LearningCurve:
    """Measurements of a run during its training; all ranks call it together."""

    def __init__(
        self, run: RunDir, config: RunConfig, job: Job, engine: Engine, loggers: Sequence[Logger] = ()
    ) -> None:
        """Find out at which positions to measure; `loggers` are the first rank's."""
        self._run, self._config, self._job = run, config, job
        self._engine, self._loggers = engine, loggers
        self.distance = job.group.broadcast_from_rank0(lambda: validation_distance(config, find_info))
        """Images between measurements; None for none."""
        self._held_out: HeldOut | None = None

    def measure(self, images_seen: int, lr: float) -> None:
        """Measure the loss, if it is not yet in `curve.jsonl`, and append the line.

        Args:
            lr: learning rate of the previous step.

        Raises:
            UserError: data that cannot be used.
            DivergedError: the loss is not finite.
            PreemptedError: a signal asked to stop; nothing was written.
        """
        started, group = time.monotonic(), self._job.group
        if not group.broadcast_from_rank0(lambda: self._is_missing(images_seen)):
            return
        self._job.update_status(durable=False, phase=f"measure at {images_seen:,}", heartbeat=time.time())
        line = {"images_seen": images_seen, "lr": lr} | self._loss(images_seen)
        if group.device.type == "cuda":
            torch.cuda.empty_cache()  # training needs this memory again
        if group.is_first:
            self._record(line | {"validation": self._settings, "measured_s": time.monotonic() - started})
        group.barrier()
        group.limit_collectives(COLLECTIVE_TIMEOUT_S)

    def _record(self, line: dict[str, Any]) -> None:
        """Append a line, and tell the loggers."""
        images_seen = line["images_seen"]
        append_line(self._run.curve, sealed(line))
        scalars = row_scalars(line, during=True)
        if expected := read_expected(self._run):
            scalars |= expected_scalars(expected.points, images_seen, "train/val_loss")
        for logger in self._loggers:
            logger.log_values(images_seen, scalars)
        _log.info("%10d images  validation loss %.4f", images_seen, line["val_loss"])

    @property
    def _settings(self) -> str:
        """Name of the settings and images of the validation."""
        return validation_settings(self._config.evaluation.validation)

    def _is_missing(self, images_seen: int) -> bool:
        """Return whether no line at this position holds the loss by the present settings."""
        settings_at = {point["images_seen"]: point.get("validation") for point in self._run.read_curve()}
        return not is_measurement(settings_at.get(images_seen), self._settings)

    def _loss(self, images_seen: int) -> dict[str, float | None]:
        """Measure the validation columns of a row."""
        config, group = self._config, self._job.group
        self._held_out = self._held_out or open_held_out(config, group)
        model = copied_model(self._engine, group, DTYPES[config.training.optimiser.precision])
        losses = validate(model, self._held_out, group, self._job.progress_callback())
        if not math.isfinite(losses.loss):
            raise DivergedError(f"the validation loss at image {images_seen} is {losses.loss}; the weights diverged")
        return {column: value if math.isfinite(value) else None for column, value in losses.columns.items()}
