"""Laws fitted to forecast: every run counts in proportion to its compute, so that a law is right where it is extended.

No law holds from the smallest run to the largest. One that fits all runs alike errs at both ends, and the upper end is
where the forecast starts. On public tables cut at a tenth of their compute, weights by compute lower the mean error of
every law (docs/forecasts.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.errors import Components, components_of
from aimscale.analysis.fitting.groups import Groups, with_spread
from aimscale.analysis.fitting.objectives import LOG_LSQ, LSQ
from aimscale.analysis.fitting.optimise import MAX_STARTS, global_minimum
from aimscale.analysis.fitting.problem import Problem, make_problem
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import LINK_SIGMOID

SPARE_POINTS = 2
"""Points that a law needs beyond its parameters."""
THROUGH = " through the loss"
"""Ends the name of a curve that leads through the loss."""
LEAST = 1e-6
"""Smallest loss or error rate that a curve returns."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a forecast is made from: positive measurements at scales, such as losses or error rates."""

    x: Mapping[str, Array]
    """Variable -> values (n,)."""
    y: Array
    """Measurements (n,)."""
    compute: Array
    """Training FLOPs (n,): what runs count by, and what distance is measured in."""
    loss: Array | None = None
    """Losses (n,) that a link leads from to an error rate; None where y is no error rate."""
    chance: float | None = None
    """Accuracy of guessing, where the task has one."""
    ideal: float | None = None
    """Loss at which the accuracy is 1, where the task has one."""
    groups: Groups = field(default_factory=Groups)
    """Points that share errors."""

    def rows(self, keep: Array) -> Measured:
        """Some of the points (mask)."""
        return replace(
            self,
            x={v: values[keep] for v, values in self.x.items()},
            y=self.y[keep],
            compute=self.compute[keep],
            loss=None if self.loss is None else self.loss[keep],
            groups=self.groups.rows(keep),
        )

    @property
    def weights(self) -> Array:
        """What every point counts for (n,), 1 on average."""
        return self.compute / self.compute.mean()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fitted law, or a law of the loss with a link to the accuracy."""

    name: str
    """The law's, and "through the loss" of a link."""
    num_params: int
    noise: float
    """Standard deviation of a measurement's logarithm about the curve, near the largest compute."""
    log_value: Callable[[Mapping[str, Array]], Array]
    """Variables (m,) -> ln y (m,)."""
    log_sd: Callable[[Mapping[str, Array]], Array]
    """Variables (m,) -> standard error of ln y (m,) that the parameters leave."""


def law_curve(law: Law, points: Measured) -> Curve:
    """A law fitted by least squares of ln y, every point weighted by its compute.

    Raises:
        AnalysisError: too few points for its parameters, or no finite optimum.
    """
    x = Columns({v: points.x[v] for v in law.variables})
    law = law.centred(x) if law.centred is not None else law
    problem = make_problem(law, dict(x), points.y, LOG_LSQ, weights=points.weights)
    found = _fitted(problem, points.groups)

    def log_value(at: Mapping[str, Array]) -> Array:
        return np.log(np.maximum(law.value({v: at[v] for v in law.variables}, found.params), LEAST)) + 0.0 * at[x_name]

    x_name = law.variables[0]
    return Curve(
        name=law.name,
        num_params=len(law.parameters),
        noise=found.errors.total,
        log_value=log_value,
        log_sd=lambda at: found.spread(law.slopes(at, found.params, log=True)),
    )


def link_curves(losses: Mapping[str, Curve], points: Measured) -> dict[str, Curve]:
    """Error rates by way of the loss: every curve of the loss, then one sigmoid from loss to accuracy.

    The sigmoid starts at chance, where that is known, and passes through (ideal, 1) as through one more point.

    Raises:
        AnalysisError: too few points for its parameters.
    """
    assert points.loss is not None
    x, y, weights, groups = points.loss, 1 - points.y, points.weights, points.groups
    if points.ideal is not None and points.ideal < x.min():
        x, y, weights = np.append(x, points.ideal), np.append(y, 1.0), np.append(weights, 1.0)
        groups = groups.with_one_more()
    fixed = {} if points.chance is None else {"floor": points.chance}
    problem = make_problem(LINK_SIGMOID, {"L": x}, y, LSQ, weights=weights, fixed=fixed)
    found = _fitted(problem, groups)
    top = points.compute >= np.median(points.compute)
    noise = found.errors.total / float(np.mean(points.y[top]))

    def through(first: Curve) -> Curve:
        def error(log_loss: Array) -> Array:
            return np.maximum(1 - LINK_SIGMOID.value({"L": np.exp(log_loss)}, found.params), LEAST)

        def log_sd(at: Mapping[str, Array]) -> Array:
            log_loss = first.log_value(at)
            value = error(log_loss)
            step = 1e-5
            by_loss = (error(log_loss + step) - value) / step / value * first.log_sd(at)
            of_link = found.spread(LINK_SIGMOID.slopes({"L": np.exp(log_loss)}, found.params, log=False)) / value
            return np.hypot(by_loss, of_link)

        return Curve(
            name=f"{first.name}{THROUGH}",
            num_params=first.num_params + len(found.params) - len(fixed),
            noise=noise,
            log_value=lambda at: np.log(error(first.log_value(at))),
            log_sd=log_sd,
        )

    return {curve.name: curve for curve in map(through, losses.values())}


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """An optimum with its errors."""

    params: dict[str, float]
    inverse: Array
    """Derivatives (k, n) of the parameters by the measurements; zero of those held."""
    errors: Components
    groups: Groups
    """Points that share errors which the law leaves visible."""

    def spread(self, slopes: Array) -> Array:
        """Standard errors (m,) of what has these slopes (m, k): errors of sizes and of runs are shared."""
        every = np.ones(self.inverse.shape[1])
        return np.sqrt(self.errors.variance_of(slopes @ self.inverse, every, self.groups))


def _fitted(problem: Problem, groups: Groups) -> _Fitted:
    """Minimise, and linearise about the optimum.

    Raises:
        AnalysisError: too few points for the parameters, or no finite optimum.
    """
    free = int(problem.movable.sum())
    if problem.num_points < free + SPARE_POINTS:
        raise AnalysisError(f"{problem.num_points} points are too few for its {free} parameters.")
    minima = global_minimum(problem, count=MAX_STARTS)
    if not minima:
        raise AnalysisError("it has no finite optimum there.")
    params = {name: float(v[0]) for name, v in problem.params_of(minima[0].vector[None]).items()}
    x = {v: values[: problem.num_points] for v, values in problem.x.items() if v in problem.law.variables}
    slopes = problem.law.slopes(x, params, log=problem.objective.log)[:, problem.movable]
    if not np.isfinite(slopes).all():
        raise AnalysisError("its optimum lies where it has no finite derivatives.")
    seen, _ = with_spread(groups, slopes)
    errors = components_of(slopes, problem.residual(minima[0].vector), problem.weights, seen)
    root = np.sqrt(problem.weights)
    design = slopes * root[:, None]
    size = np.linalg.norm(design, axis=0)
    size = np.where(size > 0, size, 1.0)
    inverse = np.zeros((len(params), problem.num_points))
    # the weights are no precisions: every run's error is of one size, whatever it counts for
    inverse[problem.movable] = np.linalg.pinv(design / size, rcond=1e-6) / size[:, None] * root
    return _Fitted(params=params, inverse=inverse, errors=errors, groups=seen)
