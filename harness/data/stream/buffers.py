"""Memory of batches that is used again once nobody shows it any more.

Memory from the system costs a page fault for every 4 KiB at its first touch, 37 for an image of 224 px; a thread's
allocator gives large pieces back to the system and takes them anew.
"""

from __future__ import annotations

import collections
import weakref
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

T = TypeVar("T")


class Buffers:
    """Flat buffers of one size, as many as are held at once."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._free: collections.deque[npt.NDArray[np.uint8]] = collections.deque()

    def take(self) -> torch.Tensor:
        """uint8 (num_bytes,), of any content; free again when the last tensor that shows a part of it is gone."""
        memory = self._free.pop() if self._free else np.empty(self._num_bytes, dtype=np.uint8)
        return lent(memory[:], memory, self._free)


def lent(shown: npt.NDArray[np.uint8], what: T, free: collections.deque[T]) -> torch.Tensor:
    """A tensor of `shown`, an array that nobody else has; `what` is free again when the last of its views is gone."""
    weakref.finalize(shown, free.append, what).atexit = False
    return torch.from_numpy(shown)
