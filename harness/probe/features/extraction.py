"""Frozen features of a task's images: one backbone pass gives pooled vectors, statistics and, if they fit, all tokens.

Linear and k-NN probes then never run the backbone again. Attentive heads need tokens: kept in memory if they fit (small
tasks), else computed batch by batch. Pooled vectors are on the GPU; in the host's memory if they would leave too little
for the heads there; or else in a mapped file. All ranks decide alike, by the one with the least memory.

The batch norm of a probe standardises the average of some blocks. Its variance needs the products between blocks, so
these are summed once for all pairs; any average of blocks then has exact statistics without seeing the images again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.device.distributed import Group, Placement
from aimscale.harness.probe.features.backbones import DTYPES, Backbone, weight_bytes
from aimscale.harness.probe.features.images import LabelledImages, ProgressCallback, ignore_progress
from aimscale.harness.probe.features.tasks import CACHE_SHARE, HOST_SHARE, BlockSet, ProbeError, gpu_bytes_left

NOT_FINITE = "the features are not finite: the weights diverged, or are damaged"
CHUNK_VALUES = 25_000_000
"""Values that are held in float64 at a time while their products are summed."""


def averages(outputs: Tensor, sets: Sequence[BlockSet]) -> Tensor:
    """Average over the blocks of each set, summed in fp32 and kept in the type of `outputs`: (L, ...) -> (S, ...).

    One matrix product reads every block once, whatever the number of sets.
    """
    is_member = (_averaging(sets, len(outputs)) > 0).to(outputs)
    out = (is_member @ outputs.flatten(1)).view(len(sets), *outputs.shape[1:])
    for row, members in enumerate(sets):
        if len(members) > 1:
            out[row] /= len(members)
    return out


def _averaging(sets: Sequence[BlockSet], num_blocks: int) -> Tensor:
    """Build the float32 matrix (S, L), on the host, whose row s averages the outputs of all blocks over set s."""
    weights = torch.zeros(len(sets), num_blocks)
    for row, members in enumerate(sets):
        weights[row, list(members)] = 1 / len(members)
    return weights


@dataclass(kw_only=True)
class Moments:
    """Sums over vectors of L blocks, per channel, about a fixed centre.

    They are float64: summed in any order, batches and ranks included, they give the same float32 statistics. With sums
    of fp32 products they did not, and nearest neighbours were swapped.
    """

    centre: Tensor
    """Centre, float32 (L, d): any value near the mean, the same on all ranks."""
    count: int
    """Number of vectors."""
    sums: Tensor
    """Sums of the deviations from the centre, float64 (L, d)."""
    products: Tensor
    """Sums of the products of deviations between blocks, float64 (d, L, L)."""

    @classmethod
    def around(cls, centre: Tensor) -> Moments:
        """Start with no vectors, about this centre."""
        num_blocks, width = centre.shape
        return cls(
            centre=centre,
            count=0,
            sums=torch.zeros(num_blocks, width, dtype=torch.float64, device=centre.device),
            products=torch.zeros(width, num_blocks, num_blocks, dtype=torch.float64, device=centre.device),
        )

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """Add vectors (L, n, d)."""
        step = max(1, CHUNK_VALUES // (vectors.shape[0] * vectors.shape[2]))
        for part in vectors.split(step, dim=1):
            deviation = (part.double() - self.centre[:, None]).permute(2, 0, 1)
            self.sums += deviation.sum(2).mT
            self.products += deviation @ deviation.mT
            self.count += part.shape[1]

    def over_ranks(self, group: Group) -> Moments:
        """Sum over all ranks, in place."""
        group.sum_tensor(self.sums)
        group.sum_tensor(self.products)
        if not self.sums.isfinite().all():
            raise ProbeError(NOT_FINITE)
        (self.count,) = group.sum_counts(self.count)
        return self

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            centre=self.centre,
            count=self.count + other.count,
            sums=self.sums + other.sums,
            products=self.products + other.products,
        )

    def set_statistics(self, sets: Sequence[BlockSet]) -> tuple[Tensor, Tensor]:
        """Compute mean and biased variance, float32 (S, d) each, of the average over each set's blocks."""
        weights = _averaging(sets, len(self.centre)).to(self.centre.device, torch.float64)
        mean = weights @ (self.sums / self.count)
        square = torch.einsum("sl,dlm,sm->sd", weights, self.products / self.count, weights)
        variance = (square - mean.square()).clamp_min(0)
        return (mean + weights @ self.centre.double()).float(), variance.float()


