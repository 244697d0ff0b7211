"""`fit`: a law, a table and an objective in; the best optimum with intervals, flags and exclusions out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.checks import diagnose
from aimscale.analysis.fitting.errors import Components, components_of, sandwich
from aimscale.analysis.fitting.groups import Groups, groups_of, with_spread
from aimscale.analysis.fitting.identification import unidentified
from aimscale.analysis.fitting.lackoffit import lack_of_fit
from aimscale.analysis.fitting.objectives import HUBER_LOG, LOG_LSQ, LSQ, Objective, find_objective
from aimscale.analysis.fitting.optimise import MAX_STARTS, Minimum, design, global_minimum, minimise, project
from aimscale.analysis.fitting.problem import Problem, make_problem
from aimscale.analysis.fitting.result import Fit, interval
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.points import Observations, observe
from aimscale.analysis.table.read import loss_unit
from aimscale.analysis.words import Flag, did_you_mean

LEAST_SLOPE = 1e-6
"""Of a point outside the quadratic zone."""
FOLLOWED_SCALES = 64
"""Scales at which draws of the parameters follow draws of the law: evenly spaced ones of many."""
FARTHEST = 100.0
"""Logarithm by which a draw of the law is moved at most: Student's tails of one degree of freedom have no end."""


def fit(
    law: Law | str,
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    objective: Objective | str = "robust",
    columns: Mapping[str, str] | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    resamples: int = 1000,
    zero_allowed: bool = False,
    is_tested: bool = True,
) -> Fit:
    """Fit a law to a table.

    Args:
        law: a law or its name.
        df: one row per point.
        y: column to fit.
        objective: an objective or its name; the default is least squares of logarithms for all but outliers.
        columns: variable of the law -> column; default: the variable's own name, else the results table's column.
        fixed: parameters held at a value.
        bounds: parameters kept between two values.
        resamples: draws of the parameters that intervals are read from; 0 for no intervals.
        zero_allowed: let variables be zero (an ideal loss), where the law takes no logarithm of them.
        is_tested: whether to look for what speaks against the law (`lack_of_fit`): for flags that nobody reads it takes
            too long.

    Returns:
        Parameters with intervals and flags; `predict`, `plot` and `summary` are its methods.

    Raises:
        AnalysisError: missing column, unknown name, too few points, or a variable without variation.

    Example:
        >>> table = read_table("results.parquet")
        >>> law = fit("chinchilla", table)
        >>> law.params["alpha"], law.intervals["alpha"]
        >>> law.predict({"N": 1e6, "D": 1e6})
    """
    law = find_law(law)
    objective = find_objective(objective)
    fixed, bounds = dict(fixed or {}), dict(bounds or {})
    _check_names(law, fixed, bounds)
    free = len(law.parameters) - len(fixed)
    points = observe(
        law, df, y=y, columns=columns, positive_y=objective.log, num_free=free, zero_allowed=zero_allowed,
    )  # fmt: skip
    if law.centred is not None:
        law = law.centred(Columns(points.x))
    problem = make_problem(law, points.x, points.y, objective, fixed=fixed, bounds=bounds)
    problem, minima = best_minima(problem)
    if not minima:
        raise AnalysisError(f"{law.formula} has no finite value of {objective.name} on these {len(points.y)} points.")
    hidden = unidentified(law, points.x, fixed)
    drawn = _drawn(problem, minima[0].vector, points, df.loc[points.index], resamples, hidden, is_tested)
    result = _result(problem, minima, points, drawn, hidden)
    return replace(result, fixed=fixed, bounds=bounds, loss_unit=loss_unit(df), names=names_of(df))


def best_minima(problem: Problem) -> tuple[Problem, list[Minimum]]:
    """The distinct minima, best first; an objective that takes its scale from the residuals is given it first.

    The scale is that of a nearly least-absolute-deviations fit, which no few outliers can move, and once more that of
    the fit which follows from it.
    """
    if not problem.objective.multiple:
        return problem, global_minimum(problem)
    free = int(problem.movable.sum())
    pilot = global_minimum(replace(problem, objective=HUBER_LOG))
    if not pilot:
        return problem, []
    residual = np.sort(np.abs(problem.residual(pilot[0].vector)))
    sd = 1.4826 * float(np.median(residual[min(free, len(residual) - 1) :]))  # it passes through `free` points
    vectors = np.array([m.vector for m in pilot])
    for _ in range(2):
        problem = replace(problem, objective=problem.objective.with_scale(sd))
        refined, totals = minimise(problem, vectors)
        sd = _robust_sd(problem.residual(refined[np.argmin(totals)]), free)
    return problem, global_minimum(problem, extra=vectors, count=MAX_STARTS)  # every valley is among the vectors


def _robust_sd(residual: Array, free: int) -> float:
    """Standard deviation (robust) of the errors behind residuals of a fit with `free` parameters."""
    return float(1.4826 * np.median(np.abs(residual)) * np.sqrt(len(residual) / max(1, len(residual) - free)))


def _pull_and_slope(delta: float, residual: Array, free: int) -> tuple[Array, Array]:
    """The objective's pull on every point and how fast it changes with the residual (n,), for the sandwich.

    The slope is a difference over a bandwidth, since the pull has kinks: 1 within the quadratic zone, 0 outside.
    """
    width = max(_robust_sd(residual, free) * len(residual) ** -0.2, 1e-12)
    lower, pull, upper = (np.clip(residual + move, -delta, delta) for move in (-width, 0.0, width))
    return pull, np.maximum((upper - lower) / (2 * width), LEAST_SLOPE)


