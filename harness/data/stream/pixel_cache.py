"""Decoded small images kept in memory, so that a run over many epochs decodes each once.

The memory is shared with the processes that are forked from this one: what one loader worker has decoded, the others
need not, nor those of the next stretch of the run.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data.store.decoding import UndecodableImageError
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.data.stream.augment import SMALL_SIDE

MAX_CACHE_BYTES = 512 * 2**20
"""Bound of the decoded pixels of one data set in a process and its forks; larger data sets are decoded anew."""


class PixelCache:
    """Reads small images of one data set in batches; keeps them when all have one size and together fit the bound."""

    def __init__(self, dataset: ShardDataset, channels: int) -> None:
        self._dataset, self._channels = dataset, channels
        info = dataset.info
        shape = (len(dataset), channels, info.max_height, info.max_width)
        fits = max(info.max_height, info.max_width) <= SMALL_SIDE and math.prod(shape) <= MAX_CACHE_BYTES
        self._pixels = torch.from_numpy(_shared(shape)) if info.one_size and fits else None
        self._known = _shared((len(dataset) if self._pixels is not None else 0,))

    def holds(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which samples need not be read any more."""
        return np.zeros(len(samples), dtype=bool) if self._pixels is None else self._known[samples] != 0

    def stack(
        self, samples: npt.NDArray[np.int64], data: Sequence[bytes | None]
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Images of one size: uint8 (number that decoded, C, H, W), and bool (len(samples),) saying which did.

        `data` holds the files' bytes where they were read before.
        """
        good = np.ones(len(samples), dtype=bool)
        fresh: list[torch.Tensor] = []
        for i in range(len(samples)) if self._pixels is None else np.flatnonzero(~self.holds(samples)):
            sample = int(samples[i])
            try:
                image = self._dataset.decode(sample, self._channels, data[int(i)])
            except UndecodableImageError:
                good[i] = False
                continue
            if self._pixels is None:
                fresh.append(image)
            else:
                self._pixels[sample] = image
                self._known[sample] = 1  # after the pixels: another process may look at any moment
        if self._pixels is not None:
            return self._pixels[torch.from_numpy(samples[good])], good
        empty = torch.empty(0, self._channels, 1, 1, dtype=torch.uint8)
        return torch.stack(fresh) if fresh else empty, good


def _shared(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Zeros; pages are mapped when they are written, so that memory grows with the images that were read."""
    size = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8, size).reshape(shape)
