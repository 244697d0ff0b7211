"""Frozen features of a task's images: one backbone pass gives pooled vectors, statistics and, if they fit, all tokens.

Linear and k-NN probes then never run the backbone again. Attentive heads need tokens: kept in memory if they fit (small
tasks), else computed batch by batch. Every source of features has `num_blocks`, `num_tokens` and `width`, `owners` says
which rank has an image, and `parts` yields this rank's outputs for chunks of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aimscale.aim.model import DTYPES
from aimscale.harness.distributed.group import Group
from aimscale.harness.distributed.job import ProgressCallback, ignore_progress
from aimscale.harness.probe.features.backbones import Backbone
from aimscale.harness.probe.features.images import LabelledImages
from aimscale.harness.probe.features.moments import NOT_FINITE, Moments
from aimscale.harness.probe.features.tasks import CACHE_SHARE, ProbeError

EXTRACT_BATCH = 64
"""Number of images per backbone pass."""
CENTRE_IMAGES = 16
"""Number of images whose mean is the centre of pooled features and moments."""


def own_indices(indices: Sequence[int], group: Group) -> list[int]:
    """Return the indices whose features this rank keeps: i belongs to rank i mod world_size, whatever the batch."""
    return [index for index in indices if index % group.world_size == group.rank]


def batched(indices: np.ndarray | Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield consecutive lists of `size` indices; the last may be shorter."""
    for start in range(0, len(indices), size):
        yield [int(i) for i in indices[start : start + size]]


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

    def owners(self, images: Sequence[int]) -> np.ndarray:
        """Return the rank that computes each of these images: as many on every rank, whichever they are."""
        return np.arange(len(images)) % self.group.world_size

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """Yield outputs (L, b, N, d) of each chunk, while the next images are decoded."""
        for _, images in self._images.ahead(chunks, epoch):
            if len(images) <= EXTRACT_BATCH:
                yield self._compute(images) if len(images) else self._first[:, :0]
            else:
                yield torch.cat([self._compute(part) for part in images.split(EXTRACT_BATCH)], dim=1)


class _Kept:
    """Features of the images that `own_indices` names, kept in their order."""

    group: Group

    def owners(self, images: Sequence[int]) -> np.ndarray:
        """Return the rank that keeps each image."""
        return np.asarray(images) % self.group.world_size

    def _rows(self, images: Sequence[int]) -> Tensor:
        return torch.as_tensor(images, dtype=torch.int64) // self.group.world_size


class CachedTokens(_Kept):
    """Tokens of all blocks and of this rank's images in memory, in order of images."""

    def __init__(self, outputs: Tensor, group: Group):
        self._outputs, self.group = outputs, group
        self.num_blocks, _, self.num_tokens, self.width = outputs.shape

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """Yield outputs (L, b, N, d) of each chunk."""
        for chunk in chunks:
            yield self._outputs.index_select(1, self._rows(chunk).to(self._outputs.device))


class PooledFeatures(_Kept):
    """Means over tokens of all blocks for this rank's images: image i is row i // world_size of rank i mod world_size.

    They are stored as deviations from a centre, so that bf16 rounds what distinguishes images and not a common offset.
    """

    num_tokens = 1

    def __init__(self, values: Tensor, centre: Tensor, group: Group):
        """Keep them in `values` (n, L, d), on the host or the device, about `centre`, float32 (L, d) on the device."""
        self.group = group
        self.num_blocks, self.width = centre.shape
        self._values, self._centre = values, centre

    def put(self, first_row: int, vectors: Tensor) -> None:
        """Write vectors, float32 (L, n, d), to the rows from `first_row` on."""
        rows = (vectors - self._centre[:, None]).transpose(0, 1)
        self._values[first_row : first_row + len(rows)] = rows.to(self._values)

    def rows(self, numbers: Tensor | slice) -> Tensor:
        """Return the vectors of these rows, float32 (L, n, d), on the device."""
        stored = self._values[numbers].to(self._centre.device)
        return stored.float().transpose(0, 1) + self._centre[:, None]

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """Yield the vectors of this rank's images as one token each, (L, b, 1, d) for every chunk."""
        for chunk in chunks:
            yield self.rows(self._rows(chunk))[:, :, None]


