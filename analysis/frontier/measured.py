"""Approaches 1 and 2: the best size of every budget from measured losses, and a line through these.

Approach 1 joins every size's losses at its budgets by straight lines in log-log; about the lowest of these curves at a
budget, the best size is where the parabola in ln N through it and its two neighbours has its minimum. (A line through
the lowest sizes themselves, a staircase whose first and last steps are cut off, errs by half of the exponent where five
sizes were trained.) Approach 2 takes a least-squares parabola in ln N through the points of each budget. The interval
of either is a parametric bootstrap: the joint law, fitted with its errors of sizes, runs and points, is simulated
through the table's own design, and what an approach finds there, less the law's optimum, is its error. It counts all
that the design does to an approach: few budgets, interpolated rows, grids off the centre, alpha other than beta. Where
that law is not identified or misses the points, a surface in ln N and ln D takes its place, cubic or with few points
quadratic; it tells the approach's scatter and not its bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.errors import components_of
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.groups import Groups, groups_of, with_spread
from aimscale.analysis.fitting.result import Fit, interval
from aimscale.analysis.frontier.budgets import FOUND, MIN_SIZES, REFUSED, Budget, budgets_of
from aimscale.analysis.frontier.optimum import Cost, cost_of, optimum_of, points_of
from aimscale.analysis.frontier.result import Frontier, NoFrontier
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA, power
from aimscale.analysis.words import Flag

NUM_BUDGETS = 200
"""Budgets at which approach 1 reads its envelope."""
MIN_USABLE = 0.5
"""Share of simulated tables on which an approach must work for its errors to be told from them."""
MIN_LEFT = 3
"""Budgets that must remain where some are left out."""
MIN_CUBIC = 30
"""Points from which on the surface is cubic; the quadratic one misfits, so its intervals are wide."""
MISFIT = 2.0
"""A law that misses the points by more than so many times what the surface does tells neither errors nor bias."""


def envelope_frontier(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    resamples: int = 500,
    seed: int = 0,
    joint: Fit | None = None,
) -> Frontier:
    """Approach 1: compute-optimal size by the envelope of training curves.

    It is read at `NUM_BUDGETS` budgets, where at least three curves exist and the lowest is neither that of the
    smallest size nor that of the largest.

    Args:
        columns: N, D or C -> column.
        resamples: simulated tables, from which the interval is read.
        joint: fit of the joint law to the same rows, to simulate from; None makes it.

    Raises:
        NoFrontier: fewer than three sizes were measured at two budgets or more, or the envelope never changes hands.
        AnalysisError: a column is missing.
    """
    points = points_of(df, y=y, columns=columns)
    num_curves = len(points[["N", "C"]].drop_duplicates().loc[lambda cells: cells.duplicated("N"), "N"].unique())
    if num_curves < MIN_SIZES[1]:
        raise NoFrontier(Flag(kind="few_curves", number=num_curves))
    found = _frontier(points, budgets_of(points, NUM_BUDGETS), 1, resamples, seed, joint)
    sizes = np.log(np.unique(points["N"]))
    nearest = np.abs(np.log(found.pairs["N"].to_numpy())[:, None] - sizes).argmin(axis=1)
    if len(np.unique(nearest)) < 2:
        raise NoFrontier(Flag(kind="one_size"))
    return replace(
        found,
        method=f"lower envelope of {num_curves} training curves at {len(found.pairs)} budgets",
        refusals=(),
        law=_loss_along(found.pairs.iloc[np.unique(nearest, return_index=True)[1]]),
    )


def isoflop_frontier(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    budgets: int | None = None,
    resamples: int = 500,
    seed: int = 0,
    joint: Fit | None = None,
) -> Frontier:
    """Approach 2: compute-optimal size by iso-FLOP parabolas.

    Args:
        columns: N, D or C -> column.
        budgets: interpolate every size's curve to this many budgets; None takes budgets as they are in the table.
        resamples: simulated tables, from which the interval is read.
        joint: fit of the joint law to the same rows, to simulate from; None makes it.

    Raises:
        NoFrontier: fewer than two budgets with an interior, convex minimum; each refused budget is a flag.
        AnalysisError: a column is missing.
    """
    points = points_of(df, y=y, columns=columns)
    found = _frontier(points, budgets_of(points, budgets), 2, resamples, seed, joint)
    num = len(found.pairs) + len(found.refusals)
    method = f"parabolas in ln N at {len(found.pairs)} of {num} budgets, then a plain line"
    return replace(found, method=method, law=_loss_along(found.pairs))


def _frontier(
    points: pd.DataFrame, budgets: list[Budget], approach: int, resamples: int, seed: int, joint: Fit | None
) -> Frontier:
    """The line through the minima of all budgets that have one, with its interval."""
    log_losses = np.log(points["loss"].to_numpy())
    rows, accepted, refusals = [], [], []
    for budget in budgets:
        [log_n], [loss], [why] = budget.minima(log_losses[None], approach)
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
    a, log_k = (float(v) for v in np.polyfit(np.log(pairs["C"]), np.log(pairs["N"]), 1))
    simulated = _simulated(points, cost, resamples, seed, joint) if resamples else None
    errors, bias, method = _line_errors(simulated, accepted, approach)
    draws = np.array([log_k, a]) - errors
    return Frontier(
        approach=approach,
        method="",
        exponent=a,
        exponent_interval=replace(interval(draws[:, 1], 0.95), method=method),
        bias=bias,
        left_out=without_budgets(pairs) if approach == 2 else pd.DataFrame(),
        log_k=log_k,
        draws=draws,
        cost=cost,
        pairs=pairs,
        refusals=tuple(refusals),
        range=(float(pairs["C"].min()), float(pairs["C"].max())),
    )


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Tables of known optima, or of a known surface."""

    tables: Array
    """ln losses (1 + num, n); the first table has no errors."""
    truth: Array | None
    """ln k and a of N*(C) behind them, where known."""
    by: str
    """What they were simulated by."""
    misfit: float
    """Standard deviation of the measured ln losses about the first."""


