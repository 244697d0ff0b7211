"""Properties of a task before anything runs: whether it is a benchmark, block sets, heads, steps, rounds, and its cost.

A task with the name of one of the paper's fifteen benchmarks is checked against it, so that a subset, another split or
another class list cannot pass for it; any other name is the user's own task and not checked. Costs are images through
the backbone, and the FLOPs of heads and neighbours. Torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import TRAIN_OVER_FORWARD, FlopCount, num_queries
from aimscale.aim.errors import UserError
from aimscale.harness.data.store.benchmarks import BENCHMARKS
from aimscale.harness.data.store.dataset_info import DatasetLookup, require_usable
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.stream.order import count_shared
from aimscale.harness.device.memory import ELEMENT_BYTES
from aimscale.harness.run.config import ProbeSection, RuntimeConfig

MAX_SHARED = 0.01
"""Maximum share of the test images that may be training images too: some benchmarks have a few in both splits."""
PASSES = 25
"""Passes over pooled features until linear heads are solved."""
HEADS = ("linear", "attentive", "efficient")
"""Kinds of heads that are trained on frozen features."""


class ProbeError(UserError):
    """Task or model that cannot be probed as asked."""


def check_benchmark(task: str, *, num_classes: int, num_train: int, num_test: int) -> None:
    """Refuse a data set that has a benchmark's name but other sizes; other names pass."""
    benchmark = BENCHMARKS.get(task)
    if benchmark is None:
        return
    for what, counted, expected in (
        ("classes", num_classes, benchmark.num_classes),
        ("training images", num_train, benchmark.num_train),
        ("test images", num_test, benchmark.num_test),
    ):
        if expected is not None and counted != expected:
            raise ProbeError(
                f"task '{task}' is published with {expected:,} {what}, but this data set has {counted:,}; "
                "complete it, or give the task another name so that it is not taken for the benchmark"
            )


def class_names(dataset: ShardDataset) -> tuple[str, ...]:
    """Return the names of a data set's classes, by number."""
    return dataset.classes or tuple(str(label) for label in range(dataset.num_classes))


def open_split(path: str, section: ProbeSection, runtime: RuntimeConfig, max_bad_fraction: float) -> ShardDataset:
    """Open the data set of one split; it is refused without labels, or with too large a share of undecodable images."""
    dataset = open_dataset(path, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb)
    require_usable(path, dataset.info, max_bad_fraction)
    if dataset.labels is None:
        raise ProbeError(
            f"task '{section.task}': {path} has no labels, so nothing can be probed; pack it from one folder per class"
        )
    dataset.require_labels()
    return dataset


def open_splits(
    section: ProbeSection, runtime: RuntimeConfig, max_bad_fraction: float
) -> tuple[ShardDataset, ShardDataset]:
    """Open the data sets of a task's training and test split.

    Raises:
        DataError: a split has no images that decode, or too many that do not.
        ProbeError: no labels, test classes that the training split lacks, too few images to hold some out, test images
            among the training images, or the task bears a benchmark's name and is not that benchmark.
    """
    train = open_split(section.train, section, runtime, max_bad_fraction)
    test = open_split(section.test, section, runtime, max_bad_fraction)
    classes, num_train, num_test = class_names(train), len(train.usable()), len(test.usable())
    strange = sorted(set(class_names(test)) - set(classes))
    if strange:
        raise ProbeError(
            f"task '{section.task}': the classes of {section.train} and {section.test} differ: the first has no "
            f"{', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}; pack both with the same class folders"
        )
    if len(classes) < 2:
        raise ProbeError(f"task '{section.task}': {section.train} has one class only; a probe needs two or more")
    if num_train < 2 * len(classes):
        raise ProbeError(
            f"task '{section.task}': {num_train} training images for {len(classes)} classes in {section.train} "
            "are too few to hold some out; give at least two a class"
        )
    check_benchmark(section.task, num_classes=len(classes), num_train=num_train, num_test=num_test)
    if (shared := count_shared(train, test)) > MAX_SHARED * num_test:
        raise ProbeError(
            f"task '{section.task}': {shared} of the {num_test} images of {section.test} are images of "
            f"{section.train} too, so the score would count images seen in training; give the test images of its own"
        )
    return train, test


BlockSet = tuple[int, ...]
"""Blocks, counted from 0, whose outputs are averaged."""

CACHE_SHARE = 0.1
"""Share of the memory that a rank may plan for, for tokens, or pooled features, that are kept on its device."""
HEADS_SHARE = 0.5
"""Share of a rank's memory for heads that train together; further block sets train in further rounds."""
BYTES_PER_HEAD_PARAM = 16
"""Bytes of a value, its gradient and two moments in fp32."""
BYTES_PER_SOLVED_PARAM = 96
"""Bytes of eight pairs of L-BFGS steps, and eight vectors more."""
L2S = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Strengths of L2 of linear heads that are solved, before the grid grows."""
HOLDOUT_FRACTION = 0.2
"""Share of the training split held out to choose blocks and rates by."""
MAX_EPOCHS, MAX_TRAINED_IMAGES = 20, 6_500_000
"""Default length of a training of heads: at most this many passes, and at most about this many images (5 passes of
ImageNet-1k). It keeps all frozen probes of ImageNet-1k below 3 % of training aim-600M to 128M images."""


def block_sets(num_blocks: int) -> tuple[list[BlockSet], BlockSet]:
    """List the candidate block sets, and the protocol's fixed one.

    The fixed one is the last six blocks (the last half of a model of fewer than twelve). Candidates: that, every
    single block, and every window of the same length, among which the published best layers (six contiguous ones in
    all four sizes) were found.
    """
    length = 6 if num_blocks >= 12 else max(1, num_blocks // 2)
    windows = [tuple(range(start, start + length)) for start in range(num_blocks - length + 1)]
    singles: list[BlockSet] = [(block,) for block in range(num_blocks)]
    return list(dict.fromkeys(windows + singles)), windows[-1]


def head_params(kind: str, width: int, num_classes: int) -> int:
    """Count the trained values of one head, as the classes of `aim.probes` have them."""
    if kind == "linear":
        return num_classes * (width + 1)
    if kind == "efficient":
        return width**2 + num_queries(width) * width + num_classes * (width + 1)
    return 2 * width**2 + width + num_classes * width


def number_of_steps(section: ProbeSection, num_images: int) -> int:
    """Return the optimiser steps of one training: the section's iterations, or its epochs over so many images."""
    if section.iterations is not None:
        return section.iterations
    epochs = section.epochs or max(1, min(MAX_EPOCHS, MAX_TRAINED_IMAGES // max(1, num_images)))
    return epochs * math.ceil(num_images / section.batch_size)


def bytes_per_set(kinds: Sequence[str], num_heads: int, width: int, num_classes: int, is_solved: bool) -> int:
    """Return the bytes of heads on one block set, with gradients and moments, or all that L-BFGS keeps."""
    params = num_heads * sum(head_params(kind, width, num_classes) for kind in kinds)
    return BYTES_PER_SOLVED_PARAM * params + 16 * width**2 if is_solved else BYTES_PER_HEAD_PARAM * params


def sets_per_round(one_set_bytes: int, ranks: int, memory_bytes: float) -> int:
    """Return how many block sets' heads fit into `HEADS_SHARE` of every rank's memory; at least one per rank."""
    return ranks * max(1, int(HEADS_SHARE * memory_bytes / max(1, one_set_bytes)))


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
