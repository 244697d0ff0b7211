"""What validation and probes of a budget cost: images through the backbone, heads, neighbours and kept features.

Heads move more bytes than they compute, so their traffic is priced as the FLOPs that the device would have executed
meanwhile. What that takes for granted is in the constants below.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import TRAIN_OVER_FORWARD, FlopCount, num_queries
from aimscale.harness.data.store.card import num_images
from aimscale.harness.probe.features.benchmarks import CARDS
from aimscale.harness.probe.features.sizes import (
    BYTES_PER_HEAD_PARAM,
    COPIES,
    block_sets,
    bytes_per_set,
    head_params,
    num_settings,
    number_of_steps,
    sets_per_round,
)
from aimscale.harness.run.config import EvaluationConfig, ProbeSection, ValidationSection

FLOPS_PER_BYTE = 150.0
"""Assumption: a device that executes 40 % of an H100's 989 bf16 TFLOP/s moves 80 % of its 3.35 TB/s."""
TF32_COST = 2.0
"""Products of heads and neighbours run in TF32, at half of the bf16 rate (a device without it: fp32)."""
TOKEN_TRAFFIC = 10
"""Times that a block set's averaged tokens are read or written for one training image: average, exchange between ranks,
scores and pooling, forwards and backwards."""
OPTIMISER_TRAFFIC = 2 * BYTES_PER_HEAD_PARAM
"""Bytes moved for each value of the heads in an optimiser step."""


HEADS = ("linear", "attentive", "efficient")
"""Kinds that are trained."""


@dataclass(frozen=True, kw_only=True)
class ProbeCost:
    """One task at one budget."""

    task: str
    images: float
    """Images through the backbone, forwards; what LoRA trains on counts three times."""
    rounds: int
    """Trainings that the attentive grid is divided into, because its heads fit no rank together."""
    flops_backbone: float
    """FLOPs of those forward passes."""
    flops_heads: float
    """Of training and measuring heads: products, and traffic as FLOPs."""
    flops_neighbours: float
    """Of the k-NN search."""
    head_bytes: float
    """Memory of a rank for heads, both copies of each, gradients and optimiser state."""
    feature_bytes: float
    """Pooled features of both splits, in memory or on disk, over all ranks."""

    @property
    def flops(self) -> float:
        """All of them."""
        return self.flops_backbone + self.flops_heads + self.flops_neighbours


def evaluation_flops(evaluation: EvaluationConfig, flops: FlopCount, probes: tuple[ProbeCost, ...]) -> float:
    """FLOPs of all budgets' validation and probes; a data set that is not here to be counted adds nothing.

    Args:
        flops: of its model, one image.
        probes: its tasks, as `probe_costs` prices them.
    """
    once = _validation_flops(evaluation.validation, flops) + sum(cost.flops for cost in probes)
    return len(evaluation.budgets) * once


def probe_costs(
    evaluation: EvaluationConfig, model: ModelConfig, flops: FlopCount, ranks: int, memory_gb: float
) -> tuple[ProbeCost, ...]:
    """Every task of a run at one budget, probed by so many ranks of so much memory, 10^9 bytes."""
    return tuple(_probe_cost(section, model, flops, ranks, 1e9 * memory_gb) for section in evaluation.probes)


def rounds_warning(cost: ProbeCost) -> str | None:
    """What a task's heads cost where they do not fit a rank together."""
    if cost.rounds < 2:
        return None
    passes = f"the heads train in {cost.rounds} rounds, each with passes of its own"
    return f"task '{cost.task}': {passes}; more devices save them"


def _validation_flops(section: ValidationSection, flops: FlopCount) -> float:
    images = num_images(section.path) or 0
    return flops.forward * section.num_prefixes * min(section.num_images or images, images)


