"""`fit`: a law, a table and an objective in; the best optimum with intervals, flags and exclusions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.identify import diagnose, known_from_above, rivals_of
from aimscale.analysis.fitting.intervals import Draws, draw_params, residual_of, robust_sd
from aimscale.analysis.fitting.lackoffit import lack_of_fit_flags
from aimscale.analysis.fitting.objectives import HUBER_LOG, ROBUST, Objective, find_objective
from aimscale.analysis.fitting.optimise import Minimum, Problem, global_minimum, make_problem, minimise
from aimscale.analysis.fitting.profiles import profile
from aimscale.analysis.fitting.projection import MAX_STARTS
from aimscale.analysis.fitting.result import Fit, about, intervals_of
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.points import Observations, observe
from aimscale.analysis.table.read import loss_unit

DENSE_GRID = 2
"""Up to this many non-linear parameters the grid leaves no valley unseen."""


def fit(
    law: Law | str,
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    objective: Objective | str = ROBUST,
    columns: Mapping[str, str] | None = None,
    weights: str | Array | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    resamples: int = 1000,
    intervals: str = "auto",
    cluster: str | None = "auto",
    counts: Array | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    zero_allowed: bool = False,
) -> Fit:
    """Fit a law to a table.

    Args:
        law: a law or its name.
        df: one row per point.
        y: column to fit.
        objective: an objective or its name; the default is least squares of logarithms for all but outliers.
        columns: variable of the law -> column; default: the variable's own name, else the results table's column.
        weights: column, or one weight a row.
        fixed: parameters held at a value.
        bounds: parameters kept between two values.
        resamples: draws of the parameters, or bootstrap resamples; 0 for no intervals.
        intervals: `mixed` takes errors of sizes, runs and points apart; `bootstrap` resamples; `auto` is `mixed` for
            objectives of squares (robust, lsq, log_lsq, a wide Huber) unless `cluster` asks for resamples.
        cluster: what a bootstrap resamples whole: `runs`, `sizes`, `rows` (None), or groups of a column; "auto" takes
            runs (`run_id`) where at least `MIN_RUNS` of them have several rows. For `mixed`: the column of the runs.
        counts: resamples given as counts (num_resamples, num_points), instead of drawn here.
        confidence: coverage of the intervals.
        seed: seed of the bootstrap.
        zero_allowed: let variables be zero (an ideal loss), where the law takes no logarithm of them.

    Raises:
        AnalysisError: missing column, unknown name, too few points, or a variable without variation.
    """
    law = find_law(law) if isinstance(law, str) else law
    objective = find_objective(objective)
    fixed, bounds = dict(fixed or {}), dict(bounds or {})
    _check_names(law, fixed, bounds)
    free = len(law.parameters) - len(fixed)
    points = observe(
        law, df, y=y, columns=columns, weights=weights, positive_y=objective.log, num_free=free,
        zero_allowed=zero_allowed,
    )  # fmt: skip
    if law.centred is not None:
        law = law.centred(Columns(points.x))
    problem = make_problem(law, points.x, points.y, objective, weights=points.weights, fixed=fixed, bounds=bounds)
    problem, minima = best_minima(problem)
    if not minima:
        raise AnalysisError(
            f"{law.formula} has no finite {objective.label} on these {len(points.y)} points; check {y}."
        )
    drawn = draw_params(
        problem, minima, df, points, intervals=intervals, cluster=cluster, counts=counts, resamples=resamples, seed=seed
    )
    against = lack_of_fit_flags(problem, minima[0].vector, drawn, points, df.loc[points.index], seed)
    result = replace(
        _result(problem, minima, points, replace(drawn, flags=(*drawn.flags, *against)), confidence),
        fixed=fixed,
        bounds=bounds,
        cluster=cluster,
        loss_unit=loss_unit(df),
        names=names_of(df),
    )
    return _bounded_above(result, problem)


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
    residual = np.sort(np.abs(residual_of(problem, pilot[0].vector)))
    sd = 1.4826 * float(np.median(residual[min(free, len(residual) - 1) :]))  # it passes through `free` points
    vectors = np.array([m.vector for m in pilot])
    for _ in range(2):
        problem = replace(problem, objective=problem.objective.with_scale(sd))
        refined, totals = minimise(problem, vectors)
        sd = robust_sd(residual_of(problem, refined[np.argmin(totals)]), free)
    return problem, global_minimum(problem, extra=vectors, count=MAX_STARTS)  # every valley is among the vectors


def _bounded_above(result: Fit, problem: Problem) -> Fit:
    """Upper ends by profile likelihood for coefficients that are zero in nearly every resample.

    A percentile interval at a bound has no width (and no coverage); the profile still says how large the coefficient
    may be.
    """
    intervals, flags = dict(result.intervals), list(result.flags)
    for p in problem.law.linear:
        i = intervals.get(p.name)
        if i is None or not (result.law_params[p.name] == 0 and i.low == 0) or p.name in result.fixed:
            continue
        found = profile(result, p.name, num=15, confidence=result.confidence)
        if found.high > i.high:
            intervals[p.name] = replace(i, high=found.high, method="profile likelihood, on its bound 0")
            flags = [f for f in flags if about(f) != p.name]
            flags.append(known_from_above(p.name, found.high))
    return replace(result, intervals=intervals, flags=tuple(flags))


def _check_names(law: Law, fixed: dict[str, float], bounds: dict[str, tuple[float, float]]) -> None:
    for name in (*fixed, *bounds):
        if name not in law.names:
            raise AnalysisError(f"{law.formula} has no parameter {name!r}; its parameters are {', '.join(law.names)}.")
    for p in law.parameters:
        given = [fixed[p.name]] if p.name in fixed else list(bounds.get(p.name, ()))
        if p.log and any(v <= 0 for v in given):
            raise AnalysisError(f"{p.name} of {law.formula} must be positive, so it cannot be {min(given):g}.")
        if not all(np.isfinite(v) for v in given):
            raise AnalysisError(f"{p.name} is fixed or bounded at a value that is not finite; give a number.")
    for name, (low, high) in bounds.items():
        if not low < high:
            raise AnalysisError(f"The bounds of {name} are {low:g} and {high:g}; the first must be the smaller.")


def _result(problem: Problem, minima: list[Minimum], points: Observations, drawn: Draws, confidence: float) -> Fit:
    best, law, objective = minima[0], problem.law, problem.objective
    law_params = {name: float(v[0]) for name, v in problem.params_of(best.vector[None]).items()}
    params = {name: float(v) for name, v in law.reported(law_params).items()}
    held = {p.name for p, movable in zip(law.parameters, problem.movable, strict=True) if not movable}
    free = {k: v for k, v in law.reported(drawn.params).items() if k not in held} if drawn.params else {}
    intervals = intervals_of(free, confidence, drawn.method)
    rivals = rivals_of(problem, minima)
    found = diagnose(problem, best, law_params, params, drawn.params, intervals, rivals, points)
    fitted = problem.predict(best.vector[None])[0]
    data = pd.DataFrame(points.x, index=points.index).assign(y=points.y, weight=points.weights, fitted=fitted)
    data["residual"] = objective.transform(points.y) - objective.transform(fitted)
    return Fit(
        law=law,
        objective=objective,
        params=params,
        intervals=intervals,
        flags=(*found.flags, *drawn.flags),
        not_identified=found.not_identified,
        objective_value=best.total,
        rivals=rivals,
        num_points=len(points.y),
        num_rows=points.num_rows,
        exclusions=points.exclusions,
        ranges={v: (float(values.min()), float(values.max())) for v, values in points.x.items()},
        columns=points.columns,
        data=data,
        law_params=law_params,
        draws=drawn.params,
        interval_method=drawn.method,
        interval_kind=drawn.kind,
        groups=drawn.groups,
        errors=drawn.mixed,
        optimiser=optimiser_words(law),
        confidence=confidence,
    )


def optimiser_words(law: Law) -> str:
    """How the optimum was found; the grid proves it the lowest only where it is dense in the non-linear parameters."""
    refined = "with projected linear parameters, then bounded Newton refinement of every distinct start"
    if len(law.nonlinear) <= DENSE_GRID:
        return f"fixed grid {refined}"
    return (
        f"sparse lattice of {len(law.nonlinear)} non-linear parameters {refined} (the best minimum found, not proved)"
    )
