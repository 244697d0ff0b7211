"""The laws that a forecast tries: found by name, fitted to the points of a table, and what they expect of a run.

An accuracy is forecast as its error rate, by a law of its own or through the loss and a link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import COMPUTE, fit_points
from aimscale.analysis.fitting.inference import Estimate, estimated
from aimscale.analysis.fitting.problem import LOG_LSQ, LSQ, make_problem
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import LINK_SIGMOID, Array, Law, find_law
from aimscale.analysis.table.points import Points, resolve_columns, usable_rows
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.schema import varies
from aimscale.analysis.table.select import REPEATS_FROM, task_level

AUTO = "auto"
"""Name that stands for several laws: the joint ones, or with `auto:C` those in one variable."""
JOINT = ("chinchilla", "overtrained", "coupled", "kaplan")
WITH_REPEATS = ("repeated", "penalised")
"""Further candidates where rows see pools of several sizes more than once: of one pool, repeats and D are alike."""
ONE_VARIABLE = ("power", "power_offset")
SPARE_POINTS = 2
"""Points that a law needs beyond its parameters, to tell its errors by."""
THROUGH = " through the loss"
"""End of the name of a fit of the loss, from which a link leads to the accuracy."""
LEAST, UNKNOWN_ERROR = 1e-6, 1e3
"""Smallest loss or error rate that is expected; its error, of its logarithm, where the law itself is nil."""
SLOPE_STEP = 1e-5
"""Difference of ln loss by which the sigmoid's slope is told."""

Fits = Mapping[str, Fit | str]
"""Name -> the fit, or why there is none."""
Cache = dict[tuple[str, bytes], Fit | str]
"""Fits made so far, by the law's name and the points: accuracies need those of the loss again."""


def candidate_points(runs: Runs, laws: Sequence[Law | str] | str, y: str) -> tuple[Points, tuple[Law, ...]]:
    """Find the laws to try, and the points of a table that all of them can be fitted to."""
    runs, y = runs.with_compute(), runs.column(y)
    tried = candidates(laws, runs)
    if y not in runs:
        raise runs.no_column(y, " to forecast")
    columns = {v: name for law in tried for v, name in resolve_columns(law, runs).items()}
    scales = {v: name for v in ("N", "D", "C") if (name := runs.column(v)) in runs}
    points = usable_rows(runs, {**scales, **columns, "y": y}, best_by="y")
    if not len(points):
        raise AnalysisError(f"No row of the table is complete with a positive {y}: there is nothing to forecast from.")
    return replace(points, variables=tuple(columns)), tried


def candidates(laws: Sequence[Law | str] | str, runs: Runs) -> tuple[Law, ...]:
    """Find the laws that names stand for: several with commas, `auto` (joint laws) or `auto:N` (laws of N alone)."""
    if not isinstance(laws, str):
        return tuple(map(find_law, laws))
    base, _, variable = laws.partition(":")
    names = [f"{law}:{variable}" for law in ONE_VARIABLE] if variable else [*JOINT]
    pool, seen = map(runs.column, "UD")
    if not variable and pool in runs and seen in runs and varies(runs[pool]):
        numbers = runs.numbers({"U": pool, "D": seen})
        if (numbers["D"] / numbers["U"]).max() > REPEATS_FROM:
            names += WITH_REPEATS
    return tuple(find_law(name.strip()) for name in (names if base == AUTO else laws.split(",")))


def fit_laws(points: Points, laws: Sequence[Law], cache: Cache, loss: str = "") -> tuple[Fits, Estimate | None]:
    """Fit every law to y and, where there is a loss, to that with a link from there; each once to the same points."""
    fits: dict[str, Fit | str] = _fit_each(points, laws, cache)
    if not loss:
        return fits, None
    link, error = None, ""
    try:
        link = _link(points, points.of((), loss).y)
    except AnalysisError as failure:
        error = str(failure)
    through = _fit_each(points.of(tuple(points.x), loss), laws, cache)
    return {**fits, **{f"{name}{THROUGH}": error or each for name, each in through.items()}}, link


def _fit_each(points: Points, laws: Sequence[Law], cache: Cache) -> dict[str, Fit | str]:
    """Fit every law by least squares of ln y, weighted by compute."""
    key = np.concatenate([points.y, points.compute, *points.x.values(), *points.groups.values()]).tobytes()
    weights = points.compute / points.compute.mean()
    for law in laws:
        if (law.name, key) not in cache:
            try:
                _check_number(len(points), len(law.parameters))
                fitted = fit_points(points.of(law.variables), law, LOG_LSQ, weights=weights)
                cache[law.name, key] = replace(fitted, weights=COMPUTE)
            except AnalysisError as error:
                cache[law.name, key] = str(error)
    return {law.name: cache[law.name, key] for law in laws}


def _link(points: Points, loss: Array) -> Estimate:
    """Fit a sigmoid from loss to accuracy, from chance and through one more point (ideal, 1) where these are known."""
    accuracy, compute, groups = 1 - points.y, points.compute, points.groups
    chance, ideal = (task_level(points.rows.frame, level) for level in ("chance", "ideal"))
    if ideal is not None and ideal < loss.min():
        loss, accuracy = np.append(loss, ideal), np.append(accuracy, 1.0)
        compute, groups = np.append(compute, compute.mean()), groups.with_one_more()
    fixed = {} if chance is None else {"floor": chance}
    weights = compute / compute.mean()
    problem = make_problem(LINK_SIGMOID, {"L": loss}, accuracy, LSQ, weights=weights, fixed=fixed)
    _check_number(problem.num_points, problem.num_free)
    return estimated(problem, groups)


def _check_number(num_points: int, num_params: int) -> None:
    if num_points < num_params + SPARE_POINTS:
        raise AnalysisError(f"{num_points} points are too few for its {num_params} parameters.")


def expect(fit: Fit, x: Mapping[str, Array], link: Estimate | None = None) -> tuple[Array, Array, Array]:
    """Return ln y (m,) at variables (m,), the standard error (m,) that the parameters leave, and the standard deviation
    (m,) of one measurement about the law: of an error rate by way of a link from the loss, that of the loss too."""
    log_y, errors = fit.estimate.predict_from_components(x)
    noise = np.full(len(log_y), fit.estimate.components.total)
    log_y, errors = np.maximum(log_y, np.log(LEAST)), np.nan_to_num(errors, nan=UNKNOWN_ERROR, posinf=UNKNOWN_ERROR)
    if link is None:
        return log_y, errors, noise
    accuracy, of_link = link.predict_from_components({"L": np.exp(log_y)})
    slope = (link.value_of(link.law_at({"L": np.exp(log_y + SLOPE_STEP)})) - accuracy) / SLOPE_STEP
    rate = np.maximum(1 - accuracy, LEAST)
    both = (errors, of_link), (noise, link.components.total)
    return np.log(rate), *(np.hypot(slope * of_loss, link_error) / rate for of_loss, link_error in both)


def link_of(name: str, link: Estimate | None) -> Estimate | None:
    """Return the link that leads from a fit of this name to the accuracy; none from a law of y itself."""
    return link if name.endswith(THROUGH) else None
