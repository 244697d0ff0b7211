"""An optimum, errors of any function of its parameters, and intervals of a law's own, each symmetric on the scale that
suits it: the law is linearised in the optimiser's coordinates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from aimscale.analysis.display import human
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import (
    Components,
    Covariance,
    Design,
    components_of,
    half_width,
    linear_design,
    sandwich,
)
from aimscale.analysis.fitting.problem import HUBER_LOG, Problem, global_minimum, minimise
from aimscale.analysis.laws import Array, Columns, Params
from aimscale.analysis.table.groups import Groups, visible_groups
from aimscale.analysis.table.points import KnownErrors

DIFFERENCE = 1e-5
"""Step of central differences, as a share of a coordinate's own scale: their error is its square."""
ROUNDING = 1e-12
"""Relative change of a law's values that rounding may be."""
LEAST_MOVE = 1e-8
"""Move of a function over a parameter's whole scale that counts: its differences round below that."""
LEAST_SLOPE = 1e-6
"""Curvature of the objective at a point outside its quadratic zone."""
SMALLEST_DELTA = 1e-9
"""Least width of a zone that is found from residuals: those of a table without noise are rounding errors."""
NO_INTERVAL = "(no interval)"
INTERVAL_SCALES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "own": (np.positive, np.positive),
    "log": (np.log, np.exp),
    "reciprocal": (np.reciprocal, lambda value: 1 / value if value > 0 else np.inf),
}
"""Scales on which an interval is symmetric: a function and its inverse."""

