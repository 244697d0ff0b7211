"""Approaches 1 and 2: the best size of every budget from measured losses, and a line through these.

Approach 1 joins every size's losses at its budgets by straight lines in log-log; about the lowest of these curves at a
budget, the best size is where the parabola in ln N through it and its two neighbours has its minimum. (Chinchilla
regresses the lowest size itself on C. With five sizes that is a staircase, whose slope is up to 50 % off.) Approach 2
takes a least-squares parabola in ln N through the points of each budget. Intervals assume no law: they follow from how
the line moves with each loss, and from the errors of sizes, budgets, runs and points about a cubic surface in ln N and
ln D (quadratic with few points). Interpolated budgets count for no more than the rows behind them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import components_of, linear_design
from aimscale.analysis.fitting.groups import SAME_COMPUTE, groups_of, visible_groups
from aimscale.analysis.laws.base import Array
from aimscale.analysis.optimum.frontier import Frontier, NoFrontier, cost_of, points_of, student_interval
from aimscale.analysis.words import Flag

WINDOW = 8.0
"""Only points within this factor of the best measured N enter a parabola of approach 2: far from its minimum an
iso-FLOP curve is none, and its skew would move the vertex."""
MIN_SIZES = {1: 3, 2: 4}
"""Sizes that a parabola needs: exactly through three, or with an error."""
ISOFLOP_SHARE = 0.75
"""Share of a table's rows that budgets of three sizes or more must hold in an iso-FLOP design."""
NUM_BUDGETS = 200
"""Budgets at which approach 1 reads its envelope."""
MIN_CUBIC, MIN_LEFT = 30, 3
"""Points from which on the surface is cubic (the quadratic one misfits, so its intervals are wide), and points beyond
its terms that it needs."""


class Budget(NamedTuple):
    """The points at one amount of compute."""

    flops: float
    log_sizes: Array
    """ln N (m,)."""
    blend: Array
    """Blend (m, n) of all rows' ln losses that each point's is."""


def line_optimum(flops: Array, *, line: Array, covariance: Array, degrees: float) -> tuple[Array, Array, Array]:
    """Return ln N* at budgets (m,), its standard errors and degrees of freedom, on a line of (ln k, a)."""
    at = np.column_stack([np.ones(len(flops)), np.log(flops)])
    variances = np.einsum("mi,ij,mj->m", at, covariance, at)
    return at @ line, np.sqrt(np.maximum(variances, 0.0)), np.full(len(flops), degrees)


def envelope_frontier(df: pd.DataFrame, *, y: str = "val_loss") -> Frontier:
    """Draw the frontier of approach 1: the envelope of the sizes' losses, read at `NUM_BUDGETS` amounts of compute."""
    points = points_of(df, y)
    num = int(points[["N", "C"]].drop_duplicates()["N"].value_counts().gt(1).sum())
    if num < MIN_SIZES[1]:
        text = f"it needs three sizes with two budgets each, and the table has {num}"
        raise NoFrontier("few_curves", text, number=num)
    found = _frontier(points, _interpolated(points), 1)
    sizes, best = (np.log(each.to_numpy()) for each in (points["N"].drop_duplicates(), found.pairs["N"]))
    if np.ptp(np.abs(best[:, None] - sizes).argmin(axis=1)) == 0:
        raise NoFrontier("one_size", "one size has the lowest loss wherever sizes share amounts of compute")
    return replace(found, method=f"lower envelope of the losses of {num} sizes", refusals=())


def isoflop_frontier(df: pd.DataFrame, *, y: str = "val_loss") -> Frontier:
    """Draw the frontier of approach 2: a parabola at each budget that sizes share."""
    points = points_of(df, y).sort_values("C", ignore_index=True)
    units, groups = np.eye(len(points)), points.groupby(shared_budgets(points))
    budgets = [Budget(c, np.log(rows["N"].to_numpy()), units[rows.index]) for c, rows in groups]
    found = _frontier(points, budgets, 2)
    return replace(found, method=f"line through parabolas at {len(found.pairs)} of {len(budgets)} amounts of compute")


