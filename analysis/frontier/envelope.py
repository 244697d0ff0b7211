"""Approach 1: the lower envelope of all training curves says which size is best at each budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.bootstrap import interval
from aimscale.analysis.fitting.result import Interval
from aimscale.analysis.frontier.isoflop import loss_along
from aimscale.analysis.frontier.optimum import Frontier, cost_of, log_line, points_of
from aimscale.analysis.laws.base import Array


def envelope_frontier(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    num_budgets: int = 200,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Frontier:
    """Compute-optimal size by the envelope of training curves.

    Every size's best losses at its budgets are joined by straight lines in log-log; at each of `num_budgets` budgets
    the size of the lowest curve is read off, where at least three curves exist and the lowest is neither the smallest
    nor the largest of them (nothing lies beyond these). The interval resamples whole curves.

    Raises:
        AnalysisError: fewer than three sizes were measured at two budgets or more, or the envelope never changes hands.
    """
    points = points_of(df, y=y, columns=columns)
    curves = []
    for _, group in points.groupby("N"):
        best = group.groupby("C")["loss"].min().sort_index()
        if len(best) > 1:
            curves.append((float(group["N"].iloc[0]), np.log(best.index.to_numpy(float)), np.log(best.to_numpy(float))))
    if len(curves) < 3:
        raise AnalysisError(f"Approach 1 needs 3 sizes measured at two budgets or more; the table has {len(curves)}.")
    grid = np.geomspace(points["C"].min(), points["C"].max(), num_budgets)
    table = lowest(curves, grid)
    if len(table["N"].unique()) < 2:
        raise AnalysisError("One size is lowest at every budget where curves overlap, so approach 1 sees no frontier.")
    log_k, a = log_line(table["C"].to_numpy(), table["N"].to_numpy())
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(resamples):
        drawn = [curves[i] for i in np.unique(rng.integers(0, len(curves), len(curves)))]
        again = lowest(drawn, grid)
        if len(drawn) >= 3 and len(again["N"].unique()) > 1:
            lines.append(log_line(again["C"].to_numpy(), again["N"].to_numpy()))
    draws = np.array(lines) if lines else np.array([[np.nan, np.nan]])
    low, high = interval(draws[:, 1], confidence)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    table.insert(2, "D", cost.samples(table["C"].to_numpy(), table["N"].to_numpy()))
    return Frontier(
        approach=1,
        method=f"lower envelope of {len(curves)} training curves at {len(table)} budgets",
        exponent=a,
        exponent_interval=Interval(
            low=low,
            high=high,
            confidence=confidence,
            method=f"bootstrap over curves, {len(lines)} of {resamples} usable resamples",
        ),
        log_k=log_k,
        draws=draws,
        cost=cost,
        pairs=table,
        refusals=(),
        range=(float(table["C"].min()), float(table["C"].max())),
        law=loss_along(table.drop_duplicates("N")),
    )


def lowest(curves: list[tuple[float, Array, Array]], grid: Array) -> pd.DataFrame:
    """C, N, loss, log_N_std of the lowest curve at each budget, interior ones only."""
    log_c = np.log(grid)
    losses = np.array([np.interp(log_c, c, v, left=np.inf, right=np.inf) for _, c, v in curves])
    sizes = np.array([n for n, _, _ in curves])
    present = np.isfinite(losses)
    best = np.argmin(losses, axis=0)
    smallest = np.where(present, sizes[:, None], np.inf).min(axis=0)
    largest = np.where(present, sizes[:, None], -np.inf).max(axis=0)
    interior = (present.sum(axis=0) >= 3) & (sizes[best] > smallest) & (sizes[best] < largest)
    loss = np.exp(losses[best, np.arange(len(grid))])
    return pd.DataFrame({"C": grid, "N": sizes[best], "loss": loss, "log_N_std": np.nan})[interior]


@dataclass(frozen=True, kw_only=True)
class LowerEdge:
    """A power law y = k x^-a along the lower edge of a cloud of points."""

    coefficient: float
    """k."""
    exponent: float
    """a, positive where y falls."""
    exponent_interval: Interval
    """Its confidence interval."""
    draws: Array = field(repr=False)
    """Bootstrap draws (num_resamples, 2) of (ln k, -a)."""
    num_points: int
    """Points of the cloud."""
    num_bins: int
    """Bins of ln x whose lowest y was used."""
    range: tuple[float, float]
    """Smallest and largest x."""

    def predict(self, x: Any) -> pd.DataFrame:
        """value, ci_lo, ci_hi and beyond_range at x."""
        x = np.atleast_1d(np.asarray(x, float))
        confidence = self.exponent_interval.confidence
        curves = np.exp(self.draws[:, :1] + self.draws[:, 1:] * np.log(x))
        low, high = np.percentile(curves, [50 * (1 - confidence), 50 * (1 + confidence)], axis=0)
        beyond = np.maximum(1.0, np.maximum(x / self.range[1], self.range[0] / x))
        value = self.coefficient * x**-self.exponent
        return pd.DataFrame({"value": value, "ci_lo": low, "ci_hi": high, "beyond_range": beyond})


def lower_edge(
    x: Array, y: Array, *, num_bins: int = 5, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> LowerEdge:
    """Power law through the lowest y of each of `num_bins` equal bins of log x, placed at the bins' centres.

    (Cherti et al. 2023; the bins end 0.1 decades above the largest x, as theirs do.) The interval resamples points.

    Raises:
        AnalysisError: fewer than two bins hold a point.
    """
    log_x, log_y = np.log10(np.asarray(x, float)), np.log10(np.asarray(y, float))
    edges = np.linspace(log_x.min(), log_x.max() + 0.1, num_bins + 1)

    def line(rows: Array) -> tuple[float, float] | None:
        member = np.digitize(log_x[rows], edges) - 1
        filled = np.unique(member)
        if len(filled) < 2:
            return None
        centres = (edges[filled] + edges[filled + 1]) / 2
        slope, intercept = np.polyfit(centres, [log_y[rows][member == b].min() for b in filled], 1)
        return float(intercept * np.log(10)), float(slope)

    best = line(np.arange(len(log_x)))
    if best is None:
        raise AnalysisError(f"Only one of {num_bins} bins holds points, so the lower edge has no slope.")
    rng = np.random.default_rng(seed)
    found = [line(rng.integers(0, len(log_x), len(log_x))) for _ in range(resamples)]
    draws = np.array([row for row in found if row is not None])
    low, high = interval(-draws[:, 1], confidence)
    return LowerEdge(
        coefficient=float(np.exp(best[0])),
        exponent=-best[1],
        exponent_interval=Interval(
            low=low, high=high, confidence=confidence, method=f"bootstrap over points, {resamples} resamples"
        ),
        draws=draws,
        num_points=len(log_x),
        num_bins=num_bins,
        range=(float(10 ** log_x.min()), float(10 ** log_x.max())),
    )
