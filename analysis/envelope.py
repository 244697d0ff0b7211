"""Approach 1: the lower envelope of all training curves says which size is best at each budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.bootstrap import interval
from analysis.errors import AnalysisError
from analysis.frontier import Frontier, cost_of, log_line, points_of
from analysis.isoflop import loss_along
from analysis.law import Array
from analysis.result import Interval


def envelope_frontier(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    num_budgets: int = 200,
    resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Frontier:
    """Compute-optimal size by the envelope of training curves.

    Every size's best losses at its budgets are joined by straight lines in log-log; at each of `num_budgets` budgets
    the size of the lowest curve is read off, where at least three curves exist and the lowest is neither the smallest nor
    the largest of them (nothing lies beyond these). The interval resamples whole curves.

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
    low, high = interval(draws[:, 1], level)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    table.insert(2, "D", cost.samples(table["C"].to_numpy(), table["N"].to_numpy()))
    return Frontier(
        approach=1,
        method=f"lower envelope of {len(curves)} training curves at {len(table)} budgets",
        exponent=a,
        exponent_interval=Interval(
            low=low,
            high=high,
            level=level,
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