def _frontier(points: pd.DataFrame, budgets: Sequence[Budget], approach: int) -> Frontier:
    """Draw the line through the minima of all budgets that have one, with its interval."""
    log_losses, found, refusals = np.log(points["loss"].to_numpy()), [], list[Flag]()
    for budget in budgets:
        try:
            found.append((budget, *_minimum(budget, log_losses, approach)))
        except NoFrontier as refused:
            refusals += refused.flags
    if len(found) < 2:
        have = f"{len(found)} of {len(budgets)} amounts of compute have a best size between smaller and larger ones"
        raise NoFrontier("few_minima", f"{have}, and 2 are needed", *refusals, number=len(found))
    used, log_n, losses, slopes = zip(*found, strict=True)
    flops, n, cost = np.array([budget.flops for budget in used]), np.exp(log_n), cost_of(points)
    through = np.linalg.pinv(np.column_stack([np.ones(len(flops)), np.log(flops)]))
    line, flags = through @ np.array(log_n), list[Flag]()
    covariance, degrees, method = np.full((2, 2), np.nan), 1.0, "no interval: too few points to tell errors by"
    if (surface := _surface(points, log_losses)) is not None:
        values, errors, degrees, flags = surface
        with contextlib.suppress(NoFrontier):  # the surface itself may have no minimum there
            slopes = tuple(_minimum(budget, values, approach)[2] for budget in used)
        moved = through @ np.array(slopes)
        covariance, method = moved @ errors @ moved.T, f"errors of {len(points)} points about a smooth surface"
    return Frontier(
        approach=approach,
        method="",
        exponent=float(line[1]),
        exponent_interval=student_interval(float(line[1]), float(np.sqrt(covariance[1, 1])), degrees, method),
        optimum=partial(line_optimum, line=line, covariance=covariance, degrees=degrees),
        cost=cost,
        pairs=pd.DataFrame({"C": flops, "N": n, "D": cost.samples(flops, n), "loss": losses}),
        refusals=tuple(refusals),
        range=(float(flops.min()), float(flops.max())),
        flags=tuple(replace(flag, text=f"Approach {approach}: {flag.text}") for flag in flags),
    )


def _minimum(budget: Budget, log_losses: Array, approach: int) -> tuple[float, float, Array]:
    """Find the vertex of the parabola about the lowest size of a budget.

    Returns:
        ln N*, the loss there, and the derivative (n,) of ln N* by every row's ln loss.

    Raises:
        NoFrontier: the parabola has no minimum among the sizes, with the budget as the flag's number.
    """
    refused = partial(NoFrontier, number=budget.flops)
    x, losses = budget.log_sizes, budget.blend @ log_losses
    losses, sizes = np.exp(losses) if approach == 2 else losses, np.unique(x)
    lowest = int(np.argmin(losses))
    for name, end in (("smallest", sizes[0]), ("largest", sizes[-1])):
        if x[lowest] == end and len(sizes) >= MIN_SIZES[approach]:
            raise refused("edge", f"the {name} size has the lowest loss", subject=name)
    close = np.abs(np.arange(len(x)) - lowest) <= 1 if approach == 1 else np.abs(x - x[lowest]) <= np.log(WINDOW)
    if len(np.unique(x[close])) < MIN_SIZES[approach]:
        raise refused("few_sizes", "too few sizes lie near the lowest loss")
    centre = x[close].mean()
    solve = np.linalg.pinv(np.vander(x[close] - centre, 3))
    c2, c1, c0 = solve @ losses[close]
    if c2 <= 0:
        raise refused("not_convex", "the losses have no minimum over size")
    top, least = -c1 / (2 * c2), c0 - c1**2 / (4 * c2)
    if not x[close].min() < centre + top < x[close].max():
        raise refused("outside", "the minimum lies outside the measured sizes")
    slopes = -(solve[1] + 2 * top * solve[0]) / (2 * c2) * (losses[close] if approach == 2 else 1.0)
    return centre + top, least if approach == 2 else np.exp(least), slopes @ budget.blend[close]


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
    seen, unseen, few = visible_groups(groups, terms)
    values = terms @ np.linalg.lstsq(terms, log_losses, rcond=None)[0]
    errors = components_of(linear_design(terms, np.ones(num)), log_losses - values, seen)
    flags = []
    for kind, names, how, held in (("unseen", unseen, "cannot", 50), ("few_groups", few, "hardly", 90)):  # as simulated
        for name in names:
            told = (
                f"{groups.counts[name]} {name} {how} tell an error that all points of one share: where there is one, "
            )
            text = f"{told}its 95 % interval holds some {held} %."
            flags.append(Flag(kind=kind, subject=name, number=groups.counts[name], text=text))
    return values, errors.covariance(seen, num), errors.degrees, flags


