"""Approach 2: the best size of every budget that sizes share, and a line through these.

At each budget a parabola in ln N goes through the losses near the lowest. Intervals assume no law: they follow from how
the line moves with each loss, and from the errors about a cubic surface in ln N and ln D (quadratic with few points).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import components_of, known_errors, linear_design
from aimscale.analysis.fitting.diagnostics import blind_flags
from aimscale.analysis.fitting.groups import SAME_COMPUTE, chained, groups_of, visible_groups
from aimscale.analysis.laws.base import Array
from aimscale.analysis.optimum.frontier import Frontier, NoFrontier, cost_of, points_of, student_interval
from aimscale.analysis.words import Flag

WINDOW, MIN_SIZES = 8.0, 4
"""Only points within this factor of the best measured N enter a parabola, and so many sizes at least: far from its
minimum an iso-FLOP curve is none, and its skew would move the vertex."""
ISOFLOP_SHARE, ISOFLOP_SIZES = 0.75, 3
"""Share of a table's rows that budgets of so many sizes must hold in an iso-FLOP design."""
MIN_CUBIC, MIN_LEFT = 30, 3
"""Points from which on the surface is cubic (the quadratic one misfits, so its intervals are wide), and points beyond
its terms that it needs."""


def line_optimum(flops: Array, *, line: Array, covariance: Array, degrees: float) -> tuple[Array, Array, Array]:
    """Return ln N* at budgets (m,), its standard errors and degrees of freedom, on a line of (ln k, a)."""
    at = np.column_stack([np.ones(len(flops)), np.log(flops)])
    variances = np.einsum("mi,ij,mj->m", at, covariance, at)
    return at @ line, np.sqrt(np.maximum(variances, 0.0)), np.full(len(flops), degrees)


def isoflop_frontier(df: pd.DataFrame, *, y: str = "val_loss") -> Frontier:
    """Draw the frontier of approach 2: the line through the minima of all budgets that have one, with its interval."""
    points = points_of(df, y).sort_values("C", ignore_index=True)
    log_sizes, log_losses = np.log(points[["N", "loss"]].to_numpy()).T
    budgets = {c: rows.index.to_numpy() for c, rows in points.groupby(shared_budgets(points))}
    found, refusals = dict[float, tuple[float, float, Array]](), list[Flag]()
    for c, rows in budgets.items():
        try:
            found[c] = parabola_minimum(c, rows, log_sizes, log_losses)
        except NoFrontier as refused:
            refusals += refused.flags
    if len(found) < 2:
        have = f"{len(found)} of {len(budgets)} amounts of compute have a best size between smaller and larger ones"
        raise NoFrontier("few_minima", f"{have}, and 2 are needed", *refusals, number=len(found))
    flops, (best, losses, slopes) = np.array([*found]), map(np.array, zip(*found.values(), strict=True))
    cost, through = cost_of(points), np.linalg.pinv(np.column_stack([np.ones(len(flops)), np.log(flops)]))
    line, flags = through @ best, list[Flag]()
    covariance, degrees, method = np.full((2, 2), np.nan), 1.0, "no interval: too few points to estimate errors"
    if (surface := _surface(points, log_losses)) is not None:
        values, errors, degrees, flags = surface
        with contextlib.suppress(NoFrontier):  # the surface itself may have no minimum there
            slopes = np.array([parabola_minimum(c, budgets[c], log_sizes, values)[2] for c in found])
        moved = through @ slopes
        covariance, method = moved @ errors @ moved.T, f"errors of {len(points)} points about a smooth surface"
    return Frontier(
        approach=2,
        method=f"line through parabolas at {len(flops)} of {len(budgets)} amounts of compute",
        exponent=float(line[1]),
        exponent_interval=student_interval(float(line[1]), float(np.sqrt(covariance[1, 1])), degrees, method),
        optimum=partial(line_optimum, line=line, covariance=covariance, degrees=degrees),
        cost=cost,
        pairs=pd.DataFrame({"C": flops, "N": np.exp(best), "D": cost.samples(flops, np.exp(best)), "loss": losses}),
        refusals=tuple(refusals),
        range=(float(flops.min()), float(flops.max())),
        flags=tuple(flags),
    )


