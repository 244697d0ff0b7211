"""Frozen features for probing: what a backbone is, labelled images, and tokens cached or streamed in bounded memory."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.stream.evalset import eval_images
from aimscale.harness.device.distributed import Group, Placement
from aimscale.harness.probe.benchmarks import check_against_card
from aimscale.harness.run.config import ModelSection, ProbeSection

if TYPE_CHECKING:
    from aimscale.harness.probe.views import PublishedViews

CACHE_GB = 2.0
"""Tokens of the training split are kept in memory up to this size and recomputed every epoch beyond it."""
WORKING_GB = 0.25
"""Largest transient stack of tokens."""
EXTRACT_BATCH = 64
"""Images per backbone pass."""
MAX_DECODERS = 8
"""Threads that decode the next images while the backbone works on these, where there are as many cores."""

ALONE = Group(Placement(rank=0, world_size=1, local_rank=0, address="", port=0), torch.device("cpu"), None)
"""The group of a process that probes by itself."""

BlockSet = tuple[int, ...]
"""Blocks, counted from 0, whose outputs are averaged."""


class ProbeError(UserError):
    """A task or a model that cannot be probed as asked."""


class Backbone(Protocol):
    """A frozen model as the probes see it."""

    name: str
    """Written into results."""
    num_blocks: int
    """Blocks whose outputs can be asked for."""
    num_heads: int
    """Heads of the attentive probe: those of the trunk."""

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Outputs (len(blocks), B, N, d) for normalised images (B, C, H, W)."""
        ...


class AimBackbone:
    """An AIM with bidirectional attention; raw block outputs, no final norm (as the released probe reads them)."""

    def __init__(self, model: AIM, name: str = "aim"):
        self.name = name
        self.num_blocks = model.config.depth
        self.num_heads = model.config.num_heads
        self.model = model

    @torch.no_grad()
    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Outputs (len(blocks), B, N, d); moves the images to the model's device and dtype."""
        weight = next(self.model.trunk.parameters())
        return self.model.features(images.to(weight.device, weight.dtype), blocks)


class PixelBackbone:
    """Raw pixels as the features: what a probe reaches without any model."""

    name = "raw-pixels"
    num_blocks = 1
    num_heads = 1

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """The flattened image as one token of width C H W: (len(blocks), B, 1, C H W)."""
        return images.flatten(1)[None, :, None].expand(len(blocks), -1, -1, -1)


