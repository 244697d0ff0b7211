"""Approach 3: where a fitted law is lowest along C = kappa N^(1+s) D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.result import Fit, interval
from aimscale.analysis.frontier.result import Cost, Frontier, NoFrontier, cost_of, points_of
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.words import Flag

CLOSED = ("chinchilla", "coupled")
"""Laws that fall by N^-alpha and D^-beta under one increasing function: their optimum has a closed form."""
EXPONENTS = dict.fromkeys(CLOSED, ("alpha", "beta")) | {"kaplan": ("aN", "aD")}
"""Law -> what its data must identify."""
WIDE = 0.5
"""An exponent of N*(C) that is not known to within this is not identified."""
STRAIGHT = 1e-3
"""ln N* that is further off a straight line in ln C than this makes a curve."""
FORM_ALONE = 1e-4
"""An exponent whose draws differ by less than this is set by the law's form, not by the data."""
REACH = 100.0
"""A law is minimised within this factor of the measured sizes."""
GRID = 61
"""Sizes at which a law is evaluated; four times, each about the last lowest."""
MAX_DRAWS = 300
"""Draws of a law that are minimised one by one."""
MIN_WITH_MINIMUM = 0.5
"""Share of a law's draws that need a minimum for an interval to be read from these."""


def parametric_frontier(fit: Fit, df: pd.DataFrame) -> Frontier:
    """Approach 3: the minimum of a law of N and D (of C too, and of U = D) along C = kappa N^(1+s) D.

    In closed form for the chinchilla and coupled laws, else numerically; a frontier that is no power of C keeps its
    curve, and its exponent is the mean one between the smallest and the largest C of the table.

    Raises:
        NoFrontier: the law's exponents are not identified, or it has no minimum near the measured sizes.
        AnalysisError: the law is not of N and D, or a column is missing.
    """
    if not {"N", "D"} <= {*fit.law.variables}:
        raise AnalysisError(
            f"Approach 3 needs a law of N and D, and {fit.law.formula} is one of {', '.join(fit.law.variables)}."
        )
    if {*EXPONENTS.get(fit.law.name, ())} & fit.not_identified:
        raise NoFrontier(Flag(kind="no_exponents", subject=fit.law.name))
    points = points_of(df, fit.columns["y"], fit.columns)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    span = (float(points["C"].min()), float(points["C"].max()))
    curve = None
    if fit.law.name in CLOSED:
        line = np.stack(optimum_of(fit.law.reported({k: np.array([v]) for k, v in fit.law_params.items()}), cost), 1)[0]
        draws = np.stack(optimum_of(fit.law.reported(fit.draws), cost), axis=1) if fit.draws else line[None]
    else:
        curve = partial(_curve, fit, cost, (float(points["N"].min()), float(points["N"].max())))
        line, draws, is_straight = _line_of(fit, curve, span)
        curve = None if is_straight else curve
    ends = interval(draws[:, 1])
    if ends.is_known and ends.high - ends.low > WIDE:
        raise NoFrontier(Flag(kind="no_exponents", subject=fit.law.name))
    is_form = len(draws) > 1 and ends.high - ends.low < FORM_ALONE
    ends = replace(ends, low=np.nan, high=np.nan) if is_form else ends
    how = "the law's form alone sets this exponent" if is_form else fit.interval_method
    return Frontier(
        approach=3,
        method=f"minimum of the {fit.law.name} law on C = {cost.kappa:.3g} N^{1 + cost.s:.3g} D",
        exponent=float(line[1]),
        exponent_interval=replace(ends, method=how),
        log_k=float(line[0]),
        draws=draws,
        cost=cost,
        pairs=pd.DataFrame(columns=["C", "N", "D", "loss"]),
        refusals=(),
        range=span,
        curve=curve,
        law=fit,
    )


def _curve(fit: Fit, cost: Cost, sizes: tuple[float, float], flops: Array) -> tuple[Array, Array]:
    """ln N* at budgets (m,) and draws of it (num, m)."""
    point = sizes_along(fit.law, fit.law_params, cost, flops, sizes)[0]
    draws = {name: values[:MAX_DRAWS] for name, values in fit.draws.items()}
    return point, sizes_along(fit.law, draws, cost, flops, sizes) if draws else point[None]


def _line_of(fit: Fit, curve: partial[tuple[Array, Array]], span: tuple[float, float]) -> tuple[Array, Array, bool]:
    """(ln k, a) of a straight line through N* at the ends of a span, draws of it, and whether the middle lies on it."""
    low, high = np.log(span)
    point, draws = curve(np.exp([low, (low + high) / 2, high]))
    if not np.isfinite(point).all():
        lost = span[0] if np.isnan(point[0]) else span[1]
        raise NoFrontier(Flag(kind="no_minimum", subject=fit.law.name, number=lost, more=(REACH,)))
    if np.isfinite(draws).all(axis=1).mean() < MIN_WITH_MINIMUM:
        raise NoFrontier(Flag(kind="no_exponents", subject=fit.law.name))
    slopes = (draws[:, 2] - draws[:, 0]) / (high - low)
    lines = np.stack([draws[:, 2] - slopes * high, slopes], axis=1)
    slope = (point[2] - point[0]) / (high - low)
    is_straight = abs(point[1] - (point[0] + point[2]) / 2) < STRAIGHT
    return np.array([point[2] - slope * high, slope]), lines, bool(is_straight)


def optimum_of(p: Mapping[str, Array], cost: Cost) -> tuple[Array, Array]:
    """(ln k, a) of N*(C): set to zero the derivative of A N^-alpha + B (C / kappa)^-beta N^((1+s) beta)."""
    grow = (1 + cost.s) * p["beta"]
    a = p["beta"] / (p["alpha"] + grow)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_g = (np.log(p["alpha"] * p["A"]) - np.log(grow * p["B"])) / (p["alpha"] + grow)
    return log_g - a * np.log(cost.kappa), a


def sizes_along(law: Law, params: Mapping[str, Array], cost: Cost, flops: Array, sizes: tuple[float, float]) -> Array:
    """ln N* (num, m) at budgets (m,) by any law of N, D, C, U (new data: U = D), for parameters (num,).

    Args:
        sizes: the smallest and largest measured N. Only an interior minimum within `REACH` of them counts: the lowest
            of several, NaN without one.
    """
    low, high = np.log(sizes[0] / REACH), np.log(sizes[1] * REACH)
    num = max(np.size(value) for value in params.values())
    out = np.empty((num, len(flops)))
    for k, c in enumerate(flops):
        x = np.broadcast_to(np.linspace(low, high, GRID), (num, GRID))
        lost = np.zeros(num, bool)
        for _ in range(4):
            n, step = np.exp(x), x[:, 1] - x[:, 0]
            d = cost.samples(c, n)
            with np.errstate(all="ignore"):
                loss = law.value(Columns({"N": n, "D": d, "U": d, "C": np.full_like(n, c)}), params)
            inner = loss[:, 1:-1]
            bottom = np.where((inner < loss[:, :-2]) & (inner <= loss[:, 2:]), inner, np.inf)
            lost |= ~np.isfinite(bottom).any(axis=1)
            centre = x[np.arange(num), 1 + bottom.argmin(axis=1)]
            x = centre[:, None] + step[:, None] * np.linspace(-1, 1, GRID)
        out[:, k] = np.where(lost, np.nan, centre)
    return out
