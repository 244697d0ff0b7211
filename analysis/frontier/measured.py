"""Approaches 1 and 2: the best size of every budget from measured losses, and a line through these.

Approach 1 joins every size's losses at its budgets by straight lines in log-log; about the lowest of these curves at a
budget, the best size is where the parabola in ln N through it and its two neighbours has its minimum. (A line through
the lowest sizes themselves, a staircase whose first and last steps are cut off, errs by half of the exponent where five
sizes were trained.) Approach 2 takes a least-squares parabola in ln N through the points of each budget. The interval
of either is a parametric bootstrap: a cubic surface in ln N and ln D (quadratic with few points), fitted with its
errors of sizes, runs and points, is simulated through the table's own rows, and how far what an approach finds there
scatters is its error. No law is assumed, and interpolated budgets count for no more than the rows behind them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from aimscale.analysis.fitting.errors import components_of
from aimscale.analysis.fitting.groups import groups_of, with_spread
from aimscale.analysis.fitting.result import interval
from aimscale.analysis.frontier.budgets import FOUND, MIN_SIZES, REFUSED, Budget, interpolated, shared_budgets
from aimscale.analysis.frontier.optimum import cost_of, points_of
from aimscale.analysis.frontier.result import Frontier, NoFrontier
from aimscale.analysis.laws.base import Array
from aimscale.analysis.words import Flag

NUM_BUDGETS = 200
"""Budgets at which approach 1 reads its envelope."""
MIN_USABLE = 0.5
"""Share of simulated tables on which an approach must work for its errors to be told from them."""
MIN_LEFT = 3
"""Budgets, and points beyond a surface's terms, that must remain."""
MIN_CUBIC = 30
"""Points from which on the surface is cubic; the quadratic one misfits, so its intervals are wide."""


def envelope_frontier(df: pd.DataFrame, *, y: str = "val_loss", resamples: int = 500) -> Frontier:
    """Approach 1: compute-optimal size by the envelope of training curves, read at `NUM_BUDGETS` budgets.

    Args:
        resamples: simulated tables, from which the interval is read.

    Raises:
        NoFrontier: fewer than three sizes were measured at two budgets or more, or the envelope never changes hands.
        AnalysisError: a column is missing.
    """
    points = points_of(df, y)
    num_curves = len(points[["N", "C"]].drop_duplicates().loc[lambda cells: cells.duplicated("N"), "N"].unique())
    if num_curves < MIN_SIZES[1]:
        raise NoFrontier(Flag(kind="few_curves", number=num_curves))
    found = _frontier(points, interpolated(points, NUM_BUDGETS), 1, resamples)
    sizes = np.log(np.unique(points["N"]))
    nearest = np.abs(np.log(found.pairs["N"].to_numpy())[:, None] - sizes).argmin(axis=1)
    if len(np.unique(nearest)) < 2:
        raise NoFrontier(Flag(kind="one_size"))
    method = f"lower envelope of {num_curves} training curves at {len(found.pairs)} budgets"
    return replace(found, method=method, refusals=())


def isoflop_frontier(df: pd.DataFrame, *, y: str = "val_loss", resamples: int = 500) -> Frontier:
    """Approach 2: compute-optimal size by a parabola at each budget that sizes share; arguments as of approach 1.

    Raises:
        NoFrontier: fewer than two budgets with an interior, convex minimum; each refused budget is a flag.
        AnalysisError: a column is missing.
    """
    points = points_of(df, y)
    found = _frontier(points, shared_budgets(points), 2, resamples)
    num = len(found.pairs) + len(found.refusals)
    method = f"parabolas in ln N at {len(found.pairs)} of {num} budgets, then a plain line"
    return replace(found, method=method, left_out=without_budgets(found.pairs))


