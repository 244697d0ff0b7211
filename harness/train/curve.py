"""Validation losses during training: on the trunk, on the images and by the code of budgets.

Each is made on a copy of the weights and written once, as a line of `curve.jsonl`; a run resumed from an earlier
checkpoint finds the line there. No row follows from it, and a missing one is never made up for: its weights are gone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from aimscale.aim.model import DTYPES
from aimscale.harness.data.store.dataset_info import find_info
from aimscale.harness.distributed.job import Job
from aimscale.harness.log.loggers import Logger, expected_scalars, row_scalars
from aimscale.harness.results.files import validation_settings
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.expected import read_expected
from aimscale.harness.run.failures import DivergedError
from aimscale.harness.run.files import append_line, sealed
from aimscale.harness.run.schedule import unchecked_schedule, validation_distance
from aimscale.harness.run.section import is_measurement
from aimscale.harness.run.timeouts import COLLECTIVE_TIMEOUT_S
from aimscale.harness.step.checkpoint import copied_model
from aimscale.harness.step.engine import Engine
from aimscale.harness.validation.losses import HeldOut, open_held_out, validate

_log = logging.getLogger(__name__)


class LearningCurve:
    """Measurements of a run during its training; all ranks call it together."""

    def __init__(
        self, run: RunDir, config: RunConfig, job: Job, engine: Engine, loggers: Sequence[Logger] = ()
    ) -> None:
        """Find out at which positions to measure; `loggers` are the first rank's."""
        self._run, self._config, self._job, self._schedule = run, config, job, unchecked_schedule(config)
        self._engine, self._loggers = engine, loggers
        self._distance = job.group.broadcast_from_rank0(lambda: validation_distance(config, find_info))
        self._held_out: HeldOut | None = None

    def is_at(self, images_seen: int) -> bool:
        """Return whether a measurement may be due at a position of the trunk."""
        return self._schedule.is_point(images_seen, self._distance)

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
