"""The cost of training as a table has it, C = kappa N^(1+s) D, and the points that a frontier is drawn from.

So 6ND (s = 0, kappa = 6) and counted FLOPs (attention, head and patches included; kappa holds the tokens per image) go
through the same algebra, as do the three meanings of N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.table.points import resolve_columns, usable_rows


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Training FLOPs as C = kappa N^(1 + s) D."""

    kappa: float
    """FLOPs per parameter and sample at N = 1."""
    s: float
    """Excess over 1 of the exponent of N in the FLOPs of a sample; 0 for 6ND."""

    def samples(self, flops: Array, num_params: Array) -> Array:
        """Return the D that a budget buys at a size."""
        return flops / (self.kappa * num_params ** (1 + self.s))

    def flops(self, num_params: Array, samples: Array) -> Array:
        """Return the C of training a size on so many samples."""
        return self.kappa * num_params ** (1 + self.s) * samples


def cost_of(points: pd.DataFrame) -> Cost:
    """Fit kappa and s to the N, D and C of points."""
    log_n, log_d, log_c = np.log(points[["N", "D", "C"]].to_numpy(float)).T
    per_sample = log_c - log_n - log_d
    is_flat = np.ptp(log_n) == 0 or np.ptp(per_sample) < 1e-9
    s, intercept = (0.0, per_sample.mean()) if is_flat else np.polyfit(log_n, per_sample, 1)
    return Cost(kappa=float(np.exp(intercept)), s=float(s))


def points_of(df: pd.DataFrame, y: str, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Take N, D, C and loss of the usable rows, under these names, with the columns that tell sizes and runs apart."""
    columns = columns or {}
    found = resolve_columns(CHINCHILLA, df, {v: columns[v] for v in ("N", "D") if v in columns})
    found["C"] = columns.get("C", "C" if "C" in df.columns else "flops_train")
    used = usable_rows(df, {**found, "loss": y}, best_by="loss")
    if used.numbers.empty:
        raise AnalysisError("No row of the table has positive N, D, C and loss, so there is no frontier to draw.")
    return used.numbers.assign(**{name: used.rows[name] for name in ("size", "run_id", "seed") if name in df.columns})