EXTRACT_BATCH = 64
"""Number of images per backbone pass."""
CENTRE_IMAGES = 16
"""Number of images whose mean is the centre of pooled features and moments."""

ALONE = Group(Placement(rank=0, world_size=1, local_rank=0, address="", port=0), torch.device("cpu"), None)
"""Group of a process that probes by itself."""


class StreamedTokens:
    """Tokens that the backbone computes whenever they are asked for."""

    def __init__(self, backbone: Backbone, images: LabelledImages, group: Group):
        self._backbone, self._images, self.group = backbone, images, group
        self.num_blocks = backbone.num_blocks
        self._first = self._compute(images.images([0]))
        self.num_tokens, self.width = self._first.shape[2:]

    def _compute(self, images: Tensor) -> Tensor:
        return self._backbone.features(images, range(self.num_blocks))

    @property
    def image_bytes(self) -> int:
        """Bytes of the tokens of an image."""
        return self._first.nbytes

    def empty(self, num_images: int) -> Tensor:
        """Allocate (L, num_images, N, d) of the tokens' type on their device."""
        return self._first.new_empty((self.num_blocks, num_images, self.num_tokens, self.width))

    def centre(self) -> Tensor:
        """Compute the mean over the first images, float32 (L, d), the same on every rank."""
        images = self._images.images(range(min(CENTRE_IMAGES, len(self._images))))
        centre = self._compute(images).float().mean((1, 2))
        if not centre.isfinite().all():  # raised now, not after a pass over all images
            raise ProbeError(NOT_FINITE)
        return centre

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """Yield outputs (L, b, N, d) of each chunk, computed EXTRACT_BATCH images at a time while the next ones are
        decoded."""
        for _, images in self._images.ahead(chunks, epoch):
            if len(images) <= EXTRACT_BATCH:
                yield self._compute(images) if len(images) else self._first[:, :0]
            else:
                yield torch.cat([self._compute(part) for part in images.split(EXTRACT_BATCH)], dim=1)


class CachedTokens:
    """Tokens of all blocks and of this rank's images in memory, in order of images."""

    def __init__(self, outputs: Tensor, group: Group):
        self._outputs, self.group = outputs, group
        self.num_blocks, _, self.num_tokens, self.width = outputs.shape

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """Yield outputs (L, b, N, d) of each chunk."""
        for chunk in chunks:
            rows = torch.as_tensor(chunk, dtype=torch.int64) // self.group.world_size
            yield self._outputs.index_select(1, rows.to(self._outputs.device))


