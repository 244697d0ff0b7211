"""Approaches 1 and 2: the best size of every budget from measured losses, and a line through these.

Approach 1 joins every size's losses at its budgets by straight lines in log-log; about the lowest of these curves at a
budget, the best size is where the parabola in ln N through it and its two neighbours has its minimum. (Chinchilla
regresses the lowest size itself on C. With five sizes that is a staircase, whose slope is up to 50 % off.) Approach 2
takes a least-squares parabola in ln N through the points of each budget. The error of either is told by how the line
moves with each loss, from the errors of sizes, budgets, runs and points about a cubic surface in ln N and ln D
(quadratic with few points). No law is assumed, and interpolated budgets count for no more than the rows behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.groups import SAME_COMPUTE, groups_of
from aimscale.analysis.fitting.inference import Estimate, estimated
from aimscale.analysis.fitting.objectives import LSQ
from aimscale.analysis.fitting.problem import make_problem
from aimscale.analysis.frontier.result import Frontier, NoFrontier, cost_of, points_of, student_interval
from aimscale.analysis.laws.base import Array, Columns, Law, free
from aimscale.analysis.words import Flag

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
ISOFLOP_SHARE = 0.75
"""Share of a table's rows that budgets of three sizes or more must hold in an iso-FLOP design."""
NUM_BUDGETS = 200
"""Budgets at which approach 1 reads its envelope."""
NUDGE = 1e-6
"""Change of ln loss by which the line's derivatives are told."""
MIN_LEFT = 3
"""Budgets, and points beyond a surface's terms, that must remain."""
MIN_CUBIC = 30
"""Points from which on the surface is cubic; the quadratic one misfits, so its intervals are wide."""


def envelope_frontier(df: pd.DataFrame, *, y: str = "val_loss") -> Frontier:
    """Approach 1: compute-optimal size by the envelope of the sizes' losses, read at `NUM_BUDGETS` amounts of compute.

    Raises:
        NoFrontier: fewer than three sizes were measured at two budgets or more, or one size is lowest throughout.
        AnalysisError: a column is missing.
    """
    points = points_of(df, y)
    num_curves = len(points[["N", "C"]].drop_duplicates().loc[lambda cells: cells.duplicated("N"), "N"].unique())
    if num_curves < MIN_SIZES[1]:
        raise NoFrontier(Flag(kind="few_curves", number=num_curves))
    found = _frontier(points, interpolated(points, NUM_BUDGETS), 1)
    sizes = np.log(np.unique(points["N"]))
    nearest = np.abs(np.log(found.pairs["N"].to_numpy())[:, None] - sizes).argmin(axis=1)
    if len(np.unique(nearest)) < 2:
        raise NoFrontier(Flag(kind="one_size"))
    method = f"lower envelope of the losses of {num_curves} sizes"
    return replace(found, method=method, refusals=())


def isoflop_frontier(df: pd.DataFrame, *, y: str = "val_loss") -> Frontier:
    """Approach 2: compute-optimal size by a parabola at each budget that sizes share.

    Raises:
        NoFrontier: fewer than two budgets with an interior, convex minimum; each refused budget is a flag.
        AnalysisError: a column is missing.
    """
    points = points_of(df, y)
    found = _frontier(points, shared_budgets(points), 2)
    num = len(found.pairs) + len(found.refusals)
    method = f"line through parabolas at {len(found.pairs)} of {num} amounts of compute"
    return replace(found, method=method)


@dataclass(frozen=True, kw_only=True)
class LineOptimum:
    """Best size on a line ln N* = ln k + a ln C."""

    line: Array
    """(ln k, a)."""
    covariance: Array
    """Covariance (2, 2) of ln k and a; NaN where it is not known."""
    degrees: float

    def __call__(self, flops: Array) -> tuple[Array, Array, Array]:
        """Return ln N* at budgets (m,), its standard errors and their degrees of freedom."""
        at = np.column_stack([np.ones(len(flops)), np.log(flops)])
        variances = np.einsum("mi,ij,mj->m", at, self.covariance, at)
        return at @ self.line, np.sqrt(np.maximum(variances, 0.0)), np.full(len(flops), self.degrees)