def _line_errors(simulated: Simulated | None, budgets: list[Budget], approach: int) -> tuple[Array, float | None, str]:
    """Errors (num, 2) of an approach's (ln k, a) on simulated tables, the median one of a where known, and how."""
    unknown = np.full((1, 2), np.nan)
    if simulated is None:
        return unknown, None, "no interval: no tables were simulated"
    log_c = np.log([budget.flops for budget in budgets])
    minima = np.stack([budget.minima(simulated.tables, approach)[0] for budget in budgets], axis=1)
    lines = _lines_through(log_c, minima)
    errors = lines[1:] - (lines[0] if simulated.truth is None else simulated.truth)
    usable = np.isfinite(errors).all(axis=1)
    if usable.mean() < MIN_USABLE:
        return unknown, None, f"no interval: most tables simulated by {simulated.by} have no frontier"
    bias = None if simulated.truth is None else float(np.median(errors[usable, 1]))
    return errors[usable], bias, f"{usable.sum()} tables simulated through this design by {simulated.by}"


def _simulated(points: pd.DataFrame, cost: Cost, num: int, seed: int, joint: Fit | None) -> Simulated | None:
    """Tables by the joint law, or by a surface where its optimum is not identified or it misses the points."""
    law, surface = _by_law(points, cost, num, seed, joint), _by_surface(points, num, seed)
    if law is None or (surface is not None and law.misfit > MISFIT * surface.misfit):
        return surface
    return law


def _by_law(points: pd.DataFrame, cost: Cost, num: int, seed: int, joint: Fit | None) -> Simulated | None:
    try:
        law = joint or fit(CHINCHILLA, points, y="loss", resamples=num, seed=seed)
    except AnalysisError:
        return None
    if law.errors is None or {"a", "alpha", "beta"} & law.not_identified:
        return None
    x = {v: points[v].to_numpy(float) for v in ("N", "D")}
    seen = Groups(**{name: codes for name, codes in groups_of(points, x).named.items() if name in law.groups.named})
    errors = law.errors.simulate(np.ones(len(points)), seen, num, np.random.default_rng([seed, 3]))
    clean = np.log(law.law.value(x, law.law_params))
    truth = optimum_of({name: np.array(value) for name, value in law.law_params.items()}, cost)
    spare = len(points) - len(law.law.parameters)
    return Simulated(
        tables=clean + np.insert(errors, 0, 0.0, axis=0),
        truth=np.array(truth),
        by="the joint law",
        misfit=float(np.sqrt(np.sum((np.log(points["loss"]) - clean) ** 2) / spare)),
    )


def _by_surface(points: pd.DataFrame, num: int, seed: int) -> Simulated | None:
    """Tables by a polynomial of ln N and ln D for the logarithm of the loss; None with too few points."""
    x = {v: points[v].to_numpy(float) for v in ("N", "D")}
    n, d = (np.log(each) - np.log(each).mean() for each in x.values())
    degree = 3 if len(n) >= MIN_CUBIC else 2
    design = np.column_stack([n**i * d**j for i in range(4) for j in range(4 - i) if i + j <= degree])
    spare = len(n) - design.shape[1]
    if np.linalg.matrix_rank(design) < design.shape[1] or spare < MIN_LEFT:
        return None
    log_loss, weights = np.log(points["loss"].to_numpy()), np.ones(len(points))
    clean = design @ np.linalg.lstsq(design, log_loss, rcond=None)[0]
    groups, _ = with_spread(groups_of(points, x), design)
    components = components_of(design, log_loss - clean, weights, groups)
    errors = components.simulate(weights, groups, num, np.random.default_rng([seed, 3]))
    return Simulated(
        tables=clean + np.insert(errors, 0, 0.0, axis=0),
        truth=None,
        by=f"a {'cubic' if degree == 3 else 'quadratic'} surface",
        misfit=float(np.sqrt(np.sum((log_loss - clean) ** 2) / spare)),
    )


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


def _loss_along(pairs: pd.DataFrame) -> Fit | None:
    """Power law with offset of the optimal loss against C; None with too few optima."""
    return fit(power("C"), pairs, y="loss", objective="log_lsq", resamples=200) if len(pairs) > 3 else None


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
