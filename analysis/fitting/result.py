"""What a fit and a held-out test hand back: numbers with intervals, ranges and flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Drawing, Result, plain_fields, plain_types
from aimscale.analysis.fitting.covariance import half_width
from aimscale.analysis.fitting.inference import CONFIDENCE, Estimate
from aimscale.analysis.fitting.objectives import Objective
from aimscale.analysis.laws.base import Columns, Law
from aimscale.analysis.table.names import CANONICAL, Exclusion
from aimscale.analysis.words import EXPONENTS, NOT_IDENTIFIED, Flag, fit_facts, held_out_words, human, interval_words


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of a parameter."""

    low: float
    high: float
    method: str = ""
    """How it was found, where that is not how the fit's other intervals were."""

    @property
    def is_known(self) -> bool:
        """Whether both ends are numbers."""
        return bool(np.isfinite([self.low, self.high]).all())

    def shown(self, digits: int = 4) -> str:
        """The same with so many digits, as counts are written: "[84.1k, 154k]"."""
        return f"[{human(self.low, digits)}, {human(self.high, digits)}]" if self.is_known else "(no interval)"

    def words(self, form: str = ".3f") -> str:
        """E.g. "[0.31, 0.38]", or that there is no interval."""
        return f"[{self.low:{form}}, {self.high:{form}}]" if self.is_known else "(no interval)"


@dataclass(frozen=True, kw_only=True, repr=False)
class HeldOut(Result):
    """What a fit to the smaller scales predicts for the largest, and what happened."""

    variable: str
    """Scale that was held out: N, D, C or another column."""
    values: tuple[float, ...]
    """The held-out values of it."""
    num_train: int
    num_test: int
    mean_abs_relative_error: float
    """Mean of |prediction / measurement - 1|."""
    naive_mean_abs_relative_error: float
    """The same error of the naive baseline, a straight line in log-log."""
    not_identified: frozenset[str]
    """Parameters that the points which were left do not pin down: a law with such exponents was not tested."""
    is_blind: bool
    """Whether the points that were left hardly tell what all points of one such scale share: intervals assume none."""
    predictions: pd.DataFrame = field(repr=False)
    """Rows: index of the table, variables, measured, predicted, pi_lo, pi_hi, inside, naive."""

    @property
    def is_test(self) -> bool:
        """Whether the points that were left identify the exponents: a law without them was not tested."""
        return not self.not_identified.intersection(EXPONENTS)

    @property
    def is_better(self) -> bool:
        """Whether the law predicts better than the naive baseline."""
        return self.mean_abs_relative_error < self.naive_mean_abs_relative_error

    @property
    def num_inside(self) -> int:
        """Held-out points inside their prediction interval."""
        return int(self.predictions["inside"].sum())

    @property
    def num_far(self) -> int:
        """Held-out points at least twice as far from their prediction as the end of its interval on their side."""
        p = self.predictions
        end = p["pi_lo"].where(p["measured"] < p["predicted"], p["pi_hi"])
        return int(((p["measured"] - p["predicted"]) / (end - p["predicted"])).gt(2).sum())

    @property
    def table(self) -> pd.DataFrame:
        """`predictions`."""
        return self.predictions

    def sentence(self) -> str:
        """Error on the held-out scale beside the naive baseline."""
        return f"Held out {self.variable}: {held_out_words(self)}."

    headline = sentence


