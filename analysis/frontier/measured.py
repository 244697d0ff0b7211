"""Approaches 1 and 2: the best size of every budget from measured losses, and a line through these.

Approach 1 joins every size's losses at its budgets by straight lines in log-log; about the lowest of these curves at a
budget, the best size is where the parabola in ln N through it and its two neighbours has its minimum. (A line through
the lowest sizes themselves, a staircase whose first and last steps are cut off, errs by half of the exponent where five
sizes were trained.) Approach 2 takes a least-squares parabola in ln N through the points of each budget. The interval
of either is a parametric bootstrap: the joint law, fitted with its errors of sizes, runs and points, is simulated
through the table's own design, and what an approach finds there, less the law's optimum, is its error. It counts all
that the design does to an approach: few budgets, interpolated rows, grids off the centre, alpha other than beta. Where
that law is not identified, approach 2 on the table's own budgets has the interval of its plain line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.groups import Groups, groups_of
from aimscale.analysis.fitting.result import Fit, interval
from aimscale.analysis.frontier.optimum import Cost, Frontier, cost_of, optimum_of, points_of
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA, power
from aimscale.analysis.words import Flag, flag_words

NUM_BUDGETS = 200
"""Budgets at which approach 1 reads its envelope."""
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
MIN_USABLE = 0.5
"""Share of simulated tables on which an approach must work for its errors to be told from them."""


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


def envelope_frontier(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> Frontier:
    """Approach 1: compute-optimal size by the envelope of training curves.

    It is read at `NUM_BUDGETS` budgets, where at least three curves exist and the lowest is neither that of the
    smallest size nor that of the largest.

    Raises:
        AnalysisError: fewer than three sizes were measured at two budgets or more, or the envelope never changes hands.
    """
    points = points_of(df, y=y, columns=columns)
    num_curves = len(points[["N", "C"]].drop_duplicates().loc[lambda cells: cells.duplicated("N"), "N"].unique())
    if num_curves < MIN_SIZES[1]:
        raise AnalysisError(f"Approach 1 needs 3 sizes measured at two budgets or more; the table has {num_curves}.")
    found = _frontier(points, budgets_of(points, NUM_BUDGETS), 1, resamples, seed)
    sizes = np.log(np.unique(points["N"]))
    nearest = np.abs(np.log(found.pairs["N"].to_numpy())[:, None] - sizes).argmin(axis=1)
    if len(np.unique(nearest)) < 2:
        raise AnalysisError("One size is lowest at every budget where curves overlap, so approach 1 sees no frontier.")
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
) -> Frontier:
    """Approach 2: compute-optimal size by iso-FLOP parabolas.

    Args:
        columns: N, D or C -> column.
        budgets: interpolate every size's curve to this many budgets; None takes budgets as they are in the table.
        resamples: simulated tables, from which the interval is read.

    Raises:
        AnalysisError: fewer than two budgets with an interior, convex minimum; the message names each refused budget.
    """
    points = points_of(df, y=y, columns=columns)
    found = _frontier(points, budgets_of(points, budgets), 2, resamples, seed)
    num = len(found.pairs) + len(found.refusals)
    method = f"parabolas in ln N at {len(found.pairs)} of {num} budgets, then a plain line"
    return replace(found, method=method, law=_loss_along(found.pairs))


def _frontier(points: pd.DataFrame, budgets: list[Budget], approach: int, resamples: int, seed: int) -> Frontier:
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
        named = "; ".join(flag_words(refusals))
        raise AnalysisError(
            f"Approach {approach} finds {len(rows)} budget(s) with an interior, convex minimum and needs 2: {named}."
        )
    pairs = pd.DataFrame(rows)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    pairs.insert(2, "D", cost.samples(pairs["C"].to_numpy(), pairs["N"].to_numpy()))
    a, log_k = (float(v) for v in np.polyfit(np.log(pairs["C"]), np.log(pairs["N"]), 1))
    draws, method = np.full((1, 2), np.nan), "no interval: the joint law, which simulates this design, cannot be fitted"
    errors = _line_errors(points, cost, accepted, approach, resamples, seed)
    if errors is not None:
        draws = np.array([log_k, a]) - errors
        method = f"{len(draws)} tables simulated through this design by the joint law"
    elif len(pairs) > 2 and accepted[0].blend is None:
        draws = _line_draws(pairs, max(resamples, 1), seed)
        method = f"plain line, t with {len(pairs) - 2} degrees of freedom"
    return Frontier(
        approach=approach,
        method="",
        exponent=a,
        exponent_interval=replace(interval(draws[:, 1], 0.95), method=method),
        bias=None if errors is None else float(np.median(errors[:, 1])),
        log_k=log_k,
        draws=draws,
        cost=cost,
        pairs=pairs,
        refusals=tuple(refusals),
        range=(float(pairs["C"].min()), float(pairs["C"].max())),
    )


def _line_draws(pairs: pd.DataFrame, num: int, seed: int) -> Array:
    """Draws (num, 2) of (ln k, a) of the least-squares line through a table's own budgets, t-distributed."""
    line, covariance = np.polyfit(np.log(pairs["C"]), np.log(pairs["N"]), 1, cov=True)
    rng, spare = np.random.default_rng(seed), len(pairs) - 2
    normal = rng.multivariate_normal(np.zeros(2), covariance, num)
    return (line + normal / np.sqrt(rng.chisquare(spare, (num, 1)) / spare))[:, ::-1]


