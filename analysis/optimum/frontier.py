"""The frontier by one approach, the points and the cost of training that every approach takes from a table, and
approach 3: where a fitted law is lowest along C = kappa N^(1+s) D."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, human
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import current_level, half_width
from aimscale.analysis.fitting.diagnostics import WIDE_DERIVED, blind_flags
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.inference import Estimate, Function, Interval
from aimscale.analysis.fitting.result import LACK_OF_FIT, Fit, times_beyond
from aimscale.analysis.forecasts.forecaster import DOF, Forecaster
from aimscale.analysis.laws import Array, Columns, Law, Params
from aimscale.analysis.table.groups import Cost, cost_of
from aimscale.analysis.table.points import compute_points
from aimscale.analysis.table.runs import Runs

FORM_ALONE = 1e-4
"""An exponent whose interval is narrower than this is set by the law's form, not by the data."""
SEARCH_SPAN, GRID = 100.0, 241
"""A law is minimised within this factor of the measured sizes, from the lowest of so many."""
LEAST_WEIGHT = 0.5
"""Weight in the forecast that laws with an optimum must have together, where they stand in for a rejected one."""
NEWTON_STEPS, NEWTON_WIDTH = 8, 1e-3
"""Newton's steps from there, by differences of ln N: of fixed width, so that N* moves smoothly with the parameters."""


class NoFrontier(AnalysisError):
    """An approach that a table does not allow: flags of the reason, then of the budgets that were refused."""

    def __init__(self, kind: str, text: str, *refusals: Flag, subject: str = "", number: float = 0.0) -> None:
        self.flags = (Flag(kind=kind, subject=subject, number=number, text=text), *refusals)
        super().__init__(why_not(self.flags))


def refusal_words(flags: Sequence[Flag]) -> str:
    """Say why amounts of compute were refused, and how many for each reason."""
    return ", ".join(f"{reason} ({num})" for reason, num in Counter(map(str, flags)).items())


def why_not(flags: Sequence[Flag]) -> str:
    """Say why an approach was not possible."""
    return f"{flags[0]}; {refusal_words(flags[1:])}" if flags[1:] else str(flags[0])


