"""Approach 3: where a fitted law is lowest along C = kappa N^(1+s) D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.diagnostics import WIDE_DERIVED
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.frontier.result import Cost, Frontier, NoFrontier, cost_of, points_of, student_interval
from aimscale.analysis.laws.base import Array, Columns, Law, Params
from aimscale.analysis.words import Flag

FORM_ALONE = 1e-4
"""An exponent whose interval is narrower than this is set by the law's form, not by the data."""
REACH = 100.0
"""A law is minimised within this factor of the measured sizes."""
GRID, ROUNDS = 61, 2
"""Sizes at which a law is evaluated, each round about the last lowest."""
NEWTON_STEPS, DIFFERENCE = 8, 1e-3
"""Newton's steps from there, by differences of ln N: of fixed width, so that N* moves smoothly with the parameters."""


@dataclass(frozen=True, kw_only=True)
class LawOptimum:
    """Best size of a fitted law at an amount of compute."""

    fit: Fit
    cost: Cost
    sizes: tuple[float, float]
    """Smallest and largest measured N."""

    def __call__(self, flops: Array) -> tuple[Array, Array, Array]:
        """Return ln N* at budgets (m,), NaN where there is none, its standard errors and their degrees of freedom."""
        return self.fit.estimate.error_of(lambda params: self.log_sizes(params, flops))

    def log_sizes(self, params: Params, flops: Array) -> Array:
        """Return ln N* (batch, m) for parameters (batch,)."""
        return sizes_along(self.fit.law, params, self.cost, flops, self.sizes)

    def exponent(self, span: tuple[float, float]) -> tuple[float, Interval]:
        """Return the mean exponent of N* over a span of compute, with its interval."""
        ends = np.array(span)

        def slope(params: Params) -> Array:
            log_n = self.log_sizes(params, ends)
            return (log_n[:, 1] - log_n[:, 0]) / np.log(ends[1] / ends[0])

        (value,), errors, degrees = self.fit.estimate.error_of(slope)
        return float(value), student_interval(float(value), float(errors[0]), float(degrees[0]))


def parametric_frontier(fit: Fit, df: pd.DataFrame) -> Frontier:
    """Approach 3: the minimum of a law of N and D (of C too, and of U = D) along C = kappa N^(1+s) D.

    The exponent of a frontier that is no power of C is the mean one over the table's range of C.

    Raises:
        NoFrontier: the exponent is not identified, or the law has no minimum near the measured sizes.
        AnalysisError: the law is not of N and D, or a column is missing.
    """
    if not {"N", "D"} <= {*fit.law.variables}:
        raise AnalysisError(
            f"Approach 3 needs a law of N and D, and {fit.law.formula} is one of {', '.join(fit.law.variables)}."
        )
    points = points_of(df, fit.columns["y"], fit.columns)
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    span = (float(points["C"].min()), float(points["C"].max()))
    optimum = LawOptimum(fit=fit, cost=cost, sizes=(float(points["N"].min()), float(points["N"].max())))
    log_n, *_ = optimum(np.array(span))
    if not np.isfinite(log_n).all():
        lost = span[0] if np.isnan(log_n[0]) else span[1]
        raise NoFrontier(Flag(kind="no_minimum", subject=fit.law.name, number=lost, more=(REACH,)))
    exponent, i = optimum.exponent(span)
    if not i.high - i.low <= WIDE_DERIVED or fit.not_identified & {*fit.law.derived}:
        raise NoFrontier(Flag(kind="no_exponents", subject=fit.law.name))
    is_form = i.high - i.low < FORM_ALONE
    how = "the law's form alone sets this exponent" if is_form else fit.interval_method
    ends = (np.nan, np.nan) if is_form else (i.low, i.high)
    return Frontier(
        approach=3,
        method=f"minimum of the {fit.law.name} law on C = {cost.kappa:.3g} N^{1 + cost.s:.3g} D",
        exponent=exponent,
        exponent_interval=Interval(low=ends[0], high=ends[1], method=how),
        optimum=optimum,
        cost=cost,
        pairs=pd.DataFrame(columns=["C", "N", "D", "loss"]),
        refusals=(),
        range=span,
        law=fit,
    )


def optimum_of(p: Mapping[str, Array], cost: Cost) -> tuple[Array, Array]:
    """(ln k, a) of N*(C) of the chinchilla and coupled laws in closed form.

    Set to zero the derivative of A N^-alpha + B (C / kappa)^-beta N^((1+s) beta).
    """
    grow = (1 + cost.s) * p["beta"]
    a = p["beta"] / (p["alpha"] + grow)
    log_g = (np.log(p["alpha"] * p["A"]) - np.log(grow * p["B"])) / (p["alpha"] + grow)
    return log_g - a * np.log(cost.kappa), a


def sizes_along(law: Law, params: Params, cost: Cost, flops: Array, sizes: tuple[float, float]) -> Array:
    """ln N* (num, m) at budgets (m,) by any law of N, D, C, U (new data: U = D), for parameters (num,).

    Args:
        sizes: the smallest and largest measured N. Only an interior minimum within `REACH` of them counts: the lowest
            of several, NaN without one.
    """
    low, high = np.log(sizes[0] / REACH), np.log(sizes[1] * REACH)
    num = max(np.size(value) for value in params.values())

    def losses(x: Array, c: float) -> Array:
        n = np.exp(x)
        d = cost.samples(c, n)
        with np.errstate(all="ignore"):
            return law.value(Columns({"N": n, "D": d, "U": d, "C": np.full_like(n, c)}), params)

    out = np.empty((num, len(flops)))
    for k, c in enumerate(np.asarray(flops, float).tolist()):
        x, lost = np.broadcast_to(np.linspace(low, high, GRID), (num, GRID)), np.zeros(num, bool)
        for _ in range(ROUNDS):
            step, loss = x[:, 1] - x[:, 0], losses(x, c)
            inner = loss[:, 1:-1]
            bottom = np.where((inner < loss[:, :-2]) & (inner <= loss[:, 2:]), inner, np.inf)
            lost |= ~np.isfinite(bottom).any(axis=1)
            centre = x[np.arange(num), 1 + bottom.argmin(axis=1)]
            x = centre[:, None] + step[:, None] * np.linspace(-1, 1, GRID)
        start = centre
        for _ in range(NEWTON_STEPS):
            below, at, above = losses(centre[:, None] + DIFFERENCE * np.array([-1, 0, 1]), c).T
            with np.errstate(all="ignore"):
                centre = centre - DIFFERENCE * (above - below) / (2 * (above - 2 * at + below))
            centre = np.clip(centre, start - step, start + step)
        out[:, k] = np.where(lost, np.nan, centre)
    return out
