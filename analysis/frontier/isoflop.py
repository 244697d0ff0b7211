"""Approach 2: a parabola in ln N through the points of each compute budget, then a line through the minima."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.frontier.optimum import Cost, Frontier, Refusal, cost_of, log_line, points_of, refusal_words
from aimscale.analysis.frontier.parabola import Budget, tops_of, vertex
from aimscale.analysis.frontier.quality import advice
from aimscale.analysis.frontier.simulated import corrected, interval_of, lines_through, simulate
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import power

TOLERANCE = 0.1
"""Rows whose C differ by less than this fraction share a budget."""


def isoflop_frontier(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    budgets: int | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> Frontier:
    """Compute-optimal size by iso-FLOP parabolas.

    Args:
        columns: N, D or C -> column.
        budgets: interpolate every size's curve to this many budgets; None takes budgets as they are in the table.
        resamples: simulated tables, from which the interval is read.

    Raises:
        AnalysisError: fewer than two budgets with an interior, convex minimum; the message names each refused budget.
    """
    points = points_of(df, y=y, columns=columns)
    curves = budgets_of(points, budgets)
    log_losses = np.log(points["loss"].to_numpy())
    pairs, refusals, accepted = [], [], []
    for curve in curves:
        found = vertex(curve.num_params, curve.losses(log_losses[None])[0])
        if isinstance(found, str):
            refusals.append(Refusal(flops=curve.flops, reason=found))
            continue
        pairs.append({"C": curve.flops, "N": float(np.exp(found[0])), "loss": found[1]})
        accepted.append(curve)
    if len(pairs) < 2:
        raise AnalysisError(
            f"Approach 2 finds {len(pairs)} budget(s) with an interior, convex minimum and needs 2"
            f"{': ' if refusals else ''}{'; '.join(refusal_words(refusals))}."
        )
    table = pd.DataFrame(pairs)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    table.insert(2, "D", cost.samples(table["C"].to_numpy(), table["N"].to_numpy()))
    line = log_line(table["C"].to_numpy(), table["N"].to_numpy())
    fresh = len(table)
    if budgets is not None:  # interpolation has the budgets that a size was measured at to go by, however many it makes
        fresh = min(fresh, int(points.groupby("N")["C"].nunique().median()))
    draws, bias, method, spread = _draws(points, cost, accepted, table, line, fresh, resamples, seed)
    return Frontier(
        approach=2,
        method=f"parabolas in ln N at {len(table)} of {len(curves)} budgets, then a plain line",
        exponent=line[1],
        exponent_interval=interval_of(draws, method),
        bias=bias,
        advice=advice(points, accepted, table, line[1]) if budgets is None else (),
        log_k=line[0],
        draws=draws,
        cost=cost,
        pairs=table.assign(log_N_std=spread),
        refusals=tuple(refusals),
        range=(float(table["C"].min()), float(table["C"].max())),
        law=loss_along(table),
    )


def budgets_of(points: pd.DataFrame, budgets: int | None) -> list[Budget]:
    """The table's own budgets, or `budgets` common ones that every size's curve is interpolated to."""
    numbered = points.assign(row=np.arange(len(points)))
    if budgets is not None:
        return _interpolated(numbered, budgets)
    return [
        Budget(flops=flops, num_params=group["N"].to_numpy(), rows=group["row"].to_numpy())
        for flops, group in isoflop_points(numbered, None)
    ]


def _draws(
    points: pd.DataFrame,
    cost: Cost,
    accepted: list[Budget],
    table: pd.DataFrame,
    line: tuple[float, float],
    fresh: int,
    resamples: int,
    seed: int,
) -> tuple[Array, float | None, str, Array]:
    """Draws (num, 2) of (ln k, a), the bias, how they were made, and the spread of every budget's ln N*.

    Tables simulated through the design count everything but scatter between budgets that their law does not know; where
    the optima scatter more about their line than 97.5 % of the simulated ones, the draws are widened to match.
    """
    log_c, log_n = np.log(table["C"].to_numpy()), np.log(table["N"].to_numpy())
    rest = log_n - line[0] - line[1] * log_c
    spare = max(1, fresh - 2)
    scatter = float(np.sqrt(np.sum(rest**2) / max(1, len(rest) - 2)))
    tables = simulate(points, cost, resamples, seed) if resamples else None
    found = None
    if tables is not None:
        tops = np.stack([tops_of(each, tables.log_losses) for each in accepted], axis=1)
        lines = lines_through(log_c, tops)
        found = corrected(line, lines, tables.optima)
    if tables is None or found is None:
        draws = _line_draws(log_c, line, scatter * np.sqrt(len(rest) / fresh), spare, max(resamples, 1), seed)
        return draws, None, f"plain line, t with {spare} degrees of freedom", np.full(len(table), np.nan)
    draws, bias = found
    with np.errstate(invalid="ignore"):
        simulated = np.sqrt(
            np.nansum((tops - lines[:, :1] - lines[:, 1:] * log_c) ** 2, axis=1) / max(1, len(rest) - 2)
        )
    usual, most = np.nanmedian(simulated), np.nanpercentile(simulated, 97.5)
    method = f"{len(draws)} tables simulated through this design by the joint law"
    if len(rest) > 2 and scatter > most:
        middle = np.median(draws, axis=0)
        draws = middle + (draws - middle) * scatter / usual
        method += f", widened {scatter / usual:.2g} times: so much more do the budgets' optima scatter"
    return draws, bias, method, np.nanstd(tops, axis=0)


def _line_draws(log_c: Array, line: tuple[float, float], scatter: float, spare: int, num: int, seed: int) -> Array:
    """Draws (num, 2) of a line's (ln k, a), t-distributed."""
    rng = np.random.default_rng(seed)
    t = rng.standard_normal((num, 2)) / np.sqrt(rng.chisquare(spare, (num, 1)) / spare)
    middle = log_c.mean()
    slope = scatter / np.sqrt(np.sum((log_c - middle) ** 2)) * t[:, 0]
    level = scatter / np.sqrt(len(log_c)) * t[:, 1]
    return np.stack([line[0] + level - slope * middle, line[1] + slope], axis=1)