@dataclass(frozen=True)
class LabelledImages:
    """A labelled data set, preprocessed for one model geometry."""

    dataset: ShardDataset
    """Indexed shards."""
    rows: np.ndarray
    """Samples used (n,): those that decode."""
    labels: Tensor
    """Class indices (n,), int64, of those."""
    classes: tuple[str, ...]
    """Class names."""
    model_section: ModelSection
    """Image size and channels to prepare for."""
    views: PublishedViews | None = None
    """Augmentation of training views; None has one centre crop an image."""

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int], epoch: int | None = None) -> Tensor:
        """Normalised float32 images (len(indices), C, H, W).

        Shorter side resized and centre crop; with `epoch`, the training views of that epoch where there are any.
        """
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        if epoch is not None and self.views is not None:
            return self.views.images(self.dataset, rows, epoch)
        return eval_images(self.dataset, rows, self.model_section)

    def ahead(
        self, chunks: Iterable[Sequence[int]], epoch: int | None = None
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Each chunk of indices with its images, in order, decoded by threads while the caller works on earlier ones.

        Memory: one chunk a thread and one more. An error comes out where its chunk would have.
        """
        pending: deque[tuple[Sequence[int], Future[Tensor]]] = deque()
        num_threads = min(MAX_DECODERS, len(os.sched_getaffinity(0)))
        local = threading.local()

        def open_files() -> None:
            local.images = replace(self, dataset=self.dataset.with_own_files())

        def decode(chunk: Sequence[int]) -> Tensor:
            images: LabelledImages = local.images
            return images.images(chunk, epoch)

        pool = ThreadPoolExecutor(num_threads, "decode", initializer=open_files)
        try:
            for chunk in chunks:
                pending.append((chunk, pool.submit(decode, chunk)))
                if len(pending) > num_threads:
                    first, images = pending.popleft()
                    yield first, images.result()
            for first, images in pending:
                yield first, images.result()
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
    return LabelledImages(dataset, rows, labels, classes, model_section)


def open_task(section: ProbeSection, model_section: ModelSection) -> tuple[LabelledImages, LabelledImages]:
    """Training and test split of a task.

    Raises:
        ProbeError: no labels, test classes that the training split lacks, or too few images to hold some out.
        TaskError: the task bears a benchmark's name and is not that benchmark.
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


def block_sets(num_blocks: int) -> tuple[list[BlockSet], BlockSet]:
    """Candidate sets and the protocol's fixed one.

    The fixed one is the last six blocks (the last half of a model of fewer than twelve). Candidates: that, every
    single block, and every window of the same length, among which the published best layers (six contiguous ones in
    all four sizes) were found.
    """
    length = 6 if num_blocks >= 12 else max(1, num_blocks // 2)
    windows = [tuple(range(start, start + length)) for start in range(num_blocks - length + 1)]
    singles: list[BlockSet] = [(block,) for block in range(num_blocks)]
    return list(dict.fromkeys(windows + singles)), windows[-1]


def averages(tokens: Tensor, sets: Sequence[BlockSet], blocks: Sequence[int] | None = None) -> Tensor:
    """Mean over the blocks of each set, in fp32: tokens (L, ...) -> (S, ...); `blocks` names the rows if not 0..L-1."""
    row = {block: i for i, block in enumerate(range(len(tokens)) if blocks is None else blocks)}
    out = torch.zeros((len(sets), *tokens.shape[1:]), device=tokens.device)
    for i, members in enumerate(sets):
        for block in members:
            out[i] += tokens[row[block]]
        out[i] /= len(members)
    return out


class Chunk(NamedTuple):
    """Some images of a batch."""

    tokens: Tensor
    """(S, B, N, d); B may be 0 where a rank has no image of a batch."""
    labels: Tensor
    """(B,)."""
    batch_size: int
    """Images of the whole batch, over all chunks and ranks."""
    ends_batch: bool
    """Whether this is the rank's last chunk of the batch."""


class Selection(Protocol):
    """The tokens of some block sets, batch by batch."""

    def batches(self, indices: np.ndarray, batch_size: int, epoch: int | None = None) -> Iterator[Chunk]:
        """This rank's part of every batch of the images `indices`, in that order, in one chunk or several."""
        ...


class StreamedTokens:
    """Tokens recomputed by the backbone whenever they are asked for.

    Memory: EXTRACT_BATCH images at a time, whatever the batch: 4 (L + S) x EXTRACT_BATCH x N x d bytes for L blocks and
    S block sets.
    """

    cached = False

    def __init__(self, backbone: Backbone, images: LabelledImages, group: Group):
        self._backbone = backbone
        self._images = images
        self.group = group
        self.first = backbone.features(images.images([0]), range(backbone.num_blocks))
        """Outputs of all blocks for one image (L, 1, N, d): shape, type and device of the others."""

    @property
    def width(self) -> int:
        """d."""
        return self.first.shape[3]

    def extract(self, images: Tensor, blocks: Sequence[int] | None = None) -> Tensor:
        """Outputs (L, B, N, d) of these blocks, of all by default, for normalised images (B, C, H, W)."""
        blocks = range(self._backbone.num_blocks) if blocks is None else blocks
        if not len(images):
            return self.first[list(blocks), :0]
        return self._backbone.features(images, blocks)

    def select(self, sets: Sequence[BlockSet]) -> Selection:
        """Averages over these sets."""
        return _StreamedSelection(self, self._images, sets)


@dataclass(frozen=True)
class _StreamedSelection:
    source: StreamedTokens
    images: LabelledImages
    sets: Sequence[BlockSet]

    def batches(self, indices: np.ndarray, batch_size: int, epoch: int | None = None) -> Iterator[Chunk]:
        blocks = sorted({block for members in self.sets for block in members})
        plan = [
            (chunk, len(part), number == len(chunks))
            for part in batched(indices, batch_size)
            for chunks in [list(batched(share(part, self.source.group), EXTRACT_BATCH)) or [[]]]
            for number, chunk in enumerate(chunks, start=1)
        ]
        decoded = self.images.ahead((chunk for chunk, _, _ in plan), epoch)
        for (chunk, size, ends_batch), (_, images) in zip(plan, decoded, strict=True):
            tokens = averages(self.source.extract(images, blocks), self.sets, blocks)
            labels = self.images.labels[torch.as_tensor(chunk, dtype=torch.int64)].to(tokens.device)
            yield Chunk(tokens, labels, size, ends_batch)


class CachedTokens:
    """Tokens of all blocks and of this rank's images in memory, from one backbone pass."""

    cached = True

    def __init__(self, blocks: Tensor, labels: Tensor, group: Group):
        self._blocks = blocks
        self._labels = labels
        self._group = group

    @property
    def width(self) -> int:
        """d."""
        return self._blocks.shape[3]

    @functools.cached_property
    def pooled(self) -> CachedTokens:
        """The mean over tokens as one token: all that a linear probe needs."""
        mean = self._blocks.new_empty((*self._blocks.shape[:2], 1, self._blocks.shape[3]), dtype=torch.float32)
        for out, tokens in zip(mean, self._blocks, strict=True):
            torch.mean(tokens, dim=1, keepdim=True, dtype=torch.float32, out=out)
        return CachedTokens(mean, self._labels, self._group)

    def sets_at_once(self, num_sets: int) -> int:
        """Sets whose averaged tokens stay within the working memory together, at least one; the same on all ranks."""
        return max(1, min(num_sets, int(WORKING_GB * 1e9 / (4 * self._blocks[0, 0].numel() * len(self._labels)))))

    def select(self, sets: Sequence[BlockSet]) -> Selection:
        """Averages over these sets, computed once."""
        return _CachedSelection(averages(self._blocks, sets), self._labels, self._group)


@dataclass(frozen=True)
class _CachedSelection:
    tokens: Tensor
    labels: Tensor
    group: Group

    def batches(self, indices: np.ndarray, batch_size: int, epoch: int | None = None) -> Iterator[Chunk]:
        for part in batched(indices, batch_size):
            own = torch.as_tensor(share(part, self.group), dtype=torch.int64)
            # image i lies in row i // world_size of rank i % world_size
            rows = (own // self.group.world_size).to(self.tokens.device)
            labels = self.labels[own].to(self.tokens.device)
            yield Chunk(self.tokens.index_select(1, rows), labels, len(part), ends_batch=True)


def token_source(
    backbone: Backbone, images: LabelledImages, group: Group = ALONE, *, cache_gb: float = CACHE_GB
) -> CachedTokens | StreamedTokens:
    """Cache the tokens of all blocks if those of a rank's images fit into `cache_gb` (10^9 bytes), else stream them."""
    stream = StreamedTokens(backbone, images, group)
    first = stream.first
    num_own = -(-len(images) // group.world_size)
    if images.views is not None or first.numel() * first.element_size() * num_own > cache_gb * 1e9:
        return stream
    own = share(range(len(images)), group)
    blocks = first.new_empty((first.shape[0], len(own), *first.shape[2:]))
    done = 0
    for chunk, decoded in images.ahead(batched(own, EXTRACT_BATCH)):
        blocks[:, done : done + len(chunk)] = stream.extract(decoded)
        done += len(chunk)
    return CachedTokens(blocks, images.labels, group)


def share(indices: Sequence[int], group: Group) -> list[int]:
    """Those of the images that this rank works on: i belongs to rank i mod world_size, whatever the batch."""
    return [index for index in indices if index % group.world_size == group.rank]


def batched(indices: np.ndarray | Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive lists of `size` indices; the last may be shorter."""
    for start in range(0, len(indices), size):
        yield [int(i) for i in indices[start : start + size]]
