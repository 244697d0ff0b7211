"""Decoded small images kept in memory, so that a run over many epochs decodes each once.

The memory is shared with the loader processes: what one of them has decoded, the others need not, nor those of the
next stretch of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data.processes import SharedMemory
from aimscale.harness.data.store.decoding import UndecodableImageError, decode
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.data.stream.augment import SMALL_SIDE

MAX_CACHE_BYTES = 512 * 2**20
"""Bound of the decoded pixels of one data set, over all loader processes; larger data sets are decoded anew."""


class PixelCache:
    """Reads small images of one data set in batches; keeps them when all have one size and together fit the bound."""

    def __init__(self, dataset: ShardDataset, channels: int) -> None:
        self._dataset, self._channels = dataset, channels
        info = dataset.info
        shape = (len(dataset), channels, info.max_height, info.max_width)
        fits = max(info.max_height, info.max_width) <= SMALL_SIDE and math.prod(shape) <= MAX_CACHE_BYTES
        self._shape = shape
        self._memory = (
            SharedMemory(math.prod(shape) + len(dataset)) if info.one_size and fits and len(dataset) else None
        )
        self._map()

    def _map(self) -> None:
        self._pixels: torch.Tensor | None = None
        if self._memory is not None:
            self._pixels = torch.from_numpy(self._memory.array(self._shape))
            self._known = self._memory.array(self._shape[:1], math.prod(self._shape))

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_dataset", "_channels", "_shape", "_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def holds(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which samples need not be read any more."""
        return np.zeros(len(samples), dtype=bool) if self._pixels is None else self._known[samples] != 0

    def stack(
        self, samples: npt.NDArray[np.int64], data: Sequence[bytes]
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Images of one size: uint8 (number that decoded, C, H, W), and bool (len(samples),) saying which did.

        `data` holds the files' bytes, of those that are not held yet.
        """
        good = np.ones(len(samples), dtype=bool)
        decoded: dict[int, torch.Tensor] = {}
        for i in np.flatnonzero(~self.holds(samples)).tolist():
            try:
                decoded[i] = decode(data[i], self._channels)
            except UndecodableImageError:
                good[i] = False
        self._dataset.check(samples[list(decoded)], [data[i] for i in decoded])
        if self._pixels is None:
            empty = torch.empty(0, self._channels, 1, 1, dtype=torch.uint8)
            return torch.stack([*decoded.values()]) if decoded else empty, good
        for i, image in decoded.items():
            self._pixels[samples[i]] = image
            self._known[samples[i]] = 1  # after the pixels: another process may look at any moment
        return self._pixels[torch.from_numpy(samples[good])], good
