"""The frontier by one approach, the points and the cost of training that every approach takes from a table, and
approach 3: where a fitted law is lowest along C = kappa N^(1+s) D."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import error_column, half_width
from aimscale.analysis.fitting.diagnostics import WIDE_DERIVED, blind_flags
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.laws.base import Array, Columns, Law, Params
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.table.names import our_name
from aimscale.analysis.table.points import resolve_columns, usable_rows
from aimscale.analysis.words import Flag, human

FORM_ALONE = 1e-4
"""An exponent whose interval is narrower than this is set by the law's form, not by the data."""
SEARCH_SPAN, GRID = 100.0, 241
"""A law is minimised within this factor of the measured sizes, from the lowest of so many."""
NEWTON_STEPS, NEWTON_WIDTH = 8, 1e-3
"""Newton's steps from there, by differences of ln N: of fixed width, so that N* moves smoothly with the parameters."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Training FLOPs C = kappa N^(1 + s) D: 6ND, or as counted with attention and head (and images for D)."""

    kappa: float
    s: float

    def samples(self, flops: Array, num_params: Array) -> Array:
        """Return the D that a budget buys at a size."""
        return flops / (self.kappa * num_params ** (1 + self.s))

    def flops(self, num_params: Array, samples: Array) -> Array:
        """Return the C of training a size on so many samples."""
        return self.kappa * num_params ** (1 + self.s) * samples


def cost_of(points: pd.DataFrame) -> Cost:
    """Fit kappa and s to the N, D and C of points."""
    log_n, log_d, log_c = np.log(points[["N", "D", "C"]].to_numpy(float)).T
    per_sample = log_c - log_n - log_d
    is_flat = np.ptp(log_n) == 0 or np.ptp(per_sample) < 1e-9
    s, intercept = (0.0, per_sample.mean()) if is_flat else np.polyfit(log_n, per_sample, 1)
    return Cost(kappa=float(np.exp(intercept)), s=float(s))


def points_of(df: pd.DataFrame, y: str, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Take N, D, C and loss of the usable rows, under these names, with the columns that tell sizes and runs apart."""
    named = {"C": our_name(df, "C"), **(columns or {})}
    found = {**resolve_columns(CHINCHILLA, df, columns), "C": named["C"], "loss": y}
    used = usable_rows(df, found, best_by="loss")
    if used.numbers.empty:
        raise AnalysisError("No row of the table has positive N, D, C and loss, so there is no frontier to draw.")
    kept = {**{name: name for name in ("size", "run_id", "seed")}, error_column("loss"): error_column(y)}
    return used.numbers.assign(**{name: used.rows[column] for name, column in kept.items() if column in df.columns})


class NoFrontier(AnalysisError):
    """An approach that a table does not allow: flags of the reason, then of the budgets that were refused."""

    def __init__(self, kind: str, text: str, *refusals: Flag, subject: str = "", number: float = 0.0) -> None:
        self.flags = (Flag(kind=kind, subject=subject, number=number, text=text), *refusals)
        super().__init__(why_not(self.flags))


def refusal_words(flags: Sequence[Flag]) -> str:
    """Say why amounts of compute were refused, and how many for each reason."""
    return ", ".join(f"{why} ({num})" for why, num in Counter(map(str, flags)).items())


def why_not(flags: Sequence[Flag]) -> str:
    """Say why an approach was not possible."""
    return f"{flags[0]}; {refusal_words(flags[1:])}" if flags[1:] else str(flags[0])


def student_interval(value: float, error: float, degrees: float, method: str = "") -> Interval:
    """Return the 95 % interval of a value with a standard error."""
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
    optimum: Callable[[Array], tuple[Array, Array, Array]] = field(repr=False)
    """Function from budgets (m,) to ln N* (m,), its standard errors and their degrees of freedom."""
    cost: Cost
    pairs: pd.DataFrame
    """Optima that the line goes through: C, N, D, loss (approach 2)."""
    refusals: tuple[Flag, ...] = ()
    """Budgets left out and why; their number is C."""
    range: tuple[float, float]
    """Smallest and largest C used."""
    law: Fit | None = field(default=None, repr=False)
    """Law of approach 3."""
    flags: tuple[Flag, ...] = ()
    """Errors that points may share and that the rows hardly tell, or not at all."""

    def at(self, flops: Array) -> pd.DataFrame:
        """Return the optimum at budgets.

        Returns:
            Columns C, N, N_lo, N_hi, D, D_lo, D_hi, of approach 3 loss, loss_lo, loss_hi, and beyond_range, the factor
            above the largest C used (1 within).
        """
        c = np.atleast_1d(np.asarray(flops, float))
        log_n, errors, degrees = self.optimum(c)
        half = half_width(errors, degrees)
        n, n_lo, n_hi = np.exp([log_n, log_n - half, log_n + half])
        d, d_lo, d_hi = (self.cost.samples(c, each) for each in (n, n_hi, n_lo))
        out = {"C": c, "N": n, "N_lo": n_lo, "N_hi": n_hi, "D": d, "D_lo": d_lo, "D_hi": d_hi}
        if self.law is not None:
            predicted = self.law.predict({"N": n, "D": d, "U": d, "C": c})
            out |= {"loss": predicted["value"], "loss_lo": predicted["ci_lo"], "loss_hi": predicted["ci_hi"]}
        return pd.DataFrame({**out, "beyond_range": np.maximum(1.0, c / self.range[1])})

    @property
    def method_words(self) -> str:
        """Method, that of the interval, and what was left out."""
        left = f"; left out: {refusal_words(self.refusals)}" if self.refusals else ""
        return f"{self.method}; interval: {self.exponent_interval.method}{left}"

    def exponent_words(self) -> str:
        """Write the exponent with its interval."""
        return f"{self.exponent:.2f} {self.exponent_interval.words('.2f')}"


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
        flags=tuple(blind_flags(found.estimate.groups)),
    )
