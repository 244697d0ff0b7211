"""A law, its data and its objective in the coordinates of the optimiser, and the global minimum.

1. On a fixed grid of the non-linear parameters the linear ones are projected out by bounded least squares (variable
   projection, Golub and Pereyra 1973).
2. The floors of the grid's valleys are refined by `scipy.optimize.least_squares` within the bounds, roughly at first,
   and those that lead to distinct minima to the end.
3. A robust objective is reached by continuation: the quadratic zone of the Huber loss shrinks from the residuals' scale
   to its target.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.spatial import cKDTree

from aimscale.analysis.fitting.objectives import Objective
from aimscale.analysis.laws.base import Array, Columns, Law

COMPLEX_STEP = 1e-30
"""Imaginary part by which a parameter is moved for its derivative; no difference is taken, so nothing cancels."""
MIN_STARTS = 3
"""Starts that are refined, or as many as there are non-linear parameters; 16 found none lower on public tables."""
NEIGHBOURS = 8
"""A point of the grid that is lower than so many nearest ones is the floor of a valley."""
MAX_GRID_POINTS = 120
"""Points that the grid looks at, evenly spaced: starts need no more, and are refined on all."""
RIDGE = 1e-11
"""Added to the squares of unit columns, of which two may be one at corners of the grid."""
ROUGH, FINE = 1e-4, 1e-13
"""Relative changes of objective, step and gradient at which a refinement ends."""
MAX_EVALUATIONS = {ROUGH: 25, FINE: 200}
SAME_MINIMUM = 0.05
"""Relative distance of vectors within which they are taken for one minimum."""
SHRINK = 6.0
"""Factor by which the quadratic zone shrinks at each step of the continuation."""
BLEND = 0.5
"""Share of the loss's own curvature in its model, the rest being that of reweighted least squares: with all of it steps
end early where the quadratic zone is narrow, with none of it they are many."""
ON_BOUND = 1e-4
"""A parameter this near its bound is tried on it: a trust region that stays inside only comes close."""


@dataclass(frozen=True)
class Problem:
    """A law, its data and its objective: a linear coefficient is multiplied by its basis function at the geometric mean
    of the data (so that A and alpha are nearly independent), a parameter marked `log` is replaced by its logarithm."""

    law: Law
    x: Columns
    """Variables (n + 1,); the last entry is the reference point."""
    y: Array
    weights: Array
    objective: Objective
    lower: Array
    """Bounds (k,) in the optimiser's coordinates."""
    upper: Array
    referenced: Array
    """Linear coefficients that are scaled by the reference point (p,): not those held by a finite, non-zero bound."""

    @property
    def num_linear(self) -> int:
        """Number p of linear parameters; they come first."""
        return len(self.law.linear)

    @property
    def num_points(self) -> int:
        """Number n of measurements."""
        return len(self.y)

    @property
    def movable(self) -> Array:
        """True for parameters (k,) that are not fixed."""
        return self.upper > self.lower

    @property
    def num_free(self) -> int:
        """Number of parameters that are not fixed."""
        return int(self.movable.sum())

    def at_points(self, index: Array) -> Problem:
        """Select some of the points."""
        x = Columns({v: self.x[v][np.append(index, self.num_points)] for v in self.law.variables})
        return replace(self, x=x, y=self.y[index], weights=self.weights[index])

    def limits(self, j: int) -> tuple[float, float]:
        """Return the bounds of parameter j in its own units; those of a scaled coefficient are 0 or infinite in any."""
        is_log = self.law.parameters[j].log
        low, high = (float(np.exp(ends[j]) if is_log else ends[j]) for ends in (self.lower, self.upper))
        return low, high

    def _terms(self, vector: Array) -> tuple[dict[str, Array], list[Array], list[Array]]:
        """Return non-linear parameters (batch, 1) by name, basis functions (batch, n), and their sizes (batch or 1, 1)
        at the reference point, of vectors (batch, k), real or complex."""
        columns, shape = vector[:, self.num_linear :, None], (len(vector), self.num_points + 1)
        t = {p.name: np.exp(columns[:, j]) if p.log else columns[:, j] for j, p in enumerate(self.law.nonlinear)}
        g = [np.broadcast_to(part, shape) for part in self.law.basis(self.x, {**t, **self.law.constants})]
        last = [each[:, -1:] for each in g]
        sizes = [v * np.sign(v.real) if s else np.ones((1, 1)) for v, s in zip(last, self.referenced, strict=True)]
        return t, [each[:, :-1] for each in g], sizes

    def basis(self, vector: Array) -> list[Array]:
        """Return basis functions (batch, n) of vectors, real or complex, each over its size at the reference point."""
        _, parts, sizes = self._terms(vector)
        return [g / np.where(size == 0, 1.0, size) for g, size in zip(parts, sizes, strict=True)]

    def predict(self, vector: Array) -> Array:
        """Return the law's values (batch, n)."""
        return sum(vector[:, j, None] * part for j, part in enumerate(self.basis(vector)))

    def predict_and_jacobian(self, vector: Array) -> tuple[Array, Array]:
        """Return the law's values (n,) at a vector (k,) and derivatives (k, n), by the complex step: exact."""
        p, q = self.num_linear, len(vector) - self.num_linear
        moved = np.repeat(vector[None].astype(complex), q + 1, axis=0)
        moved[np.arange(1, q + 1), np.arange(p, p + q)] += 1j * COMPLEX_STEP
        parts = self.basis(moved)
        values = sum(vector[j] * part for j, part in enumerate(parts))
        slopes = values[1:].imag / COMPLEX_STEP
        return values[0].real, np.concatenate([np.array([part[0].real for part in parts]), slopes])

    def params_of(self, vector: Array) -> dict[str, Array]:
        """Return parameters by name (batch,), in the formula's own units, of the optimiser's vectors (batch, k)."""
        t, _, sizes = self._terms(vector)
        linear = {p.name: vector[:, j] / sizes[j][:, 0] for j, p in enumerate(self.law.linear)}
        return linear | {name: value[:, 0] for name, value in t.items()}

    def residual(self, vector: Array) -> Array:
        """Return residuals (n,) of T(y) at a vector (k,)."""
        transform = self.objective.transform
        return transform(self.y) - transform(self.predict(vector[None])[0])

    def linearised(self, vector: Array) -> Array:
        """Return derivatives (n, free) of T(law) by the movable parameters at a vector (k,)."""
        value, jacobian = self.predict_and_jacobian(vector)
        return (jacobian / value if self.objective.log else jacobian)[self.movable].T

    def totals(self, value: Array) -> Array:
        """Return the objective (batch,) of the law's values (batch, n), infinite outside T's domain."""
        with np.errstate(invalid="ignore", divide="ignore"):
            r = self.objective.transform(self.y) - self.objective.transform(value)
            return np.nan_to_num(np.sum(self.weights * self.objective.loss(r), axis=-1), nan=np.inf, posinf=np.inf)


