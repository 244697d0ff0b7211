"""Which source of a mixture stands at a position, by quota instead of by independent draws.

The first source takes position p when floor(p q + 1/2) steps up there; the positions it leaves, renumbered, are dealt
among the others in the same way. So after p positions a source of probability q has given p q images, within one for
every source before it, and how often it came up before p is known at once: what O(1) resuming and exact epochs need.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aimscale.harness.data.random_access import I64

_UNITS = 1 << 20  # probabilities are rounded to multiples of 2^-20, so that positions may reach 2^42


class Mixture:
    """The order of some sources with given probabilities, which add up to 1."""

    def __init__(self, probabilities: Sequence[float]) -> None:
        units = [max(1, round(probability * _UNITS)) for probability in probabilities]
        self._quotas = [(units[number], sum(units[number:])) for number in range(len(units))]

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """(source number, how many earlier positions have the same source) at every position."""
        source_of, rank = np.full_like(positions, len(self._quotas) - 1), positions.copy()
        left = np.arange(len(positions))
        for number, (units, total) in enumerate(self._quotas[:-1]):
            before = _taken(rank[left], units, total)
            takes = _taken(rank[left] + 1, units, total) > before
            source_of[left[takes]] = number
            rank[left[~takes]] -= before[~takes]
            rank[left[takes]] = before[takes]
            left = left[~takes]
        return source_of, rank

    def counts(self, num_positions: int) -> list[int]:
        """How many of the first positions each source has."""
        counts, left = [], num_positions
        for units, total in self._quotas:
            counts.append((left * units + total // 2) // total)
            left -= counts[-1]
        return counts


def _taken(positions: I64, units: int, total: int) -> I64:
    """How many of the first positions a source with `units` of `total` takes."""
    return (positions * units + total // 2) // total