def _frontier(points: pd.DataFrame, budgets: list[Budget], approach: int, num: int) -> Frontier:
    """The line through the minima of all budgets that have one, with its interval from `num` simulated tables."""
    log_losses = np.log(points["loss"].to_numpy())[None]
    rows, accepted, refusals = [], [], []
    for budget in budgets:
        [log_n], [loss], [why] = budget.minima(log_losses, approach)
        if why == FOUND:
            rows.append({"C": budget.flops, "N": float(np.exp(log_n)), "loss": float(loss)})
            accepted.append(budget)
        else:
            kind, subject = REFUSED[int(why)]
            refusals.append(Flag(kind=kind, subject=subject, number=budget.flops))
    if len(rows) < 2:
        raise NoFrontier(Flag(kind="few_minima", number=len(rows)), *refusals)
    pairs = pd.DataFrame(rows)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    pairs.insert(2, "D", cost.samples(pairs["C"].to_numpy(), pairs["N"].to_numpy()))
    log_c = np.log(pairs["C"].to_numpy())
    [line] = _lines_through(log_c, np.log(pairs["N"].to_numpy())[None])
    errors, method = np.full((1, 2), np.nan), "no interval: no tables were simulated"
    if (tables := _simulated(points, num)) is not None:
        lines = _lines_through(log_c, np.stack([each.minima(tables, approach)[0] for each in accepted], axis=1))
        known = np.isfinite(lines[1:] - lines[0]).all(axis=1)
        method = "no interval: most simulated tables have no frontier"
        if known.mean() >= MIN_USABLE:
            errors, method = (lines[1:] - lines[0])[known], f"{known.sum()} tables simulated through this design"
    draws = line - errors
    return Frontier(
        approach=approach,
        method="",
        exponent=float(line[1]),
        exponent_interval=replace(interval(draws[:, 1]), method=method),
        log_k=float(line[0]),
        draws=draws,
        cost=cost,
        pairs=pairs,
        refusals=tuple(refusals),
        range=(float(pairs["C"].min()), float(pairs["C"].max())),
    )


def _simulated(points: pd.DataFrame, num: int) -> Array | None:
    """ln losses (1 + num, n) of tables by a polynomial of ln N and ln D, the first without errors; None with too few
    points."""
    x = {v: points[v].to_numpy(float) for v in ("N", "D")}
    n, d = (np.log(each) - np.log(each).mean() for each in x.values())
    degree = 3 if len(n) >= MIN_CUBIC else 2
    design = np.column_stack([n**i * d**j for i in range(4) for j in range(4 - i) if i + j <= degree])
    if num == 0 or np.linalg.matrix_rank(design) < design.shape[1] or len(n) < design.shape[1] + MIN_LEFT:
        return None
    log_loss, weights = np.log(points["loss"].to_numpy()), np.ones(len(points))
    clean = design @ np.linalg.lstsq(design, log_loss, rcond=None)[0]
    groups, _ = with_spread(groups_of(points, x), design)
    errors = components_of(design, log_loss - clean, weights, groups)
    return clean + np.insert(errors.simulate(weights, groups, num, np.random.default_rng([0, 3])), 0, 0.0, axis=0)


def _lines_through(log_c: Array, log_n: Array) -> Array:
    """(ln k, a) of least-squares lines (num, 2) through the finite of (num, m) optima at m budgets; NaN below two."""
    weight = np.isfinite(log_n).astype(float)
    y = np.nan_to_num(log_n)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y = ((weight * each).sum(axis=1) / weight.sum(axis=1) for each in (log_c, y))
        dx = weight * (log_c - mean_x[:, None])
        spread = (dx**2).sum(axis=1)
        slope = np.where(spread > 0, (dx * y).sum(axis=1) / spread, np.nan)
    return np.stack([mean_y - slope * mean_x, slope], axis=1)


def without_budgets(pairs: pd.DataFrame) -> pd.DataFrame:
    """The exponent of the line through the optima without some: each budget in turn, the two largest, the two smallest.

    Returns:
        Columns: which (`one`, `largest two`, `smallest two`), budgets (the C left out), exponent; no row where fewer
        than three would remain.
    """
    log_c, log_n = np.log(pairs.sort_values("C")[["C", "N"]].to_numpy()).T
    subsets = [("one", [k]) for k in range(len(log_c))]
    subsets += [("largest two", [len(log_c) - 2, len(log_c) - 1]), ("smallest two", [0, 1])]
    rows = []
    for which, subset in subsets:
        x, y = np.delete(log_c, subset), np.delete(log_n, subset)
        if len(x) >= MIN_LEFT:
            budgets = [float(np.exp(log_c[k])) for k in subset]
            rows.append({"which": which, "budgets": budgets, "exponent": float(np.polyfit(x, y, 1)[0])})
    return pd.DataFrame(rows, columns=["which", "budgets", "exponent"])
