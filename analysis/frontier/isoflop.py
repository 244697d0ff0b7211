"""Approach 2: a parabola in ln N through the points of each compute budget, then a line through the minima."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.bootstrap import interval
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.frontier.optimum import Frontier, Refusal, cost_of, log_line, points_of, refusal_words
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import power


def isoflop_frontier(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    budgets: int | None = None,
    tolerance: float = 0.1,
    window: float = 8.0,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Frontier:
    """Compute-optimal size by iso-FLOP parabolas.

    Args:
        df: one row a point.
        y: loss column.
        columns: N, D or C -> column.
        budgets: interpolate every size's curve to this many budgets; None takes budgets as they stand in the table.
        tolerance: rows whose C differ by less than this fraction share a budget (without `budgets`).
        window: only points within this factor of the best measured N enter the parabola: far from its minimum an
            iso-FLOP curve is no parabola, and its skew would move the vertex.
        resamples: residual-bootstrap resamples.
        confidence: coverage of the intervals.
        seed: seed of the bootstrap.

    Raises:
        AnalysisError: fewer than two budgets with an interior, convex minimum; the message names each refused budget.
    """
    points = points_of(df, y=y, columns=columns)
    curves = isoflop_points(points, budgets, tolerance)
    rng = np.random.default_rng(seed)
    pairs, refusals, draws = [], [], []
    for flops, group in curves:
        found = vertex(group["N"].to_numpy(), group["loss"].to_numpy(), window, resamples, rng)
        if isinstance(found, str):
            refusals.append(Refusal(flops=flops, reason=found))
            continue
        log_n, loss, samples = found
        std = float(np.nanstd(samples))
        pairs.append({"C": flops, "N": float(np.exp(log_n)), "loss": loss, "log_N_std": std})
        draws.append(np.where(np.isfinite(samples), samples, log_n))
    if len(pairs) < 2:
        raise AnalysisError(
            f"Approach 2 finds {len(pairs)} budget(s) with an interior, convex minimum and needs 2"
            f"{': ' if refusals else ''}{'; '.join(refusal_words(refusals))}."
        )
    table = pd.DataFrame(pairs)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    table.insert(2, "D", cost.samples(table["C"].to_numpy(), table["N"].to_numpy()))
    std = np.maximum(table["log_N_std"].to_numpy(), 1e-3)
    log_k, a = log_line(table["C"].to_numpy(), table["N"].to_numpy(), std)
    lines = np.array([log_line(table["C"].to_numpy(), np.exp(row), std) for row in np.array(draws).T])
    low, high = interval(lines[:, 1], confidence)
    return Frontier(
        approach=2,
        method=f"parabolas in ln N at {len(table)} of {len(curves)} budgets, then a line weighted by 1/variance",
        exponent=a,
        exponent_interval=Interval(
            low=low,
            high=high,
            confidence=confidence,
            method=f"residual bootstrap of every parabola, {resamples} resamples",
        ),
        log_k=log_k,
        draws=lines,
        cost=cost,
        pairs=table,
        refusals=tuple(refusals),
        range=(float(table["C"].min()), float(table["C"].max())),
        law=loss_along(table),
    )


def loss_along(pairs: pd.DataFrame) -> Fit | None:
    """Power law with offset of the optimal loss against C; None with too few optima."""
    return fit(power("C"), pairs, y="loss", objective="log_lsq", resamples=200) if len(pairs) > 3 else None


def isoflop_points(points: pd.DataFrame, budgets: int | None, tolerance: float) -> list[tuple[float, pd.DataFrame]]:
    """(budget, its points N and loss), by rows that share a C or by interpolating each size's curve."""
    if budgets is not None:
        return _interpolated(points, budgets)
    ordered = points.sort_values("C")
    log_c = np.log(ordered["C"].to_numpy())
    group = _shared_budgets(log_c, ordered["N"].to_numpy(), tolerance)
    found = [(float(np.exp(log_c[group == k].mean())), ordered[group == k]) for k in np.unique(group)]
    return sorted(found, key=lambda pair: pair[0])


def _shared_budgets(log_c: Array, num_params: Array, tolerance: float) -> Array:
    """Group number of every row (n,), rows by ascending C: the budgets that most sizes share are taken first.

    A table that holds a grid of (N, D) beside its iso-FLOP runs has rows at nearly every C; chained by nearness they
    would all be one budget.
    """
    half = np.log1p(tolerance) / 2
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


def _interpolated(points: pd.DataFrame, budgets: int) -> list[tuple[float, pd.DataFrame]]:
    """Loss of every size at common budgets, by straight lines in log-log between its own."""
    curves = [g.sort_values("C") for _, g in points.groupby("N") if len(g["C"].unique()) > 1]
    if not curves:
        raise AnalysisError("No size has two budgets, so its loss cannot be interpolated to a common one.")
    grid = np.geomspace(points["C"].min(), points["C"].max(), budgets)
    out = []
    for c in grid:
        at = [
            (g["N"].iloc[0], np.exp(np.interp(np.log(c), np.log(g["C"]), np.log(g["loss"]))))
            for g in curves
            if g["C"].min() <= c <= g["C"].max()
        ]
        if at:
            out.append((float(c), pd.DataFrame(at, columns=["N", "loss"])))
    return out


FEW_SIZES = "fewer than 4 sizes, which a parabola with an error needs"


def vertex(
    num_params: Array, loss: Array, window: float, resamples: int, rng: np.random.Generator
) -> tuple[float, float, Array] | str:
    """(ln N*, loss*, draws of ln N*) of a parabola in ln N, or the reason why there is none."""
    if len(np.unique(num_params)) < 4:
        return FEW_SIZES
    best = num_params[np.argmin(loss)]
    if best in (num_params.min(), num_params.max()):
        edge = "smallest" if best == num_params.min() else "largest"
        return f"the {edge} size has the lowest loss, so the minimum is not interior"
    near = np.abs(np.log(num_params / best)) <= np.log(window)
    x, z = np.log(num_params[near]), loss[near]
    if len(np.unique(x)) < 4:
        return f"{len(np.unique(x))} sizes within a factor {window:g} of the best, a parabola with an error needs 4"
    centre = x.mean()
    design = np.vander(x - centre, 3)
    solve = np.linalg.pinv(design)
    c2, c1, c0 = solve @ z
    if c2 <= 0:
        return "the parabola is not convex"
    top = -c1 / (2 * c2) + centre
    if not x.min() < top < x.max():
        return "the vertex of the parabola lies outside the measured sizes"
    residual = (z - design @ [c2, c1, c0]) * np.sqrt(len(x) / max(1, len(x) - 3))
    noisy = design @ [c2, c1, c0] + rng.choice(residual, (resamples, len(x)))
    d2, d1, _ = solve @ noisy.T
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(d2 > 0, -d1 / (2 * d2) + centre, np.nan)
    return float(top), float(c0 - c1 * c1 / (4 * c2)), np.clip(draws, x.min(), x.max())