class PooledFeatures:
    """Means over tokens of all blocks for this rank's images: image i is row i // world_size of rank i mod world_size.

    They are stored as deviations from a centre, so that bf16 rounds what distinguishes images and not a common offset.
    A mapped file has no name, so that its disk space is freed when the process ends, however it ends.
    """

    num_tokens = 1

    def __init__(self, num_rows: int, centre: Tensor, dtype: torch.dtype, group: Group, place: torch.device | Path):
        """Allocate rows of (L, d) values about `centre` (L, d), on a device or on the disk of a folder."""
        self.group = group
        self.num_blocks, self.width = centre.shape
        self._centre = centre
        if isinstance(place, torch.device) or not num_rows:
            at = place if isinstance(place, torch.device) else None
            # zeroed, so that later allocations of any process see that the host has less memory
            self._values = torch.empty(num_rows, *centre.shape, dtype=dtype, device=at).zero_()
        else:
            values = _mapped(place, num_rows * centre.numel() * dtype.itemsize)
            self._values = values.view(dtype).view(-1, *centre.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's rows."""
        return self._values.nbytes

    def put(self, first_row: int, vectors: Tensor) -> None:
        """Write vectors, float32 (L, n, d), to the rows from `first_row` on."""
        rows = (vectors - self._centre[:, None]).transpose(0, 1)
        self._values[first_row : first_row + len(rows)] = rows.to(self._values)

    def rows(self, numbers: Tensor | slice) -> Tensor:
        """Return the vectors of these rows, float32 (L, n, d), on the device."""
        numbers = numbers if isinstance(numbers, slice) else numbers.to(self._values.device)
        stored = self._values[numbers].to(self._centre.device)
        return stored.float().transpose(0, 1) + self._centre[:, None]

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """Yield the vectors of this rank's images as one token each, (L, b, 1, d) for every chunk."""
        for chunk in chunks:
            numbers = torch.as_tensor(chunk, dtype=torch.int64) // self.group.world_size
            yield self.rows(numbers)[:, :, None]


Features = StreamedTokens | CachedTokens | PooledFeatures
"""Block outputs of this rank's images: `num_blocks`, `num_tokens`, `width`, and `parts` for chunks of images."""


def _mapped(folder: Path, num_bytes: int) -> Tensor:
    """Map uint8 values of a file without a name; all of its space is allocated now, so that no write can fail."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return torch.from_numpy(np.memmap(file, mode="r+", shape=num_bytes))
    except OSError as error:
        raise ProbeError(
            f"pooled features need {num_bytes / 1e9:.3g} GB in {folder}, which cannot hold them ({error.strerror}); "
            "free space there, or use more ranks or memory"
        ) from error


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """Results of one pass over a split."""

    pooled: PooledFeatures
    """Means over tokens, of every block."""
    tokens: StreamedTokens | CachedTokens
    """Tokens, kept in memory or computed again when asked for."""
    token_moments: tuple[Moments, Moments]
    """Statistics of the tokens of the images to fit and of the hold-out, of all ranks; empty unless tokens will be
    read."""
    pooled_moments: tuple[Moments, Moments]
    """Statistics of the pooled vectors, likewise."""


@dataclass(frozen=True, kw_only=True)
class FeaturePass:
    """Settings of the pass that computes and keeps a task's features."""

    backbone: Backbone
    """Backbone, on its device and in the task's precision."""
    group: Group
    precision: str
    """Precision in which pooled features are kept, `fp32` or `bf16`."""
    for_tokens: bool = True
    """Whether any head reads single tokens; else they are not kept, and have no statistics."""
    folder: Path | None = None
    """Folder whose disk takes pooled features that do not fit into memory; None uses memory alone."""
    report_progress: ProgressCallback = ignore_progress

    @torch.no_grad()
    def split(self, images: LabelledImages, fit: np.ndarray | None = None, reserved_bytes: int = 0) -> SplitFeatures:
        """Compute the features of a split in one pass over its images.

        Args:
            fit: images whose statistics are summed, apart from those of all others; None sums none.
            reserved_bytes: bytes of pooled features that the GPU may hold already.

        Raises:
            ProbeError: neither memory nor disk holds the pooled features.
        """
        stream = StreamedTokens(self.backbone, images, self.group)
        centre = stream.centre()
        own = own_indices(range(len(images)), self.group)
        most = -(-len(images) // self.group.world_size)  # images per rank: all ranks take as many turns
        num_bytes = most * centre.numel() * DTYPES[self.precision].itemsize
        place = self._place(num_bytes, reserved_bytes, EXTRACT_BATCH * stream.image_bytes)
        pooled = PooledFeatures(len(own), centre, DTYPES[self.precision], self.group, place)
        kept = None
        if self.for_tokens and images.views is None:  # views change by epoch
            fits = most * stream.image_bytes <= CACHE_SHARE * self.group.min_over_ranks(self.group.memory_bytes())
            kept = stream.empty(most)[:, : len(own)] if fits else None
        sums = [Moments.around(centre) for _ in range(4)]  # tokens: to fit, held out; pooled: to fit, held out
        is_fit = np.isin(np.arange(len(images)), [] if fit is None else fit)
        chunks = [own[first : first + EXTRACT_BATCH] for first in range(0, most, EXTRACT_BATCH)]
        for number, (chunk, outputs) in enumerate(zip(chunks, stream.parts(chunks), strict=True)):
            first, means = number * EXTRACT_BATCH, outputs.float().mean(2)
            pooled.put(first, means)
            if kept is not None:
                kept[:, first : first + len(chunk)] = outputs
            for part, chosen in enumerate((is_fit[chunk], ~is_fit[chunk]) if fit is not None else ()):
                rows = torch.from_numpy(np.flatnonzero(chosen)).to(outputs.device)
                if self.for_tokens:
                    sums[part].add(outputs.index_select(1, rows).flatten(1, 2))
                sums[2 + part].add(means.index_select(1, rows))
            seen = min(len(images), self.group.world_size * (first + len(chunk)))
            self.report_progress(f"features of {images.dataset.info.name}", seen, len(images))
        for moments in sums if fit is not None else ():
            moments.over_ranks(self.group)
        return SplitFeatures(
            pooled=pooled,
            tokens=stream if kept is None else CachedTokens(kept, self.group),
            token_moments=(sums[0], sums[1]),
            pooled_moments=(sums[2], sums[3]),
        )

    def _place(self, num_bytes: int, reserved_bytes: int, pass_bytes: int) -> torch.device | Path:
        """Choose where a rank's pooled features of this size go."""
        group, room = self.group, 0.0
        if group.device.type == "cuda":
            room = gpu_bytes_left(group.min_over_ranks(group.memory_bytes()), weight_bytes(self.backbone), pass_bytes)
        if num_bytes + reserved_bytes <= room:
            return group.device
        if num_bytes <= HOST_SHARE * group.min_over_ranks(group.host_memory_bytes()):
            return torch.device("cpu")
        if self.folder is None:
            raise ProbeError(
                f"pooled features need {num_bytes / 1e9:.3g} GB on a rank, more than its memory; use more ranks"
            )
        return self.folder


@dataclass
class FeatureCache:
    """Cache of a backbone's features of the last task, for the next task on the same images."""

    _found: dict[tuple[object, ...], tuple[bool, SplitFeatures]] = field(default_factory=dict)

    def get(
        self, features: FeaturePass, attention: str, *splits: tuple[LabelledImages, np.ndarray | None]
    ) -> list[SplitFeatures]:
        """Return the features of splits and images to fit, see `FeaturePass.split`; all others are dropped first."""
        wanted: list[tuple[object, ...]] = [
            (images.views is None, features.precision, attention, images.dataset.fingerprint, images.centre_crop, part)
            for images, fit in splits
            for part in [None if fit is None else fit.tobytes()]
        ]
        self._found = {
            key: found
            for key, found in self._found.items()
            if key in wanted and key[0] and found[0] >= features.for_tokens
        }
        for key, (images, fit) in zip(wanted, splits, strict=True):
            if key not in self._found:
                beside = sum(found.pooled.num_bytes for _, found in self._found.values())
                self._found[key] = features.for_tokens, features.split(images, fit, beside)
        return [self._found[key][1] for key in wanted]


def own_indices(indices: Sequence[int], group: Group) -> list[int]:
    """Return the indices that this rank works on: i belongs to rank i mod world_size, whatever the batch."""
    return [index for index in indices if index % group.world_size == group.rank]


def batched(indices: np.ndarray | Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield consecutive lists of `size` indices; the last may be shorter."""
    for start in range(0, len(indices), size):
        yield [int(i) for i in indices[start : start + size]]
