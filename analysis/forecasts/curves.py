"""Laws fitted to forecast: every run counts in proportion to its compute, so that a law is right where it is extended.

No law holds from the smallest run to the largest. One that fits all runs alike errs at both ends, and the upper end is
where the forecast starts. On public tables cut at a tenth of their compute, weights by compute lower the mean error of
every law (docs/forecasts.md). `fit(table, law, weights="compute", objective="log_lsq")` is the same fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.groups import Groups
from aimscale.analysis.fitting.inference import Estimate, estimated
from aimscale.analysis.fitting.objectives import LOG_LSQ, LSQ, Objective
from aimscale.analysis.fitting.problem import make_problem
from aimscale.analysis.forecasts.points import Points
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import LINK_SIGMOID

SPARE_POINTS = 2
"""Points that a law needs beyond its parameters: with fewer its errors have no degree of freedom to be told by."""
THROUGH = " through the loss"
"""Ends the name of a curve that leads through the loss."""
LEAST, UNKNOWN = 1e-6, 1e3
"""Smallest loss or error rate that a curve returns; its error, of its logarithm, where the law itself is nil."""
STEP = 1e-5
"""Difference of ln loss by which the sigmoid's slope is told."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fitted law, or a law of the loss with a link to the accuracy."""

    name: str
    """Name of the law, with "through the loss" behind it where a link follows."""
    noise: float
    """Standard deviation of a measurement's logarithm about the curve."""
    law: Estimate = field(repr=False)
    link: Estimate | None = field(default=None, repr=False)
    """Sigmoid from the loss to the accuracy."""

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return len(self.law.problem.law.parameters) + (int(self.link.problem.movable.sum()) if self.link else 0)

    def predict(self, x: Mapping[str, Array]) -> tuple[Array, Array]:
        """Return ln y (m,) at variables (m,) and the standard error (m,) that the parameters leave."""
        log_y, errors = self.law.modelled(x)
        log_y, errors = np.maximum(log_y, np.log(LEAST)), np.nan_to_num(errors, nan=UNKNOWN, posinf=UNKNOWN)
        if self.link is None:
            return log_y, errors
        accuracy, of_link = self.link.modelled({"L": np.exp(log_y)})
        slope = (self.link.value_at({"L": np.exp(log_y + STEP)}) - accuracy) / STEP
        rate = np.maximum(1 - accuracy, LEAST)
        return np.log(rate), np.hypot(slope * errors, of_link) / rate


Curves = dict[str, Curve | str]
"""Name -> the curve, or why it could not be fitted."""
Cache = dict[tuple[str, bytes], Curve | str]
"""Fits made so far, by the law's name and the points: accuracies need those of the loss again."""


def fit_curves(points: Points, cache: Cache) -> Curves:
    """Fit every law to y and, where there are losses, to these with a link from there; each once to the same points."""
    found = _fit_laws(points, cache)
    if points.loss is not None:
        of_loss = _fit_laws(replace(points, y=points.loss), cache)
        try:
            found |= _link({name: curve for name, curve in of_loss.items() if isinstance(curve, Curve)}, points)
        except AnalysisError as error:
            found |= {f"{name}{THROUGH}": str(error) for name in of_loss}
    return found


def _fit_laws(points: Points, cache: Cache) -> Curves:
    """Fit every law by least squares of ln y."""
    key = np.concatenate([points.y, points.compute, *points.x.values(), *points.groups.values()]).tobytes()
    for law in points.laws:
        if (law.name, key) not in cache:
            try:
                found = _estimate(law, points.x, points.y, LOG_LSQ, points.compute, points.groups)
                cache[law.name, key] = Curve(name=law.name, law=found, noise=found.components.total)
            except AnalysisError as error:
                cache[law.name, key] = str(error)
    return {law.name: cache[law.name, key] for law in points.laws}


def _link(of_loss: Mapping[str, Curve], points: Points) -> dict[str, Curve]:
    """Lead every curve of the loss to error rates by one sigmoid, from chance, where that is known, and through
    (ideal, 1) as through one more point."""
    assert points.loss is not None
    loss, accuracy, compute, groups = points.loss, 1 - points.y, points.compute, points.groups
    if points.ideal is not None and points.ideal < loss.min():
        loss, accuracy = np.append(loss, points.ideal), np.append(accuracy, 1.0)
        compute, groups = np.append(compute, compute.mean()), groups.with_one_more()
    fixed = {} if points.chance is None else {"floor": points.chance}
    link = _estimate(LINK_SIGMOID, {"L": loss}, accuracy, LSQ, compute, groups, fixed)
    top = points.compute >= np.median(points.compute)
    noise = link.components.total / float(np.mean(points.y[top]))
    names = {name: f"{name}{THROUGH}" for name in of_loss}
    return {names[name]: replace(each, name=names[name], link=link, noise=noise) for name, each in of_loss.items()}


def _estimate(
    law: Law,
    x: Mapping[str, Array],
    y: Array,
    objective: Objective,
    compute: Array,
    groups: Groups,
    fixed: dict[str, float] | None = None,
) -> Estimate:
    """Fit a law, weighted by compute."""
    columns = Columns({v: x[v] for v in law.variables})
    law, weights = law.centred(columns), compute / compute.mean()
    problem = make_problem(law, dict(columns), y, objective, weights=weights, fixed=fixed)
    free = int(problem.movable.sum())
    if problem.num_points < free + SPARE_POINTS:
        raise AnalysisError(f"{problem.num_points} points are too few for its {free} parameters.")
    return estimated(problem, groups)
