"""Labelled images of a task: its two splits, decoded ahead, without those that do not decode, and the hold-out."""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.data.store.dataset_info import require_usable
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.store.overlap import count_shared
from aimscale.harness.data.stream.augment import normalise
from aimscale.harness.data.stream.held_out import EvalImages
from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.tasks import HOLDOUT_FRACTION, ProbeError, check_benchmark
from aimscale.harness.probe.features.views import PublishedViews
from aimscale.harness.run.config import ModelSection, ProbeSection, RuntimeConfig

ProgressCallback = Callable[..., None]
"""Callback that all ranks call together, often: (what, done, total, unit). It shows progress, if there is a `what`, and
raises to stop the work."""


def ignore_progress(*_: object) -> None:
    """Ignore progress, and stop nothing."""


def numbered_progress(report_progress: ProgressCallback, number: int, count: int) -> ProgressCallback:
    """Prefix the names of one of several pieces of work with `number/count`."""
    if count == 1:
        return report_progress
    return lambda what="", *standing: report_progress(what and f"{number}/{count} {what}", *standing)


MAX_SHARED = 0.01
"""Maximum share of the test images that may be training images too: some benchmarks have a few in both splits."""
MAX_DECODERS = 8
"""Maximum number of threads that decode the next images while the backbone works, if there are as many cores."""


