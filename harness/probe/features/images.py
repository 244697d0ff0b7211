"""Labelled images of a task: its two splits, decoded ahead, without those that do not decode, and the hold-out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.data.images import normalise
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.data.stream.held_out import EvalImages, decoded_ahead
from aimscale.harness.distributed.group import Group
from aimscale.harness.distributed.job import ProgressCallback, ignore_progress
from aimscale.harness.probe.features.tasks import HOLDOUT_FRACTION, class_names, open_split, open_splits
from aimscale.harness.probe.features.views import PublishedViews
from aimscale.harness.run.config import ModelSection, ProbeSection, RuntimeConfig


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


Result = TypeVar("Result")


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
        pixels = read(images)
        images.source.agree(group, images.rows)
        is_good = images.source.is_good(images.rows)
        if is_good.all():
            images.source.is_read = True
            return images, pixels
        del pixels  # makes room
        images = replace(images, rows=images.rows[is_good], labels=images.labels[torch.from_numpy(is_good)])


def open_labelled(
    path: str, section: ProbeSection, model_section: ModelSection, runtime: RuntimeConfig, max_bad_fraction: float
) -> LabelledImages:
    """Open one split of a task; it is refused if its share of undecodable images is above `max_bad_fraction`."""
    dataset = open_split(path, section, runtime, max_bad_fraction)
    return _preprocessed(dataset, class_names(dataset), section, model_section, max_bad_fraction)


def open_task(
    section: ProbeSection, model_section: ModelSection, runtime: RuntimeConfig, max_bad_fraction: float
) -> tuple[LabelledImages, LabelledImages]:
    """Open the training and test split of a task, see `open_splits`; both number the classes alike."""
    train, test = open_splits(section, runtime, max_bad_fraction)
    classes = class_names(train)
    shared = classes, section, model_section, max_bad_fraction
    return _preprocessed(train, *shared), _preprocessed(test, *shared)


def _preprocessed(
    dataset: ShardDataset,
    classes: tuple[str, ...],
    section: ProbeSection,
    model_section: ModelSection,
    max_bad_fraction: float,
) -> LabelledImages:
    """Prepare the images of a data set that decode, with the numbers that its classes have among `classes`."""
    rows = dataset.usable()
    number = np.array([classes.index(name) for name in class_names(dataset)])
    labels = torch.as_tensor(number[dataset.require_labels()[rows]])
    source = EvalImages(dataset, model_section, centre_crop=section.centre_crop, max_bad_fraction=max_bad_fraction)
    return LabelledImages(source, rows, labels, classes)


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
