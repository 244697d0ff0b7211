"""The global minimum of a law's objective, for one data set or for thousands of resamples at once.

1. On a fixed grid of the non-linear parameters the linear ones are projected out: a bounded weighted least-squares
   problem of a few unknowns per grid point, for all points together (variable projection, Golub and Pereyra 1973).
2. The best distinct grid points are refined together by a bounded Levenberg-Marquardt-Newton method.
3. A robust objective is reached by continuation: the quadratic zone of the Huber loss shrinks from the residuals' scale
   to its target.

Everything carries a leading batch dimension: starts, resamples, or both. A resample is a row of weights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from aimscale.analysis.fitting.problem import Problem, objective_of
from aimscale.analysis.laws.base import Array

MAX_STARTS = 8
LATTICE_STARTS = 48
RADIUS = 0.08
"""Starts lie further apart than this share of the range in one parameter or another."""
NEIGHBOURS = 8
"""A point of the lattice that is lower than so many nearest ones is the floor of a valley."""
GRID_VALUES = 1_000_000
"""Residuals per chunk of the grid."""
MAX_GRID_POINTS = 2000
"""Points that the grid looks at."""
MAX_ITERATIONS = 200
CHUNK_VALUES = 250_000
"""Residuals per chunk of a batch: keeps the Jacobian in the cache."""


def minimise(problem: Problem, vector: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Refine starts (batch, k) under weights (n,) or (batch, n); returns the optima and their objective (batch,).

    Measurements may be a batch (batch, n) as well: one simulated table for every start.
    """
    w = problem.weights if weights is None else weights
    rows = max(1, CHUNK_VALUES // problem.num_points)
    out, total = [], []
    for i in range(0, len(vector), rows):
        chunk, part = w[i : i + rows] if np.ndim(w) == 2 else w, problem.rows(slice(i, i + rows))
        with np.errstate(over="ignore", invalid="ignore"):  # a trial step may overflow; it is rejected
            refined = _continue(part, vector[i : i + rows], chunk)
        out.append(refined)
        total.append(objective_of(part, part.predict(refined), chunk))
    return np.concatenate(out), np.concatenate(total)


def _continue(problem: Problem, vector: Array, weights: Array) -> Array:
    """Newton's method at a shrinking quadratic zone; plain for least squares."""
    objective = problem.objective
    if not objective.robust:
        return _newton(problem, vector, weights, np.full((len(vector), 1), np.inf), MAX_ITERATIONS)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = objective.transform(problem.y) - objective.transform(problem.predict(vector))
    r = np.where(np.isfinite(r), r, 1.0)
    delta = np.maximum(2 * np.median(np.abs(r), axis=1, keepdims=True), objective.delta)
    while np.any(delta > objective.delta):
        vector = _newton(problem, vector, weights, delta, 4)
        delta = np.maximum(delta / 6, objective.delta)
    return _newton(problem, vector, weights, delta, MAX_ITERATIONS)


def _newton(problem: Problem, vector: Array, weights: Array, delta: Array, max_iterations: int) -> Array:
    """Bounded Levenberg-Marquardt on a batch; a row leaves when its step or its gain is at rounding level."""
    vector = np.clip(vector, problem.lower, problem.upper)
    damping = np.full(len(vector), 1e-3)
    active = np.arange(len(vector))
    for _ in range(max_iterations):
        w = weights[active] if np.ndim(weights) == 2 else weights
        old, part = vector[active], problem.rows(active)
        total, gradient, hessian, diagonal = _derivatives(part, old, w, delta[active], damping[active])
        step = _bounded_step(problem, old, gradient, hessian, diagonal * damping[active][:, None])
        new = np.clip(old + step, problem.lower, problem.upper)
        new_total = objective_of(part, part.predict(new), w, delta[active])
        accept = new_total <= total
        gain = total - new_total
        vector[active[accept]] = new[accept]
        damping[active] = np.clip(np.where(accept, damping[active] * 0.15, damping[active] * 6.0), 1e-9, 1e9)
        small = np.max(np.abs(new - old) / (np.abs(old) + 1e-3), axis=1) < 1e-10
        done = (accept & (gain <= 1e-14 * np.abs(total)) & (damping[active] < 1e-4)) | small | (damping[active] >= 1e9)
        active = active[~done]
        if len(active) == 0:
            break
    return vector


def _derivatives(
    problem: Problem, vector: Array, weights: Array, delta: Array, damping: Array
) -> tuple[Array, Array, Array, Array]:
    """Objective, gradient, a positive Hessian model and its diagonal.

    The model is Newton's, blended with that of reweighted least squares (which always descends) as the damping grows.
    """
    objective = problem.objective
    value, jacobian = problem.predict_and_jacobian(vector)
    if objective.log:
        value = np.maximum(value, 1e-300)
        r = np.log(problem.y) - np.log(value)
        jacobian /= value[:, None, :]
    else:
        r = problem.y - value
    size = np.abs(r)
    total = np.sum(weights * objective.loss(r, delta), axis=1)
    inside = size <= delta
    pull = weights * (np.where(inside, r, delta * np.sign(r)) if np.all(np.isfinite(delta)) else r)
    ratio = np.minimum(1.0, delta / np.maximum(size, 1e-300))
    blend = np.minimum(damping, 1.0)[:, None]
    curvature = weights * (inside + blend * (ratio - inside))
    gradient = -np.einsum("bkn,bn->bk", jacobian, pull)
    hessian = (jacobian * curvature[:, None, :]) @ jacobian.transpose(0, 2, 1)
    diagonal = np.einsum("bkk->bk", hessian)
    return total, gradient, hessian, diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300


def _bounded_step(problem: Problem, vector: Array, gradient: Array, hessian: Array, damping: Array) -> Array:
    """Newton step with parameters held that are fixed or pushed outward at a bound."""
    held = (
        ((vector <= problem.lower) & (gradient > 0)) | ((vector >= problem.upper) & (gradient < 0)) | ~problem.movable
    )
    k = vector.shape[1]
    free = ~held
    scale = np.sqrt(np.einsum("bkk->bk", hessian) + damping)
    matrix = hessian / (scale[:, :, None] * scale[:, None, :]) * (free[:, :, None] & free[:, None, :])
    matrix[:, np.arange(k), np.arange(k)] = 1.0 + 1e-13
    step = np.linalg.solve(matrix, (-(gradient / scale) * free)[..., None])[..., 0]
    return step / scale


@dataclass(frozen=True)
class Minimum:
    """A local minimum."""

    vector: Array
    total: float
    """Objective, summed over points."""


def global_minimum(problem: Problem, *, extra: Array | None = None, count: int | None = None) -> list[Minimum]:
    """Distinct local minima, best first: the grid's best points, refined."""
    first = starts(problem, count)
    if extra is not None:
        first = np.concatenate([first, extra])
    if len(first) == 0:
        first = np.clip(np.zeros((1, len(problem.lower))), problem.lower, problem.upper)
    vector, total = minimise(problem, first)
    minima: list[Minimum] = []
    for i in np.argsort(total, kind="stable"):
        distance = [np.max(np.abs(m.vector - vector[i]) / (np.abs(m.vector) + 1e-2)) for m in minima]
        if np.isfinite(total[i]) and all(d > 1e-2 for d in distance):
            minima.append(Minimum(vector=vector[i], total=float(total[i])))
    return minima


def grid_points(lower: Array, upper: Array) -> Array:
    """Fixed points (m, q) of the box: a product grid for q <= 2, a low-discrepancy lattice above."""
    q = len(lower)
    if q == 0:
        return np.zeros((1, 0))
    if q <= 2:
        axes = [np.linspace(lo, hi, {1: 96, 2: 20}[q] if hi > lo else 1) for lo, hi in zip(lower, upper, strict=True)]
        return np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")], axis=1)
    # The R-sequence: the generalised golden ratio's powers fill any dimension evenly.
    ratio = 2.0
    for _ in range(50):
        ratio = (1 + ratio) ** (1 / (q + 1))
    steps = ratio ** -np.arange(1, q + 1)
    points = np.mod(0.5 + np.arange(1, 1024 * (q - 1) + 1)[:, None] * steps, 1.0)
    return lower + (upper - lower) * points


def design(problem: Problem, theta: Array) -> Array:
    """Normalised basis functions (m, p, n) at the non-linear parameters (m, q)."""
    vector = np.concatenate([np.zeros((len(theta), problem.num_linear)), theta], axis=1)
    parts, _ = problem.normalised(problem.law.basis(problem.x, problem.nonlinear(vector)), ())
    shape = (len(theta), len(problem.y))
    return np.stack([np.broadcast_to(part, shape) for part in parts], axis=1)


def project(problem: Problem, g: Array, weights: Array) -> Array:
    """Best bounded linear coefficients (m, p) of weighted least squares on designs (m, p, n).

    All 2^p choices of coefficients held at their nearest finite bound are tried; p is at most a few.
    """
    p, gw = problem.num_linear, g * weights
    gram, moment = gw @ g.transpose(0, 2, 1), gw @ problem.y
    scale = np.sqrt(np.einsum("mjj->mj", gram)) + 1e-300
    gram = gram / (scale[:, :, None] * scale[:, None, :]) + 1e-11 * np.eye(p)
    moment = moment / scale
    lower, upper = problem.lower[:p] * scale, problem.upper[:p] * scale
    held_at = np.where(np.isfinite(lower), lower, np.where(np.isfinite(upper), upper, 0.0))
    can_hold = np.isfinite(problem.lower[:p]) | np.isfinite(problem.upper[:p])
    best, best_value = held_at.copy(), np.full(len(gram), np.inf)
    for choice in itertools.product((False, True), repeat=p):
        held = np.array(choice)
        if np.any(held & ~can_hold) or np.any(~held & ~problem.movable[:p]):
            continue
        c, free = np.where(held, held_at, 0.0), ~held
        rhs = moment[:, free] - np.einsum("mij,mj->mi", gram[:, free][:, :, held], c[:, held])
        c[:, free] = np.linalg.solve(gram[:, free][:, :, free], rhs[..., None])[..., 0]
        inside = np.all((c >= lower - 1e-12) & (c <= upper + 1e-12), axis=1)
        value = 0.5 * np.einsum("mi,mij,mj->m", c, gram, c) - np.einsum("mi,mi->m", c, moment)
        better = inside & (value < best_value)
        best[better], best_value[better] = c[better], value[better]
    return best / scale


def starts(problem: Problem, count: int | None = None) -> Array:
    """The best distinct grid points with projected coefficients (count, k), by the objective itself.

    Args:
        count: by default more where the lattice is sparse.
    """
    count = count or (MAX_STARTS if len(problem.law.nonlinear) <= 2 else LATTICE_STARTS)
    problem = _thinned(problem)
    theta = grid_points(problem.lower[problem.num_linear :], problem.upper[problem.num_linear :])
    rows = max(1, GRID_VALUES // len(problem.y))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # far corners of the grid may overflow
        chunks = [_project_chunk(problem, theta[i : i + rows]) for i in range(0, len(theta), rows)]
    vector, total = (np.concatenate(part) for part in zip(*chunks, strict=True))
    span = np.where(problem.movable, problem.upper - problem.lower, 1.0)[problem.num_linear :]
    order = np.argsort(total, kind="stable")
    if theta.shape[1] > 2:  # first the floor of every valley, also of one that lies high; then the lowest others
        _, near = cKDTree(theta / span).query(theta / span, NEIGHBOURS + 1)
        order = order[np.argsort((total > total[near].min(axis=1))[order], kind="stable")]
    chosen: list[int] = []
    for i in order:
        if not np.isfinite(total[i]) or len(chosen) == count:
            break
        if not np.any(np.all(np.abs(theta[chosen] - theta[i]) / span < RADIUS, axis=1)):
            chosen.append(int(i))
    return vector[chosen]


def _thinned(problem: Problem) -> Problem:
    """The problem on evenly spaced points where there are many: enough to find starts, which are refined on all."""
    n = len(problem.y)
    if n <= MAX_GRID_POINTS:
        return problem
    return problem.at_points(np.linspace(0, n - 1, MAX_GRID_POINTS).astype(int))


def _project_chunk(problem: Problem, theta: Array) -> tuple[Array, Array]:
    """Projected grid points (m, k) and their objective (m,)."""
    relative = problem.weights / problem.y**2 if problem.objective.log else problem.weights
    g = design(problem, theta)
    c = project(problem, g, relative)
    value = np.einsum("mp,mpn->mn", c, g)
    total = objective_of(problem, value, problem.weights)
    return np.concatenate([c, theta], axis=1), total
