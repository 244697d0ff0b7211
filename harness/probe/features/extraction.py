"""Frozen features of a task's images: one backbone pass gives pooled vectors, statistics and, if they fit, all tokens.

Linear and k-NN probes then never run the backbone again. Attentive heads need tokens: kept in memory where they fit
(small tasks), computed batch by batch otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.device.distributed import Group, Placement
from aimscale.harness.probe.features.backbones import DTYPES, Backbone, ProbeError
from aimscale.harness.probe.features.images import LabelledImages
from aimscale.harness.probe.features.moments import Moments
from aimscale.harness.probe.features.pooled import STRETCH_ROWS, PooledFeatures
from aimscale.harness.probe.files import Pause

CACHE_GB = 2.0
"""Memory of a rank for tokens, and the same for pooled features; beyond it tokens are computed batch by batch, and
pooled features go to disk."""
DISK_GB = 500.0
"""Disk of a rank for pooled features (0.6B on ImageNet-1k, one rank: 98 GB in bf16)."""
EXTRACT_BATCH = 64
"""Images per backbone pass."""
CENTRE_IMAGES = 16
"""Images whose mean is the centre that pooled features and moments are kept about."""

ALONE = Group(Placement(rank=0, world_size=1, local_rank=0, address="", port=0), torch.device("cpu"), None)
"""The group of a process that probes by itself."""


class Features(Protocol):
    """Block outputs of this rank's images."""

    num_blocks: int
    num_tokens: int
    width: int
    group: Group

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """Outputs (L, b, N, d) for each chunk of this rank's images; b may be 0."""
        ...


class StreamedTokens:
    """Tokens computed by the backbone whenever they are asked for."""

    def __init__(self, backbone: Backbone, images: LabelledImages, group: Group):
        self._backbone, self._images, self.group = backbone, images, group
        self.num_blocks = backbone.num_blocks
        self._first = self._compute(images.images([0]))
        self.num_tokens, self.width = self._first.shape[2:]

    def _compute(self, images: Tensor) -> Tensor:
        return self._backbone.features(images, range(self.num_blocks))

    @property
    def bytes_per_image(self) -> int:
        """Of the tokens of all blocks."""
        return self._first.numel() * self._first.element_size()

    def room(self, num_images: int) -> Tensor:
        """An empty (L, num_images, N, d) of the tokens' type on their device."""
        return self._first.new_empty((self.num_blocks, num_images, self.num_tokens, self.width))

    def centre(self) -> Tensor:
        """float32 (L, d): mean over the first images, the same on every rank."""
        images = self._images.images(range(min(CENTRE_IMAGES, len(self._images))))
        return self._compute(images).float().mean((1, 2))

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """Outputs (L, b, N, d), computed EXTRACT_BATCH images at a time while the next ones are decoded."""
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
        """Outputs (L, b, N, d) of each chunk."""
        for chunk in chunks:
            rows = torch.as_tensor(chunk, dtype=torch.int64) // self.group.world_size
            yield self._outputs.index_select(1, rows.to(self._outputs.device))


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """What one pass over a split gave."""

    pooled: PooledFeatures
    """Mean over tokens, every block."""
    tokens: StreamedTokens | CachedTokens
    """All tokens: kept, or computed again when asked for."""
    of_tokens: tuple[Moments, Moments]
    """Statistics of the tokens of the images to fit and of the hold-out, of all ranks; of nothing unless they are to be
    read."""
    of_pooled: tuple[Moments, Moments]
    """The same of the pooled vectors."""


