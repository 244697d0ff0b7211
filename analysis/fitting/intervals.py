"""Draws of a law's parameters, from which every interval of a fit is read: a mixed model, or a bootstrap by choice."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting import bootstrap as boot
from aimscale.analysis.fitting.objectives import Objective
from aimscale.analysis.fitting.optimise import Minimum, Problem, minimise
from aimscale.analysis.fitting.projection import resample_starts, starts
from aimscale.analysis.inference.groups import Groups, by_scale, groups_of, with_spread
from aimscale.analysis.inference.mixed import Mixed, mixed_model, simulated_errors
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.points import Observations

WEIGHTS_AT_ONCE = 1_000_000
"""Weights of resamples held in floating point at once, for each start."""
MANY_NONLINEAR = 3
"""From this many non-linear parameters on a resample's optimum is looked for on its own grid as well."""
BENT_SHARE = 0.01
"""Share of draws of an exponent beyond its bounds from which on the law is refitted to simulated tables instead."""
REFIT_STARTS = 2
"""Points of the grid that a refit to a simulated table starts from, beside the optimum."""
LOG_ODDS = 3.0
"""A law is said to depart at every scale where that explains what replicate seeds share e^3 = 20 times better than
errors of runs do."""
MIN_RUNS = 5
"""Fewer runs than this are not resampled unless asked for: three or four say too little about their own spread."""
KINDS = ("auto", "mixed", "bootstrap")
"""What `fit(intervals=...)` takes."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What the intervals of a fit are read from."""

    params: dict[str, Array] = field(default_factory=dict)
    """The law's own parameters (num_draws,)."""
    kind: str = "none"
    """mixed, bootstrap or none."""
    method: str = "none"
    """In words."""
    groups: Groups = field(default_factory=lambda: Groups(sizes=None, runs=None))
    """Which points share errors."""
    mixed: Mixed | None = None
    """Variance components, of the mixed model."""
    flags: tuple[str, ...] = ()
    """What to be careful about."""


def draw_params(
    problem: Problem,
    minima: list[Minimum],
    df: pd.DataFrame,
    points: Observations,
    *,
    intervals: str,
    cluster: str | None,
    counts: Array | None,
    resamples: int,
    seed: int,
) -> Draws:
    """Draws by the mixed model where the objective is one of squares and no resamples were asked for; else a bootstrap.

    Raises:
        AnalysisError: an unknown kind of intervals, or no such column to group by.
    """
    if intervals not in KINDS:
        raise AnalysisError(f"There are no {intervals!r} intervals; choose from {', '.join(KINDS)}.")
    if counts is None and not resamples:
        return Draws()
    is_square = _is_square(problem, minima[0])
    if intervals == "mixed" and not is_square:
        raise AnalysisError(
            f"A mixed model describes means, which the {problem.objective.label} does not estimate; minimise robust or "
            "log_lsq, or take bootstrap intervals."
        )
    wants_bootstrap = counts is not None or intervals == "bootstrap" or (intervals == "auto" and cluster != "auto")
    if wants_bootstrap or not is_square:
        return _bootstrap(problem, minima, df, points, cluster, counts, resamples, seed)
    return _mixed(problem, minima[0], df, points, cluster, resamples, seed)


def residual_of(problem: Problem, vector: Array) -> Array:
    """Residuals (n,) of T(y) at a vector (k,)."""
    transform = problem.objective.transform
    return transform(problem.y) - transform(problem.predict(vector[None])[0])


def robust_sd(residual: Array, free: int) -> float:
    """Standard deviation (robust) of the errors behind residuals of a fit with `free` parameters."""
    return float(1.4826 * np.median(np.abs(residual)) * np.sqrt(len(residual) / max(1, len(residual) - free)))


def pseudo_residual(objective: Objective, residual: Array, weights: Array) -> Array:
    """Residuals (n,) whose least squares are the objective's optimum and spread as its error does (Huber 1981, 7.10).

    The objective's pull on every point, over its mean slope: outliers are drawn in, the others stretched for it.
    """
    pull = np.clip(residual, -objective.delta, objective.delta)
    return pull / max(1e-3, float(np.average(pull == residual, weights=weights)))


