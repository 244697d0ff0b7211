"""Approach 2: the best size of every budget that sizes share, and a line through these.

At each budget a parabola in N^skew goes through the losses near the lowest, of one skew for all budgets: in ln N, skew
0, the vertex is biased where size and data have unlike exponents (Czech et al., arXiv 2603.22339). Near its minimum a
law of exponents alpha and beta is a parabola of skew (beta - alpha) / 3 up to the third order, whatever the budget.
Intervals assume no law: they follow from how the line moves with each loss, and from the errors about a cubic surface
in ln N and ln D (quadratic with few points).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from aimscale.analysis.display import Flag
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import components_of, linear_design
from aimscale.analysis.fitting.diagnostics import blind_flags
from aimscale.analysis.laws import Array
from aimscale.analysis.optimum.frontier import Frontier, NoFrontier, student_interval
from aimscale.analysis.table.groups import cost_of, isoflop_budgets, shared_budgets, visible_groups
from aimscale.analysis.table.points import Points, compute_points
from aimscale.analysis.table.runs import Runs

WINDOW, MIN_SIZES = 8.0, 4
"""Only points within this factor of the best measured N enter a parabola, and so many sizes at least: far from its
minimum an iso-FLOP curve is none, and its skew would move the vertex."""
MOST_SKEW, SKEW_STEP = 1.0, 1e-3
"""Largest skew that is tried, and the difference by which derivatives are taken."""
MIN_CUBIC, MIN_LEFT = 30, 3
"""Points from which on the surface is cubic (the quadratic one misfits, so its intervals are wide), and points beyond
its terms that it needs."""


def line_optimum(flops: Array, *, line: Array, covariance: Array, degrees: float) -> tuple[Array, Array, Array]:
    """Return ln N* at budgets (m,), its standard errors and degrees of freedom, on a line of (ln k, a)."""
    at = np.column_stack([np.ones(len(flops)), np.log(flops)])
    variances = np.einsum("mi,ij,mj->m", at, covariance, at)
    return at @ line, np.sqrt(np.maximum(variances, 0.0)), np.full(len(flops), degrees)


def line_moves(flops: float, *, by_losses: Array, labels: pd.Index) -> pd.DataFrame:
    """Return the derivatives of a and of ln N* at a budget by the ln loss of every row, from those (2, n) of a line."""
    return pd.DataFrame((np.array([[0, 1], [1, np.log(flops)]]) @ by_losses).T, labels)


def isoflop_frontier(runs: Runs, *, y: str = "val_loss") -> Frontier:
    """Draw the frontier of approach 2: the line through the minima of all budgets that have one, with its interval."""
    points = compute_points(runs, y)
    numbers = points.numbers
    order, codes = np.argsort(numbers["C"].to_numpy()), shared_budgets(numbers).to_numpy()
    log_sizes, log_losses = np.log(numbers[["N", "y"]].to_numpy()).T
    budgets = {c: order[codes[order] == c] for c in np.unique(codes)}
    skew, of_losses = common_skew(budgets, log_sizes, log_losses)
    minima, refusals = dict[float, tuple[float, float, Array]](), list[Flag]()
    for c, rows in budgets.items():
        try:
            minima[c] = parabola_minimum(c, rows, log_sizes, log_losses, skew)
        except NoFrontier as refused:
            refusals += refused.flags
    if len(minima) < 2:
        have = f"{len(minima)} of {len(budgets)} amounts of compute have a best size between smaller and larger ones"
        raise NoFrontier("few_minima", f"{have}, and 2 are needed", *refusals, number=len(minima))
    flops, (best, losses, slopes) = np.array([*minima]), map(np.array, zip(*minima.values(), strict=True))
    cost, through = cost_of(numbers), np.linalg.pinv(np.column_stack([np.ones(len(flops)), np.log(flops)]))
    line, flags = through @ best, list[Flag]()
    covariance, degrees, method = np.full((2, 2), np.nan), 1.0, "no interval: too few points to estimate errors"
    about = None
    if (surface := _surface(points, log_losses)) is not None:
        values, errors, degrees, flags = surface
        with contextlib.suppress(NoFrontier):  # the surface itself may have no minimum there
            slopes = np.array([parabola_minimum(c, budgets[c], log_sizes, values, skew)[2] for c in minima])
        with contextlib.suppress(NoFrontier):  # every optimum moves with the skew, and that with every loss
            ends = [
                [parabola_minimum(c, budgets[c], log_sizes, values, skew + move)[0] for c in minima]
                for move in (-SKEW_STEP, SKEW_STEP)
            ]
            slopes = slopes + np.outer(np.diff(ends, axis=0)[0] / (2 * SKEW_STEP), of_losses)
        moved, about = through @ slopes, pd.DataFrame(errors, points.index, points.index)
        covariance, method = moved @ errors @ moved.T, f"errors of {len(points)} points about a smooth surface"
    return Frontier(
        approach=2,
        method=f"line through parabolas in N^{skew:.2f} at {len(flops)} of {len(budgets)} amounts of compute",
        exponent=float(line[1]),
        exponent_interval=student_interval(float(line[1]), sd := float(np.sqrt(covariance[1, 1])), degrees, method),
        exponent_error=(sd, degrees),
        optimum=partial(line_optimum, line=line, covariance=covariance, degrees=degrees),
        cost=cost,
        pairs=pd.DataFrame({"C": flops, "N": np.exp(best), "D": cost.samples(flops, np.exp(best)), "loss": losses}),
        refusals=tuple(refusals),
        range=(float(flops.min()), float(flops.max())),
        sizes=points.span("N"),
        flags=tuple(flags),
        moves=partial(line_moves, by_losses=through @ slopes, labels=points.index),
        errors=about,
    )


def common_skew(budgets: Mapping[float, Array], log_sizes: Array, log_losses: Array) -> tuple[float, Array]:
    """Find the skew with which parabolas miss the losses near the minima of all budgets least, and its derivative (n,)
    by every row's ln loss; 0 where no budget has a point to spare for it."""
    windows = [rows for c, rows in ((c, near_lowest(rows, log_sizes, log_losses)) for c, rows in budgets.items())
               if len(np.unique(log_sizes[rows])) >= MIN_SIZES]  # fmt: skip
    if sum(len(rows) - 3 for rows in windows) < MIN_LEFT:
        return 0.0, np.zeros(len(log_losses))

    def misses(skew: float) -> Array:
        """Return what parabolas leave of the losses (n,), each as a share of its own."""
        remainder = np.zeros(len(log_losses))
        for rows in windows:
            y, terms = np.exp(log_losses[rows]), np.vander(skewed(log_sizes[rows] - log_sizes[rows].mean(), skew), 3)
            remainder[rows] = (y - terms @ (np.linalg.pinv(terms) @ y)) / y.mean()
        return remainder

    def total(skew: float) -> float:
        return float(np.sum(misses(skew) ** 2))

    skew = float(minimize_scalar(total, bounds=(-MOST_SKEW, MOST_SKEW), method="bounded").x)
    low, here, high = (misses(skew + move) for move in (-SKEW_STEP, 0.0, SKEW_STEP))
    curvature = float(np.sum(low**2) - 2 * np.sum(here**2) + np.sum(high**2)) / SKEW_STEP**2
    if curvature <= 0 or abs(skew) > 0.99 * MOST_SKEW:
        return skew, np.zeros(len(log_losses))
    return skew, -(high - low) / SKEW_STEP / curvature


