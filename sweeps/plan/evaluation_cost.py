"""What a run's validation and probes cost: forward passes, counted like training's; the heads themselves are not."""

from __future__ import annotations

from aimscale.aim.cost import TRAIN_OVER_FORWARD, FlopCount
from aimscale.harness.data.store.card import num_images
from aimscale.harness.run.config import EvaluationConfig, ProbeSection, ValidationSection


def evaluation_flops(evaluation: EvaluationConfig, flops: FlopCount) -> float:
    """FLOPs of all budgets' validation and probes; a data set that is not here to be counted adds nothing.

    Args:
        evaluation: of the run.
        flops: of its model, one image.
    """
    once = _validation_flops(evaluation.validation, flops)
    once += sum(_probe_flops(task, flops) for task in evaluation.probes)
    return len(evaluation.budgets) * once


def _validation_flops(section: ValidationSection, flops: FlopCount) -> float:
    images = num_images(section.path) or 0
    return flops.forward * section.num_prefixes * min(section.num_images or images, images)


def _probe_flops(section: ProbeSection, flops: FlopCount) -> float:
    """The trunk runs once an image, or once an epoch under augmentation; LoRA trains through it."""
    trunk = flops.patch_embed + flops.trunk
    fit, test = (num_images(path) or 0 for path in (section.train, section.test))
    passes = 0.0
    if set(section.kinds) != {"lora"}:
        passes += test + fit * (1 if section.augmentation == "none" else section.epochs)
    if "lora" in section.kinds:
        passes += test + fit * section.epochs * TRAIN_OVER_FORWARD
    return trunk * passes