def make_problem(
    law: Law,
    x: Mapping[str, Array],
    y: Array,
    objective: Objective,
    *,
    weights: Array | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> Problem:
    """Put a law, data (n,) and restrictions on parameters into the optimiser's coordinates."""
    columns = Columns()
    for name, values in x.items():
        v = np.asarray(values, float)
        columns[name] = np.append(v, np.exp(np.mean(np.log(v))) if np.all(v > 0) else np.mean(v))
    given = {**(bounds or {}), **{name: (value, value) for name, value in (fixed or {}).items()}}
    limits = [given.get(p.name, p.bounds(columns) if callable(p.bounds) else p.bounds) for p in law.parameters]
    plain = [low in (0.0, -np.inf) and high in (0.0, np.inf) and low < high for low, high in limits]
    scaled = [np.log(ends) if p.log else ends for p, ends in zip(law.parameters, limits, strict=True)]
    lower, upper = np.array(scaled, float).reshape(-1, 2).T
    return Problem(
        law=law,
        x=columns,
        y=np.asarray(y, float),
        weights=np.ones(len(y)) if weights is None else np.asarray(weights, float),
        objective=objective,
        lower=lower,
        upper=upper,
        referenced=np.array(plain[: len(law.linear)], bool),
    )


@dataclass(frozen=True)
class Minimum:
    """A local minimum, and the objective there."""

    vector: Array
    total: float


def global_minimum(problem: Problem) -> Minimum:
    """Find the lowest of the minima below the floors of the grid's valleys; its objective is infinite if none is."""
    distinct = list[Minimum]()
    for each in sorted((_refined(problem, start, ROUGH) for start in starts(problem)), key=lambda m: m.total):
        apart = [np.max(np.abs(m.vector - each.vector) / (np.abs(m.vector) + 1e-2)) for m in distinct]
        distinct += [each] if all(d > SAME_MINIMUM for d in apart) else []
    found = [minimise(problem, each.vector) for each in distinct]
    return min(found, key=lambda m: m.total, default=Minimum(vector=problem.lower, total=np.inf))


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
    lower, upper = problem.lower[free], problem.upper[free]
    inside = 1e-9 * np.minimum(1.0, upper - lower)

    def vector_of(x: Array) -> Array:
        vector = start.copy()
        vector[free] = x
        return vector

    with np.errstate(all="ignore"):  # a trial step may overflow; it is rejected
        found = least_squares(
            lambda x: -root * problem.residual(vector_of(x)),
            np.clip(start[free], lower + inside, upper - inside),
            jac=lambda x: np.nan_to_num(root[:, None] * problem.linearised(vector_of(x)), posinf=0.0, neginf=0.0),
            bounds=(lower, upper),
            x_scale="jac",
            loss=_huber(objective.delta * root) if objective.robust else "linear",
            max_nfev=MAX_EVALUATIONS[tolerance],
            **dict.fromkeys(("ftol", "xtol", "gtol"), tolerance),
        )
    return vector_of(found.x)


def _huber(edges: Array) -> Callable[[Array], Array]:
    """Make the Huber loss of weighted residuals, with an edge (n,) for each, as scipy takes it: of their squares."""

    def rho(squares: Array) -> Array:
        size = np.maximum(np.sqrt(squares), 1e-300)
        inside = size <= edges
        values = np.where(inside, squares, 2 * edges * size - edges**2)
        first = np.where(inside, 1.0, edges / size)
        return np.stack([values, first, np.where(inside, 0.0, -BLEND * first / 2 / np.maximum(squares, 1e-300))])

    return rho


def starts(problem: Problem) -> Array:
    """Find the floors of the grid's valleys (count, k), lowest first, with the linear coefficients projected out."""
    p, n = problem.num_linear, problem.num_points
    if n > MAX_GRID_POINTS:
        problem = problem.at_points(np.linspace(0, n - 1, MAX_GRID_POINTS).astype(int))
    unit = _unit_grid(problem.movable[p:])
    with np.errstate(all="ignore"):  # far corners of the grid may overflow
        vector, total = _projected(problem, problem.lower[p:] + (problem.upper - problem.lower)[p:] * unit)
    places = np.column_stack([unit, np.zeros(len(unit))])  # a law may have no non-linear parameter
    _, near = cKDTree(places).query(places, range(1, min(NEIGHBOURS + 1, len(unit)) + 1))
    total[total > total[near].min(axis=1)] = np.inf
    best = np.argsort(total, kind="stable")[: max(MIN_STARTS, len(problem.law.nonlinear))]
    return vector[best[np.isfinite(total[best])]]


def _unit_grid(movable: Array) -> Array:
    """Return fixed points (m, q) of the unit cube: a product grid for q <= 2, a low-discrepancy sequence above."""
    if (q := len(movable)) > 2:
        from scipy.stats.qmc import Halton  # slow to import, and many designs need none

        return Halton(q, scramble=False).random(1024 * (q - 1))
    axes = [np.linspace(0, 1, (96, 20)[q - 1] if moves else 1) for moves in movable]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, q) if q else np.zeros((1, 0))