def linearised(problem: Problem, vector: Array) -> Array:
    """Derivatives (n, free) of T(law) by the movable parameters at a vector (k,)."""
    value, jacobian = problem.predict_and_jacobian(vector[None])
    slope = jacobian[0] / value[0] if problem.objective.log else jacobian[0]
    return slope.T[:, problem.movable]


def _is_square(problem: Problem, best: Minimum) -> bool:
    """Whether most residuals lie in the quadratic zone, so that the optimum is (weighted) least squares."""
    objective = problem.objective
    if objective.likelihood not in ("", "normal") or objective.above != 1.0:
        return False
    sd = robust_sd(residual_of(problem, best.vector), int(problem.movable.sum()))
    return objective.multiple > 0 or bool(objective.delta >= sd)


def _mixed(
    problem: Problem, best: Minimum, df: pd.DataFrame, points: Observations, cluster: str | None, num: int, seed: int
) -> Draws:
    rows = df.loc[points.index]
    if cluster not in (None, "auto"):
        rows = rows.assign(run_id=_labels(rows, str(cluster)))
    jacobian = linearised(problem, best.vector)
    residual = pseudo_residual(problem.objective, residual_of(problem, best.vector), problem.weights)
    stream = [seed, zlib.crc32(f"{problem.law.name} {points.columns['y']}".encode())]

    def model(groups: Groups) -> Mixed:
        rng = np.random.default_rng(stream)
        return mixed_model(jacobian, residual, problem.weights, groups.sizes, groups.runs, num_draws=num, rng=rng)

    shared = groups_of(rows, points.x)
    groups, unseen = with_spread(shared, jacobian)
    found = model(groups)
    scales = by_scale(shared, points.x)
    if scales is not None:
        scales, unseen_scales = with_spread(scales, jacobian)
        departing = model(scales)
        if departing.evidence > found.evidence + LOG_ODDS:
            groups, found, unseen = scales, departing, unseen_scales
    shift = np.zeros((num, len(best.vector)))
    shift[:, problem.movable] = found.shift
    vectors = within_bounds(problem, best.vector, shift, found.metric)
    refitted = ""
    if _is_bent(problem, best.vector, shift):
        errors = simulated_errors(found.drawn, points.weights, groups.sizes, groups.runs, np.random.default_rng(seed))
        vectors, refitted = _refit(problem, best.vector, errors), " refitted to simulated tables"
    flags = tuple(
        f"There are too few {word} to see the errors that all points of one share; the intervals assume none."
        for word in unseen
    )
    method = f"mixed model (REML) of {groups.words}, {found.degrees:.3g} degrees of freedom, {num} draws{refitted}"
    return Draws(
        params=problem.params_of(vectors), kind="mixed", method=method, groups=groups, mixed=found, flags=flags
    )


def _is_bent(problem: Problem, vector: Array, shift: Array) -> bool:
    """Whether a straight line through the optimum misleads: an exponent's error reaches its bounds."""
    out = (vector + shift)[:, problem.num_linear :]
    lower, upper = problem.lower[problem.num_linear :], problem.upper[problem.num_linear :]
    beyond = np.mean((out < lower) | (out > upper), axis=0)
    return bool(np.any(beyond[problem.movable[problem.num_linear :]] > BENT_SHARE))


def _refit(problem: Problem, vector: Array, errors: Array) -> Array:
    """Optima (num, k) of tables simulated from the fitted law with errors (num, n)."""
    objective = problem.objective
    tables = objective.inverse(objective.transform(problem.predict(vector[None])) + errors)
    again = replace(problem, y=tables)
    best, total = minimise(again, np.repeat(vector[None], len(tables), axis=0))
    for start in starts(problem)[:REFIT_STARTS]:
        other, other_total = minimise(again, np.repeat(start[None], len(tables), axis=0))
        better = other_total < total
        best[better], total[better] = other[better], other_total[better]
    return best


