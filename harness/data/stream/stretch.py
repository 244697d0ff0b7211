"""What is drawn at positions of the stream, for a stretch of them at once.

The order, the crops and the prefixes of a batch take numpy some two hundred small calls, whose code has left the
caches since the batch before: those of 32 photographs took 17 microseconds for each of them, where decoding and
resizing one takes 840 (Zen 4), and those of 256 hardly take longer in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aimscale.harness.data.random_access import I64
from aimscale.harness.data.stream.augment import Boxes

Columns = tuple[npt.NDArray[Any], ...]
"""Arrays with one row per position."""
_NUM_AHEAD = 256


class Drawn(NamedTuple):
    """What is drawn at some positions, one row each."""

    source: I64
    """Number of the source."""
    sample: I64
    """Number of the sample in it."""
    uniforms: npt.NDArray[np.float64]
    """What the boxes are made of, (rows, some)."""
    image_height: npt.NDArray[np.int32]
    """Pixels, before the crop."""
    image_width: npt.NDArray[np.int32]
    """As `image_height`."""
    top: I64
    """The crops, as in `Boxes`."""
    left: I64
    height: I64
    width: I64
    flip: npt.NDArray[np.bool_]

    @property
    def boxes(self) -> Boxes:
        """The crops."""
        return Boxes._make(self[-len(Boxes._fields) :])

    def of(self, rows: I64) -> Drawn:
        """Some rows."""
        return Drawn._make(column[rows] for column in self)


class Stretch:
    """A function of positions that remembers the stretch it was last asked about, and some positions behind it."""

    def __init__(self, function: Callable[[I64], Columns]) -> None:
        self._function = function
        self._known: tuple[int, Columns] | None = None

    def __call__(self, where: range | I64) -> Columns:
        """`function` at consecutive positions, or at any; only to be read."""
        if not isinstance(where, range):
            return self._function(where)
        first, number = where.start, len(where)
        known_from, columns = self._known or (first, ())
        if not columns or not 0 <= first - known_from <= len(columns[0]) - number:
            known_from, columns = first, self._function(np.arange(first, first + max(number, _NUM_AHEAD)))
            self._known = known_from, columns  # at once: another thread may look at any moment
        rows = slice(first - known_from, first - known_from + number)
        return tuple(column[rows] for column in columns)