def loss_along(pairs: pd.DataFrame) -> Fit | None:
    """Power law with offset of the optimal loss against C; None with too few optima."""
    return fit(power("C"), pairs, y="loss", objective="log_lsq", resamples=200) if len(pairs) > 3 else None


def isoflop_points(points: pd.DataFrame, budgets: int | None) -> list[tuple[float, pd.DataFrame]]:
    """(budget, its points N and loss), by rows that share a C or by interpolating each size's curve."""
    if budgets is not None:
        numbered = points.assign(row=np.arange(len(points)))
        log_losses = np.log(points["loss"].to_numpy())[None]
        return [
            (each.flops, pd.DataFrame({"N": each.num_params, "loss": each.losses(log_losses)[0]}))
            for each in _interpolated(numbered, budgets)
        ]
    ordered = points.sort_values("C")
    log_c = np.log(ordered["C"].to_numpy())
    group = _shared_budgets(log_c, ordered["N"].to_numpy())
    found = [(float(np.exp(log_c[group == k].mean())), ordered[group == k]) for k in np.unique(group)]
    return sorted(found, key=lambda pair: pair[0])


def _shared_budgets(log_c: Array, num_params: Array) -> Array:
    """Group number of every row (n,), rows by ascending C: the budgets that most sizes share are taken first.

    A table that holds a grid of (N, D) beside its iso-FLOP runs has rows at nearly every C; chained by nearness they
    would all be one budget.
    """
    half = np.log1p(TOLERANCE) / 2
    starts, ends = np.searchsorted(log_c, log_c - half), np.searchsorted(log_c, log_c + half, side="right")
    group, number = np.full(len(log_c), -1), 0
    sizes = np.array([len(np.unique(num_params[a:b])) for a, b in zip(starts, ends, strict=True)])
    spread = np.array([np.ptp(log_c[a:b]) for a, b in zip(starts, ends, strict=True)])
    for i in np.lexsort((log_c, spread, -sizes)):
        if group[i] >= 0:
            continue
        rows = np.arange(starts[i], ends[i])
        group[rows[group[rows] < 0]] = number
        number += 1
    return group


def _interpolated(points: pd.DataFrame, budgets: int) -> list[Budget]:
    """Every size at common budgets, by straight lines in log-log between its own (seeds averaged)."""
    grid = np.geomspace(points["C"].min(), points["C"].max(), budgets)
    sizes, blends = [], []
    for size, group in points.groupby("N"):
        own = np.unique(group["C"])
        if len(own) < 2:
            continue
        blend = np.zeros((budgets, len(points)))
        for flops, unit in zip(own, np.eye(len(own)), strict=True):
            rows = group.loc[group["C"] == flops, "row"].to_numpy()
            share = np.interp(np.log(grid), np.log(own), unit, left=np.nan, right=np.nan)
            blend[:, rows] = share[:, None] / len(rows)
        sizes.append(float(size))  # type: ignore[arg-type]
        blends.append(blend)
    if not sizes:
        raise AnalysisError("No size has two budgets, so its loss cannot be interpolated to a common one.")
    out = []
    for k, flops in enumerate(grid):
        here = [i for i, blend in enumerate(blends) if np.isfinite(blend[k]).all()]
        if here:
            blend = np.array([blends[i][k] for i in here])
            out.append(
                Budget(flops=float(flops), num_params=np.array(sizes)[here], rows=np.array([], int), blend=blend)
            )
    return out