def _probe_cost(
    section: ProbeSection, model: ModelConfig, flops: FlopCount, ranks: int, memory_bytes: float
) -> ProbeCost:
    train, test, num_classes = _task_size(section)
    fit, held = train * (1 - section.holdout_fraction), train * section.holdout_fraction
    sets = len(block_sets(model.depth)[0])
    frozen = set(section.kinds) - {"lora"}
    on_views = section.augmentation == "published"
    # heads that train on tokens, from one pass per batch; without augmentation the linear ones need none
    with_tokens = [kind for kind in HEADS if kind in frozen and (kind != "linear" or on_views)]
    together = with_tokens or [kind for kind in ("linear",) if kind in frozen]
    at_once = min(sets, sets_per_round(section, together, model.width, num_classes, ranks, memory_bytes))
    rounds = -(-sets // at_once) if with_tokens else 0
    trained = _images_trained(section, train)
    images = 0.0
    if frozen:
        images += train + test
    if with_tokens:
        images += rounds * (trained + held) + test * any(kind != "linear" for kind in with_tokens)
    if "lora" in section.kinds:
        points = num_settings(section)
        images += TRAIN_OVER_FORWARD * (points * _images_trained(section, fit) + trained) + points * held + test
    heads = sum(
        _head_flops(kind, section, model, num_classes, COPIES * sets * num_settings(section), trained)
        + _traffic(kind, model, sets if kind in with_tokens else 0, trained, held)
        for kind in HEADS
        if kind in frozen
    )
    return ProbeCost(
        task=section.task,
        images=images,
        rounds=rounds,
        flops_backbone=images * (flops.patch_embed + flops.trunk),
        flops_heads=heads,
        flops_neighbours=_neighbour_flops(model, sets, fit, held, train, test) if "knn" in frozen else 0.0,
        head_bytes=-(-at_once // ranks) * bytes_per_set(section, together, model.width, num_classes),
        feature_bytes=(train + test) * model.depth * model.width * (2 if section.precision == "bf16" else 4)
        if frozen
        else 0.0,
    )


def _task_size(section: ProbeSection) -> tuple[int, int, int]:
    """Training images, test images and classes: as counted where the data are here, else by the benchmark's card."""
    card = CARDS.get(section.task)
    train, test = num_images(section.train), num_images(section.test)
    if train is None:
        train = card.num_train if card else 0
    if test is None:
        test = (card.num_test or 0) if card else 0
    return train, test, _num_classes(section.train) or (card.num_classes if card else 0)


def _num_classes(path: str) -> int | None:
    try:
        return len(json.loads((Path(path) / "dataset.json").read_text())["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _images_trained(section: ProbeSection, num_images: float) -> float:
    """Images of one training of the heads."""
    steps_per_epoch = max(1, math.ceil(num_images / section.batch_size))
    return number_of_steps(section, round(num_images)) / steps_per_epoch * num_images


def _head_flops(
    kind: str, section: ProbeSection, model: ModelConfig, num_classes: int, num_heads: int, images: float
) -> float:
    """Products of so many heads on so many images, forwards and backwards, and their optimiser's traffic."""
    d = model.width
    product = TF32_COST * 2.0 * num_classes * d
    if kind != "linear":  # scores and pooling are products with tokens, in the features' own type
        queries = model.num_heads if kind == "attentive" else num_queries(d)
        in_bf16 = section.precision == "bf16"
        product += (1.0 if in_bf16 else TF32_COST) * 4.0 * model.num_tokens * d * queries
        product += TF32_COST * 2.0 * d * d
    steps = images / section.batch_size
    optimiser = steps * OPTIMISER_TRAFFIC * head_params(kind, d, num_classes) * FLOPS_PER_BYTE
    return num_heads * (TRAIN_OVER_FORWARD * product * images + optimiser)


def _traffic(kind: str, model: ModelConfig, sets: int, trained: float, held: float) -> float:
    """Averaged tokens of every set, moved for every image; counted once, with the attentive heads."""
    if not sets or kind == "linear":
        return 0.0
    one = 2.0 * model.num_tokens * model.width * sets * FLOPS_PER_BYTE
    return one * (TOKEN_TRAFFIC * trained + TOKEN_TRAFFIC / 2 * held)


def _neighbour_flops(model: ModelConfig, sets: int, fit: float, held: float, train: float, test: float) -> float:
    """Every hold-out image against every image to fit, for every set; the test split against everything, twice."""
    return TF32_COST * 2.0 * model.width * (sets * fit * held + 2 * train * test)
