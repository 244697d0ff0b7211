"""The global minimum of a law's objective.

1. On a fixed grid of the non-linear parameters the linear ones are projected out: a bounded weighted least-squares
   problem of a few unknowns per grid point, for all points together (variable projection, Golub and Pereyra 1973).
2. The best distinct grid points are refined by `scipy.optimize.least_squares` within the bounds, roughly at first, and
   those that lead to distinct minima to the end.
3. A robust objective is reached by continuation: the quadratic zone of the Huber loss shrinks from the residuals' scale
   to its target.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial import cKDTree

from aimscale.analysis.fitting.problem import Problem
from aimscale.analysis.laws.base import Array

MIN_STARTS = 3
"""Starts that are refined, or as many as there are non-linear parameters: on 444 fits of public tables 16
found no lower minimum of any law."""
RADIUS = 0.08
"""Starts lie further apart than this share of the range in one parameter or another."""
NEIGHBOURS = 8
"""A point of the lattice that is lower than so many nearest ones is the floor of a valley."""
GRID_VALUES = 1_000_000
"""Residuals per chunk of the grid."""
MAX_GRID_POINTS = 120
"""Points that the grid looks at: starts need no more, and are refined on all."""
ROUGH, FINE = 1e-4, 1e-13
"""Relative changes of objective, step and gradient at which a refinement ends."""
MAX_EVALUATIONS = {ROUGH: 25, FINE: 200}
SAME_MINIMUM = {ROUGH: 0.05, FINE: 0.01}
"""Relative distance of vectors within which they are taken for one minimum."""
SHRINK = 6.0
"""Factor by which the quadratic zone shrinks at each step of the continuation."""
BLEND = 0.5
"""Share of the loss's own curvature in its model; the rest is that of reweighted least squares, which always descends.
With all of it steps end early where the quadratic zone is narrow, with none of it they are many."""
ON_BOUND = 1e-4
"""A parameter this near its bound is tried on it: a trust region that stays inside only comes close."""


@dataclass(frozen=True)
class Minimum:
    """A local minimum."""

    vector: Array
    total: float
    """Objective, summed over points."""


def global_minimum(problem: Problem, *, extra: Array | None = None, count: int | None = None) -> list[Minimum]:
    """Find the distinct local minima, best first: the grid's best points, refined.

    Args:
        extra: further starts (m, k).
        count: starts of the grid (`starts`).
    """
    first = starts(problem, count)
    if extra is not None:
        first = np.concatenate([first, extra])
    if len(first) == 0:
        first = np.clip(np.zeros((1, len(problem.lower))), problem.lower, problem.upper)
    rough = _distinct([_refined(problem, start, ROUGH) for start in first], ROUGH)
    return _distinct([minimise(problem, each.vector) for each in rough], FINE)


def _distinct(found: list[Minimum], tolerance: float) -> list[Minimum]:
    """Keep the minima of finite objective that differ, best first."""
    kept: list[Minimum] = []
    for each in sorted(found, key=lambda m: m.total):
        apart = [np.max(np.abs(m.vector - each.vector) / (np.abs(m.vector) + 1e-2)) for m in kept]
        if np.isfinite(each.total) and all(d > SAME_MINIMUM[tolerance] for d in apart):
            kept.append(each)
    return kept


def minimise(problem: Problem, start: Array) -> Minimum:
    """Refine a start (k,) to the local minimum, exactly on the bounds that hold it."""
    found = _refined(problem, start, FINE)
    low, high = (np.abs(found.vector - bound) <= ON_BOUND for bound in (problem.lower, problem.upper))
    if not (near := problem.movable & (low | high)).any():
        return found
    bound = np.where(low, problem.lower, problem.upper)
    lower, upper = np.where(near, bound, problem.lower), np.where(near, bound, problem.upper)
    held = _refined(replace(problem, lower=lower, upper=upper), np.where(near, bound, found.vector), FINE)
    return held if held.total <= found.total * (1 + 1e-9) else found


def _refined(problem: Problem, start: Array, tolerance: float) -> Minimum:
    """Minimise from a start, by continuation where the objective is robust; roughly, only its first step is taken."""
    objective, vector = problem.objective, np.clip(start, problem.lower, problem.upper)
    with np.errstate(all="ignore"):
        residual = problem.residual(vector)
    if problem.movable.any() and np.isfinite(residual).all():
        delta = objective.delta
        if objective.robust:
            delta = max(2 * float(np.median(np.abs(residual))), objective.delta)
        while delta > objective.delta:
            vector = _solved(replace(problem, objective=replace(objective, delta=delta)), vector, ROUGH)
            delta = objective.delta if tolerance == ROUGH else max(delta / SHRINK, objective.delta)
        if tolerance == FINE or not objective.robust:
            vector = _solved(problem, vector, tolerance)
    return Minimum(vector=vector, total=float(problem.totals(problem.predict(vector[None]))[0]))


def _solved(problem: Problem, start: Array, tolerance: float) -> Array:
    """Run scipy's trust region from a vector (k,)."""
    free, objective, root = problem.movable, problem.objective, np.sqrt(problem.weights)
    lower, upper, known = problem.lower[free], problem.upper[free], dict[bytes, tuple[Array, Array]]()
    target = objective.transform(problem.y)

    def evaluated(x: Array) -> tuple[Array, Array]:
        """Weighted residuals (n,) and their derivatives (n, free); scipy asks for both at one place in turn."""
        if (key := x.tobytes()) not in known:
            vector = start.copy()
            vector[free] = x
            with np.errstate(all="ignore"):  # a trial step may overflow; it is rejected
                value, jacobian = problem.predict_and_jacobian(vector)
                slopes = jacobian[free].T
                if objective.log:
                    value = np.maximum(value, 1e-300)
                    value, slopes = np.log(value), slopes / value[:, None]
            residual = np.nan_to_num(root * (value - target), nan=1e100, posinf=1e100, neginf=-1e100)
            known.clear()
            known[key] = residual, np.nan_to_num(root[:, None] * slopes, posinf=0.0, neginf=0.0)
        return known[key]

    inside = 1e-9 * np.minimum(1.0, upper - lower)
    solution = start.copy()
    solution[free] = least_squares(
        lambda x: evaluated(x)[0],
        np.clip(start[free], lower + inside, upper - inside),
        jac=lambda x: evaluated(x)[1],
        bounds=(lower, upper),
        x_scale="jac",
        loss=_huber(objective.delta * root) if objective.robust else "linear",
        max_nfev=MAX_EVALUATIONS[tolerance],
        **dict.fromkeys(("ftol", "xtol", "gtol"), tolerance),
    ).x
    return solution


def _huber(edges: Array) -> Callable[[Array], Array]:
    """Huber loss of weighted residuals, with an edge (n,) for each, as scipy takes it: of their squares."""

    def rho(squares: Array) -> Array:
        size = np.maximum(np.sqrt(squares), 1e-300)
        inside = size <= edges
        values = np.where(inside, squares, 2 * edges * size - edges**2)
        first = np.where(inside, 1.0, edges / size)
        return np.stack([values, first, np.where(inside, 0.0, -BLEND * first / 2 / np.maximum(squares, 1e-300))])

    return rho


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
    return np.stack(problem.basis(np.concatenate([np.zeros((len(theta), problem.num_linear)), theta], axis=1)), axis=1)


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
        count: by default `MIN_STARTS`, or one for each non-linear parameter.
    """
    count = count or max(MIN_STARTS, len(problem.law.nonlinear))
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
    return np.concatenate([c, theta], axis=1), problem.totals(value)
