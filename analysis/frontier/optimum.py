"""The cost of training as a table has it, and the size at which a law is lowest for a budget of compute.

The cost is C = kappa N^(1+s) D, so that 6ND (s = 0, kappa = 6) and counted FLOPs (attention, head and patches included;
kappa holds the tokens per image) go through the same algebra; so do the three meanings of N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.table.names import no_column
from aimscale.analysis.table.points import resolve_columns, usable_rows

REACH = 100.0
"""A law is minimised within this factor of the measured sizes."""
GRID = 61
"""Sizes at which a law is evaluated; four times, each about the last lowest."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Training FLOPs as C = kappa N^(1 + s) D."""

    kappa: float
    """FLOPs per parameter and sample at N = 1."""
    s: float
    """How much faster than N the FLOPs of a sample grow; 0 for 6ND."""

    def samples(self, flops: Array, num_params: Array) -> Array:
        """D that the budget buys at a size."""
        return flops / (self.kappa * num_params ** (1 + self.s))

    def flops(self, num_params: Array, samples: Array) -> Array:
        """C of training a size on so many samples."""
        return self.kappa * num_params ** (1 + self.s) * samples


def cost_of(num_params: Array, samples: Array, flops: Array) -> Cost:
    """Fit kappa and s to a table's N, D and C."""
    per_sample = np.log(flops / (num_params * samples))
    if np.ptp(np.log(num_params)) == 0 or np.ptp(per_sample) < 1e-9:
        s, intercept = 0.0, float(np.mean(per_sample))
    else:
        s, intercept = (float(v) for v in np.polyfit(np.log(num_params), per_sample, 1))
    return Cost(kappa=float(np.exp(intercept)), s=s)


def points_of(df: pd.DataFrame, y: str, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """N, D, C and loss of the usable rows, under these names, with what tells sizes and runs apart (index kept).

    Raises:
        AnalysisError: a column is missing or no row is left.
    """
    given = {v: name for v, name in (columns or {}).items() if v in ("N", "D")}
    found = resolve_columns(CHINCHILLA, df, given)
    found["C"] = (columns or {}).get("C", "C" if "C" in df.columns else "flops_train")
    for name in (found["C"], y):
        if name not in df.columns:
            raise no_column(df, name)
    used = usable_rows(df, {**found, "loss": y})
    if used.numbers.empty:
        raise AnalysisError("No row of the table has positive N, D, C and loss, so there is no frontier to draw.")
    return used.numbers.assign(**{name: used.rows[name] for name in ("size", "run_id", "seed") if name in df.columns})


def optimum_of(p: Mapping[str, Array], cost: Cost) -> tuple[Array, Array]:
    """(ln k, a) of N*(C): set to zero the derivative of A N^-alpha + B (C / kappa)^-beta N^((1+s) beta)."""
    grow = (1 + cost.s) * p["beta"]
    a = p["beta"] / (p["alpha"] + grow)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_g = (np.log(p["alpha"] * p["A"]) - np.log(grow * p["B"])) / (p["alpha"] + grow)
    return log_g - a * np.log(cost.kappa), a


def sizes_along(law: Law, params: Mapping[str, Array], cost: Cost, flops: Array, sizes: tuple[float, float]) -> Array:
    """ln N* (num, m) at budgets (m,) by any law of N, D, C, U (new data: U = D), for parameters (num,).

    Args:
        sizes: the smallest and largest measured N. Only an interior minimum within `REACH` of them counts: the lowest
            of several, NaN without one.
    """
    low, high = np.log(sizes[0] / REACH), np.log(sizes[1] * REACH)
    num = max(np.size(value) for value in params.values())
    out = np.empty((num, len(flops)))
    for k, c in enumerate(flops):
        x = np.broadcast_to(np.linspace(low, high, GRID), (num, GRID))
        lost = np.zeros(num, bool)
        for _ in range(4):
            n, step = np.exp(x), x[:, 1] - x[:, 0]
            d = cost.samples(c, n)
            with np.errstate(all="ignore"):
                loss = law.value(Columns({"N": n, "D": d, "U": d, "C": np.full_like(n, c)}), params)
            inner = loss[:, 1:-1]
            bottom = np.where((inner < loss[:, :-2]) & (inner <= loss[:, 2:]), inner, np.inf)
            lost |= ~np.isfinite(bottom).any(axis=1)
            centre = x[np.arange(num), 1 + bottom.argmin(axis=1)]
            x = centre[:, None] + step[:, None] * np.linspace(-1, 1, GRID)
        out[:, k] = np.where(lost, np.nan, centre)
    return out
