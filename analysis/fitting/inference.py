"""An optimum and errors of any function of its parameters: the law is linearised in the optimiser's coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import (
    Components,
    Covariance,
    Design,
    KnownErrors,
    components_of,
    half_width,
    linear_design,
    sandwich,
)
from aimscale.analysis.fitting.groups import Groups, visible_groups
from aimscale.analysis.fitting.problem import HUBER_LOG, Problem, global_minimum, minimise
from aimscale.analysis.laws.base import Array, Columns, Params

DIFFERENCE = 1e-5
"""Step of central differences, as a share of a coordinate's own scale: their error is its square."""
LEAST_SLOPE = 1e-6
"""Curvature of the objective at a point outside its quadratic zone."""
SMALLEST_DELTA = 1e-9
"""Least width of a zone that is found from residuals: those of a table without noise are rounding errors."""

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
    design: Design
    residual: Array
    """Residuals (n,) of T(y) whose least squares the optimum is: outliers drawn in, the others stretched for it."""
    known: KnownErrors | None = None
    """Errors of the measurements that were found before, such as those of tuning."""

    @cached_property
    def covariance(self) -> Covariance:
        """Covariance of the movable coordinates; forecasts, which fit most, never ask for it."""
        # what curves the objective is the slope: a point's precision, besides which its weight is no precision
        pull, slope = _pull_and_slope(self.problem, self.vector)
        root = np.sqrt(slope)
        scaled = linear_design(self.problem.linearised(self.vector) * root[:, None], self.problem.weights)
        clusterings = self.groups.clusterings(self.problem.num_points).items()
        by = {name: sandwich(scaled, pull / root, codes) for name, codes in clusterings}
        if self.known is None:
            return Covariance(by=by)
        loadings = scaled.inverse * root * self._per_logarithm @ self.known.loadings
        return Covariance(by={**by, "tuning": replace(self.known, loadings=loadings)})

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
        # of a logarithm 1, of a coefficient its range or the size of the measurements
        span, level = problem.upper - problem.lower, max(float(np.median(np.abs(problem.y))), 1e-300)
        scales = np.where([p.log for p in problem.law.parameters], 1.0, np.where(np.isfinite(span), span, level))
        steps = DIFFERENCE * np.diag(scales)[free]
        values = function(problem.params_of(np.concatenate([self.vector + steps, self.vector - steps])))
        up, down = np.asarray(values, float).reshape(2, len(free), -1)
        return ((up - down) / (2 * steps.sum(axis=1, keepdims=True))).T

    def value_of(self, function: Function) -> Array:
        """Return a function's values (m,)."""
        return np.asarray(function({k: np.array([v]) for k, v in self.params.items()}), float).reshape(-1)

    def error_of(self, function: Function) -> tuple[Array, Array, Array]:
        """Return a function's values (m,), standard errors (m,) and degrees of freedom (m,), by the delta method."""
        return (self.value_of(function), *self.covariance.of_contrasts(self.gradient(function)))

    def interval_of(self, function: Function) -> tuple[Array, Array]:
        """Return the ends (m,) of 95 % intervals of a function's values."""
        value, errors, degrees = self.error_of(function)
        half = half_width(errors, degrees)
        return value - half, value + half

    def error_after(self, target: Function, more: Function, noise: float) -> tuple[float, Array]:
        """Return the standard error of a target, and what it would be (m,) after one more measurement of each of `more`
        (m,), functions of the parameters, with errors of standard deviation `noise`."""
        (wanted,), shown, matrix = self.gradient(target), self.gradient(more), self.covariance.matrix
        shared, own = shown @ matrix @ wanted, np.sum(shown @ matrix * shown, axis=1)
        before = float(wanted @ matrix @ wanted)
        return before**0.5, np.sqrt(np.maximum(before - shared**2 / np.maximum(own + noise**2, 1e-300), 0.0))

    def modelled(self, x: Mapping[str, Array]) -> tuple[Array, Array]:
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


def estimated(problem: Problem, groups: Groups, known: KnownErrors | None = None) -> Estimate:
    """Minimise a problem and infer the errors of its optimum; `known` ones of the measurements add to what residuals
    show.

    Raises:
        AnalysisError: the objective is nowhere finite, or the law not differentiable at its optimum.
    """
    problem, vector = _minimised(problem)
    jacobian = problem.linearised(vector)
    if not np.isfinite(jacobian).all():
        raise AnalysisError(f"The optimum of {problem.law.formula} lies where it has no finite derivatives.")
    pull, slope = _pull_and_slope(problem, vector)
    groups = visible_groups(groups, jacobian)
    design, residual = linear_design(jacobian, problem.weights), pull / np.average(slope, weights=problem.weights)
    return Estimate(
        problem=problem,
        vector=vector,
        components=components_of(design, residual, groups),
        groups=groups,
        design=design,
        residual=residual,
        known=known,
    )


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


def _pull_and_slope(problem: Problem, vector: Array) -> tuple[Array, Array]:
    """Return the objective's pull on every point and its slope (n,) in the residual: a difference over a bandwidth,
    since the pull has kinks, 1 within the quadratic zone and 0 outside."""
    delta, residual = problem.objective.delta, problem.residual(vector)
    width = max(_robust_sd(residual, problem.num_free) * len(residual) ** -0.2, 1e-12)
    lower, pull, upper = (np.clip(residual + move, -delta, delta) for move in (-width, 0.0, width))
    return pull, np.maximum((upper - lower) / (2 * width), LEAST_SLOPE)
