"""Laws fitted to forecast: every run counts in proportion to its compute, so that a law is right where it is extended.

No law holds from the smallest run to the largest. One that fits all runs alike errs at both ends, and the upper end is
where the forecast starts. On public tables cut at a tenth of their compute, weights by compute lower the mean error of
every law (docs/forecasts.md). `fit(table, law, weights="compute", objective="log_lsq")` is the same fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.groups import Groups
from aimscale.analysis.fitting.inference import Estimate, estimated
from aimscale.analysis.fitting.objectives import LOG_LSQ, LSQ, Objective
from aimscale.analysis.fitting.problem import make_problem
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import LINK_SIGMOID

SPARE_POINTS = 2
"""Points that a law needs beyond its parameters: with fewer its errors have no degree of freedom to be told by."""
THROUGH = " through the loss"
"""Ends the name of a curve that leads through the loss."""
LEAST, UNKNOWN = 1e-6, 1e3
"""Smallest loss or error rate that a curve returns; its error, of its logarithm, where the law itself is nil."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Positive measurements at scales, such as losses or error rates, that a forecast is made from."""

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

    def rows(self, keep: Array) -> Measurements:
        """Select some of the points (mask)."""
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
        """Weight of every point (n,), 1 on average."""
        return self.compute / self.compute.mean()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fitted law, or a law of the loss with a link to the accuracy."""

    name: str
    """The law's, and "through the loss" of a link."""
    num_params: int
    noise: float
    """Standard deviation of a measurement's logarithm about the curve."""
    num_runs: float
    """Effective number of points behind the weighted fit."""
    predict: Callable[[Mapping[str, Array]], tuple[Array, Array]]
    """Variables (m,) -> ln y (m,) and the standard error (m,) that the parameters leave."""


def law_curve(law: Law, points: Measurements) -> Curve:
    """Fit a law by least squares of ln y, every point weighted by its compute.

    Raises:
        AnalysisError: too few points for its parameters, or no finite optimum.
    """
    found = _estimated(law, points.x, points.y, LOG_LSQ, points)

    def predict(at: Mapping[str, Array]) -> tuple[Array, Array]:
        value, errors = found.modelled(at)
        return np.maximum(value, np.log(LEAST)), np.nan_to_num(errors, nan=UNKNOWN, posinf=UNKNOWN)

    noise = found.components.total
    return Curve(name=law.name, num_params=len(law.parameters), noise=noise, num_runs=found.num_runs, predict=predict)


def link_curves(losses: Mapping[str, Curve], points: Measurements) -> dict[str, Curve]:
    """Lead to error rates by way of the loss: every curve of the loss, then one sigmoid from loss to accuracy.

    The sigmoid starts at chance, where that is known, and passes through (ideal, 1) as through one more point.

    Raises:
        AnalysisError: too few points for its parameters.
    """
    assert points.loss is not None
    x, y, anchored = points.loss, 1 - points.y, points
    if points.ideal is not None and points.ideal < x.min():
        x, y, compute = (
            np.append(a, b) for a, b in ((x, points.ideal), (y, 1.0), (points.compute, points.compute.mean()))
        )
        anchored = replace(points, compute=compute, groups=points.groups.with_one_more())
    fixed = {} if points.chance is None else {"floor": points.chance}
    found = _estimated(LINK_SIGMOID, {"L": x}, y, LSQ, anchored, fixed)
    top = points.compute >= np.median(points.compute)
    noise = found.components.total / float(np.mean(points.y[top]))

    def through(first: Curve) -> Curve:
        def predict(at: Mapping[str, Array]) -> tuple[Array, Array]:
            log_loss, of_loss = first.predict(at)
            accuracy, errors = found.modelled({"L": np.exp(log_loss)})
            moved = found.value_at({"L": np.exp(log_loss + STEP)})
            rate = np.maximum(1 - accuracy, LEAST)
            return np.log(rate), np.hypot((moved - accuracy) / STEP * of_loss, errors) / rate

        return replace(
            first,
            name=f"{first.name}{THROUGH}",
            num_params=first.num_params + len(found.params) - len(fixed),
            noise=noise,
            predict=predict,
        )

    return {curve.name: curve for curve in map(through, losses.values())}


STEP = 1e-5
"""Difference of ln loss by which the sigmoid's slope is told."""


def _estimated(
    law: Law,
    x: Mapping[str, Array],
    y: Array,
    objective: Objective,
    points: Measurements,
    fixed: dict[str, float] | None = None,
) -> Estimate:
    """Minimise, weighted by compute.

    Raises:
        AnalysisError: too few points for the parameters, or no finite optimum.
    """
    columns = Columns({v: x[v] for v in law.variables})
    problem = make_problem(law.centred(columns), dict(columns), y, objective, weights=points.weights, fixed=fixed)
    free = int(problem.movable.sum())
    if problem.num_points < free + SPARE_POINTS:
        raise AnalysisError(f"{problem.num_points} points are too few for its {free} parameters.")
    return estimated(problem, points.groups)
