"""`fit`: a law, a table and an objective in; a global optimum with intervals, flags and exclusions out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting import bootstrap as boot
from aimscale.analysis.fitting.identify import Diagnosis, diagnose, rivals_of
from aimscale.analysis.fitting.objectives import HUBER_LOG, Objective, find_objective
from aimscale.analysis.fitting.optimise import Minimum, Problem, global_minimum, make_problem, minimise
from aimscale.analysis.fitting.profiles import profile
from aimscale.analysis.fitting.result import Fit, intervals_of
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.tables.observations import THEIR_NAMES, Observations, observe
from aimscale.analysis.tables.results import loss_unit

WEIGHTS_AT_ONCE = 5_000_000
"""Weights of resamples held in floating point at once."""
OPTIMISER = "fixed grid with projected linear parameters, then bounded Newton refinement of every distinct start"


def fit(
    law: Law | str,
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    objective: Objective | str = HUBER_LOG,
    columns: Mapping[str, str] | None = None,
    weights: str | Array | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    resamples: int = 1000,
    cluster: str | None = "auto",
    counts: Array | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    zero_allowed: bool = False,
) -> Fit:
    """Fit a law to a table.

    Args:
        law: a law or its name.
        df: one row a point.
        y: column to fit.
        objective: an objective or its name.
        columns: variable of the law -> column; default: the variable's own name, else the results table's column.
        weights: column, or one weight a row.
        fixed: parameters held at a value.
        bounds: parameters kept between two values.
        resamples: bootstrap resamples; 0 for none.
        cluster: column whose groups (a run, a size) are resampled whole; None resamples points; "auto" resamples runs
            (`run_id`) where at least `MIN_RUNS` of them have several rows, which share their trunk's error.
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
    points = observe(
        law,
        df,
        y=y,
        columns=columns,
        weights=weights,
        positive_y=objective.log,
        num_free=len(law.parameters) - len(fixed),
        zero_allowed=zero_allowed,
    )
    if law.centred is not None:
        law = law.centred(Columns(points.x))
    problem = make_problem(law, points.x, points.y, objective, weights=points.weights, fixed=fixed, bounds=bounds)
    minima = global_minimum(problem)
    if not minima:
        raise AnalysisError(
            f"{law.formula} has no finite {objective.label} on these {len(points.y)} points; check {y}."
        )
    draws: dict[str, Array] = {}
    method = "none"
    cluster, shared = _cluster(df, points, cluster)
    if counts is not None or resamples:
        counts, method = _counts(df, points, counts, cluster, resamples, seed)
        draws = bootstrap_draws(problem, minima, counts)
    law_params = {name: float(v[0]) for name, v in problem.params_of(minima[0].vector[None]).items()}
    params = {name: float(v) for name, v in law.reported(law_params).items()}
    intervals = intervals_of(law.reported(draws), confidence, method) if draws else {}
    rivals = rivals_of(problem, minima)
    found = diagnose(problem, minima[0], law_params, params, draws, intervals, rivals, points)
    if shared and draws:
        found = replace(found, flags=(*found.flags, shared))
    result = _result(
        problem, minima[0], points, objective, params, law_params, draws, found, rivals, intervals, method, confidence
    )
    result = replace(result, fixed=fixed, bounds=bounds, loss_unit=loss_unit(df), names=df.attrs.get(THEIR_NAMES, {}))
    return _bounded_above(result, problem)


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
            flags = [f for f in flags if not f.startswith(f"{p.name} is known from above")]
            flags.append(f"{p.name} is known from above only: the data allow any value from 0 to {found.high:.4g}.")
    return replace(result, intervals=intervals, flags=tuple(flags))


def bootstrap_draws(problem: Problem, minima: list[Minimum], counts: Array) -> dict[str, Array]:
    """The law's own parameters (num_resamples,) refitted under every row of counts.

    Every resample starts from the best minimum and from the rivals (at most two more), and keeps the lower result.
    """
    rows = max(1, WEIGHTS_AT_ONCE // len(problem.y))
    blocks = []
    for i in range(0, len(counts), rows):
        weights = counts[i : i + rows] * problem.weights
        best, best_total = minimise(problem, np.repeat(minima[0].vector[None], len(weights), axis=0), weights)
        for rival in minima[1:3]:
            vector, total = minimise(problem, np.repeat(rival.vector[None], len(weights), axis=0), weights)
            better = total < best_total
            best[better], best_total[better] = vector[better], total[better]
        blocks.append(best)
    return problem.params_of(np.concatenate(blocks))


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


MIN_RUNS = 5
"""Fewer runs than this are not resampled unless asked for: three or four say too little about their own spread."""


def _cluster(df: pd.DataFrame, points: Observations, wish: str | None) -> tuple[str | None, str]:
    """The column to resample by, and a warning where runs share errors but are too few to resample."""
    if wish != "auto":
        return wish, ""
    if "run_id" not in df.columns:
        return None, ""
    runs = df.loc[points.index, "run_id"]
    num_runs = runs.nunique()
    if runs.isna().any() or num_runs == len(runs):
        return None, ""
    if num_runs >= MIN_RUNS:
        return "run_id", ""
    return None, (
        f"The {len(runs)} points come from {num_runs} run{'s' * (num_runs > 1)}, too few to resample; rows of a run "
        "share its error, so the intervals, which resample rows, are too narrow."
    )


def _counts(
    df: pd.DataFrame, points: Observations, counts: Array | None, cluster: str | None, resamples: int, seed: int
) -> tuple[Array, str]:
    n = len(points.y)
    if counts is not None:
        if counts.shape[1] != n:
            raise AnalysisError(f"The resamples count {counts.shape[1]} points, but {n} are fitted.")
        return counts, f"percentile bootstrap, {len(counts)} given resamples of {n} points"
    if cluster is None:
        return boot.point_counts(n, resamples, seed), f"percentile bootstrap, {resamples} resamples of {n} points"
    if cluster not in df.columns:
        raise AnalysisError(f"The table has no column {cluster!r} to resample by.")
    groups = df.loc[points.index, cluster].to_numpy()
    drawn = boot.cluster_counts(groups, resamples, seed)
    kind = f"percentile bootstrap, {resamples} resamples of {len(np.unique(groups.astype(str)))} clusters by {cluster}"
    return drawn, kind


def _result(
    problem: Problem,
    best: Minimum,
    points: Observations,
    objective: Objective,
    params: dict,
    law_params: dict,
    draws: dict,
    found: Diagnosis,
    rivals: tuple,
    intervals: dict,
    method: str,
    confidence: float,
) -> Fit:
    fitted = problem.predict(best.vector[None])[0]
    data = pd.DataFrame(points.x, index=points.index).assign(y=points.y, weight=points.weights, fitted=fitted)
    data["residual"] = objective.transform(points.y) - objective.transform(fitted)
    return Fit(
        law=problem.law,
        objective=objective,
        params=params,
        intervals=intervals,
        flags=found.flags,
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
        draws=draws,
        interval_method=method,
        optimiser=OPTIMISER,
        confidence=confidence,
    )
