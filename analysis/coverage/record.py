"""Counting: does an interval hold the truth, how wide is it beside the spread of its estimate?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

NORMAL_95 = 1.959964


@dataclass
class Record:
    """Intervals of many simulated tables, by the name of what they are of."""

    entries: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=lambda: defaultdict(list))
    """Name -> (low, high, estimate, truth) of every table."""
    verdicts: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    """Name -> whether a verdict was right, table by table."""

    def add(self, name: str, low: float, high: float, estimate: float, truth: float) -> None:
        """One interval; one without ends counts as missing the truth."""
        self.entries[name].append((low, high, estimate, truth))

    def judge(self, name: str, right: bool) -> None:
        """One verdict."""
        self.verdicts[name].append(right)

    def table(self) -> pd.DataFrame:
        """One row a name: interval, tables, coverage, width (median width over that of 1.96 standard deviations of the
        estimate each way; NaN for prediction intervals, whose estimate is not what scatters)."""
        rows = []
        for name, entries in self.entries.items():
            low, high, estimate, truth = np.array(entries, float).T
            held = (low <= truth) & (truth <= high)
            spread = np.std(estimate - truth) if np.ptp(truth) == 0 else np.nan
            width = np.nanmedian(high - low) / (2 * NORMAL_95 * spread) if spread > 0 else np.nan
            rows.append({"interval": name, "tables": len(held), "coverage": held.mean(), "width": width})
        rows += [
            {"interval": name, "tables": len(right), "coverage": np.mean(right), "width": np.nan}
            for name, right in self.verdicts.items()
        ]
        return pd.DataFrame(rows)
