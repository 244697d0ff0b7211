"""The result of a fit: parameters with intervals, predictions, flags and held-out tests, and their words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, Result, flag_words, human, plain_fields, plain_types, said_once
from aimscale.analysis.errors import AnalysisError, UndefinedError
from aimscale.analysis.fitting.covariance import CONFIDENCE, current_level, half_width, level_words, satterthwaite
from aimscale.analysis.fitting.diagnostics import Misfit, diagnose, lack_of_fit, misfits, outliers, unidentified
from aimscale.analysis.fitting.held_out import HeldOut, held_out_cautions
from aimscale.analysis.fitting.inference import Estimate, Function, Interval, intervals_of
from aimscale.analysis.fitting.problem import Objective
from aimscale.analysis.laws import Array, Columns, Law, Params
from aimscale.analysis.table.points import Points
from aimscale.analysis.table.schema import CANONICAL, Exclusion, described

NOT_IDENTIFIED = "not identified"
ASSUMED = (
    "they assume that the law is true; on public tables those of one law covered 80 % of runs 3 to 100 times beyond"
)
"""Caution about predictions by one law, from backtests on the public tables of docs/forecasts.md."""
LACK_OF_FIT = ("scatter", "pattern")
"""Kinds of flags that reject a law."""


def times_beyond(x: Mapping[str, Array], ranges: Mapping[str, tuple[float, float]]) -> Array:
    """Return the largest factor by which variables (m,) lie outside their ranges, on either side; 1 inside."""
    at = {v: np.asarray(x[v], float) for v in ranges}
    return np.max([np.maximum(low / at[v], at[v] / high) for v, (low, high) in ranges.items()], axis=0, initial=1.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class Fit(Result):
    """A fitted law; `predict`, `conf_int`, `cov`, `bse`, `resid`, `fittedvalues`, `aic` and `bic` are statsmodels'."""

    also = (
        "objective", "params", "intervals", "flags", "not_identified", "objective_value", "num_points", "num_rows",
        "exclusions", "ranges", "columns", "names", "loss_unit", "misfits",
    )  # fmt: skip

    points: Points = field(repr=False)
    """The points that were fitted, with the table's rows and what was left out."""
    estimate: Estimate = field(repr=False)
    """The optimum with its covariance: errors of any function of the law's own parameters."""
    weights: str = ""
    """Weights of the points: "compute", a column, or empty for equal weights."""
    limits: tuple[float, float] | None = None
    """Values that y cannot leave, such as chance and 1 of an accuracy."""
    heldout: tuple[HeldOut, ...] = ()
    """Extrapolation tests, if asked for."""
    cautions: tuple[Flag, ...] = field(default=(), repr=False)
    """Flags of the whole table, beside those of the fit."""
    level: float = field(default_factory=current_level)
    """Level of the intervals, unless a method is given another one."""
    fixed: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    is_tested: bool = field(default=True, repr=False)
    """Whether to look for what speaks against the law (`lack_of_fit`)."""
    num_added: int = field(default=0, repr=False)
    """Number of points at the end that were not measured, such as the ideal one of a link."""

    @property
    def law(self) -> Law:
        """Law with its constants."""
        return self.estimate.problem.law

    @property
    def objective(self) -> Objective:
        """Objective, its width found."""
        return self.estimate.problem.objective

    @cached_property
    def params(self) -> pd.Series:
        """Reported parameters and derived quantities, digits of those `not_identified` included."""
        return pd.Series({name: float(value) for name, value in self.law.reported(self.estimate.params).items()})

    @cached_property
    def _unidentified(self) -> frozenset[str]:
        return unidentified(self.law, self.points.x, self.fixed)

    @cached_property
    def _ends(self) -> dict[str, Interval]:
        """Intervals by which everything is decided, of reported parameters and of the law's own."""
        return intervals_of(self.estimate, self._unidentified, CONFIDENCE)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Confidence intervals of `params`, of those that are not held."""
        is_usual = self.level == CONFIDENCE
        every = self._ends if is_usual else intervals_of(self.estimate, self._unidentified, self.level)
        return {name: each for name, each in every.items() if name in self.params}

    @cached_property
    def _diagnosis(self) -> tuple[tuple[Flag, ...], frozenset[str]]:
        return diagnose(self.estimate, [*self.params.index], self._ends, self.points, self._unidentified)

    @cached_property
    def misfits(self) -> tuple[Misfit, ...]:
        """How far the law is off against noise, in its form and in each variable alone."""
        return misfits(self.estimate, self.points) if self.is_tested else ()

    @cached_property
    def flags(self) -> tuple[Flag, ...]:
        """What to be careful about: parameters, tests against the law, the choice of rows, the table."""
        against = lack_of_fit(self.estimate, self.misfits, self.points) if self.is_tested else ()
        return said_once((*self._diagnosis[0], *against, *self.points.flags, *self.cautions))

    @cached_property
    def not_identified(self) -> frozenset[str]:
        """Parameters that the data do not pin down: `.table` prints words instead of digits."""
        return self._diagnosis[1]

    @property
    def objective_value(self) -> float:
        """Objective at the optimum, summed over points."""
        return float(self.estimate.problem.total(self.estimate.vector))

    @property
    def num_points(self) -> int:
        """Number of points that were measured."""
        return len(self.points) - self.num_added

    @property
    def num_rows(self) -> int:
        """Rows of the table given."""
        return self.points.num_rows - self.num_added

    @property
    def exclusions(self) -> tuple[Exclusion, ...]:
        """Rows left out."""
        return self.points.exclusions

    @property
    def columns(self) -> dict[str, str]:
        """Variable and "y" -> column of the table."""
        return {name: self.points.columns[name] for name in (*self.law.variables, "y")}

    @property
    def names(self) -> dict[str, str]:
        """Column -> its name in the file, where `--columns` renamed it."""
        return self.points.rows.names

    @cached_property
    def loss_unit(self) -> str:
        """Unit of the losses, for axes; empty for a table that is not a results table."""
        return self.points.rows.loss_unit

    @cached_property
    def data(self) -> pd.DataFrame:
        """The measured points: variables, y, fitted, residual (of T(y)); index as in the table."""
        problem, vector = self.estimate.problem, self.estimate.vector
        fitted, residual = problem.predict(vector[None])[0], problem.residual(vector)
        numbers = self.points.numbers[[*self.law.variables, "y"]].assign(fitted=fitted, residual=residual)
        return numbers.iloc[: self.num_points]

    @cached_property
    def outliers(self) -> pd.Index:
        """Labels of rows far beyond the others: `data.loc[outliers]`; `fit(drop_outliers=True)` leaves them out."""
        return outliers(self.estimate, self.points)

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of each variable among the measured points."""
        return {v: (float(self.data[v].min()), float(self.data[v].max())) for v in self.law.variables}

    def variables(self, df: pd.DataFrame | Mapping[str, Any]) -> Columns:
        """Take the law's variables from a table, by the variable's name or by the fit's column names."""
        out = {}
        for v in self.law.variables:
            name = next((c for c in (v, self.columns[v], CANONICAL.get(v, v)) if c in df), None)
            if name is None:
                needed = ", ".join(self.law.variables)
                raise AnalysisError(f"There is no {v} (column {self.columns[v]!r}) to predict at; give {needed}.")
            out[v] = np.atleast_1d(np.asarray(df[name], float))
        return Columns(zip(out, np.broadcast_arrays(*out.values()), strict=True))

    def predict(
        self, df: pd.DataFrame | Mapping[str, Any] | None = None, *, level: float | None = None, **scales: Any
    ) -> pd.DataFrame:
        """Predict at scales, rows as given: `predict(table)` or `predict(N=1e9, D=[1e9, 1e10])`; at the fitted points
        without any.

        Returns:
            Columns value; se, its standard error in the unit of y, and se_log, that of ln y, where the objective takes
            logarithms (the intervals follow from it); df, degrees of freedom; ci_lo, ci_hi of the law and pi_lo, pi_hi
            of one new measurement, whose scatter adds to the law's error; beyond_range, the largest factor by which a
            variable lies outside the fitted range (1 inside). Both intervals assume that the law is true: on public
            tables those of 95 % hold 80 % of runs 3 to 100 times beyond the table. `forecast` counts the misfit, too.
        """
        df = self.data if df is None and not scales else df
        x = self.variables(scales if df is None else df)
        value, errors, degrees = self.estimate.error_of(self.estimate.law_at(x))
        scatter, inverse = self.estimate.components, self.objective.inverse
        parts = np.stack(np.broadcast_arrays(errors, scatter.total))
        spare = satterthwaite(parts, np.stack(np.broadcast_arrays(degrees, scatter.degrees)))
        out = {"value": inverse(value), "se": errors, "df": degrees}
        if self.objective.log:
            out |= {"se": out["value"] * errors, "se_log": errors}
        for name, sd, free in (("ci", errors, degrees), ("pi", np.hypot(*parts), spare)):
            half = half_width(sd, free, self.level if level is None else level)
            out |= {f"{name}_lo": inverse(value - half), f"{name}_hi": inverse(value + half)}
        if self.limits is not None:
            # a curve stays above chance; one measured accuracy may fall below it, though not below 0
            low, high = self.limits
            for name in out.keys() - {"se", "se_log", "df"}:
                out[name] = np.clip(out[name], 0.0 if name.startswith("pi") else low, high)
        index = df.index if isinstance(df, pd.DataFrame) else None
        return pd.DataFrame({**out, "beyond_range": times_beyond(x, self.ranges)}, index=index)

    def conf_int(self, level: float | None = None) -> pd.DataFrame:
        """Return the intervals, a row a parameter, with columns lower and upper; NaN where not identified."""
        every = self.intervals
        if level not in (None, self.level):
            every = intervals_of(self.estimate, self.not_identified, level)
        shown = {name: Interval() if name in self.not_identified else every[name] for name in self.intervals}
        return pd.DataFrame({k: [i.low, i.high] for k, i in shown.items()}, index=["lower", "upper"], dtype=float).T

    def interval(self, function: Function, level: float | None = None) -> pd.DataFrame:
        """Return value, lower and upper, a row a value of a function of the parameters, by the delta method:
        `fit.interval(lambda p: p["alpha"] / p["beta"])`."""

        def reported(params: Params) -> Array:
            return function(self.law.quantities(params))

        ends = self.estimate.interval_of(reported, self.level if level is None else level)
        return pd.DataFrame({"value": self.estimate.value_of(reported), "lower": ends[0], "upper": ends[1]})

    @property
    def bse(self) -> pd.Series:
        """Standard errors of the identified parameters."""
        return pd.Series(np.sqrt(np.diag(self.cov)), self.cov.index)

    @property
    def fittedvalues(self) -> pd.Series:
        """The law at the fitted points, in the unit of y."""
        return self.data["fitted"]

    @property
    def cov(self) -> pd.DataFrame:
        """Cluster-robust covariance of the identified parameters, by the delta method; none of those that are held."""
        names = [name for name in self.intervals if name not in self.not_identified]
        matrix = self.estimate.covariance.matrix

        def slopes(name: str) -> Array:
            return self.estimate.gradient(lambda p: self.law.quantities(p)[name])

        rows = np.reshape([slopes(name) for name in names], (-1, len(matrix)))
        return pd.DataFrame(rows @ matrix @ rows.T, index=names, columns=names)

    @property
    def resid(self) -> pd.Series:
        """Residuals of T(y): of its logarithm where the objective takes that."""
        return self.data["residual"]

    @property
    def is_rejected(self) -> bool:
        """Whether a test speaks against the law (`lack_of_fit`)."""
        return any(flag.kind in LACK_OF_FIT for flag in self.flags)

    @property
    def nobs(self) -> int:
        """`num_points`."""
        return self.num_points

    @property
    def llf(self) -> float:
        """Log-likelihood of y under independent normal errors of T(y), so that lsq and log_lsq compare."""
        problem = self.estimate.problem
        if self.objective.robust or self.weights:
            raise UndefinedError("A likelihood needs least squares of equal weights; fit with objective='log_lsq'.")
        n, residual = problem.num_points, problem.residual(self.estimate.vector)
        jacobian = float(np.sum(np.log(problem.y))) if self.objective.log else 0.0
        return -n / 2 * (float(np.log(2 * np.pi * np.mean(residual**2))) + 1) - jacobian

    @property
    def aic(self) -> float:
        """Akaike's criterion, 2 k - 2 llf with k free parameters of the law."""
        return 2 * self.estimate.problem.num_free - 2 * self.llf

    @property
    def bic(self) -> float:
        """Bayesian criterion, k ln n - 2 llf."""
        return float(np.log(self.nobs)) * self.estimate.problem.num_free - 2 * self.llf

    def shown(self, name: str, digits: int = 4) -> str:
        """Write a parameter: digits with its interval, a bound, or the words "not identified"."""
        if name in self.not_identified:
            return NOT_IDENTIFIED
        if any(flag.kind == "from_above" and flag.subject == name for flag in self.flags):
            return f"at most {human(self.intervals[name].high, digits)}"
        text = human(self.params[name], digits)
        if name in self.fixed:
            return f"{text} (held)"
        return f"{text} {self.intervals[name].shown(digits)}" if name in self.intervals else text

    def equation(self, name: str, label: str) -> str:
        """Write a parameter in a sentence: "E = 0.31 [0.29, 0.32]", "E at most 0.6", "E not identified"."""
        text = self.shown(name, 3)
        return f"{label} {text}" if text == NOT_IDENTIFIED or text.startswith("at most") else f"{label} = {text}"

    @property
    def table(self) -> pd.DataFrame:
        """One row a parameter: parameter, value, low, high, method, note."""
        rows = []
        for name, value in zip(map(str, self.params.index), self.params, strict=True):
            is_known = name not in self.not_identified
            i = self.intervals.get(name, Interval()) if is_known else Interval()
            notes = ["held"] * (name in self.fixed) + [str(flag) for flag in self.flags if flag.subject == name]
            shown = value if is_known else NOT_IDENTIFIED
            rows.append({"parameter": name, "value": shown, **vars(i), "note": " ".join(notes)})
        return pd.DataFrame(rows)

    def headline(self) -> str:
        """Write law, points and how many flags it carries."""
        flags = f"; {len(self.flags)} flag{'s' * (len(self.flags) > 1)}, see summary()" if self.flags else ""
        return f"{self.law.formula}, {self.columns['y']} of {self.num_points} points{flags}"

    def cells(self) -> list[dict[str, str]]:
        """Write the parameters with their intervals."""
        parts = {name: self.shown(name).partition(" [") for name in map(str, self.params.index)}
        return [
            {"parameter": name, "value": v, f"{level_words(self.level)} interval": s.strip() + i}
            for name, (v, s, i) in parts.items()
        ]

    def facts(self) -> list[tuple[str, str]]:
        """List what the checklist of (Mis)fitting (Li et al. 2025) asks for, flags and held-out errors first."""
        return list(self._facts())

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield from ((f"held out {test.variable}", test.words()) for test in self.heldout)
        worst_first = sorted(
            self.flags, key=lambda flag: (flag.kind not in LACK_OF_FIT, flag.subject not in self.not_identified)
        )
        yield from (("caution", each) for each in (*held_out_cautions(self.heldout), *flag_words(worst_first)))
        for test in self.misfits:
            yield "lack of fit", f"{test.subject}: {test.words()}"
        yield "law", self.law.formula
        names = {"L": self._column_words("y"), **{v: self._column_words(v) for v in self.law.variables}}
        if other := [f"{letter} = {name}" for letter, name in names.items() if letter != name]:
            yield "columns", ", ".join(other)
        groups = ", ".join(f"{num} {kind}" for kind, num in self.estimate.groups.counts.items())
        yield "rows", f"{self.num_points} of {self.num_rows}{': ' * bool(groups)}{groups}"
        yield from [("left out", "; ".join(map(str, self.exclusions)))] if self.exclusions else []
        yield from ((f"range {v}", f"{human(low)} to {human(high)}") for v, (low, high) in self.ranges.items())
        o = self.objective
        residuals = f"{'Huber losses' if o.robust else 'squares'} of {'log ' * o.log}residuals"
        residuals += f", linear beyond {human(o.delta)} (delta)" if o.robust else ""
        yield "objective", f"{o.name}: sum of {residuals}: {human(self.objective_value, 4)} at the optimum"
        assumed = f"; {ASSUMED}" if "L" not in self.law.variables else ""
        yield "intervals", f"{level_words(self.level)}, {self.interval_method}{assumed}" if self.intervals else "none"
        yield from [] if self.heldout else [("held out", "nothing")]

    @property
    def interval_method(self) -> str:
        """Method of the intervals, in words."""
        counts = {**self.estimate.groups.counts, "points": self.num_points}
        over = " and ".join(f"{counts[name]} {name}" for name in self.estimate.covariance.by if name in counts)
        also = ", with the errors of tuning" if self.estimate.known else ""
        return f"cluster-robust (CR2, Bell-McCaffrey) over {over}{also}"

    def _column_words(self, variable: str) -> str:
        """Name a variable's (or "y"'s) column as a foreign table does; of a results table with what it counts."""
        column = self.columns[variable]
        name = self.names.get(column, column)
        counts = described(column).axis_label.partition(": ")[2]  # behind the letter of a law
        return f"{name} ({counts})" if self.loss_unit and name == column and counts else name

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the data, in plain types."""
        plain = super().to_dict() | {"params": plain_types(self.params.to_dict())}
        for part in (plain["params"], plain["intervals"]):
            part |= dict.fromkeys(self.not_identified & part.keys())
        law = {"law": self.law.name, "formula": self.law.formula, "source": self.law.source}
        flags = [{**plain_fields(flag), "words": str(flag)} for flag in self.flags]
        return {**plain, **law, "flags": flags}
