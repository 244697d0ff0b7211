"""Approach 3: where a fitted law is lowest along C = kappa N^(1+s) D."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.diagnostics import WIDE_DERIVED
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.laws.base import Array, Columns, Law, Params
from aimscale.analysis.optimum.frontier import Cost, Frontier, NoFrontier, cost_of, points_of, student_interval
from aimscale.analysis.words import human

FORM_ALONE = 1e-4
"""An exponent whose interval is narrower than this is set by the law's form, not by the data."""
SEARCH_SPAN, GRID = 100.0, 241
"""A law is minimised within this factor of the measured sizes, from the lowest of so many."""
NEWTON_STEPS, NEWTON_WIDTH = 8, 1e-3
"""Newton's steps from there, by differences of ln N: of fixed width, so that N* moves smoothly with the parameters."""


def log_optimum(params: Params, flops: Array, *, law: Law, cost: Cost, sizes: tuple[float, float]) -> Array:
    """Return ln N* (batch, m) of a law with parameters (batch,) at budgets (m,), where new data are bought (U = D).

    Only an interior minimum within `SEARCH_SPAN` of the measured sizes (low, high) counts: the lowest of several, NaN
    without one.
    """
    c = np.asarray(flops, float)[:, None]

    def losses(log_n: Array) -> Array:  # (..., m, k) -> (batch, m, k)
        n = np.exp(log_n)
        d = cost.samples(c, n)
        x = {"N": n, "D": d, "U": d, "C": np.broadcast_to(c, n.shape)}
        with np.errstate(all="ignore"):
            found = law.value(Columns({v: each.reshape(*n.shape[:-2], -1) for v, each in x.items()}), params)
        return found.reshape(-1, *n.shape[-2:])

    grid = np.linspace(np.log(sizes[0] / SEARCH_SPAN), np.log(sizes[1] * SEARCH_SPAN), GRID)
    values, width = losses(np.broadcast_to(grid, (len(c), GRID))), grid[1] - grid[0]
    below, at, above = (values[..., k : GRID - 2 + k] for k in range(3))
    lowest = np.where((at < below) & (at <= above), at, np.inf)
    start = log_n = grid[1 + lowest.argmin(axis=-1)]
    for _ in range(NEWTON_STEPS):
        below, at, above = np.moveaxis(losses(log_n[..., None] + NEWTON_WIDTH * np.array([-1, 0, 1])), -1, 0)
        with np.errstate(all="ignore"):
            log_n = log_n - NEWTON_WIDTH * (above - below) / (2 * (above - 2 * at + below))
        log_n = np.clip(log_n, start - width, start + width)
    return np.where(np.isfinite(lowest).any(axis=-1), log_n, np.nan)


def law_optimum(flops: Array, *, fit: Fit, where: Callable[..., Array]) -> tuple[Array, Array, Array]:
    """Return ln N* of a fitted law at budgets (m,), its standard errors and their degrees of freedom."""
    return fit.estimate.error_of(partial(where, flops=flops))


def parametric_frontier(law: Fit | Law, df: pd.DataFrame, *, y: str = "val_loss") -> Frontier:
    """Draw the frontier of approach 3: the minimum of a law of N and D (of C too, and of U = D) on C = kappa N^(1+s) D;
    its exponent is the mean one over the table's range of C."""
    form = law.law if isinstance(law, Fit) else law
    name, variables = form.name, ", ".join(form.variables)
    if not {"N", "D"} <= {*form.variables}:
        raise AnalysisError(f"Approach 3 needs a law of N and D, and {form.formula} is one of {variables}.")
    try:
        found = law if isinstance(law, Fit) else fit(df, law, y=y, is_tested=False)
    except AnalysisError as error:
        raise NoFrontier("no_law", f"the {name} law was not fitted: {error}", subject=name) from None
    points = points_of(df, found.columns["y"], found.columns)
    sizes, span = ((float(points[v].min()), float(points[v].max())) for v in ("N", "C"))
    cost = cost_of(points)
    where = partial(log_optimum, law=found.law, cost=cost, sizes=sizes)
    optimum = partial(law_optimum, fit=found, where=where)
    for flops, log_n in zip(span, optimum(span)[0], strict=True):
        if np.isnan(log_n):
            place = f"at {human(flops)} FLOP within {human(SEARCH_SPAN)} times the measured sizes"
            text = f"the {name} law has no best size {place}"
            raise NoFrontier("no_minimum", text, subject=name, number=flops)
    width = np.log(span[1] / span[0])
    slope = found.estimate.error_of(lambda params: np.diff(where(params, flops=span)) / width)
    exponent, sd, degrees = (float(each[0]) for each in slope)
    i = student_interval(exponent, sd, degrees, found.interval_method)
    if not i.high - i.low <= WIDE_DERIVED or found.not_identified & {*form.derived}:
        raise NoFrontier("no_exponents", f"the exponents of the {name} law are not identified", subject=name)
    if i.high - i.low < FORM_ALONE:
        i = Interval(low=np.nan, high=np.nan, method="the law's form alone sets this exponent")
    return Frontier(
        approach=3,
        method=f"minimum of the {name} law on C = {human(cost.kappa)} N^{human(1 + cost.s)} D",
        exponent=exponent,
        exponent_interval=i,
        optimum=optimum,
        cost=cost,
        pairs=pd.DataFrame(columns=["C", "N", "D", "loss"]),
        range=span,
        law=found,
    )
