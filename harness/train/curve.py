"""Measurements during training: validation loss and cheap probes on the trunk, on the images and by the code of
budgets.

Each is made on a copy of the weights and written once, as a line of `curve.jsonl`; a run resumed from an earlier
checkpoint finds the line there. No row follows from it, and a missing one is never made up for: its weights are gone.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from aimscale.harness.data.store.dataset_info import find_info, fingerprint
from aimscale.harness.distributed.group import COLLECTIVE_TIMEOUT_S
from aimscale.harness.distributed.job import Job
from aimscale.harness.log.expected import Deviation, Expected, read_expected
from aimscale.harness.log.loggers import Logger, expected_scalars, row_scalars
from aimscale.harness.log.record import append_line
from aimscale.harness.probe.cost import validation_distance
from aimscale.harness.probe.features.backbones import DTYPES, AimBackbone
from aimscale.harness.probe.files import validation_settings
from aimscale.harness.probe.protocol import probe_backbone
from aimscale.harness.run.config import ProbeSection, RunConfig
from aimscale.harness.run.directory import RunDir, probe_key
from aimscale.harness.run.failures import DivergedError, OffTrackError
from aimscale.harness.run.files import remove_dir
from aimscale.harness.run.identity import is_measurement
from aimscale.harness.run.schedule import unchecked_schedule
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.whole_weights import copied_model
from aimscale.harness.train.evaluate import open_held_out
from aimscale.harness.train.validation import HeldOut, validate

_log = logging.getLogger(__name__)


class LearningCurve:
    """Measurements of a run during its training; all ranks call it together."""

    def __init__(
        self, run: RunDir, config: RunConfig, job: Job, engine: Engine, loggers: Sequence[Logger] = ()
    ) -> None:
        """Find out at which positions to measure; `loggers` are the first rank's."""
        self._run, self._config, self._job, self._schedule = run, config, job, unchecked_schedule(config)
        self._engine, self._loggers = engine, loggers
        self._distance = job.group.from_first(lambda: validation_distance(config, find_info))
        self._probes = [section for each in config.evaluation.probes if (section := each.during_training)]
        self._held_out: HeldOut | None = None
        self._folder = run.path / "probes" / "during"  # of the probes under way

    def is_at(self, images_seen: int) -> bool:
        """Return whether a measurement may be due at a position of the trunk."""
        distances = [self._distance, *(section.every_images for section in self._probes)]
        return any(self._schedule.is_point(images_seen, every) for every in distances)

    def measure(self, images_seen: int, lr: float) -> None:
        """Measure what is due here and not yet in `curve.jsonl`, and append the line.

        Args:
            lr: learning rate of the previous step.

        Raises:
            UserError: data that cannot be used.
            DivergedError: the loss is not finite.
            OffTrackError: the run is so far above its forecast that it is to end; the line is written.
            PreemptedError: a signal asked to stop; nothing was written, and kinds of probe that were done are kept.
        """
        started, group, why = time.monotonic(), self._job.group, None
        validation, probes = group.from_first(lambda: self._lacking(images_seen))
        if not validation and not probes:
            return
        self._job.update_status(durable=False, phase=f"measure at {images_seen:,}", heartbeat=time.time())
        line: dict[str, Any] = {"images_seen": images_seen, "lr": lr}
        if validation:
            line |= {"validation": validation} | self._loss(images_seen)
        line["probes"] = [entry for each in DTYPES for entry in self._entries(images_seen, each, probes)]
        if group.device.type == "cuda":
            torch.cuda.empty_cache()  # training needs this memory again
        if group.is_first:
            why = self._record(line | {"measured_s": time.monotonic() - started})
            remove_dir(self._folder)
        why = group.from_first(lambda: why)
        group.limit_collectives(COLLECTIVE_TIMEOUT_S)
        if why:
            raise OffTrackError(why)

    def _record(self, line: dict[str, Any]) -> str | None:
        """Append a line, tell the loggers, and return why the run is to end, if it is."""
        images_seen, validation, why = line["images_seen"], line.get("validation"), None
        append_line(self._run.curve, line)
        scalars = row_scalars(line, during=True)
        if validation and (expected := read_expected(self._run)):
            scalars |= expected_scalars(expected.points, images_seen, "train/val_loss")
            if deviation := self._deviation(expected, validation):
                scalars["train/val_loss_deviation"] = deviation.sd
                why = expected.reason_to_stop(deviation)
        for logger in self._loggers:
            logger.log_values(images_seen, scalars)
        said = [f"validation loss {line['val_loss']:.4f}"] if validation else []
        said += [f"{entry['task']} {entry['kind']} top-1 {100 * entry['top1']:.1f} %" for entry in line["probes"]]
        _log.info("%10d images  %s", images_seen, ", ".join(said))
        return why

    def _lacking(self, images_seen: int) -> tuple[str | None, Sequence[ProbeSection]]:
        """Return the name of the validation, None if none is due, and the probes that are due."""
        there: dict[str, Any] = {point["images_seen"]: point for point in self._run.read_curve()}.get(images_seen, {})
        name = validation_settings(self._config.evaluation.validation)
        is_due = self._schedule.is_point(images_seen, self._distance)
        is_due = is_due and not is_measurement(there.get("validation"), name)
        places = {probe_key(entry) for entry in there.get("probes", ())}
        probes = []
        for probe in self._probes:
            evaluation = probe.evaluation_id(fingerprint(probe.train), fingerprint(probe.test))
            found = {kind for task, kind, known in places if task == probe.task and is_measurement(known, evaluation)}
            if self._schedule.is_point(images_seen, probe.every_images) and not found >= set(probe.kinds):
                probes.append(probe)
        return name if is_due else None, probes

    def _deviation(self, expected: Expected, validation: str) -> Deviation | None:
        """Compare the losses so far with their forecast, and tell it in `status.json`."""
        points = [point for point in self._run.read_curve() if point.get("validation") == validation]
        found = expected.deviation({point["images_seen"]: point["val_loss"] for point in points})
        is_alarm = found is not None and found.is_alarm
        self._job.update_status(
            durable=False, deviation=found and found.sd, deviates_since=found.since if found and is_alarm else None
        )
        return found

    def _loss(self, images_seen: int) -> dict[str, float | None]:
        """Measure the validation columns of a row."""
        config, group = self._config, self._job.group
        self._held_out = self._held_out or open_held_out(config, group)
        model = copied_model(self._engine, group, DTYPES[config.training.optimiser.precision])
        losses = validate(model, self._held_out, group, self._job.progress_callback())
        if not math.isfinite(losses.loss):
            raise DivergedError(f"the validation loss at image {images_seen} is {losses.loss}; the weights diverged")
        return {column: value if math.isfinite(value) else None for column, value in losses.columns.items()}

    def _entries(self, images_seen: int, precision: str, probes: Sequence[ProbeSection]) -> list[dict[str, Any]]:
        """Probe in one precision, on one copy of the weights, and return the entries of a row's probes."""
        config, found = self._config, list[dict[str, Any]]()
        chosen = [section for section in probes if section.precision == precision]
        if not chosen:
            return found
        copied = functools.partial(copied_model, self._engine, self._job.group, DTYPES[precision])
        backbone = AimBackbone(copied, f"{config.run_id}@{images_seen} trunk")
        for section in chosen:
            found += probe_backbone(
                backbone,
                section,
                config,
                out=self._folder,
                group=self._job.group,
                report_progress=self._job.progress_callback(),
            )
        return found