@dataclass(frozen=True)
class LabelledImages:
    """Labelled data set, preprocessed for one model geometry."""

    source: EvalImages
    """Images by their sample numbers."""
    rows: np.ndarray
    """Samples used (n,): those that decode."""
    labels: Tensor
    """Class indices (n,), int64, of those."""
    classes: tuple[str, ...]
    views: PublishedViews | None = None
    """Augmentation of training views; None uses one centre crop per image."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dataset(self) -> ShardDataset:
        """Data set that the images come from."""
        return self.source.dataset

    def images(self, indices: Sequence[int], epoch: int | None = None) -> Tensor:
        """Load normalised float32 images (len(indices), C, H, W): centre crops, or with `epoch` its training views if
        there are any."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        if epoch is not None and self.views is not None:
            return self.views.images(self.dataset, rows, epoch)
        return normalise(self.source.pixels(rows))

    def ahead(
        self, chunks: Iterable[Sequence[int]], epoch: int | None = None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield each chunk of indices with its images, see `decoded_ahead`."""
        return decoded_ahead(functools.partial(self.images, epoch=epoch), chunks)


Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def decoded_ahead(images: Callable[[Chunk], Tensor], chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield each chunk with its images, in order, decoded by threads ahead of the caller; an error is raised at its
    chunk."""
    num_threads = min(MAX_DECODERS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(num_threads, "decode")
    try:
        under_way = ((chunk, pool.submit(images, chunk)) for chunk in chunks)
        pending = deque(itertools.islice(under_way, num_threads))
        while pending:
            pending.extend(itertools.islice(under_way, 1))
            chunk, future = pending.popleft()
            yield chunk, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Task shared by all probes: its images, of which the training split has a hold-out, and the ranks that work."""

    section: ProbeSection
    """Kinds, learning rates, epochs or iterations, batch size."""
    train: LabelledImages
    test: LabelledImages
    seed: int
    """Seed of the hold-out, the heads' initial weights and the order of images."""
    group: Group
    """Ranks that share the work; the result depends on them only by rounding."""
    report_progress: ProgressCallback = ignore_progress

    @property
    def num_classes(self) -> int:
        """Classes of the training split."""
        return len(self.train.classes)

    @functools.cached_property
    def is_fit(self) -> np.ndarray:
        """Whether heads judged by the hold-out learn from each training image, bool (n,)."""
        fit, _ = holdout_split(self.train.labels, HOLDOUT_FRACTION, self.seed)
        return np.isin(self.everything, fit)

    @property
    def fit(self) -> np.ndarray:
        """Indices of the training images from which they learn, ascending."""
        return np.flatnonzero(self.is_fit)

    @property
    def held(self) -> np.ndarray:
        """Indices of the hold-out, ascending."""
        return np.flatnonzero(~self.is_fit)

    @property
    def everything(self) -> np.ndarray:
        """Indices of all training images."""
        return np.arange(len(self.train))


def read_without_bad(
    images: LabelledImages, group: Group, read: Callable[[LabelledImages], Result]
) -> tuple[LabelledImages, Result]:
    """Read a split, and once more without the images that were found undecodable on the way; returns the split and what
    was read."""
    while True:
        found = read(images)
        images.source.agree(group, images.rows)
        is_good = images.source.is_good(images.rows)
        if is_good.all():
            images.source.is_read = True
            return images, found
        del found  # makes room
        images = replace(images, rows=images.rows[is_good], labels=images.labels[torch.from_numpy(is_good)])


def open_labelled(
    path: str, section: ProbeSection, model_section: ModelSection, runtime: RuntimeConfig, max_bad_fraction: float
) -> LabelledImages:
    """Open one split of a task; it is refused if its share of undecodable images is above `max_bad_fraction`."""
    dataset = open_dataset(path, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb)
    require_usable(path, dataset.info, max_bad_fraction)
    if dataset.labels is None:
        raise ProbeError(
            f"task '{section.task}': {path} has no labels, so nothing can be probed; pack it from one folder per class"
        )
    rows = dataset.usable()
    labels = torch.as_tensor(dataset.require_labels()[rows])
    classes = dataset.classes or tuple(str(label) for label in range(dataset.num_classes))
    source = EvalImages(dataset, model_section, centre_crop=section.centre_crop, max_bad_fraction=max_bad_fraction)
    return LabelledImages(source, rows, labels, classes)


def open_task(
    section: ProbeSection, model_section: ModelSection, runtime: RuntimeConfig, max_bad_fraction: float
) -> tuple[LabelledImages, LabelledImages]:
    """Open the training and test split of a task.

    Raises:
        DataError: a split has no images that decode, or too many that do not.
        ProbeError: no labels, test classes that the training split lacks, too few images to hold some out, test images
            among the training images, or the task bears a benchmark's name and is not that benchmark.
    """
    train = open_labelled(section.train, section, model_section, runtime, max_bad_fraction)
    test = open_labelled(section.test, section, model_section, runtime, max_bad_fraction)
    strange = sorted(set(test.classes) - set(train.classes))
    if strange:
        raise ProbeError(
            f"task '{section.task}': the classes of {section.train} and {section.test} differ: the first has no "
            f"{', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}; pack both with the same class folders"
        )
    if train.classes != test.classes:  # in another order, or some have no test image
        number = torch.tensor([train.classes.index(name) for name in test.classes])
        test = replace(test, labels=number[test.labels], classes=train.classes)
    if len(train.classes) < 2:
        raise ProbeError(f"task '{section.task}': {section.train} has one class only; a probe needs two or more")
    if len(train) < 2 * len(train.classes):
        raise ProbeError(
            f"task '{section.task}': {len(train)} training images for {len(train.classes)} classes in {section.train} "
            "are too few to hold some out; give at least two a class"
        )
    check_benchmark(section.task, num_classes=len(train.classes), num_train=len(train), num_test=len(test))
    if (shared := count_shared(train.dataset, test.dataset)) > MAX_SHARED * len(test):
        raise ProbeError(
            f"task '{section.task}': {shared} of the {len(test)} images of {section.test} are images of "
            f"{section.train} too, so the score would count images seen in training; give the test images of its own"
        )
    return train, test


def holdout_split(labels: Tensor, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into (fit, hold-out), stratified and seeded: `fraction` of every class, but of no class its only
    image."""
    draw = np.random.default_rng([seed, 0])
    fit, held = [], []
    for label in np.unique(labels.numpy()):
        members = draw.permutation(np.flatnonzero(labels.numpy() == label))
        exact = fraction * len(members)
        count = min(len(members) - 1, int(exact) + int(draw.random() < exact % 1))
        held.append(members[:count])
        fit.append(members[count:])
    held_indices = np.sort(np.concatenate(held))
    if not len(held_indices):  # every class rounded down: the largest gives one
        largest = max(range(len(fit)), key=lambda i: len(fit[i]))
        held_indices, fit[largest] = fit[largest][:1], fit[largest][1:]
    return np.sort(np.concatenate(fit)), held_indices