@dataclass(frozen=True, kw_only=True)
class FeaturePass:
    """How the features of a task are computed and kept."""

    backbone: Backbone
    """On its device, in the task's precision."""
    group: Group
    precision: str
    """`fp32` or `bf16`: in which pooled features are kept."""
    for_tokens: bool = True
    """Whether anything will read single tokens: else they are not kept, and have no statistics."""
    cache_gb: float = CACHE_GB
    """Memory of a rank, 10^9 bytes, for tokens and again for pooled features."""
    disk_gb: float = DISK_GB
    """Disk of a rank for pooled features that memory does not hold."""
    folder: Path | None = None
    """Where they go then; None keeps to memory."""
    pause: Pause = lambda: None
    """Called between stretches of images by all ranks together; raises to stop there."""

    @torch.no_grad()
    def split(self, images: LabelledImages, name: str, key: str, fit: np.ndarray | None = None) -> SplitFeatures:
        """One pass over the images of a split.

        Args:
            key: what the features depend on.
            fit: images whose statistics are summed, apart from those of all others; None sums none.

        Raises:
            ProbeError: neither memory nor disk holds the pooled features within their bounds.
        """
        stream = StreamedTokens(self.backbone, images, self.group)
        centre = stream.centre()
        own = share(range(len(images)), self.group)
        pooled = self._store(len(own), centre, name, key)
        sums = [Moments.about(centre) for _ in range(4)]  # tokens: to fit, held out; pooled: to fit, held out
        for moments, state in zip(sums, pooled.state or (), strict=False):
            moments.load_state_dict(state)
        is_fit = np.zeros(len(images), dtype=bool)
        is_fit[fit] = fit is not None
        kept = self._room_for_tokens(stream, images, len(own))
        for number in range(-(-len(images) // (STRETCH_ROWS * self.group.world_size))):
            first = number * STRETCH_ROWS
            rows = own[first : first + STRETCH_ROWS] if number >= pooled.num_sealed else []
            chunks = list(batched(rows, EXTRACT_BATCH))
            for chunk, outputs in zip(chunks, stream.parts(chunks), strict=True):
                means = outputs.float().mean(2)
                pooled.put(first, means)
                if kept is not None:
                    kept[:, first : first + len(chunk)] = outputs
                if fit is not None:
                    for part, rows_of in enumerate((is_fit[chunk], ~is_fit[chunk])):
                        chosen = torch.from_numpy(rows_of).to(outputs.device)
                        if self.for_tokens:
                            sums[part].add(outputs[:, chosen].flatten(1, 2))
                        sums[2 + part].add(means[:, chosen])
                first += len(chunk)
            if rows:
                pooled.seal([moments.state_dict() for moments in sums])
            self.pause()
        if fit is not None:
            for moments in sums:
                moments.over_ranks(self.group)
        return SplitFeatures(
            pooled=pooled,
            tokens=stream if kept is None else CachedTokens(kept, self.group),
            of_tokens=(sums[0], sums[1]),
            of_pooled=(sums[2], sums[3]),
        )

    def _room_for_tokens(self, stream: StreamedTokens, images: LabelledImages, num_own: int) -> Tensor | None:
        """Room for all tokens of this rank's images, where they are read, fit, and do not change by epoch."""
        num_bytes = stream.bytes_per_image * -(-len(images) // self.group.world_size)
        if not self.for_tokens or images.views is not None or num_bytes > self.cache_gb * 1e9:
            return None
        return stream.room(num_own)

    def _store(self, num_rows: int, centre: Tensor, name: str, key: str) -> PooledFeatures:
        """Where the pooled features of a split go."""
        dtype = DTYPES[self.precision]
        size_gb = (num_rows + 1) * centre.numel() * dtype.itemsize / 1e9
        if size_gb <= self.cache_gb:
            return PooledFeatures(num_rows, centre, dtype, self.group)
        if self.folder is None or size_gb > self.disk_gb:
            raise ProbeError(
                f"the pooled features of the {name} split take {size_gb:.3g} GB on a rank, more than --cache-gb "
                f"{self.cache_gb:g} of memory and --disk-gb {self.disk_gb:g} of disk; raise one, or use more ranks"
            )
        rank = f"{self.group.rank}-of-{self.group.world_size}"
        return PooledFeatures(
            num_rows, centre, dtype, self.group, file=self.folder / f"{name}-{rank}.features", key=key
        )


def share(indices: Sequence[int], group: Group) -> list[int]:
    """Those of the images that this rank works on: i belongs to rank i mod world_size, whatever the batch."""
    return [index for index in indices if index % group.world_size == group.rank]


def batched(indices: np.ndarray | Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive lists of `size` indices; the last may be shorter."""
    for start in range(0, len(indices), size):
        yield [int(i) for i in indices[start : start + size]]
