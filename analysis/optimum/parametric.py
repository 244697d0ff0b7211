"""Approach 3: where a fitted law is lowest along C = kappa N^(1+s) D."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.diagnostics import WIDE_DERIVED
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.laws.base import Array, Columns, Law, Params
from aimscale.analysis.optimum.cost import Cost, cost_of, points_of
from aimscale.analysis.optimum.result import Frontier, NoFrontier, student_interval
from aimscale.analysis.words import Flag

FORM_ALONE = 1e-4
"""An exponent whose interval is narrower than this is set by the law's form, not by the data."""
REACH, GRID = 100.0, 241
"""A law is minimised within this factor of the measured sizes, from the lowest of so many."""
NEWTON_STEPS, DIFFERENCE = 8, 1e-3
"""Newton's steps from there, by differences of ln N: of fixed width, so that N* moves smoothly with the parameters."""


@dataclass(frozen=True, kw_only=True)
class LawOptimum:
    """Best size of a fitted law of N, D, C and U (new data: U = D) at an amount of compute."""

    fit: Fit
    cost: Cost
    sizes: tuple[float, float]
    """Smallest and largest measured N."""

    def __call__(self, flops: Array) -> tuple[Array, Array, Array]:
        """Return ln N* at budgets (m,), NaN where there is none, its standard errors and their degrees of freedom."""
        return self.fit.estimate.error_of(lambda params: self.log_sizes(params, flops))

    def log_sizes(self, params: Params, flops: Array) -> Array:
        """Return ln N* (batch, m) at budgets (m,) for parameters (batch,).

        Only an interior minimum within `REACH` of the measured sizes counts: the lowest of several, NaN without one.
        """
        return np.stack([self._log_size(params, c) for c in np.asarray(flops, float).tolist()], axis=1)

    def _log_size(self, params: Params, flops: float) -> Array:
        def losses(log_n: Array) -> Array:
            n = np.exp(log_n)
            d = self.cost.samples(flops, n)
            with np.errstate(all="ignore"):
                return self.fit.law.value(Columns({"N": n, "D": d, "U": d, "C": np.full_like(n, flops)}), params)

        grid = np.linspace(np.log(self.sizes[0] / REACH), np.log(self.sizes[1] * REACH), GRID)
        below, at, above = (losses(grid)[:, k : GRID - 2 + k] for k in range(3))
        lowest = np.where((at < below) & (at <= above), at, np.inf)
        start = log_n = grid[1 + lowest.argmin(axis=1)]
        for _ in range(NEWTON_STEPS):
            below, at, above = losses(log_n[:, None] + DIFFERENCE * np.array([-1, 0, 1])).T
            with np.errstate(all="ignore"):
                log_n = log_n - DIFFERENCE * (above - below) / (2 * (above - 2 * at + below))
            log_n = np.clip(log_n, start - grid[1] + grid[0], start + grid[1] - grid[0])
        return np.where(np.isfinite(lowest).any(axis=1), log_n, np.nan)


def parametric_frontier(law: Fit | Law, df: pd.DataFrame, *, y: str = "val_loss", is_tested: bool = True) -> Frontier:
    """Draw the frontier of approach 3: the minimum of a law of N and D (of C too, and of U = D) on C = kappa N^(1+s) D.

    The exponent of a frontier that is no power of C is the mean one over the table's range of C.
    """
    form = law.law if isinstance(law, Fit) else law
    name = form.name
    if not {"N", "D"} <= {*form.variables}:
        named = ", ".join(form.variables)
        raise AnalysisError(f"Approach 3 needs a law of N and D, and {form.formula} is one of {named}.")
    try:
        found = law if isinstance(law, Fit) else fit(df, law, y=y, is_tested=is_tested)
    except AnalysisError as error:
        raise NoFrontier(Flag(kind="no_law", subject=name, text=f"the {name} law was not fitted: {error}")) from None
    points = points_of(df, found.columns["y"], found.columns)
    cost, sizes, span = cost_of(points), *((float(points[v].min()), float(points[v].max())) for v in ("N", "C"))
    optimum = LawOptimum(fit=found, cost=cost, sizes=sizes)
    for flops, log_n in zip(span, optimum(np.array(span))[0], strict=True):
        if np.isnan(log_n):
            text = f"the {name} law has no best size at {flops:.3g} FLOP within {REACH:.3g} times the measured sizes"
            raise NoFrontier(Flag(kind="no_minimum", subject=name, number=flops, text=text))
    width = np.log(span[1] / span[0])
    slope = found.estimate.error_of(lambda params: np.diff(optimum.log_sizes(params, span), axis=1) / width)
    exponent, sd, degrees = (float(each[0]) for each in slope)
    i = student_interval(exponent, sd, degrees, found.interval_method)
    if not i.high - i.low <= WIDE_DERIVED or found.not_identified & {*form.derived}:
        text = f"the exponents of the {name} law are not identified"
        raise NoFrontier(Flag(kind="no_exponents", subject=name, text=text))
    if i.high - i.low < FORM_ALONE:
        i = Interval(low=np.nan, high=np.nan, method="the law's form alone sets this exponent")
    return Frontier(
        approach=3,
        method=f"minimum of the {name} law on C = {cost.kappa:.3g} N^{1 + cost.s:.3g} D",
        exponent=exponent,
        exponent_interval=i,
        optimum=optimum,
        cost=cost,
        pairs=pd.DataFrame(columns=["C", "N", "D", "loss"]),
        refusals=(),
        range=span,
        law=found,
    )