@dataclass(frozen=True, kw_only=True, repr=False)
class Fit(Result):
    """A fitted law."""

    plot = Drawing("scaling.plot_fit")

    law: Law
    objective: Objective
    params: dict[str, float]
    """Reported parameters and derived quantities; see `not_identified` before printing digits."""
    intervals: dict[str, Interval]
    """Confidence intervals of `params`, of those that are not held."""
    flags: tuple[Flag, ...]
    """What to be careful about."""
    not_identified: frozenset[str]
    """Parameters that the data do not pin down: `.table()` prints words instead of digits."""
    objective_value: float
    """Objective at the optimum, summed over points."""
    num_points: int
    num_rows: int
    """Rows of the table given."""
    exclusions: tuple[Exclusion, ...]
    ranges: dict[str, tuple[float, float]]
    """Smallest and largest value of each variable among the fitted points."""
    columns: dict[str, str]
    """Variable and 'y' -> column of the table."""
    data: pd.DataFrame = field(repr=False)
    """The fitted points: variables, y, fitted, residual (of T(y)); index as in the table."""
    estimate: Estimate = field(repr=False)
    """The optimum with its covariance: errors of any function of the law's own parameters."""
    weights: str = ""
    """How points were weighted: "compute", a column, or empty for equal weights."""
    limits: tuple[float, float] | None = None
    """Values that y cannot leave, such as chance and 1 of an accuracy."""
    names: dict[str, str] = field(default_factory=dict)
    """Column -> its name in the file, where `--columns` renamed it."""
    loss_unit: str = ""
    """Unit of the losses, for axes; empty for a table that is not a results table."""
    heldout: tuple[HeldOut, ...] = ()
    """Extrapolation tests, if asked for."""
    fixed: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Parameters that were kept between two values."""

    @property
    def interval_method(self) -> str:
        """How the intervals were found, in words."""
        return interval_words(self)

    @property
    def law_params(self) -> dict[str, float]:
        """The law's own parameters."""
        return self.estimate.params

    def variables(self, df: pd.DataFrame | Mapping[str, Any]) -> Columns:
        """The law's variables, taken from a table by the variable's name or by the fit's column names."""
        out = Columns()
        for v in self.law.variables:
            key = next((c for c in (v, self.columns[v], CANONICAL.get(v, v)) if c in df), None)
            if key is None:
                raise KeyError(f"{v} (column {self.columns[v]!r})")
            out[v] = np.atleast_1d(np.asarray(df[key], float))
        return out

    def predict(self, df: pd.DataFrame | Mapping[str, Any]) -> pd.DataFrame:
        """Predict at scales, rows as given.

        Returns:
            Columns value; se and df, the standard error of T(law) (of its logarithm where the objective takes that) and
            its degrees of freedom; ci_lo, ci_hi of the law and pi_lo, pi_hi of one new measurement, whose scatter adds
            to the law's error; beyond_range, the largest factor by which a variable lies outside the fitted range (1
            inside). Both intervals assume that the law is true: on public tables they hold 80 % of runs 3 to 100 times
            beyond the table. `forecast` counts the misfit, too.
        """
        x = self.variables(df)
        value, errors, degrees = self.estimate.transformed(x)
        scatter = self.estimate.components
        whole = np.hypot(errors, scatter.total)
        uncertain = errors**4 / degrees + scatter.total**4 / scatter.degrees
        spare = np.where(uncertain > 0, whole**4 / np.maximum(uncertain, 1e-300), scatter.degrees)
        inverse, out = self.objective.inverse, {"value": value, "se": errors, "df": degrees}
        for name, half in (
            ("ci", half_width(errors, degrees, CONFIDENCE)),
            ("pi", half_width(whole, spare, CONFIDENCE)),
        ):
            out |= {f"{name}_lo": inverse(value - half), f"{name}_hi": inverse(value + half)}
        out["value"] = inverse(value)
        if self.limits is not None:
            # a curve stays above chance; one measured accuracy may fall below it, though not below 0
            low, high = self.limits
            for name in ("value", "ci_lo", "ci_hi", "pi_lo", "pi_hi"):
                out[name] = np.clip(out[name], 0.0 if name.startswith("pi") else low, high)
        factor = np.ones(len(value))
        for v, (low, high) in self.ranges.items():
            factor = np.maximum(factor, np.maximum(low / x[v], x[v] / high))
        return pd.DataFrame({**out, "beyond_range": factor}, index=df.index if isinstance(df, pd.DataFrame) else None)

    def shown(self, name: str, digits: int = 4) -> str:
        """A parameter as text: digits with its interval, a bound, or the words "not identified"."""
        if name in self.not_identified:
            return NOT_IDENTIFIED
        if any(flag.kind == "from_above" and flag.subject == name for flag in self.flags):
            return f"at most {human(self.intervals[name].high, digits)}"
        text = human(self.params[name], digits)
        if name in self.fixed:
            return f"{text} (held)"
        return f"{text} {self.intervals[name].shown(digits)}" if name in self.intervals else text

    def equation(self, name: str, label: str) -> str:
        """A parameter in a sentence: "E = 0.31 [0.29, 0.32]", "E at most 0.6", "E not identified"."""
        text = self.shown(name, 3)
        return f"{label} {text}" if text == NOT_IDENTIFIED or text.startswith("at most") else f"{label} = {text}"

    @property
    def table(self) -> pd.DataFrame:
        """One row a parameter: parameter, value, low, high, method, note."""
        rows = []
        for name, value in self.params.items():
            unknown = Interval(low=np.nan, high=np.nan)
            i = unknown if name in self.not_identified else self.intervals.get(name, unknown)
            notes = ["held"] * (name in self.fixed) + [str(flag) for flag in self.flags if flag.subject == name]
            shown = NOT_IDENTIFIED if name in self.not_identified else value
            rows.append({"parameter": name, "value": shown, **vars(i), "note": " ".join(notes)})
        return pd.DataFrame(rows)

    def headline(self) -> str:
        """Law, points and how many flags it carries."""
        flags = f"; {len(self.flags)} flag{'s' * (len(self.flags) > 1)}, see summary()" if self.flags else ""
        return f"{self.law.formula}, {self.columns['y']} of {self.num_points} points{flags}"

    def cells(self) -> list[dict[str, str]]:
        """The parameters with their intervals."""
        parts = {name: self.shown(name).partition(" [") for name in self.params}
        return [
            {"parameter": name, "value": value, "95 % interval": f"[{interval}" if interval else ""}
            for name, (value, _, interval) in parts.items()
        ]

    def facts(self) -> list[tuple[str, str]]:
        """Flags, law, columns, rows, ranges, objective, intervals, held-out errors."""
        return list(fit_facts(self))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the data, in plain types."""
        known, intervals = (
            {k: None if k in self.not_identified else plain_types(v) for k, v in each.items()}
            for each in (self.params, {k: plain_fields(i) for k, i in self.intervals.items()})
        )
        law = {"law": self.law.name, "formula": self.law.formula, "source": self.law.source}
        flags = [{**plain_fields(flag), "words": str(flag)} for flag in self.flags]
        return {**super().to_dict(), **law, "params": known, "intervals": intervals, "flags": flags}
