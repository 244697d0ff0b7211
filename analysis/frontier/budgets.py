"""Budgets of compute in a table: which rows share one, and the best size of each from its measured losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.frontier.optimum import points_of
from aimscale.analysis.laws.base import Array

TOLERANCE = 0.1
"""Rows whose C differ by less than this fraction share a budget."""
WINDOW = 8.0
"""Only points within this factor of the best measured N enter a parabola of approach 2: far from its minimum an
iso-FLOP curve is none, and its skew would move the vertex."""
MIN_SIZES = {1: 3, 2: 4}
"""Sizes that a parabola needs: exactly through three, or with an error."""
FOUND, FEW, SMALLEST, LARGEST, CONCAVE, OUTSIDE = range(6)
REFUSED = {
    FEW: ("few_sizes", ""),
    SMALLEST: ("edge", "smallest"),
    LARGEST: ("edge", "largest"),
    CONCAVE: ("not_convex", ""),
    OUTSIDE: ("outside", ""),
}
"""Why a budget has no minimum: kind and subject of its flag."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The points of one budget, as a function of the table's losses."""

    flops: float
    num_params: Array
    """N of each point (m,)."""
    rows: Array
    """Rows of the table (m,), where its points stand at this budget."""
    blend: Array | None = None
    """Where sizes are interpolated: ln loss of each as a blend (m, n) of all rows'."""

    def minima(self, log_losses: Array, approach: int) -> tuple[Array, Array, Array]:
        """ln N* (num,), the loss there (both NaN where there is none) and why not (num,), of tables (num, n)."""
        x, losses = (
            np.log(self.num_params),
            log_losses[:, self.rows] if self.blend is None else log_losses @ self.blend.T,
        )
        losses = np.exp(losses) if approach == 2 else losses
        at, value = np.full((2, len(losses)), np.nan)
        why = np.full(len(losses), FEW)
        if len(np.unique(x)) < MIN_SIZES[approach]:
            return at, value, why
        lowest = np.argmin(losses, axis=1)
        for i in np.unique(lowest):
            rows = lowest == i
            if x[i] in (x.min(), x.max()):
                why[rows] = SMALLEST if x[i] == x.min() else LARGEST
                continue
            close = np.abs(np.arange(len(x)) - i) <= 1 if approach == 1 else np.abs(x - x[i]) <= np.log(WINDOW)
            if len(np.unique(x[close])) < MIN_SIZES[approach]:
                continue
            centre = x[close].mean()
            c2, c1, c0 = np.polyfit(x[close] - centre, losses[np.ix_(rows, close)].T, 2)
            with np.errstate(divide="ignore", invalid="ignore"):
                top, least = centre - c1 / (2 * c2), c0 - c1 * c1 / (4 * c2)
            inside = (top > x[close].min()) & (top < x[close].max())
            why[rows] = np.where(c2 <= 0, CONCAVE, np.where(inside, FOUND, OUTSIDE))
            found = why[rows] == FOUND
            at[rows], value[rows] = np.where(found, top, np.nan), np.where(found, least, np.nan)
        return at, np.exp(value) if approach == 1 else value, why


def isoflop_points(points: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    """(budget, its rows) of a table, by rows that share a C.

    The budgets that most sizes share are taken first: a table that holds a grid of (N, D) beside its iso-FLOP runs has
    rows at nearly every C, and chained by nearness they would all be one budget.
    """
    ordered = points.sort_values("C")
    log_c, num_params = np.log(ordered["C"].to_numpy()), ordered["N"].to_numpy()
    half = np.log1p(TOLERANCE) / 2
    starts, ends = np.searchsorted(log_c, log_c - half), np.searchsorted(log_c, log_c + half, side="right")
    group = np.full(len(log_c), -1)
    sizes = np.array([len(np.unique(num_params[a:b])) for a, b in zip(starts, ends, strict=True)])
    spread = np.array([np.ptp(log_c[a:b]) for a, b in zip(starts, ends, strict=True)])
    for number, i in enumerate(np.lexsort((log_c, spread, -sizes))):
        if group[i] < 0:
            rows = np.arange(starts[i], ends[i])
            group[rows[group[rows] < 0]] = number
    found = [(float(np.exp(log_c[group == k].mean())), ordered[group == k]) for k in np.unique(group)]
    return sorted(found, key=lambda pair: pair[0])


def shared_budgets(points: pd.DataFrame) -> list[Budget]:
    """The table's own budgets."""
    numbered = points.assign(row=np.arange(len(points)))
    return [
        Budget(flops=flops, num_params=group["N"].to_numpy(), rows=group["row"].to_numpy())
        for flops, group in isoflop_points(numbered)
    ]


def interpolated(points: pd.DataFrame, num: int) -> list[Budget]:
    """`num` budgets that every size's curve is interpolated to, by straight lines in log-log, seeds averaged."""
    numbered = points.assign(row=np.arange(len(points)))
    grid = np.geomspace(points["C"].min(), points["C"].max(), num)
    sizes, blends = [], []
    for size, group in numbered.groupby("N"):
        own = np.unique(group["C"])
        if len(own) < 2:
            continue
        blend = np.zeros((num, len(points)))
        for flops, unit in zip(own, np.eye(len(own)), strict=True):
            rows = group.loc[group["C"] == flops, "row"].to_numpy()
            share = np.interp(np.log(grid), np.log(own), unit, left=np.nan, right=np.nan)
            blend[:, rows] = share[:, None] / len(rows)
        sizes.append(size)
        blends.append(blend)
    out = []
    for flops, blend in zip(grid, np.stack(blends, axis=1), strict=True):
        here = np.isfinite(blend).all(axis=1)
        budget = Budget(flops=float(flops), num_params=np.array(sizes)[here], rows=np.array([], int), blend=blend[here])
        out += [budget] if here.any() else []
    return out


ISOFLOP_SHARE = 0.75
"""Share of a table's rows that budgets of three sizes or more must hold in an iso-FLOP design."""


def isoflop_budgets(points: pd.DataFrame) -> pd.Series | None:
    """The budget of compute of every row (as `points` are indexed) where runs were planned by budgets of compute.

    Few distinct C with several N each: rows within `TOLERANCE` of one C are a budget; three quarters of the rows
    belong to budgets of three sizes or more, of which there are at least two; and there are fewer budgets than
    distinct D (in a grid of sizes and data, rows of equal C lie on its diagonals, and D takes fewer values).
    None for any other design.
    """
    found = isoflop_points(points)
    shared = [rows for _, rows in found if rows["N"].nunique() >= MIN_SIZES[1]]
    num_d = len(np.unique(np.round(np.log(points["D"].to_numpy(float)) / np.log1p(TOLERANCE))))
    if len(shared) < 2 or sum(map(len, shared)) < ISOFLOP_SHARE * len(points) or len(found) >= num_d:
        return None
    return pd.concat([pd.Series(flops, index=rows.index) for flops, rows in found]).loc[points.index]


def with_budgets(df: pd.DataFrame, y: str, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table with the budget of every row as its C where it is of iso-FLOP design; else the table itself.

    Runs of one budget differ in C by less than what tells budgets apart; held out by C, they belong together.
    """
    try:
        found = isoflop_budgets(points_of(df, y, columns))
    except AnalysisError:  # no C, or nothing usable: no such design
        return df
    return df if found is None else df.assign(C=found)