def student_interval(value: float, error: float, degrees: float, method: str = "") -> Interval:
    """Return the interval of a value with a standard error."""
    half = float(half_width(error, degrees))
    return Interval(low=value - half, high=value + half, method=method)


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Compute-optimal size N*(C) = k C^a by one approach."""

    approach: int
    """2 iso-FLOP parabolas, 3 parametric law."""
    method: str
    """Method in words."""
    exponent: float
    """a, of N*(C)."""
    exponent_interval: Interval
    exponent_error: tuple[float, float]
    """Standard error of a, NaN where nothing tells it, and its degrees of freedom."""
    optimum: Callable[[Array], tuple[Array, Array, Array]] = field(repr=False)
    """Function from budgets (m,) to ln N* (m,), its standard errors and their degrees of freedom."""
    cost: Cost
    pairs: pd.DataFrame
    """Optima that the line goes through: C, N, D, loss (approach 2)."""
    refusals: tuple[Flag, ...] = ()
    """Budgets left out and why; their number is C."""
    range: tuple[float, float]
    """Smallest and largest C used."""
    sizes: tuple[float, float]
    """Smallest and largest N used."""
    law: Fit | Forecaster | None = field(default=None, repr=False)
    """Law of approach 3, or those of the forecast where that one is rejected."""
    level: float = field(default_factory=current_level)
    """Level of the intervals."""
    flags: tuple[Flag, ...] = ()
    """Errors that points may share and that the rows hardly tell, or not at all."""
    moves: Callable[[float], pd.DataFrame] | None = field(default=None, repr=False)
    """Function from a budget to the derivatives of a and of ln N* there by each ln loss, with the table's labels."""
    errors: pd.DataFrame | None = field(default=None, repr=False)
    """Covariance of the ln losses about a smooth surface, with the table's labels (approach 2)."""

    def at(self, flops: Array) -> pd.DataFrame:
        """Return the optimum at budgets.

        Returns:
            Columns C, N, N_lo, N_hi, D, D_lo, D_hi, of approach 3 loss, loss_lo, loss_hi, and beyond_range, the factor
            by which C or N* lies outside those used (1 within).
        """
        c = np.atleast_1d(np.asarray(flops, float))
        log_n, errors, degrees = self.optimum(c)
        half = half_width(errors, degrees, self.level)
        n, n_lo, n_hi = np.exp([log_n, log_n - half, log_n + half])
        d, d_lo, d_hi = (self.cost.samples(c, each) for each in (n, n_hi, n_lo))
        out = {"C": c, "N": n, "N_lo": n_lo, "N_hi": n_hi, "D": d, "D_lo": d_lo, "D_hi": d_hi}
        if self.law is not None:
            predicted = self.law.predict({"N": n, "D": d, "U": d, "C": c})
            out |= {"loss": predicted["value"], "loss_lo": predicted["ci_lo"], "loss_hi": predicted["ci_hi"]}
        return pd.DataFrame({**out, "beyond_range": times_beyond(out, {"C": self.range, "N": self.sizes})})

    @property
    def method_words(self) -> str:
        """Method, that of the interval, and what was left out."""
        left_out = f"; left out: {refusal_words(self.refusals)}" if self.refusals else ""
        return f"{self.method}; interval: {self.exponent_interval.method}{left_out}"

    def exponent_words(self) -> str:
        """Write the exponent with its interval, unless that is too wide to tell anything."""
        if self.exponent_interval.high - self.exponent_interval.low > WIDE_DERIVED:
            return "a, a not known"
        return f"{self.exponent:.2f} {self.exponent_interval.words('.2f')}"

    @property
    def law_words(self) -> str:
        """Name the laws behind an optimum."""
        if self.law is None:
            return ""
        return " on the forecast's laws" if isinstance(self.law, Forecaster) else f" on the {self.law.law.name} law"


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
            values = law.value(Columns({v: each.reshape(*n.shape[:-2], -1) for v, each in x.items()}), params)
        return values.reshape(-1, *n.shape[-2:])

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


def mean_slope(params: Params, *, where: Callable[..., Array], span: tuple[float, float]) -> Array:
    """Return the mean exponent (batch, 1) of N* over a range of budgets."""
    return np.diff(where(params, flops=span)) / np.log(span[1] / span[0])


def law_moves(flops: float, *, fit: Fit, where: Callable[..., Array], span: tuple[float, float]) -> pd.DataFrame:
    """Return the derivatives of the mean exponent of N*, and of ln N* at a budget, by the ln loss of every row."""
    functions = partial(mean_slope, where=where, span=span), partial(where, flops=[flops])
    gradients = np.vstack([fit.estimate.gradient(each) for each in functions])
    return pd.DataFrame((gradients @ fit.estimate.design.inverse).T, fit.data.index)


def parametric_frontier(law: Fit | Law, runs: Runs, *, y: str = "val_loss") -> Frontier:
    """Draw the frontier of approach 3: the minimum of a law of N and D (of C too, and of U = D) on C = kappa N^(1+s) D;
    its exponent is the mean one over the table's range of C."""
    form = law.law if isinstance(law, Fit) else law
    name, variables = form.name, ", ".join(form.variables)
    if not {"N", "D"} <= {*form.variables}:
        raise AnalysisError(f"Approach 3 needs a law of N and D, and {form.formula} is one of {variables}.")
    try:
        result = law if isinstance(law, Fit) else fit(runs, law, y=y)
    except AnalysisError as error:
        raise NoFrontier("no_law", f"the {name} law was not fitted: {error}", subject=name) from None
    points = compute_points(runs, result.columns["y"], result.columns)
    sizes, span, cost = points.span("N"), points.span("C"), cost_of(points.numbers)
    where = partial(log_optimum, law=result.law, cost=cost, sizes=sizes)
    optimum = partial(law_optimum, fit=result, where=where)
    for flops, log_n in zip(span, optimum(span)[0], strict=True):
        if np.isnan(log_n):
            place = f"at {human(flops)} FLOP within {human(SEARCH_SPAN)} times the measured sizes"
            text = f"the {name} law has no best size {place}"
            raise NoFrontier("no_minimum", text, subject=name, number=flops)
    slope = result.estimate.error_of(partial(mean_slope, where=where, span=span))
    exponent, sd, degrees = (float(each[0]) for each in slope)
    i = student_interval(exponent, sd, degrees, result.interval_method)
    if not i.high - i.low <= WIDE_DERIVED or result.not_identified & {*form.derived}:
        raise NoFrontier("no_exponents", f"the exponents of the {name} law are not identified", subject=name)
    if i.high - i.low < FORM_ALONE:
        sd = float("nan")
        i = Interval(low=np.nan, high=np.nan, method="the law's form alone sets this exponent")
    return Frontier(
        approach=3,
        method=f"minimum of the {name} law on C = {cost}",
        exponent=exponent,
        exponent_interval=i,
        exponent_error=(sd, degrees),
        optimum=optimum,
        cost=cost,
        pairs=pd.DataFrame(columns=["C", "N", "D", "loss"]),
        range=span,
        sizes=sizes,
        law=result,
        flags=tuple(blind_flags(result.estimate.groups)),
        moves=partial(law_moves, fit=result, where=where, span=span),
    )


