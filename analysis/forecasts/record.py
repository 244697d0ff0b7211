"""How forecasts at a distance fared on public tables: the record that every forecast is told with.

`record.csv` is written by `aimscale board` and comes with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

RECORD = Path(__file__).with_name("record.csv")
BINS = (1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
"""Distances, in factors beyond the table, between which forecasts are counted together."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Forecasts of one range of distances; every table counts alike."""

    low: float
    high: float
    """Factors beyond the largest compute."""
    num_tables: int
    inside: float
    """Share of losses inside their 95 % intervals."""
    error: float
    """Mean absolute error of ln loss."""
    accuracy_inside: float
    """Share of accuracies inside their intervals."""
    accuracy_error: float
    """Mean absolute error of accuracies, as fractions."""


@cache
def records() -> tuple[Record, ...]:
    """The record that comes with the package, nearest first."""
    rows = pd.read_csv(RECORD, comment="#").to_dict("records")
    return tuple(Record(**{str(k): v for k, v in row.items()}) for row in rows)


def record(distance: float) -> Record | None:
    """The record at a distance; of the farthest range beyond it, None inside the table."""
    if distance <= BINS[0]:
        return None
    return next((each for each in records() if distance <= each.high), records()[-1])
