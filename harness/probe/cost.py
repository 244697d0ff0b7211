"""Cost of probes: images through the backbone, and the FLOPs of heads and neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import TRAIN_OVER_FORWARD, FlopCount, num_queries
from aimscale.harness.data.store.benchmarks import BENCHMARKS
from aimscale.harness.data.store.dataset_info import DatasetLookup
from aimscale.harness.device.memory import ELEMENT_BYTES
from aimscale.harness.probe.features.tasks import (
    CACHE_SHARE,
    HOLDOUT_FRACTION,
    L2S,
    block_sets,
    bytes_per_set,
    head_params,
    number_of_steps,
    sets_per_round,
)
from aimscale.harness.run.config import ProbeSection

PASSES = 25
"""Passes over pooled features until linear heads are solved."""
HEADS = ("linear", "attentive", "efficient")
"""Kinds of heads that are trained on frozen features."""


@dataclass(frozen=True, kw_only=True)
class ProbeCost:
    """Cost of a task at one budget."""

    task: str
    images: float
    """Images through the backbone, forward; those that LoRA trains on count three times."""
    flops: float
    """FLOPs of these forward passes, of training and evaluating heads, and of the k-NN search."""
    pairs: float = 0.0
    """Pairs of images that the k-NN search compares."""
    heads_flops: float = 0.0
    """Part of `flops` for training and evaluating heads."""


def probe_cost(
    section: ProbeSection, model: ModelConfig, flops: FlopCount, ranks: int, memory_bytes: float, lookup: DatasetLookup
) -> ProbeCost:
    """Estimate the cost of a task at one budget, on ranks of this memory."""
    train, test, num_classes = _task_size(section, lookup)
    frozen = [kind for kind in section.kinds if kind != "lora"]
    # heads that train on tokens, from one pass per batch; without augmentation the linear ones need none
    on_views = section.augmentation == "published"
    with_tokens = [kind for kind in HEADS if kind in frozen and (kind != "linear" or on_views)]
    sets = len(block_sets(model.depth)[0])
    fit, held = train * (1 - HOLDOUT_FRACTION), train * HOLDOUT_FRACTION
    values = ELEMENT_BYTES[section.precision] * model.depth * model.num_tokens * model.width
    is_kept = not on_views and train * values <= CACHE_SHARE * memory_bytes * ranks
    one_set = bytes_per_set(with_tokens, len(section.lrs), model.width, num_classes, is_solved=False)
    rounds = 0 if is_kept or not with_tokens else -(-sets // sets_per_round(one_set, ranks, memory_bytes))
    trained = _images_trained(section, train)
    images = float(train + test) if frozen else 0.0
    if rounds:  # the search in rounds on the part to fit, and the chosen heads together on everything
        images += rounds * (trained * (1 - HOLDOUT_FRACTION) + held) + trained + test * (with_tokens != ["linear"])
    if "lora" in section.kinds:
        points = len(section.lrs)
        images += TRAIN_OVER_FORWARD * (points * _images_trained(section, fit) + trained) + points * held + test
    # each head learns from the part to fit, and the two chosen ones from everything
    heads = sets * len(section.lrs) * (1 - HOLDOUT_FRACTION) + 2
    products = heads * trained * _head_flops(with_tokens, model, num_classes)
    if "linear" in frozen and not on_views:
        products += PASSES * (sets * len(L2S) * fit + 2 * train) * _head_flops(["linear"], model, num_classes)
    # the held-out images against the others, for every set; the test split against all, twice
    pairs = sets * fit * held + 2.0 * train * test if "knn" in frozen else 0.0
    whole = images * (flops.patch_embed + flops.trunk) + products + 2 * model.width * pairs
    return ProbeCost(task=section.task, images=images, flops=whole, pairs=pairs, heads_flops=products)


def _head_flops(kinds: Sequence[str], model: ModelConfig, num_classes: int) -> float:
    """Count the FLOPs of one head of each kind on one image, forward and backward."""
    queries = {"linear": 0, "attentive": model.num_heads, "efficient": num_queries(model.width)}
    products = [
        2.0 * head_params(kind, model.width, num_classes) + 4.0 * model.num_tokens * model.width * queries[kind]
        for kind in kinds
        if kind in HEADS
    ]
    return TRAIN_OVER_FORWARD * sum(products)


def _task_size(section: ProbeSection, lookup: DatasetLookup) -> tuple[int, int, int]:
    """Return training images, test images and classes: as counted if the data are here, else as published."""
    benchmark, train, test = BENCHMARKS.get(section.task), lookup(section.train), lookup(section.test)
    return (
        train.num_usable if train else benchmark.num_train if benchmark else 0,
        test.num_usable if test else (benchmark.num_test or 0) if benchmark else 0,
        len(train.classes) if train and train.classes else benchmark.num_classes if benchmark else 0,
    )


def _images_trained(section: ProbeSection, num_images: float) -> float:
    """Count the images of one training of the heads."""
    steps_per_epoch = max(1, math.ceil(num_images / section.batch_size))
    return number_of_steps(section, round(num_images)) / steps_per_epoch * num_images
