"""The memory that `plan` states against rehearsed steps of the real engine."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.cost import mean_scored_tokens
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.device.memory import WORKSPACE_BYTES, copy_bytes, held_bytes, peak_bytes_per_image, waiting_bytes
from aimscale.harness.rehearsal.step import rehearse

pytestmark = pytest.mark.fork


def stated(shape: dict[str, Any]) -> int:
    """Peak of a step by the formula, without what no tensor occupies."""
    model, precision, options = (shape[name] for name in ("model", "precision", "options"))
    where: dict[str, Any] = {"zero_stage": options.zero_stage, "world_size": shape["world_size"]}
    scored = mean_scored_tokens(model, shape["prefix"])
    per_image = peak_bytes_per_image(model, precision, options.activation_checkpointing, scored)
    activations = max(shape["micro_batches"]) * per_image
    is_split = len(shape["micro_batches"]) > 1
    total = held_bytes(model, precision, **where, accumulates=is_split) - WORKSPACE_BYTES + activations
    if not is_split:
        total -= waiting_bytes(model, precision, **where, activations=activations)
    return total


def shape_of(
    model: ModelConfig,
    precision: str,
    stage: int,
    ranks: int,
    micro_batches: list[int],
    *,
    prefix: str = "paired",
    recomputes: bool = False,
) -> dict[str, Any]:
    return {
        "model": model,
        "precision": precision,
        "options": EngineOptions(zero_stage=stage, activation_checkpointing=recomputes),
        "world_size": ranks,
        "micro_batches": tuple(micro_batches),
        "prefix": prefix,
        "on_gpu": True,
    }


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
        *(pytest.param(*each, marks=pytest.mark.grid) for each in GRID),
    ],
    ids=str,
)
def test_the_stated_memory_is_within_five_percent_of_a_rehearsed_step(
    size: str, geometry: tuple[int, int], ranks: int, kind: tuple[str, int], prefix: str
) -> None:
    model = model_config(size, image_size=geometry[0], patch_size=geometry[1], head_rule="released")
    shape = shape_of(model, *kind, ranks, [16, 16], prefix=prefix)
    found = rehearse(**shape)
    assert stated(shape) == pytest.approx(found.peak_bytes(), rel=0.05)
    copied = found.peak_bytes(point=True) - sum(found.phases[-1].held.values())
    assert copy_bytes(model, kind[0]) == pytest.approx(copied, rel=0.01 if kind[1] else 0.05)  # type: ignore[arg-type]


@pytest.mark.grid
@pytest.mark.parametrize(("recomputes", "micro_batches"), itertools.product([False, True], [[32], [32, 32, 32]]))
def test_it_is_so_with_recomputation_and_for_single_micro_batches(recomputes: bool, micro_batches: list[int]) -> None:
    model = model_config("aim-600M", head_rule="released")
    shape = shape_of(model, "bf16", 2, 8, micro_batches, recomputes=recomputes)
    assert stated(shape) == pytest.approx(rehearse(**shape).peak_bytes(), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "ranks", "kind"),
    [
        ("none", 64, ("fp32", 3)),
        ("none", 8, ("fp32", 1)),  # a rank in the middle holds more than the last one
        ("proportional", 64, ("fp32", 2)),
        ("proportional", 2, ("fp32", 1)),
        ("proportional", 64, ("bf16", 1)),
        ("proportional", 64, ("bf16", 2)),
        ("proportional", 64, ("bf16", 3)),
    ],
    ids=str,
)
def test_it_is_so_where_a_rank_holds_a_part_of_one_large_matrix(head: str, ranks: int, kind: tuple[str, int]) -> None:
    model = model_config("w8192-d2", head_rule=head)  # type: ignore[arg-type]
    shape = shape_of(model, *kind, ranks, [8, 8])
    assert stated(shape) == pytest.approx(rehearse(**shape).peak_bytes(), rel=0.05)