def _drawn(
    problem: Problem,
    vector: Array,
    points: Observations,
    rows: pd.DataFrame,
    num: int,
    hidden: frozenset[str],
    is_tested: bool,
) -> tuple[dict[str, Array], Groups, Components | None, tuple[Flag, ...]]:
    """Draws of the law's own parameters (num,), points that share errors, their components, flags about both."""
    jacobian = problem.linearised(vector)
    groups, unseen = with_spread(groups_of(rows, points.x), jacobian)
    if not num:
        return {}, groups, None, ()
    weights = problem.weights
    pull, slope = _pull_and_slope(problem.objective.delta, problem.residual(vector), jacobian.shape[1])
    found = sandwich(jacobian, pull / slope, weights * slope, groups.clusters(len(pull)))
    residual = pull / np.average(slope, weights=weights)  # outliers are drawn in, the others stretched for it
    errors = components_of(jacobian, residual, weights, groups)
    rng = np.random.default_rng([0, zlib.crc32(f"{problem.law.name} {points.columns['y']}".encode())])
    shift = np.zeros((num, len(vector)))
    shift[:, problem.movable] = found.draws(num, rng)
    params = problem.params_of(_followed(problem, vector, shift, hidden, rng))
    flags = [Flag(kind="unseen", subject=name) for name in unseen]
    against = lack_of_fit(problem, vector, residual, groups, errors, points, rows) if is_tested else ()
    return params, groups, errors, (*flags, *against)


def _followed(problem: Problem, vector: Array, shift: Array, hidden: frozenset[str], rng: np.random.Generator) -> Array:
    """Vectors (num, k) within the bounds whose laws lie nearest to those that shifts (num, k) of an optimum ask for.

    The values of the law move as far as its derivatives say, and the parameters follow them: along a curved valley, and
    no floor above the law's lowest value, where the shifted parameters themselves would leave both. Exponents that no
    loss could tell start anywhere within their bounds.
    """
    scales = np.unique([problem.x[v][:-1] for v in problem.law.variables], axis=1, return_index=True)[1]
    if len(scales) > FOLLOWED_SCALES:
        scales = scales[np.linspace(0, len(scales) - 1, FOLLOWED_SCALES).astype(int)]
    some = problem.at_points(scales)
    some = replace(some, objective=LOG_LSQ if problem.objective.log else LSQ)
    fitted, start = some.predict(vector[None])[0], np.repeat(vector[None], len(shift), axis=0)
    if anywhere := [j for j, name in enumerate(problem.law.names) if j >= problem.num_linear and name in hidden]:
        start[:, anywhere] = rng.uniform(problem.lower[anywhere], problem.upper[anywhere], (len(shift), len(anywhere)))
        same, theta = replace(some, y=fitted), start[:, problem.num_linear :]
        start[:, : problem.num_linear] = project(same, design(same, theta), same.weights)
    moved = shift[:, some.movable] @ some.linearised(vector).T
    moved = np.clip(moved, -FARTHEST, FARTHEST) if some.objective.log else moved
    return minimise(replace(some, y=some.objective.inverse(some.objective.transform(fitted) + moved)), start)[0]


def _check_names(law: Law, fixed: dict[str, float], bounds: dict[str, tuple[float, float]]) -> None:
    if set(law.names) <= set(fixed):
        raise AnalysisError(f"Every parameter of {law.formula} is held, so nothing is left to fit; free one.")
    positive = {p.name for p in law.parameters if p.log}
    for name, (low, high) in ({name: (v, v) for name, v in fixed.items()} | bounds).items():
        if name not in law.names:
            raise AnalysisError(f"{law.formula} has no parameter {name!r}; {did_you_mean(name, law.names, 'it has')}")
        if not np.isfinite([low, high]).all() or (low <= 0 and name in positive):
            what = "positive, finite" if name in positive else "finite"
            raise AnalysisError(f"{name} of {law.formula} needs {what} numbers, so it cannot be {low:g}.")
        if name in bounds and not low < high:
            raise AnalysisError(f"The bounds of {name} are {low:g} and {high:g}; the first must be the smaller.")


def _result(
    problem: Problem,
    minima: list[Minimum],
    points: Observations,
    drawn: tuple[dict[str, Array], Groups, Components | None, tuple[Flag, ...]],
    hidden: frozenset[str],
) -> Fit:
    draws, groups, errors, against = drawn
    best, law = minima[0], problem.law
    law_params = {name: float(v[0]) for name, v in problem.params_of(best.vector[None]).items()}
    params = {name: float(v) for name, v in law.reported(law_params).items()}
    held = {p.name for p, movable in zip(law.parameters, problem.movable, strict=True) if not movable}
    free = {k: v for k, v in law.reported(draws).items() if k not in held} if draws else {}
    nothing = np.array([])
    intervals = {name: interval(nothing if name in hidden else v) for name, v in free.items()}
    flags, not_identified = diagnose(problem, minima, params, draws, intervals, points, hidden)
    fitted = problem.predict(best.vector[None])[0]
    data = pd.DataFrame(points.x, index=points.index).assign(y=points.y, fitted=fitted)
    return Fit(
        law=law,
        objective=problem.objective,
        params=params,
        intervals=intervals,
        flags=(*flags, *against),
        not_identified=not_identified,
        objective_value=best.total,
        num_points=len(points.y),
        num_rows=points.num_rows,
        exclusions=points.exclusions,
        ranges={v: (float(values.min()), float(values.max())) for v, values in points.x.items()},
        columns=points.columns,
        data=data.assign(residual=problem.residual(best.vector)),
        law_params=law_params,
        draws=draws,
        groups=groups,
        errors=errors,
    )