Features = StreamedTokens | CachedTokens | PooledFeatures

HOST_SHARE = 0.4
"""Share of a rank's free host memory for the pooled features of a split that its device has no room for."""


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """Results of one pass over a split."""

    pooled: PooledFeatures
    """Means over tokens, of every block."""
    tokens: StreamedTokens | CachedTokens
    """Tokens, kept in memory or computed again when asked for."""
    token_moments: tuple[Moments, Moments]
    """Statistics of tokens, of the images to fit and of the hold-out, of all ranks; empty without `for_tokens`."""
    pooled_moments: tuple[Moments, Moments]
    """Statistics of the pooled vectors, likewise."""


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    images: LabelledImages,
    group: Group,
    *,
    precision: str,
    for_tokens: bool = True,
    fit: np.ndarray | None = None,
    report_progress: ProgressCallback = ignore_progress,
) -> SplitFeatures:
    """Compute the features of a split in one pass over its images.

    Args:
        backbone: on its device and in the task's precision.
        precision: precision in which pooled features are kept, `fp32` or `bf16`.
        for_tokens: whether any head reads single tokens; else they are not kept, and have no statistics.
        fit: images whose statistics are summed, apart from those of all others; None sums none.
    """
    stream = StreamedTokens(backbone, images, group)
    centre = stream.centre()
    indices = own_indices(range(len(images)), group)
    most = -(-len(images) // group.world_size)  # images per rank: all ranks take as many turns
    dtype = DTYPES[precision]
    num_bytes = most * centre.numel() * dtype.itemsize
    cache_bytes = CACHE_SHARE * group.min_over_ranks(group.memory_bytes())
    is_on_host = num_bytes > cache_bytes
    if is_on_host and num_bytes > HOST_SHARE * group.min_over_ranks(group.host_memory_bytes()):
        raise ProbeError(
            f"pooled features need {num_bytes / 1e9:.3g} GB on a rank, more than {HOST_SHARE:.0%} of its free host "
            "memory; use more ranks"
        )
    # written at once, so that later allocations of any process see that the host has less memory
    values = torch.empty(
        len(indices), *centre.shape, dtype=dtype, device="cpu" if is_on_host else centre.device
    ).zero_()
    pooled = PooledFeatures(values, centre, group)
    kept = None
    if for_tokens and images.views is None:  # views change by epoch
        kept = stream.empty(most)[:, : len(indices)] if most * stream.image_bytes <= cache_bytes else None
    sums = [Moments.around(centre) for _ in range(4)]  # tokens: to fit, held out; pooled: to fit, held out
    is_fit = np.isin(np.arange(len(images)), [] if fit is None else fit)
    chunks = [indices[first : first + EXTRACT_BATCH] for first in range(0, most, EXTRACT_BATCH)]
    for number, (chunk, outputs) in enumerate(zip(chunks, stream.parts(chunks), strict=True)):
        first, means = number * EXTRACT_BATCH, outputs.float().mean(2)
        pooled.put(first, means)
        if kept is not None:
            kept[:, first : first + len(chunk)] = outputs
        for part, chosen in enumerate((is_fit[chunk], ~is_fit[chunk]) if fit is not None else ()):
            rows = torch.from_numpy(np.flatnonzero(chosen)).to(outputs.device)
            if for_tokens:
                sums[part].add(outputs.index_select(1, rows).flatten(1, 2))
            sums[2 + part].add(means.index_select(1, rows))
        seen = min(len(images), group.world_size * (first + len(chunk)))
        report_progress(f"features of {images.dataset.info.name}", seen, len(images))
    for moments in sums if fit is not None else ():
        moments.over_ranks(group)
    return SplitFeatures(
        pooled=pooled,
        tokens=stream if kept is None else CachedTokens(kept, group),
        token_moments=(sums[0], sums[1]),
        pooled_moments=(sums[2], sums[3]),
    )
