"""The memory that `plan` states against rehearsed steps of the real engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.cost import mean_scored_tokens
from aimscale.harness.device.memory import WORKSPACE_BYTES, copy_bytes, held_bytes, peak_bytes_per_image, waiting_bytes
from aimscale.harness.rehearsal.step import StepShape, rehearse


def stated(shape: StepShape) -> int:
    """Peak of a step by the formula, without what no tensor occupies."""
    where: dict[str, Any] = {"zero_stage": shape.zero_stage, "world_size": shape.world_size}
    scored = mean_scored_tokens(shape.model, shape.prefix)
    per_image = peak_bytes_per_image(shape.model, shape.precision, shape.activation_checkpointing, scored)
    activations = max(shape.micro_batches) * per_image
    total = held_bytes(shape.model, shape.precision, **where) - WORKSPACE_BYTES + activations
    if len(shape.micro_batches) == 1:
        total -= waiting_bytes(shape.model, shape.precision, **where, activations=activations)
    return total


def shape_of(model: ModelConfig, precision: str, stage: int, ranks: int, micro_batches: list[int], **given: Any) -> Any:
    settings: dict[str, Any] = {"prefix": "paired", "activation_checkpointing": False} | given
    return StepShape(
        model=model,
        precision=precision,  # type: ignore[arg-type]
        zero_stage=stage,
        world_size=ranks,
        micro_batches=tuple(micro_batches),
        on_gpu=True,
        **settings,
    )


SIZES = ("aim-600M", "aim-1B", "aim-3B", "aim-7B")
BF16_2 = [("bf16", 2)]
# What an image takes depends on neither ranks nor stage, so geometries and prefixes are rehearsed at one of each.
GRID = [
    *itertools.product(SIZES, [(224, 14)], [8, 32, 64, 128], [("bf16", 1), ("bf16", 2), ("bf16", 3)], ["paired"]),
    *itertools.product(["aim-600M"], [(224, 14)], [8, 128], [("fp32", stage) for stage in range(4)], ["paired"]),
    *itertools.product(SIZES, [(128, 16), (512, 16)], [64], BF16_2, ["paired", "none"]),
    *itertools.product(SIZES, [(224, 14)], [64], BF16_2, ["none"]),
]


@pytest.mark.parametrize(
    ("size", "geometry", "ranks", "kind", "prefix"),
    [
        ("w1536-d4", (224, 14), 8, ("bf16", 2), "paired"),
        ("w1024-d4", (128, 16), 32, ("fp32", 2), "none"),
        pytest.param("aim-600M", (224, 14), 8, ("fp32", 0), "paired", marks=pytest.mark.slow),
        pytest.param("aim-1B", (512, 16), 64, ("bf16", 2), "none", marks=pytest.mark.slow),
        *(pytest.param(*each, marks=pytest.mark.grid) for each in GRID),
    ],
    ids=str,
)
def test_the_stated_memory_is_within_five_percent_of_a_rehearsed_step(
    size: str, geometry: tuple[int, int], ranks: int, kind: tuple[str, int], prefix: str
) -> None:
    model = model_config(size, image_size=geometry[0], patch_size=geometry[1], head_rule="released")
    shape = shape_of(model, *kind, ranks, [16, 16], prefix=prefix)
    found = rehearse(shape)
    assert stated(shape) == pytest.approx(found.peak_bytes, rel=0.05)
    copied = found.copy_peak_bytes - found.held_bytes
    assert copy_bytes(model, shape.precision) == pytest.approx(copied, rel=0.01 if shape.zero_stage else 0.05)


@pytest.mark.grid
@pytest.mark.parametrize(("recomputes", "micro_batches"), itertools.product([False, True], [[32], [32, 32, 32]]))
def test_it_is_so_with_recomputation_and_for_single_micro_batches(recomputes: bool, micro_batches: list[int]) -> None:
    model = model_config("aim-600M", head_rule="released")
    shape = shape_of(model, "bf16", 2, 8, micro_batches, activation_checkpointing=recomputes)
    assert stated(shape) == pytest.approx(rehearse(shape).peak_bytes, rel=0.05)