Function = Callable[[Params], Array]
"""Parameters of the law (batch,) by name -> values (batch, m) or (batch,)."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Best parameters of a law, with their covariance and the errors of the points."""

    problem: Problem
    vector: Array
    """Optimum (k,) in the optimiser's coordinates."""
    components: Components
    """Errors of T(y) that points share, and of single points."""
    groups: Groups
    """Points that share errors which the law leaves visible."""
    slopes: Array
    """Derivatives (n, free) of T(law) by the movable parameters; nil where these are not felt."""
    design: Design
    residual: Array
    """Residuals (n,) of T(y) whose least squares the optimum is: outliers drawn in, the others stretched for it."""
    known: KnownErrors | None = None
    """Errors of the measurements that were found before, such as those of tuning."""

    @cached_property
    def covariance(self) -> Covariance:
        """Covariance of the movable coordinates; forecasts, which fit most, never ask for it."""
        # a point's precision is the curvature of the objective, besides which its weight is none
        score, curvature = _score_and_curvature(self.problem, self.vector)
        root = np.sqrt(curvature)
        scaled = linear_design(self.slopes * root[:, None], self.problem.weights)
        clusterings = self.groups.clusterings(self.problem.num_points).items()
        errors = self.components, self.groups
        by = {name: sandwich(scaled, score / root, codes, *errors) for name, codes in clusterings}
        least = tuple(name for name in by if name not in self.groups.few)  # these would leave next to no interval
        if self.known is not None:
            loadings = scaled.inverse * root * self._per_logarithm @ self.known.loadings
            return Covariance(by={**by, "tuning": replace(self.known, loadings=loadings)}, least=least)
        return Covariance(by=by, least=least)

    @property
    def _per_logarithm(self) -> Array:
        """Change of T(y) by ln y."""
        return 1.0 if self.problem.objective.log else self.problem.y

    @cached_property
    def params(self) -> dict[str, float]:
        """The law's own parameters."""
        return {name: float(v[0]) for name, v in self.problem.params_of(self.vector[None]).items()}

    @property
    def num_runs(self) -> float:
        """Effective number of points behind a weighted fit (Kish): all where weights are equal."""
        w = self.problem.weights
        return float(w.sum() ** 2 / np.sum(w**2))

    def gradient(self, function: Function) -> Array:
        """Return derivatives (m, free) of a function by the movable coordinates."""
        free, problem = np.flatnonzero(self.problem.movable), self.problem
        steps = DIFFERENCE * np.diag(problem.scales)[free]
        values = function(problem.params_of(np.concatenate([self.vector + steps, self.vector - steps])))
        up, down = np.asarray(values, float).reshape(2, len(free), -1)
        return ((up - down) / (2 * steps.sum(axis=1, keepdims=True))).T

    def value_of(self, function: Function) -> Array:
        """Return a function's values (m,)."""
        return np.asarray(function({k: np.array([v]) for k, v in self.params.items()}), float).reshape(-1)

    def error_of(self, function: Function) -> tuple[Array, Array, Array]:
        """Return a function's values (m,), standard errors (m,) and degrees of freedom (m,), by the delta method; an
        infinite error where it moves with a parameter that the fit does not feel."""
        value, gradient = self.value_of(function), self.gradient(function)
        errors, degrees = self.covariance.of_contrasts(gradient)
        is_idle = ~self.slopes.any(axis=0)
        moved = np.abs(gradient * self.problem.scales[self.problem.movable])[:, is_idle] > LEAST_MOVE
        return value, np.where(moved.any(axis=1), np.inf, errors), degrees

    def interval_of(self, function: Function, level: float | None = None) -> tuple[Array, Array]:
        """Return the ends (m,) of intervals of a function's values."""
        value, errors, degrees = self.error_of(function)
        half = half_width(errors, degrees, level)
        return value - half, value + half

    def error_with_more_data(self, target: Function, more: Function, noise: float) -> tuple[float, Array]:
        """Return the standard error of a target, and what it would be (m,) after one more measurement of each of `more`
        (m,), functions of the parameters, with errors of standard deviation `noise`."""
        (wanted,), shown, matrix = self.gradient(target), self.gradient(more), self.covariance.matrix
        shared, variances = shown @ matrix @ wanted, np.sum(shown @ matrix * shown, axis=1)
        before = float(wanted @ matrix @ wanted)
        return before**0.5, np.sqrt(np.maximum(before - shared**2 / np.maximum(variances + noise**2, 1e-300), 0.0))

    def predict_from_components(self, x: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return T(law) at places (m,) and its standard errors (m,) by the components of variance, which are steadier
        than the sandwich where few runs carry the weight, as in the mean of several laws."""
        law = self.law_at(x)
        contrasts = self.gradient(law) @ self.design.inverse
        variances = self.components.variance_of(contrasts, self.groups)
        if self.known is not None:
            variances = variances + self.known.of_contrasts(contrasts * self._per_logarithm)[0] ** 2
        return self.value_of(law), np.sqrt(variances)

    def law_at(self, x: Mapping[str, Array]) -> Function:
        """Make T(law) at places (m,) a function of the parameters."""
        law, transform = self.problem.law, self.problem.objective.transform
        columns = Columns({v: np.atleast_1d(np.asarray(x[v], float)) for v in law.variables})
        shape = np.shape(columns[law.variables[0]])

        def value(params: Params) -> Array:
            y = law.value(columns, params)
            with np.errstate(invalid="ignore", divide="ignore"):
                return transform(np.broadcast_to(y, np.broadcast_shapes(np.shape(y), shape)))

        return value


def estimated(problem: Problem, groups: Groups, given_errors: KnownErrors | None = None) -> Estimate:
    """Minimise a problem and infer the errors of its optimum; `known` ones of the measurements add to what residuals
    show.

    Raises:
        AnalysisError: the objective is nowhere finite, or the law not differentiable at its optimum.
    """
    problem, vector = _minimised(problem)
    slopes = _slopes(problem, vector)
    if not np.isfinite(slopes).all():
        raise AnalysisError(f"The optimum of {problem.law.formula} lies where it has no finite derivatives.")
    score, curvature = _score_and_curvature(problem, vector)
    groups = visible_groups(groups, slopes)
    design, residual = linear_design(slopes, problem.weights), score / np.average(curvature, weights=problem.weights)
    return Estimate(
        problem=problem,
        vector=vector,
        components=components_of(design, residual, groups),
        groups=groups,
        slopes=slopes,
        design=design,
        residual=residual,
        known=given_errors,
    )


def _slopes(problem: Problem, vector: Array) -> Array:
    """Return derivatives (n, free) of T(law) by the movable parameters, nil where none of their steps moves the law by
    more than it rounds: else rounding would decide which way they point."""
    slopes = problem.linearised(vector)
    moved = np.abs(slopes).max(axis=0) * problem.scales[problem.movable]
    level = 1.0 if problem.objective.log else float(np.abs(problem.y).max())
    return np.where(moved <= ROUNDING * level, 0.0, slopes)


def _minimised(problem: Problem) -> tuple[Problem, Array]:
    """Find the minimum; an objective that takes its scale from the residuals is given that of a nearly
    least-absolute-deviations fit, which no few outliers can move, and once more of the fit that follows."""
    objective, free = problem.objective, problem.num_free

    def with_zone(sd: float) -> Problem:
        return replace(problem, objective=replace(objective, delta=max(objective.multiple * sd, SMALLEST_DELTA)))

    if objective.multiple:
        narrow = _finite_minimum(replace(problem, objective=HUBER_LOG))
        residual = np.sort(np.abs(problem.residual(narrow)))
        first = with_zone(1.4826 * float(np.median(residual[min(free, len(residual) - 1) :])))  # through `free` points
        problem = with_zone(_robust_sd(problem.residual(minimise(first, narrow)), free))
    return problem, _finite_minimum(problem)


def _finite_minimum(problem: Problem) -> Array:
    vector = global_minimum(problem)
    if vector is None or not np.isfinite(problem.total(vector)):
        of, num = problem.law.formula, problem.num_points
        raise AnalysisError(f"{of} has no finite value of {problem.objective.name} on these {num} points.")
    return vector


def _robust_sd(residual: Array, free: int) -> float:
    """Return the robust standard deviation of the errors behind residuals of a fit with `free` parameters."""
    return float(1.4826 * np.median(np.abs(residual)) * np.sqrt(len(residual) / max(1, len(residual) - free)))


def _score_and_curvature(problem: Problem, vector: Array) -> tuple[Array, Array]:
    """Return the derivative (score) of the objective by every residual (n,), and its own (curvature): a difference over
    a bandwidth, since the score has kinks, 1 within the quadratic zone and 0 outside."""
    delta, residual = problem.objective.delta, problem.residual(vector)
    width = max(_robust_sd(residual, problem.num_free) * len(residual) ** -0.2, 1e-12)
    lower, score, upper = (np.clip(residual + move, -delta, delta) for move in (-width, 0.0, width))
    return score, np.maximum((upper - lower) / (2 * width), LEAST_SLOPE)


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a parameter."""

    low: float = np.nan
    high: float = np.nan
    method: str = ""
    """Method, if another than that of the fit's other intervals."""

    @property
    def is_known(self) -> bool:
        """True if both ends are numbers."""
        return bool(np.isfinite([self.low, self.high]).all())

    def shown(self, digits: int = 4) -> str:
        """Write it with so many digits, as counts are written: "[84.1k, 154k]"."""
        return f"[{human(self.low, digits)}, {human(self.high, digits)}]" if self.is_known else NO_INTERVAL

    def words(self, form: str = ".3f") -> str:
        """Write it in a number format, e.g. "[0.310, 0.380]"."""
        return f"[{self.low:{form}}, {self.high:{form}}]" if self.is_known else NO_INTERVAL


def intervals_of(estimate: Estimate, hidden: Collection[str], level: float | None = None) -> dict[str, Interval]:
    """Find intervals of the law's own, the reported and the derived parameters that are neither held nor hidden.

    Exponents and coefficients have intervals of their logarithm; a limit such as E, and derived exponents, of
    themselves; others as the law says (`Law.scales`). A coefficient whose contribution may be nil begins at 0.
    """
    law, parts, out = estimate.problem.law, estimate.problem.basis(estimate.vector[None]), dict[str, Interval]()
    movable = dict(zip(law.names, estimate.problem.movable.tolist(), strict=True))
    # a limit's term does not vary over the points
    varies = {p.name: bool(np.ptp(g) > 1e-12 * np.abs(g).max()) for p, g in zip(law.linear, parts, strict=True)}
    scales = {p.name: "log" for p in law.parameters if p.log or varies.get(p.name)} | dict(law.scales)
    for name, value in law.quantities(estimate.params).items():
        if not movable.get(name, True):
            continue
        forth, back = INTERVAL_SCALES[scales.get(name, "own") if value > 0 else "own"]

        def scaled(p: Params, name: str = name, forth: Callable[[Array], Array] = forth) -> Array:
            return forth(law.quantities(p)[name])

        with np.errstate(all="ignore"):
            low, high = sorted(float(back(end[0])) for end in estimate.interval_of(scaled, level))
        out[name] = Interval() if name in hidden else Interval(low, high)
        # a reported parameter of the same name has its own unit
        if name in movable and out[name].is_known and value == estimate.params[name]:
            is_limit = not varies.get(name, True) and all(bool(np.all(g >= 0)) for g in parts)
            out[name] = _bounded(estimate, law.names.index(name), out[name], is_limit, level)
    return out


def _bounded(estimate: Estimate, j: int, i: Interval, is_limit: bool, level: float | None) -> Interval:
    """Clip the interval of the law's own parameter j to its bounds, and a limit to the lowest value of the law."""
    problem, (low, high) = estimate.problem, estimate.problem.limits(j)
    bottom, top = max(i.low, low), i.high
    if j < problem.num_linear:  # the interval of a coefficient that may be nil begins at its bound
        at, unit = estimate.vector[j], np.where(np.arange(len(estimate.vector)) == j, 1.0, estimate.vector)
        half = float(half_width(*estimate.covariance.of_contrasts(np.eye(len(unit))[j, problem.movable]), level)[0])
        if at - half <= problem.lower[j]:
            own_unit = float(problem.params_of(unit[None])[problem.law.names[j]][0])
            bottom, top = low, max(top, (at + half) * own_unit)
    lowest = float(problem.predict(estimate.vector[None]).min()) if is_limit else np.inf
    return Interval(bottom, min(top, high, lowest))