def _interpolated(points: pd.DataFrame) -> list[Budget]:
    """Interpolate every size's curve to `NUM_BUDGETS`, by straight lines in log-log, seeds averaged."""
    grid, sizes, blends = np.geomspace(points["C"].min(), points["C"].max(), NUM_BUDGETS), [], []
    for size, rows in points.reset_index(drop=True)[["N", "C"]].apply(np.log).groupby("N"):
        own, codes = np.unique(rows["C"], return_inverse=True)
        if len(own) > 1:
            shares = [np.interp(np.log(grid), own, unit, left=np.nan, right=np.nan) for unit in np.eye(len(own))]
            blend = np.zeros((len(grid), len(points)))
            blend[:, rows.index] = (np.array(shares).T / np.bincount(codes))[:, codes]
            sizes.append(size)
            blends.append(blend)
    found = zip(grid.tolist(), np.stack(blends, axis=1), strict=True)
    here = [(c, blend, np.isfinite(blend).all(axis=1)) for c, blend in found]
    return [Budget(c, np.array(sizes)[keep], blend[keep]) for c, blend, keep in here if keep.any()]


def shared_budgets(points: pd.DataFrame) -> pd.Series:
    """Find the budget of every row: the mean C of rows within `SAME_COMPUTE` of each other.

    The budgets that most sizes share are taken first: a table that holds a grid of (N, D) beside its iso-FLOP runs has
    rows at nearly every C, and chained by nearness they would all be one budget.
    """
    ordered = points.sort_values("C")
    log_c, num_params = np.log(ordered["C"].to_numpy()), ordered["N"].to_numpy()
    half = np.log1p(SAME_COMPUTE) / 2
    near = [slice(*np.searchsorted(log_c, [c - half, np.nextafter(c + half, np.inf)])) for c in log_c]
    rank = [(-len(np.unique(num_params[each])), np.ptp(log_c[each])) for each in near]
    group = np.full(len(log_c), -1)
    for i in sorted(range(len(log_c)), key=rank.__getitem__):
        if group[i] < 0:
            group[near[i]] = np.where(group[near[i]] < 0, i, group[near[i]])
    means = pd.Series(log_c, ordered.index).groupby(group).transform("mean")
    return means.apply(np.exp).loc[points.index]


def isoflop_budgets(points: pd.DataFrame) -> pd.Series | None:
    """Find the budget of every row where runs were planned by budgets of compute; None for any other design.

    Few distinct C with several N each: three quarters of the rows belong to budgets of three sizes or more, of which
    there are at least two; and there are fewer budgets than distinct D (in a grid of sizes and data, rows of equal C
    lie on its diagonals, and D takes fewer values).
    """
    found = shared_budgets(points)
    num_sizes = points["N"].groupby(found).nunique()
    shared = num_sizes.index[num_sizes >= MIN_SIZES[1]]
    num_d = len(np.unique(np.round(np.log(points["D"].to_numpy(float)) / np.log1p(SAME_COMPUTE))))
    is_planned = len(shared) > 1 and found.isin(shared).mean() >= ISOFLOP_SHARE and len(num_sizes) < num_d
    return found if is_planned else None


def with_budgets(df: pd.DataFrame, y: str, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Give every row of a table of iso-FLOP design its budget as its C, by which it is held out; return others as they
    are."""
    try:
        found = isoflop_budgets(points_of(df, y, columns))
    except AnalysisError:  # no C, or nothing usable: no such design
        return df
    return df if found is None else df.assign(C=found)