def within_bounds(problem: Problem, vector: Array, shift: Array, metric: Array) -> Array:
    """Vectors (num, k) of draws (num, k) about an optimum, each moved to its nearest point within the bounds.

    A coefficient that falls below its bound is set there and takes the parameters that go with it along.
    """
    out = vector + shift
    free = np.flatnonzero(problem.movable)
    for place, j in enumerate(free):
        if j >= problem.num_linear or not np.isfinite(problem.lower[j]) or metric[place, place] <= 0:
            continue
        below = out[:, j] < problem.lower[j]
        lift = problem.lower[j] - out[below, j]
        out[np.ix_(below, free)] += np.outer(lift, metric[:, place] / metric[place, place])
    return np.clip(out, problem.lower, problem.upper)


def _bootstrap(
    problem: Problem,
    minima: list[Minimum],
    df: pd.DataFrame,
    points: Observations,
    cluster: str | None,
    counts: Array | None,
    resamples: int,
    seed: int,
) -> Draws:
    groups = groups_of(df.loc[points.index], points.x)
    cluster, flag = _cluster(df, points, cluster)
    counts, method = _counts(df, points, counts, cluster, resamples, seed)
    params = bootstrap_draws(problem, minima, counts)
    return Draws(params=params, kind="bootstrap", method=method, groups=groups, flags=(flag,) if flag else ())


def bootstrap_draws(problem: Problem, minima: list[Minimum], counts: Array) -> dict[str, Array]:
    """The law's own parameters (num_resamples,) refitted under every row of counts.

    Every resample starts from the best minimum and from the rivals (at most two more), and keeps the lowest result.
    With three or more non-linear parameters its optimum may lie elsewhere altogether, so the floors of the lowest
    valleys of its own projected grid are starts as well.
    """
    near = np.array([m.vector for m in minima[:3]])
    rows = max(1, WEIGHTS_AT_ONCE // len(problem.y))
    blocks = []
    for i in range(0, len(counts), rows):
        weights = counts[i : i + rows] * problem.weights
        num = len(weights)
        origins = np.repeat(near[:, None], num, axis=1)
        if len(problem.law.nonlinear) >= MANY_NONLINEAR:
            origins = np.concatenate([origins, resample_starts(problem, weights, near[0])])
        flat = origins.reshape(-1, origins.shape[2])
        vector, total = minimise(problem, flat, np.tile(weights, (len(origins), 1)))
        best = np.argmin(total.reshape(-1, num), axis=0)
        blocks.append(vector.reshape(origins.shape)[best, np.arange(num)])
    return problem.params_of(np.concatenate(blocks))


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


def _labels(rows: pd.DataFrame, cluster: str) -> Array:
    if cluster not in rows.columns:
        raise AnalysisError(f"The table has no column {cluster!r} to resample by.")
    return rows[cluster].astype(str).to_numpy()


def _counts(
    df: pd.DataFrame, points: Observations, counts: Array | None, cluster: str | None, resamples: int, seed: int
) -> tuple[Array, str]:
    n = len(points.y)
    if counts is not None:
        if counts.shape[1] != n:
            raise AnalysisError(f"The resamples count {counts.shape[1]} points, but {n} are fitted.")
        return counts, f"percentile bootstrap, {len(counts)} given resamples of {n} points"
    if cluster is None or cluster == "rows":
        return boot.point_counts(n, resamples, seed), f"percentile bootstrap, {resamples} resamples of {n} points"
    rows = df.loc[points.index]
    groups = groups_of(rows, points.x)
    own = {"runs": groups.runs, "sizes": groups.sizes}.get(cluster) if cluster not in df.columns else None
    labels = own if own is not None else _labels(rows, cluster)
    drawn = boot.cluster_counts(labels, resamples, seed)
    return drawn, f"percentile bootstrap, {resamples} resamples of {len(np.unique(labels))} clusters by {cluster}"