def skewed(x: Array, skew: float) -> Array:
    """Return (e^(skew x) - 1) / skew, which is x without a skew."""
    return np.expm1(skew * x) / skew if skew else x


def near_lowest(rows: Array, log_sizes: Array, log_losses: Array) -> Array:
    """Keep the rows of a budget whose size is near that of the lowest loss."""
    return rows[np.abs(log_sizes[rows] - log_sizes[rows[np.argmin(log_losses[rows])]]) <= np.log(WINDOW)]


def parabola_minimum(
    flops: float, rows: Array, log_sizes: Array, log_losses: Array, skew: float = 0.0
) -> tuple[float, float, Array]:
    """Find the vertex of the parabola in N^skew about the lowest size of a budget, which rows (m,) of all (n,) share.

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
    close = near_lowest(rows, log_sizes, log_losses)
    x, losses = log_sizes[close], np.exp(log_losses[close])
    if len(np.unique(x)) < MIN_SIZES:
        raise refused("few_sizes", "too few sizes lie near the lowest loss")
    solve = np.linalg.pinv(np.vander(skewed(x - x.mean(), skew), 3))
    c2, c1, c0 = solve @ losses
    if c2 <= 0:
        raise refused("not_convex", "the losses have no minimum over size")
    top = -c1 / (2 * c2)
    per_size = 1 + skew * top  # derivative of the skewed by ln N
    best = x.mean() + (np.log(per_size) / skew if skew else top) if per_size > 0 else np.nan
    if not x.min() < best < x.max():
        raise refused("outside", "the minimum lies outside the measured sizes")
    slopes = np.zeros(len(log_losses))
    slopes[close] = -(solve[1] + 2 * top * solve[0]) / (2 * c2 * per_size) * losses
    return best, c0 - c1**2 / (4 * c2), slopes


def _surface(points: Points, log_losses: Array) -> tuple[Array, Array, float, list[Flag]] | None:
    """Fit ln loss by a polynomial of ln N and ln D; None with too few points.

    Returns:
        Its values (n,), the covariance (n, n) of the errors about it with its degrees of freedom, and flags of groups
        of points that share errors which it tells hardly or not at all.
    """
    degree, num = 3 if len(points) >= MIN_CUBIC else 2, len(points)
    logs = np.log(points.numbers[["N", "D"]].to_numpy(float))
    n, d = ((logs - logs.mean(axis=0)) / np.maximum(logs.std(axis=0), 1e-300)).T
    terms = np.column_stack([n**i * d**j for i in range(degree + 1) for j in range(degree + 1 - i)])
    if np.linalg.matrix_rank(terms) < terms.shape[1] or num < terms.shape[1] + MIN_LEFT:
        return None
    seen = visible_groups(points.groups, terms)
    values = terms @ np.linalg.lstsq(terms, log_losses, rcond=None)[0]
    errors = components_of(linear_design(terms, np.ones(num)), log_losses - values, seen)
    covariance = errors.covariance(seen, num)
    if points.known is not None:
        covariance = covariance + points.known.loadings @ points.known.loadings.T
    return values, covariance, errors.degrees, [*blind_flags(seen)]


def with_budgets(runs: Runs, y: str, columns: Mapping[str, str] | None = None) -> Runs:
    """Give every row of a table of iso-FLOP design its budget as its C; return other tables as they are."""
    try:
        budgets = isoflop_budgets(compute_points(runs, y, columns).numbers)
    except AnalysisError:  # no C, or nothing usable: no such design
        return runs
    return runs if budgets is None else runs.assign(C=budgets)
