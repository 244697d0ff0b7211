"""What a fit hands back: numbers with intervals, ranges and flags, and ways to show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.fitting.bootstrap import interval
from aimscale.analysis.fitting.objectives import Objective
from aimscale.analysis.inference.groups import Groups
from aimscale.analysis.inference.mixed import Mixed
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.table.names import CANONICAL, Exclusion

if TYPE_CHECKING:
    from aimscale.analysis.fitting.heldout import HeldOut

NOT_IDENTIFIED = "not identified"


class Flag(str):
    """A sentence of warning about a fit, or about one of its parameters."""

    about: str
    """The parameter, or empty."""

    def __new__(cls, sentence: str, about: str = "") -> Flag:
        """A flag of these words."""
        flag = super().__new__(cls, sentence)
        flag.about = about
        return flag


def about(flag: str) -> str:
    """The parameter that a flag is about, or empty."""
    return flag.about if isinstance(flag, Flag) else ""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of a parameter."""

    low: float
    high: float
    confidence: float
    """E.g. 0.95."""
    method: str
    """E.g. "bootstrap over 240 points"."""

    @property
    def is_known(self) -> bool:
        """Whether both ends are numbers."""
        return bool(np.isfinite([self.low, self.high]).all())

    def words(self, form: str = ".3f") -> str:
        """Both ends in brackets, or that there is no interval."""
        return f"[{self.low:{form}}, {self.high:{form}}]" if self.is_known else "(no interval)"


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A local minimum other than the best."""

    params: dict[str, float]
    objective_value: float
    """Its objective, summed over points."""
    within_noise: bool
    """The data hardly prefer the best minimum to this one (log-likelihood ratio below 2)."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Fit(Result):
    """A fitted law."""

    law: Law
    objective: Objective
    params: dict[str, float]
    """Reported parameters and derived quantities; see `not_identified` before printing digits."""
    intervals: dict[str, Interval]
    """Confidence intervals of `params`; empty if no bootstrap was asked for."""
    flags: tuple[str, ...]
    """What to be careful about, in sentences."""
    not_identified: frozenset[str]
    """Parameters that the data do not pin down: `.table()` prints words instead of digits."""
    objective_value: float
    """Objective at the optimum, summed over points."""
    rivals: tuple[Rival, ...]
    """Other local minima, best first."""
    num_points: int
    num_rows: int
    """Rows of the table given."""
    exclusions: tuple[Exclusion, ...]
    ranges: dict[str, tuple[float, float]]
    """Smallest and largest value of each variable among the fitted points."""
    columns: dict[str, str]
    """Variable, 'y' and, where they are a column, 'weight' -> column of the table."""
    data: pd.DataFrame = field(repr=False)
    """The fitted points: variables, y, weight, fitted, residual (of T(y)); index as in the table."""
    law_params: dict[str, float] = field(repr=False)
    """The law's own parameters."""
    draws: dict[str, Array] = field(repr=False)
    """Draws of the law's own parameters (num_draws,)."""
    interval_method: str
    interval_kind: str = "none"
    """mixed, bootstrap or none."""
    cluster: str | None = "auto"
    """What a refit resamples by, or the column of its runs, as it was asked for."""
    groups: Groups = field(default_factory=lambda: Groups(sizes=None, runs=None), repr=False)
    """Which points share errors."""
    errors: Mixed | None = field(default=None, repr=False)
    """Variance components of sizes, runs and points, of the mixed model."""
    limits: tuple[float, float] | None = None
    """Values that y cannot leave, such as chance and 1 of an accuracy."""
    optimiser: str
    """How the optimum was found."""
    confidence: float = 0.95
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
    def noise(self) -> Array:
        """Residuals of T(y) as those of a point of weight 1, inflated for the parameters spent."""
        free = len(self.law.parameters) - len(self.fixed)
        standard = self.data["residual"].to_numpy() * np.sqrt(self.data["weight"].to_numpy())
        return standard * np.sqrt(self.num_points / max(1, self.num_points - free))

    def scatter(self, num_points: int, weights: Array | None = None, seed: int = 0) -> Array:
        """Errors of T(y) of new measurements (num_draws, num_points), each of a new run and size.

        Args:
            weights: their weights (num_points,), relative to the fit's; None takes the fit's median.
        """
        rng, shape = np.random.default_rng([seed, 2]), (self.num_draws, num_points)
        weight = np.full(num_points, self.data["weight"].median()) if weights is None else np.asarray(weights, float)
        if self.errors is None:
            return rng.choice(self.noise, shape) / np.sqrt(weight)
        drawn = self.errors.drawn
        spread = np.sqrt((drawn.size**2 + drawn.run**2)[:, None] + drawn.point[:, None] ** 2 / weight)
        return spread * rng.standard_normal(shape)

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
        """Predictions (rows as given): value, ci_lo, ci_hi (of the law), pi_lo, pi_hi (of one new measurement), and
        beyond_range: the largest factor by which a variable lies outside the fitted range (1 inside).

        The confidence interval covers the uncertainty of the curve, the prediction interval also the scatter of a
        measurement around it, of the weight that the table gives it in the fit's column of weights (else of the fit's
        median weight). Both are NaN without draws.
        """
        x = self.variables(df)
        value = np.broadcast_to(self.law.value(x, self.law_params), (len(x[self.law.variables[0]]),))
        out = {"value": value}
        nan = np.full(len(value), np.nan)
        out |= dict.fromkeys(("ci_lo", "ci_hi", "pi_lo", "pi_hi"), nan)
        if self.draws:
            curves = np.broadcast_to(self.law.value(x, self.draws), (self.num_draws, len(value)))
            tails = [50 * (1 - self.confidence), 50 * (1 + self.confidence)]
            out["ci_lo"], out["ci_hi"] = np.nanpercentile(curves, tails, axis=0)
            name = self.columns.get("weight")
            noise = self.scatter(len(value), None if name is None or name not in df else np.asarray(df[name], float))
            with np.errstate(invalid="ignore", divide="ignore"):
                measured = self.objective.inverse(self.objective.transform(curves) + noise)
            out["pi_lo"], out["pi_hi"] = np.nanpercentile(measured, tails, axis=0)
        if self.limits is not None:
            # a curve stays above chance; one measured accuracy may fall below it, though not below 0
            low, high = self.limits
            floor = {name: 0.0 if name.startswith("pi") else low for name in out}
            out = {name: np.clip(each, floor[name], high) for name, each in out.items()}
        factor = np.ones(len(value))
        for v, (low, high) in self.ranges.items():
            factor = np.maximum(factor, np.maximum(low / x[v], x[v] / high))
        return pd.DataFrame({**out, "beyond_range": factor}, index=df.index if isinstance(df, pd.DataFrame) else None)

    def log_slopes(self, df: pd.DataFrame | Mapping[str, Any]) -> Array:
        """Derivatives (n, k) of ln L by the logarithm of each positive parameter, or by one of either sign itself."""
        x, columns = self.variables(df), []
        base = np.log(self.law.value(x, self.law_params))
        for p in self.law.parameters:
            value = self.law_params[p.name]
            unit = abs(value) if value and (p.log or p in self.law.linear) else 1.0
            moved = np.log(self.law.value(x, {**self.law_params, p.name: value + 1e-5 * unit}))
            columns.append((moved - base) / 1e-5)
        return np.stack(columns, axis=1)

    @property
    def num_draws(self) -> int:
        """Draws kept."""
        return len(next(iter(self.draws.values()))) if self.draws else 0

    def reported_draws(self) -> dict[str, Array]:
        """Draws of `params`, derived quantities included."""
        return self.law.reported(self.draws) if self.draws else {}

    def shown(self, name: str, digits: int = 4) -> str:
        """A parameter as text: digits with its interval, or the words "not identified"."""
        if name in self.not_identified:
            return NOT_IDENTIFIED
        text = f"{self.params[name]:.{digits}g}"
        if name in self.fixed:
            return f"{text} (held)"
        if name in self.intervals:
            i = self.intervals[name]
            text += f" [{i.low:.{digits}g}, {i.high:.{digits}g}]"
        return text

    @property
    def table(self) -> pd.DataFrame:
        """One row a parameter: parameter, value, low, high, confidence, method, note."""
        rows = []
        for name, value in self.params.items():
            i = self.intervals.get(name)
            rows.append(
                {
                    "parameter": name,
                    "value": NOT_IDENTIFIED if name in self.not_identified else value,
                    "low": i.low if i else np.nan,
                    "high": i.high if i else np.nan,
                    "confidence": i.confidence if i else np.nan,
                    "method": i.method if i else "",
                    "note": " ".join(["held"] * (name in self.fixed) + [f for f in self.flags if about(f) == name]),
                }
            )
        return pd.DataFrame(rows)

    def headline(self) -> str:
        """Law, points and how many flags it carries."""
        flags = f"; {len(self.flags)} flag{'s' * (len(self.flags) > 1)}, see summary()" if self.flags else ""
        return f"{self.law.formula}, {self.columns['y']} of {self.num_points} points{flags}"

    def summary(self) -> str:
        """The parameters with their intervals, then the fit as prose."""
        width = max(map(len, self.params))
        lines = [f"  {name:<{width}}  {self.shown(name)}" for name in self.params]
        return "\n".join([self.law.formula, "", *lines, "", self.sentence()])

    def sentence(self) -> str:
        """The fit as prose: law, variables, objective, optimiser, n, exclusions, range, intervals, held-out error."""
        from aimscale.analysis.fitting.sentences import fit_sentence

        return fit_sentence(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the data and the draws, in plain types."""
        return {
            "law": self.law.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "objective": {"name": self.objective.name, "label": self.objective.label, "value": self.objective_value},
            "params": {k: None if k in self.not_identified else v for k, v in self.params.items()},
            "not_identified": sorted(self.not_identified),
            "intervals": {
                k: {"low": i.low, "high": i.high, "confidence": i.confidence} for k, i in self.intervals.items()
            },
            "interval_method": self.interval_method,
            "optimiser": self.optimiser,
            "flags": list(self.flags),
            "rivals": [
                {"params": r.params, "objective": r.objective_value, "within_noise": r.within_noise}
                for r in self.rivals
            ],
            "num_points": self.num_points,
            "num_rows": self.num_rows,
            "exclusions": [vars(each) for each in self.exclusions],
            "fixed": self.fixed,
            "bounds": {k: list(v) for k, v in self.bounds.items()},
            "ranges": {k: list(v) for k, v in self.ranges.items()},
            "columns": self.columns,
            "heldout": [h.to_dict() for h in self.heldout],
            "sentence": self.sentence(),
        }


def intervals_of(draws: dict[str, Array], confidence: float, method: str) -> dict[str, Interval]:
    """Percentile intervals of named draws."""
    out = {}
    for name, values in draws.items():
        low, high = interval(values, confidence)
        out[name] = Interval(low=low, high=high, confidence=confidence, method=method)
    return out
