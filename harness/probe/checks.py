"""What is looked at before a task is probed: kinds that the model cannot have, and test images that it has seen."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.stream.overlap import count_shared
from aimscale.harness.probe.features.backbones import AimBackbone, Backbone, PixelBackbone, ProbeError
from aimscale.harness.probe.features.images import LabelledImages
from aimscale.harness.probe.heads.stacks import ON_TOKENS
from aimscale.harness.run.config import ProbeSection


def check_kinds(backbone: Backbone, section: ProbeSection) -> None:
    """Raise ProbeError for a kind of probe that this model cannot have."""
    attending = [kind for kind in section.kinds if kind in ON_TOKENS]
    if isinstance(backbone, PixelBackbone) and attending:
        named = f"{backbone.name} has one token per image, nothing to attend over"
        raise ProbeError(f"{named}; leave out kind '{attending[0]}'")
    if "lora" in section.kinds and not isinstance(backbone, AimBackbone):
        raise ProbeError(f"LoRA adapts AIM trunks, not {backbone.name}; leave out kind 'lora'")


def shared_images(
    section: ProbeSection, train: LabelledImages, test: LabelledImages, pools: Sequence[str] | None
) -> dict[str, int | None]:
    """How many test images are in the training split, and in the pre-training pool, byte for byte; says so if any are.

    Returns:
        `test_in_train` and `test_in_pool`, the latter None where the pool is unknown or not available.
    """
    counts: dict[str, int | None] = {"test_in_train": count_shared([train.dataset], test.dataset), "test_in_pool": None}
    if pools is not None:
        try:
            counts["test_in_pool"] = count_shared([open_dataset(pool) for pool in pools], test.dataset)
        except DataError:  # moved, remote, or of imported weights
            print(
                f"{section.task}: the pre-training images are not available, so they were not searched for test images",
                file=sys.stderr,
                flush=True,
            )
    for where, name in (("its training split", "test_in_train"), ("the pre-training pool", "test_in_pool")):
        if counts[name]:
            print(
                f"{section.task}: {counts[name]} of {len(test)} test images are in {where}, too; results are marked",
                file=sys.stderr,
                flush=True,
            )
    return counts
