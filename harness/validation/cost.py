"""Cost of validation: its images, its points during training, and the memory that these need. Torch is not imported."""

from __future__ import annotations

import math

from aimscale.aim.cost import executed_flops_per_image, flops_per_image, mean_scored_tokens
from aimscale.harness.data.store.dataset_info import DatasetLookup
from aimscale.harness.device.memory import measuring_bytes
from aimscale.harness.run.config import RunConfig, ValidationSection
from aimscale.harness.run.row import build_model_config
from aimscale.harness.run.schedule import unchecked_schedule

SHARE_DURING, MAX_POINTS = 0.03, 100
"""Limits of `validation.every_images: auto`: a share of the FLOPs of training, and a number of points."""


def validation_images(section: ValidationSection, lookup: DatasetLookup) -> int:
    """Count the forward passes of one budget's validation; 0 if the images are not here to be counted."""
    info = lookup(section.path)
    images = info.num_usable if info else 0
    return section.num_prefixes * min(section.num_images or images, images)


def validation_distance(config: RunConfig, lookup: DatasetLookup) -> int | None:
    """Return the images between validations during training (`validation.every_images`); None for none."""
    section, training = config.evaluation.validation, config.training
    if section.every_images != "auto":
        return section.every_images
    model, schedule = build_model_config(training), unchecked_schedule(config)
    scored = mean_scored_tokens(model, training.objective.prefix)
    trained = executed_flops_per_image(model, scored).train
    measured = validation_images(section, lookup) * flops_per_image(model).forward
    images = max(measured / (SHARE_DURING * trained), schedule.last_point / MAX_POINTS)
    return math.ceil(images / schedule.batch_size) * schedule.batch_size if measured else None


def num_points(config: RunConfig, lookup: DatasetLookup) -> int:
    """Count the validations during a run's training."""
    return unchecked_schedule(config).num_points(validation_distance(config, lookup))


def curve_bytes(config: RunConfig, lookup: DatasetLookup) -> int:
    """Return the bytes on a rank, beside what training holds, while it measures during training; 0 if it never does."""
    precision = config.training.optimiser.precision
    return measuring_bytes(build_model_config(config.training), precision) if num_points(config, lookup) else 0
