"""Labelled images of a task: its two splits, decoded ahead, and the hold-out."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.stream.evalset import eval_images
from aimscale.harness.probe.features.benchmarks import ProbeError, check_against_card
from aimscale.harness.probe.features.views import PublishedViews
from aimscale.harness.run.config import ModelSection, ProbeSection

MAX_DECODERS = 8
"""Threads that decode the next images while the backbone works on these, where there are as many cores."""


@dataclass(frozen=True)
class LabelledImages:
    """A labelled data set, preprocessed for one model geometry."""

    dataset: ShardDataset
    rows: np.ndarray
    """Samples used (n,): those that decode."""
    labels: Tensor
    """Class indices (n,), int64, of those."""
    classes: tuple[str, ...]
    model_section: ModelSection
    """Image size and channels to prepare for."""
    centre_crop: float
    """Share of the shorter side that the centre crop keeps."""
    views: PublishedViews | None = None
    """Augmentation of training views; None has one centre crop an image."""

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int], epoch: int | None = None) -> Tensor:
        """Normalised float32 images (len(indices), C, H, W).

        Resized and centre crop; with `epoch`, the training views of that epoch where there are any.
        """
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        if epoch is not None and self.views is not None:
            return self.views.images(self.dataset, rows, epoch)
        return eval_images(self.dataset, rows, self.model_section, self.centre_crop)

    def ahead(
        self, chunks: Iterable[Sequence[int]], epoch: int | None = None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Each chunk of indices with its images, in order, decoded by threads while the caller works on earlier ones.

        Memory: one chunk a thread and one more. An error comes out where its chunk would have.
        """
        num_threads = min(MAX_DECODERS, len(os.sched_getaffinity(0)))
        pool = ThreadPoolExecutor(num_threads, "decode")
        try:
            under_way = ((chunk, pool.submit(self.images, chunk, epoch)) for chunk in chunks)
            pending = deque(itertools.islice(under_way, num_threads))
            while pending:
                pending.extend(itertools.islice(under_way, 1))
                chunk, images = pending.popleft()
                yield chunk, images.result()
        finally:
            pool.shutdown(cancel_futures=True)


def open_labelled(path: str, section: ProbeSection, model_section: ModelSection) -> LabelledImages:
    """Open one side of a task.

    Raises:
        ProbeError: the data set has no labels, or more labels than names.
        DataError: some images have none, or the folder is no data set.
    """
    dataset = open_dataset(path)
    if dataset.labels is None:
        raise ProbeError(
            f"task '{section.task}': {path} has no labels, so nothing can be probed; pack it from one folder per class"
        )
    rows = np.flatnonzero(dataset.ok)
    labels = torch.as_tensor(dataset.require_labels()[rows])
    classes = dataset.classes or tuple(str(label) for label in range(dataset.num_classes))
    if len(labels) and int(labels.max()) >= len(classes):
        raise ProbeError(
            f"task '{section.task}': {path} has labels beyond its {len(classes)} class names; index it again"
        )
    return LabelledImages(dataset, rows, labels, classes, model_section, section.centre_crop)


def open_task(section: ProbeSection, model_section: ModelSection) -> tuple[LabelledImages, LabelledImages]:
    """Training and test split of a task.

    Raises:
        ProbeError: no labels, test classes that the training split lacks, too few images to hold some out, or the task
            bears a benchmark's name and is not that benchmark.
    """
    train = open_labelled(section.train, section, model_section)
    test = open_labelled(section.test, section, model_section)
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
    check_against_card(section.task, num_classes=len(train.classes), num_train=len(train), num_test=len(test))
    if not len(test):
        raise ProbeError(f"task '{section.task}': {section.test} has no images")
    return train, test


def holdout_split(labels: Tensor, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (fit, hold-out) of a stratified split: `fraction` of every class, rounded at random but seeded.

    A class with one image stays in the fit part.
    """
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