def _frontier(points: pd.DataFrame, budgets: list[Budget], approach: int) -> Frontier:
    """Draw the line through the minima of all budgets that have one, with its interval."""
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
        raise NoFrontier(Flag(kind="few_minima", number=len(rows), more=(len(rows) + len(refusals),)), *refusals)
    pairs = pd.DataFrame(rows)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    pairs.insert(2, "D", cost.samples(pairs["C"].to_numpy(), pairs["N"].to_numpy()))
    log_c = np.log(pairs["C"].to_numpy())
    [line] = _lines_through(log_c, np.log(pairs["N"].to_numpy())[None])
    covariance, degrees, method = np.full((2, 2), np.nan), 1.0, "no interval: too few points to tell errors by"
    if (surface := _surface(points)) is not None:
        moved = _derivatives(surface, log_losses[0], log_c, accepted, approach)
        if np.isfinite(moved).all():
            covariance = moved @ surface.components.covariance(surface.groups, len(points)) @ moved.T
            degrees = surface.components.degrees
            method = f"errors of {len(points)} points about a smooth surface"
            if lost := [*surface.unseen, *surface.few]:
                method += f", which hardly tells those that {' and '.join(lost)} share"
        else:
            method = "no interval: the surface through the points has no frontier"
    optimum = LineOptimum(line=line, covariance=covariance, degrees=degrees)
    i = student_interval(float(line[1]), float(np.sqrt(covariance[1, 1])), degrees)
    return Frontier(
        approach=approach,
        method="",
        exponent=float(line[1]),
        exponent_interval=replace(i, method=method),
        optimum=optimum,
        cost=cost,
        pairs=pairs,
        refusals=tuple(refusals),
        range=(float(pairs["C"].min()), float(pairs["C"].max())),
    )


def _surface(points: pd.DataFrame) -> Estimate | None:
    """Fit ln loss by a polynomial of ln N and ln D; None with too few points."""
    degree = 3 if len(points) >= MIN_CUBIC else 2
    powers = [(i, j) for i in range(4) for j in range(4 - i) if i + j <= degree]
    law = Law(
        name="surface",
        formula=f"ln L = a polynomial of ln N and ln D of degree {degree}",
        variables=("n", "d"),
        linear=tuple(free(f"c{i}{j}") for i, j in powers),
        nonlinear=(),
        basis=lambda x, t: tuple(x["n"] ** i * x["d"] ** j for i, j in powers),
    )
    logs = {v.lower(): np.log(points[v].to_numpy(float)) for v in ("N", "D")}
    x = {v: (values - values.mean()) / max(float(values.std()), 1e-300) for v, values in logs.items()}
    design = np.column_stack([np.broadcast_to(part, len(points)) for part in law.basis(Columns(x), {})])
    if np.linalg.matrix_rank(design) < len(powers) or len(points) < len(powers) + MIN_LEFT:
        return None
    groups = groups_of(points, {v: points[v].to_numpy(float) for v in ("N", "D", "C")})
    return estimated(make_problem(law, x, np.log(points["loss"].to_numpy()), LSQ), groups)


def _derivatives(surface: Estimate, log_losses: Array, log_c: Array, budgets: list[Budget], approach: int) -> Array:
    """Derivatives (2, n) of (ln k, a) by every ln loss, at the surface's minima; where it has none, at the losses'."""
    smooth = surface.problem.predict(surface.vector[None])[0]
    for at in (smooth, log_losses):
        tables = np.concatenate([at[None], at + NUDGE * np.eye(len(at))])
        lines = _lines_through(log_c, np.stack([each.minima(tables, approach)[0] for each in budgets], axis=1))
        moved = (lines[1:] - lines[0]).T / NUDGE
        if np.isfinite(moved).all():
            break
    return moved


def _lines_through(log_c: Array, log_n: Array) -> Array:
    """(ln k, a) of least-squares lines (num, 2) through (num, m) optima at m budgets; NaN where one lacks."""
    dx = log_c - log_c.mean()
    slope = log_n @ dx / np.sum(dx**2)
    return np.stack([log_n.mean(axis=1) - slope * log_c.mean(), slope], axis=1)


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
    half = np.log1p(SAME_COMPUTE) / 2
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


def isoflop_budgets(points: pd.DataFrame) -> pd.Series | None:
    """The budget of compute of every row (as `points` are indexed) where runs were planned by budgets of compute.

    Few distinct C with several N each: rows within `SAME_COMPUTE` of one C are a budget; three quarters of the rows
    belong to budgets of three sizes or more, of which there are at least two; and there are fewer budgets than
    distinct D (in a grid of sizes and data, rows of equal C lie on its diagonals, and D takes fewer values).
    None for any other design.
    """
    found = isoflop_points(points)
    shared = [rows for _, rows in found if rows["N"].nunique() >= MIN_SIZES[1]]
    num_d = len(np.unique(np.round(np.log(points["D"].to_numpy(float)) / np.log1p(SAME_COMPUTE))))
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