def parabola_minimum(flops: float, rows: Array, log_sizes: Array, log_losses: Array) -> tuple[float, float, Array]:
    """Find the vertex of the parabola about the lowest size of a budget, which rows (m,) of all (n,) share.

    Returns:
        ln N*, the loss there, and the derivative (n,) of ln N* by every row's ln loss.

    Raises:
        NoFrontier: the parabola has no minimum among the sizes, with the budget as the flag's number.
    """
    refused = partial(NoFrontier, number=flops)
    x, losses, sizes = log_sizes[rows], np.exp(log_losses[rows]), np.unique(log_sizes[rows])
    lowest = int(np.argmin(losses))
    for name, end in (("smallest", sizes[0]), ("largest", sizes[-1])):
        if x[lowest] == end and len(sizes) >= MIN_SIZES:
            raise refused("edge", f"the {name} size has the lowest loss", subject=name)
    close = np.abs(x - x[lowest]) <= np.log(WINDOW)
    x, losses = x[close], losses[close]
    if len(np.unique(x)) < MIN_SIZES:
        raise refused("few_sizes", "too few sizes lie near the lowest loss")
    solve = np.linalg.pinv(np.vander(x - x.mean(), 3))
    c2, c1, c0 = solve @ losses
    if c2 <= 0:
        raise refused("not_convex", "the losses have no minimum over size")
    top = -c1 / (2 * c2)
    if not x.min() < x.mean() + top < x.max():
        raise refused("outside", "the minimum lies outside the measured sizes")
    slopes = np.zeros(len(log_losses))
    slopes[rows[close]] = -(solve[1] + 2 * top * solve[0]) / (2 * c2) * losses
    return x.mean() + top, c0 - c1**2 / (4 * c2), slopes


def _surface(points: pd.DataFrame, log_losses: Array) -> tuple[Array, Array, float, list[Flag]] | None:
    """Fit ln loss by a polynomial of ln N and ln D; None with too few points.

    Returns:
        Its values (n,), the covariance (n, n) of the errors about it with its degrees of freedom, and flags of groups
        of points that share errors which it tells hardly or not at all.
    """
    degree, num = 3 if len(points) >= MIN_CUBIC else 2, len(points)
    logs = np.log(points[["N", "D"]].to_numpy(float))
    n, d = ((logs - logs.mean(axis=0)) / np.maximum(logs.std(axis=0), 1e-300)).T
    terms = np.column_stack([n**i * d**j for i in range(degree + 1) for j in range(degree + 1 - i)])
    if np.linalg.matrix_rank(terms) < terms.shape[1] or num < terms.shape[1] + MIN_LEFT:
        return None
    groups = groups_of(points, {v: points[v].to_numpy(float) for v in ("N", "D", "C")})
    seen = visible_groups(groups, terms)
    values = terms @ np.linalg.lstsq(terms, log_losses, rcond=None)[0]
    errors = components_of(linear_design(terms, np.ones(num)), log_losses - values, seen)
    covariance, known = errors.covariance(seen, num), known_errors(points, "loss")
    if known is not None:
        covariance = covariance + known.loadings @ known.loadings.T
    return values, covariance, errors.degrees, [*blind_flags(seen)]


def shared_budgets(points: pd.DataFrame) -> pd.Series:
    """Find the budget of every row: the mean C of rows whose neighbours lie within half of `SAME_COMPUTE`."""
    log_c = pd.Series(np.log(points["C"].to_numpy(float)), points.index)
    return np.exp(log_c.groupby(chained(log_c.to_numpy(), np.log1p(SAME_COMPUTE) / 2)).transform("mean"))


def isoflop_budgets(points: pd.DataFrame) -> pd.Series | None:
    """Find the budget of every row where runs were planned by budgets of compute; None for any other design, such as a
    grid of sizes and data, where rows of equal C lie on the diagonals and D takes fewer values than C."""
    found = shared_budgets(points)
    num_sizes = points["N"].groupby(found).nunique()
    shared = num_sizes.index[num_sizes >= ISOFLOP_SIZES]
    num_d = len(np.unique(np.round(np.log(points["D"].to_numpy(float)) / np.log1p(SAME_COMPUTE))))
    is_planned = len(shared) > 1 and found.isin(shared).mean() >= ISOFLOP_SHARE and len(num_sizes) < num_d
    return found if is_planned else None


def with_budgets(df: pd.DataFrame, y: str, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Give every row of a table of iso-FLOP design its budget as its C; return other tables as they are."""
    try:
        found = isoflop_budgets(points_of(df, y, columns))
    except AnalysisError:  # no C, or nothing usable: no such design
        return df
    return df if found is None else df.assign(C=found)
