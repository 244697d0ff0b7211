"""Approach 1: the lower envelope of all training curves says which size is best at each budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.frontier.isoflop import loss_along
from aimscale.analysis.frontier.optimum import Frontier, cost_of, log_line, points_of
from aimscale.analysis.frontier.simulated import corrected, interval_of, lines_through, simulate
from aimscale.analysis.laws.base import Array

NUM_BUDGETS = 200


def envelope_frontier(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> Frontier:
    """Compute-optimal size by the envelope of training curves.

    Every size's best losses at its budgets are joined by straight lines in log-log; at each of `NUM_BUDGETS` budgets
    the lowest curve is read off, where at least three curves exist and the lowest is neither that of the smallest size
    nor that of the largest (nothing lies beyond these). The best size lies about the lowest curve's: where the parabola
    in ln N through that curve and its two neighbours has its minimum. (A line through the lowest sizes themselves, a
    staircase whose first and last steps are cut off, errs by half of the exponent where five sizes were trained.) The
    interval comes from tables simulated through this design.

    Raises:
        AnalysisError: fewer than three sizes were measured at two budgets or more, or the envelope never changes hands.
    """
    points = points_of(df, y=y, columns=columns)
    grid = np.geomspace(points["C"].min(), points["C"].max(), NUM_BUDGETS)
    curves = Curves.of(points, grid)
    if len(curves.sizes) < 3:
        raise AnalysisError(
            f"Approach 1 needs 3 sizes measured at two budgets or more; the table has {len(curves.sizes)}."
        )
    best, loss = curves.lowest(np.log(points["loss"].to_numpy())[None])
    seen = np.isfinite(best[0])
    nearest = np.abs(best[0, seen][:, None] - np.log(curves.sizes)).argmin(axis=1)
    if len(np.unique(nearest)) < 2:
        raise AnalysisError("One size is lowest at every budget where curves overlap, so approach 1 sees no frontier.")
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    table = pd.DataFrame({"C": grid, "N": np.exp(best[0]), "loss": loss[0], "log_N_std": np.nan})[seen]
    table.insert(2, "D", cost.samples(table["C"].to_numpy(), table["N"].to_numpy()))
    line = log_line(table["C"].to_numpy(), table["N"].to_numpy())
    tables = simulate(points, cost, resamples, seed) if resamples else None
    found = None
    if tables is not None:
        lines = lines_through(np.log(grid), curves.lowest(tables.log_losses)[0])
        found = corrected(line, lines, tables.optima)
    draws, bias = (np.full((1, 2), np.nan), None) if found is None else found
    method = NO_LAW if found is None else f"{len(draws)} tables simulated through this design by the joint law"
    return Frontier(
        approach=1,
        method=f"lower envelope of {len(curves.sizes)} training curves at {len(table)} budgets",
        exponent=line[1],
        exponent_interval=interval_of(draws, method),
        bias=bias,
        log_k=line[0],
        draws=draws,
        cost=cost,
        pairs=table,
        refusals=(),
        range=(float(table["C"].min()), float(table["C"].max())),
        law=loss_along(table.iloc[np.unique(nearest, return_index=True)[1]]),
    )


NO_LAW = "no interval: the joint law, through which this design is simulated, cannot be fitted to the table"


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Training curves of all sizes on a common grid of budgets, as a function of the table's losses."""

    sizes: Array
    """N of each curve (m,), ascending."""
    cells: tuple[tuple[Array, ...], ...]
    """For each curve, the rows measured at each of its budgets."""
    blends: tuple[Array, ...]
    """For each curve, its ln loss on the grid as a blend (num_budgets, budgets of the curve); NaN outside of it."""

    @staticmethod
    def of(points: pd.DataFrame, grid: Array) -> Curves:
        """Curves of the sizes measured at two budgets or more."""
        sizes, cells, blends = [], [], []
        numbered = points.assign(row=np.arange(len(points)))
        for size, group in numbered.groupby("N"):
            rows = [each["row"].to_numpy() for _, each in group.groupby("C")]
            if len(rows) < 2:
                continue
            own = np.log(np.unique(group["C"]))
            sizes.append(float(size))  # type: ignore[arg-type]
            cells.append(tuple(rows))
            blends.append(
                np.array([np.interp(np.log(grid), own, unit, left=np.nan, right=np.nan) for unit in np.eye(len(own))]).T
            )
        return Curves(sizes=np.array(sizes), cells=tuple(cells), blends=tuple(blends))

    def lowest(self, log_losses: Array) -> tuple[Array, Array]:
        """ln N (num, num_budgets) of the minimum about the lowest curve of tables (num, n), and the loss there; NaN
        where the lowest curve is an outer one."""
        curves = []
        for rows, blend in zip(self.cells, self.blends, strict=True):
            best = np.stack([log_losses[:, each].min(axis=1) for each in rows], axis=1)
            curves.append(best @ blend.T)
        losses = np.stack(curves, axis=1)  # (num, m, num_budgets)
        log_n, loss = np.full((2, len(losses), losses.shape[2]), np.nan)
        for k, present in enumerate(np.isfinite(losses[0]).T):
            if present.sum() >= 3:
                log_n[:, k], loss[:, k] = about_lowest(np.log(self.sizes[present]), losses[:, present, k])
        return log_n, np.exp(loss)


def about_lowest(x: Array, y: Array) -> tuple[Array, Array]:
    """Minima (num,), at and of, of the parabolas through the lowest of y (num, m) at x (m,) and its two neighbours.

    NaN where the first or the last is lowest.
    """
    lowest, rows = np.argmin(y, axis=1), np.arange(len(y))
    middle = np.clip(lowest, 1, len(x) - 2)
    (x0, y0), (x1, y1), (x2, y2) = ((x[middle + step], y[rows, middle + step]) for step in (-1, 0, 1))
    # a parabola has the slopes of its chords half-way along them: falling before the lowest, rising after
    fall, rise = (y0 - y1) / (x1 - x0), (y2 - y1) / (x2 - x1)
    with np.errstate(invalid="ignore", divide="ignore"):
        at = (x0 + x1) / 2 + fall / (fall + rise) * (x2 - x0) / 2
        least = y1 - (fall + rise) / (x2 - x0) * (at - x1) ** 2
    inner = lowest == middle
    return np.where(inner, at, np.nan), np.where(inner, least, np.nan)