def _line_errors(
    points: pd.DataFrame, cost: Cost, budgets: list[Budget], approach: int, num_tables: int, seed: int
) -> Array | None:
    """Errors (num, 2) of an approach's (ln k, a) on tables simulated by the joint law; None where that is unknown."""
    if not num_tables:
        return None
    try:
        law = fit(CHINCHILLA, points, y="loss", resamples=num_tables, seed=seed)
    except AnalysisError:
        return None
    if law.errors is None or {"a", "alpha", "beta"} & law.not_identified:
        return None
    x = {v: points[v].to_numpy(float) for v in ("N", "D")}
    seen = Groups(**{name: codes for name, codes in groups_of(points, x).named.items() if name in law.groups.named})
    errors = law.errors.simulate(np.ones(len(points)), seen, num_tables, np.random.default_rng([seed, 3]))
    tables = np.log(law.law.value(x, law.law_params)) + errors
    minima = np.stack([budget.minima(tables, approach)[0] for budget in budgets], axis=1)
    lines = _lines_through(np.log([budget.flops for budget in budgets]), minima)
    truth = optimum_of({name: np.array(value) for name, value in law.law_params.items()}, cost)
    usable = np.isfinite(lines).all(axis=1)
    return (lines - np.array(truth))[usable] if usable.mean() >= MIN_USABLE else None


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


def budgets_of(points: pd.DataFrame, num: int | None) -> list[Budget]:
    """The table's own budgets, or `num` common ones that every size's curve is interpolated to.

    Interpolation is by straight lines in log-log between a size's own budgets, seeds averaged.
    """
    numbered = points.assign(row=np.arange(len(points)))
    if num is None:
        return [
            Budget(flops=flops, num_params=group["N"].to_numpy(), rows=group["row"].to_numpy())
            for flops, group in isoflop_points(numbered)
        ]
    grid = np.geomspace(points["C"].min(), points["C"].max(), num)
    blends: dict[float, Array] = {}
    for size, group in numbered.groupby("N"):
        own = np.unique(group["C"])
        if len(own) < 2:
            continue
        blend = np.zeros((num, len(points)))
        for flops, unit in zip(own, np.eye(len(own)), strict=True):
            rows = group.loc[group["C"] == flops, "row"].to_numpy()
            share = np.interp(np.log(grid), np.log(own), unit, left=np.nan, right=np.nan)
            blend[:, rows] = share[:, None] / len(rows)
        blends[float(size)] = blend  # type: ignore[arg-type]
    if not blends:
        raise AnalysisError("No size has two budgets, so its loss cannot be interpolated to a common one.")
    out = []
    for k, flops in enumerate(grid):
        here = {size: blend[k] for size, blend in blends.items() if np.isfinite(blend[k]).all()}
        if here:
            stacked = np.stack(list(here.values()))
            out.append(Budget(flops=float(flops), num_params=np.array([*here]), rows=np.array([], int), blend=stacked))
    return out
