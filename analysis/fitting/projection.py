"""Where to start: a fixed grid of the non-linear parameters, the linear ones projected out (variable projection)."""

from __future__ import annotations

import itertools

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


def num_starts(problem: Problem) -> int:
    """How many starts to refine: more where the lattice is sparse."""
    return MAX_STARTS if len(problem.law.nonlinear) <= 2 else LATTICE_STARTS


def starts(problem: Problem, *, count: int = MAX_STARTS) -> Array:
    """The best distinct grid points with projected coefficients (count, k), by the objective itself."""
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