def rejection(law: Fit) -> Flag:
    """Flag a law that its own test rejects."""
    off = next(str(flag).rstrip(".") for flag in law.flags if flag.kind in LACK_OF_FIT)
    text = f"The {law.law.name} law is rejected by its own test: {off}; the forecast's laws stand in."
    return Flag(kind="rejected", subject=law.law.name, text=text)


def ensemble_frontier(laws: Forecaster, runs: Runs, *, y: str, law: Fit, flags: tuple[Flag, ...] = ()) -> Frontier:
    """Draw the frontier of approach 3 by the mean of the forecast's laws that have an optimum, weighted as there, whose
    differences its intervals count: in the place of a law, for the reasons that `flags` give."""
    points = compute_points(runs, y, law.columns)
    sizes, span, cost = points.span("N"), points.span("C"), cost_of(points.numbers)
    parts = dict[str, tuple[float, Estimate, Callable[..., Array]]]()
    for name, fitted in laws.fits.items():
        where = partial(log_optimum, law=fitted.law, cost=cost, sizes=sizes)
        if np.isfinite(fitted.estimate.value_of(partial(where, flops=span))).all():
            parts[name] = float(laws.weights[name]), fitted.estimate, where
    if sum(weight for weight, *_ in parts.values()) < LEAST_WEIGHT:
        reason = " ".join([*map(str, flags), "Most of the forecast's laws have no optimum."])
        raise NoFrontier("no_optima", reason, subject=law.law.name)
    weights = np.array([[weight] for weight, *_ in parts.values()])
    weights = weights / weights.sum()

    def mean(of: Callable[[Callable[..., Array]], Function]) -> tuple[Array, Array, Array]:
        """Average a function of every law, with the variance within and between laws."""
        values, errors, _ = (
            np.array(each) for each in zip(*(e.error_of(of(w)) for _, e, w in parts.values()), strict=True)
        )
        centre = np.sum(weights * values, axis=0)
        spread = np.sqrt(np.sum(weights * (errors**2 + (values - centre) ** 2), axis=0))
        return centre, spread, np.full(len(centre), DOF)

    (exponent,), (sd,), _ = mean(lambda where: partial(mean_slope, where=where, span=span))
    shares = ", ".join(f"{name} {100 * weight:.0f} %" for name, weight in zip(parts, weights[:, 0], strict=True))
    return Frontier(
        approach=3,
        method=f"mean of the laws of the forecast ({shares})",
        exponent=float(exponent),
        exponent_interval=student_interval(float(exponent), float(sd), DOF, "errors of the laws and between them"),
        exponent_error=(float(sd), DOF),
        optimum=lambda flops: mean(lambda where: partial(where, flops=flops)),
        cost=cost,
        pairs=pd.DataFrame(columns=["C", "N", "D", "loss"]),
        range=span,
        sizes=sizes,
        law=laws,
        flags=flags,
    )
