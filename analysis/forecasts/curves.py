"""Curves that forecasts are made of: laws of a quantity, and laws of the loss with a link from there to an accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.inference import Estimate, estimated
from aimscale.analysis.fitting.objectives import LOG_LSQ, LSQ, Objective
from aimscale.analysis.fitting.problem import make_problem
from aimscale.analysis.forecasts.points import Points
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import LINK_SIGMOID

SPARE_POINTS = 2
"""Points that a law needs beyond its parameters, to tell its errors by."""
THROUGH = " through the loss"
"""End of the name of a curve that leads through the loss."""
LEAST, UNKNOWN_ERROR = 1e-6, 1e3
"""Smallest loss or error rate that a curve returns; its error, of its logarithm, where the law itself is nil."""
SLOPE_STEP = 1e-5
"""Difference of ln loss by which the sigmoid's slope is told."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fitted law, or a law of the loss with a link to the accuracy."""

    law: Estimate
    link: Estimate | None = None
    """Sigmoid from the loss to the accuracy."""

    @property
    def num_params(self) -> int:
        """Number of parameters, of the link those that are free."""
        return len(self.law.problem.law.parameters) + (self.link.problem.num_free if self.link else 0)

    def predict(self, x: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """Return ln y (m,) at variables (m,), the standard error (m,) that the parameters leave, and the standard
        deviation (m,) of one measurement about the curve: of an accuracy by way of the loss, that of the loss too."""
        log_y, errors = self.law.modelled(x)
        noise = np.full(len(log_y), self.law.components.total)
        log_y, errors = np.maximum(log_y, np.log(LEAST)), np.nan_to_num(errors, nan=UNKNOWN_ERROR, posinf=UNKNOWN_ERROR)
        if self.link is None:
            return log_y, errors, noise
        accuracy, of_link = self.link.modelled({"L": np.exp(log_y)})
        slope = (self.link.value_of(self.link.law_at({"L": np.exp(log_y + SLOPE_STEP)})) - accuracy) / SLOPE_STEP
        rate = np.maximum(1 - accuracy, LEAST)
        both = (errors, of_link), (noise, self.link.components.total)
        return np.log(rate), *(np.hypot(slope * of_loss, own) / rate for of_loss, own in both)


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
            link = _link(points, points.loss)
            linked: Curves = {k: replace(c, link=link) for k, c in of_loss.items() if isinstance(c, Curve)}
        except AnalysisError as error:
            linked = dict.fromkeys(of_loss, str(error))
        found |= {f"{name}{THROUGH}": curve for name, curve in linked.items()}
    return found


def _fit_laws(points: Points, cache: Cache) -> Curves:
    """Fit every law by least squares of ln y."""
    key = np.concatenate([points.y, points.compute, *points.x.values(), *points.groups.values()]).tobytes()
    for law in points.laws:
        if (law.name, key) not in cache:
            try:
                cache[law.name, key] = Curve(law=_estimate(law, points, LOG_LSQ))
            except AnalysisError as error:
                cache[law.name, key] = str(error)
    return {law.name: cache[law.name, key] for law in points.laws}


def _link(points: Points, loss: Array) -> Estimate:
    """Fit a sigmoid from loss to accuracy, from chance and through one more point (ideal, 1) where these are known."""
    accuracy, compute, groups = 1 - points.y, points.compute, points.groups
    if points.ideal is not None and points.ideal < loss.min():
        loss, accuracy = np.append(loss, points.ideal), np.append(accuracy, 1.0)
        compute, groups = np.append(compute, compute.mean()), groups.with_one_more()
    points = replace(points, x={"L": loss}, y=accuracy, compute=compute, groups=groups, known=None)
    return _estimate(LINK_SIGMOID, points, LSQ, {} if points.chance is None else {"floor": points.chance})


def _estimate(law: Law, points: Points, objective: Objective, fixed: dict[str, float] | None = None) -> Estimate:
    """Fit a law, weighted by compute."""
    x, weights = Columns({v: points.x[v] for v in law.variables}), points.compute / points.compute.mean()
    problem = make_problem(law.centred(x), dict(x), points.y, objective, weights=weights, fixed=fixed)
    if problem.num_points < problem.num_free + SPARE_POINTS:
        raise AnalysisError(f"{problem.num_points} points are too few for its {problem.num_free} parameters.")
    return estimated(problem, points.groups, points.known)
