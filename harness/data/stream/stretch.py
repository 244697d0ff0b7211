"""What is drawn at positions of the stream, for a stretch of them at once.

The order, the crops and the prefixes of a batch take numpy some two hundred small calls, whose code has left the
caches since the batch before: those of 32 photographs took 13 microseconds for each of them, where decoding and
resizing one takes 840 (Zen 4), and those of 256 hardly take longer in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from aimscale.harness.data.random_access import I64

Columns = tuple[npt.NDArray[Any], ...]
"""Arrays with one row per position."""
_NUM_AHEAD = 256


class Stretch:
    """A function of positions that remembers the stretch it was last asked about, and some positions behind it."""

    def __init__(self, function: Callable[[I64], Columns]) -> None:
        self._function = function
        self._known: tuple[int, Columns] | None = None

    def __call__(self, where: I64) -> Columns:
        """`function(where)`; only to be read."""
        number = len(where)
        if not number or (where != np.arange(where[0], where[0] + number)).any():
            return self._function(where)
        first = int(where[0])
        known_from, columns = self._known or (first, ())
        if not columns or not 0 <= first - known_from <= len(columns[0]) - number:
            known_from, columns = first, self._function(np.arange(first, first + max(number, _NUM_AHEAD)))
            self._known = known_from, columns  # at once: another thread may look at any moment
        rows = slice(first - known_from, first - known_from + number)
        return tuple(column[rows] for column in columns)