def _projected(problem: Problem, theta: Array) -> tuple[Array, Array]:
    """Project the linear coefficients out at grid points (m, q): vectors (m, k) and their objective (m,). Where least
    squares leave one below its lower bound, they are non-negative (free ones differences of two); clipped above."""
    p = problem.num_linear
    g = np.stack(problem.basis(np.column_stack([np.zeros((len(theta), p)), theta])), axis=2)
    lower, upper = problem.lower[:p], problem.upper[:p]
    is_free, base = ~np.isfinite(lower), np.where(np.isfinite(lower), lower, 0.0)
    root = np.sqrt(problem.weights) / (problem.y if problem.objective.log else 1.0)
    columns, target = root[:, None] * np.concatenate([g, -g[..., is_free]], axis=2), root * (problem.y - g @ base)
    c = np.full((len(theta), p), np.nan)
    whole = np.flatnonzero(np.isfinite(columns).all(axis=(1, 2)) & np.isfinite(target).all(axis=1))
    scale = np.linalg.norm(columns[whole, :, :p], axis=1) + 1e-300
    x, y = columns[whole, :, :p] / scale[:, None], target[whole, :, None]
    above = np.linalg.solve(np.swapaxes(x, 1, 2) @ x + RIDGE * np.eye(p), np.swapaxes(x, 1, 2) @ y)[..., 0] / scale
    c[whole] = base + above
    for i in whole[np.any((above < 0) & ~is_free, axis=1)]:
        with contextlib.suppress(RuntimeError):  # it does not converge: no start
            found = nnls(columns[i], target[i])[0]
            c[i] = base + found[:p]
            c[i, is_free] -= found[p:]
    c = np.clip(c, lower, upper)
    return np.column_stack([c, theta]), problem.totals(np.einsum("mp,mnp->mn", c, g))
