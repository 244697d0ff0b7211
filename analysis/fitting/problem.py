"""A law, its data and its objective in the coordinates of the optimiser, and the global minimum.

On a fixed grid of the non-linear parameters the linear ones are projected out by non-negative least squares (variable
projection, Golub and Pereyra 1973). The floors of the grid's valleys are refined within the bounds by
`scipy.optimize.least_squares`, for a robust objective from the least squares there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.spatial import cKDTree

from aimscale.analysis.display import did_you_mean
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws import Array, Columns, Law

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
"""Relative changes of objective, step and gradient at which a least-squares start and a minimum end."""
MAX_EVALUATIONS = 200
ON_BOUND = 1e-4
"""A parameter this near its bound is tried on it: a trust region that stays inside only comes close."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss function of residuals r = T(y) - T(prediction), summed over points."""

    name: str
    log: bool
    """T is the natural logarithm; otherwise the identity."""
    delta: float = np.inf
    """Half-width of the quadratic zone of the Huber loss; inf: squares."""
    multiple: float = 0.0
    """Delta in robust standard deviations of the residuals, which are found first; 0 takes `delta` itself."""

    @property
    def robust(self) -> bool:
        """True if large residuals count less than in least squares."""
        return bool(np.isfinite(self.delta))

    def transform(self, y: Array) -> Array:
        """Return T(y)."""
        return np.log(y) if self.log else y

    def inverse(self, z: Array) -> Array:
        """Return T^-1(z)."""
        return np.exp(z) if self.log else z

    def loss(self, r: Array) -> Array:
        """Return the loss of each residual: r^2/2 inside the zone, delta (|r| - delta/2) outside."""
        size = np.abs(r)
        inner = np.minimum(size, self.delta)
        return inner * (size - 0.5 * inner)


def huber_log(delta: float = 1e-3) -> Objective:
    """Make the Huber loss of log residuals, with the delta of Hoffmann et al. 2022 (whose code took the mean)."""
    return Objective(name="huber_log", log=True, delta=delta)


ROBUST = Objective(name="robust", log=True, multiple=2.0)
"""The default: least squares for all but outliers (99 % efficient on normal errors), whose pull is bounded."""
HUBER_LOG = huber_log()
LSQ = Objective(name="lsq", log=False)
LOG_LSQ = Objective(name="log_lsq", log=True)
OBJECTIVES = {each.name: each for each in (ROBUST, HUBER_LOG, LSQ, LOG_LSQ)}


def find_objective(name: str | Objective) -> Objective:
    """Find an objective by name, or return it; `huber_log:0.01` sets the width of its quadratic zone."""
    if isinstance(name, Objective):
        return name
    base, _, delta = name.partition(":")
    try:
        return huber_log(float(delta)) if base == "huber_log" and delta else OBJECTIVES[name]
    except (KeyError, ValueError):
        names = did_you_mean(base, OBJECTIVES, "the objectives are")
        raise AnalysisError(f"There is no objective named {name!r}; {names}") from None


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

    @property
    def scales(self) -> Array:
        """Steps of the parameters (k,) that matter: of a logarithm 1, of others the width of their bounds or, without
        any, the size of the measurements."""
        span, level = self.upper - self.lower, max(float(np.median(np.abs(self.y))), 1e-300)
        return np.where([p.log for p in self.law.parameters], 1.0, np.where(np.isfinite(span), span, level))

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
        # a penalty for repeats is zero where nothing is repeated, such as at the reference point
        return t, [each[:, :-1] for each in g], [np.where(size == 0, 1.0, size) for size in sizes]

    def basis(self, vector: Array) -> list[Array]:
        """Return basis functions (batch, n) of vectors, real or complex, each over its size at the reference point."""
        _, parts, sizes = self._terms(vector)
        return [g / size for g, size in zip(parts, sizes, strict=True)]

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

    def total(self, vector: Array) -> Array:
        """Return the objective (batch,) at vectors (batch, k) or (k,), infinite outside T's domain."""
        with np.errstate(all="ignore"):
            value = self.objective.transform(self.predict(np.atleast_2d(vector)))
            r = self.objective.transform(self.y) - value
            total = np.nan_to_num(np.sum(self.weights * self.objective.loss(r), axis=-1), nan=np.inf, posinf=np.inf)
        return total if vector.ndim > 1 else total[0]


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


def global_minimum(problem: Problem) -> Array | None:
    """Find the lowest (k,) of the minima below the floors of the grid's valleys; None if the objective is nowhere
    finite."""
    minima = [minimise(problem, start) for start in starts(problem)]
    return min(minima, key=problem.total, default=None)


def minimise(problem: Problem, start: Array) -> Array:
    """Refine a start (k,) to the local minimum, exactly on the bounds that hold it."""
    start = np.clip(start, problem.lower, problem.upper)
    if not problem.movable.any() or not np.isfinite(problem.total(start)):
        return start
    if problem.objective.robust:
        squares = replace(problem, objective=replace(problem.objective, delta=np.inf))
        start = _solved(squares, start, ROUGH)
    minimum = _solved(problem, start, FINE)
    low, high = (np.abs(minimum - bound) <= ON_BOUND for bound in (problem.lower, problem.upper))
    if not (near := problem.movable & (low | high)).any():
        return minimum
    bound = np.where(low, problem.lower, problem.upper)
    held = replace(problem, lower=np.where(near, bound, problem.lower), upper=np.where(near, bound, problem.upper))
    on_bound = np.where(near, bound, minimum)
    on_bound = _solved(held, on_bound, FINE) if held.movable.any() else on_bound
    return on_bound if problem.total(on_bound) <= problem.total(minimum) * (1 + 1e-9) else minimum


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
        solution = least_squares(
            lambda x: -root * problem.residual(vector_of(x)),
            np.clip(start[free], lower + inside, upper - inside),
            jac=lambda x: np.nan_to_num(root[:, None] * problem.linearised(vector_of(x)), posinf=0.0, neginf=0.0),
            bounds=(lower, upper),
            x_scale="jac",
            loss=_huber(objective.delta * root) if objective.robust else "linear",
            max_nfev=MAX_EVALUATIONS,
            **dict.fromkeys(("ftol", "xtol", "gtol"), tolerance),
        )
    return vector_of(solution.x)


def _huber(edges: Array) -> Callable[[Array], Array]:
    """Make the Huber loss of weighted residuals, with an edge (n,) for each, as scipy takes it: of their squares. Its
    second derivative is left out, as in reweighted least squares: with it steps end early where zones are narrow."""

    def rho(squares: Array) -> Array:
        size = np.maximum(np.sqrt(squares), 1e-300)
        inside = size <= edges
        values = np.where(inside, squares, 2 * edges * size - edges**2)
        return np.stack([values, np.where(inside, 1.0, edges / size), np.zeros_like(size)])

    return rho


def starts(problem: Problem) -> Array:
    """Find the floors of the grid's valleys (count, k), lowest first, with the linear coefficients projected out."""
    p, n = problem.num_linear, problem.num_points
    if n > MAX_GRID_POINTS:
        some = np.linspace(0, n - 1, MAX_GRID_POINTS).astype(int)
        x = Columns({v: problem.x[v][np.append(some, n)] for v in problem.law.variables})
        problem = replace(problem, x=x, y=problem.y[some], weights=problem.weights[some])
    unit = _unit_grid(problem.movable[p:])
    with np.errstate(all="ignore"):  # far corners of the grid may overflow
        vector = _projected(problem, problem.lower[p:] + (problem.upper - problem.lower)[p:] * unit)
    total, places = problem.total(vector), np.column_stack([unit, np.zeros(len(unit))])  # for a law without any
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


def _projected(problem: Problem, theta: Array) -> Array:
    """Project the linear coefficients out at grid points (m, q): vectors (m, k), NaN where there is none. They are
    those of least squares, or of non-negative ones where all have a lower bound, clipped to their bounds."""
    p = problem.num_linear
    g = np.stack(problem.basis(np.column_stack([np.zeros((len(theta), p)), theta])), axis=2)
    is_bounded, lower = np.isfinite(problem.lower[:p]), problem.lower[:p]
    base = np.where(is_bounded, lower, 0.0)
    root = np.sqrt(problem.weights) / (problem.y if problem.objective.log else 1.0)
    columns, target = root[:, None] * g, root * (problem.y - g @ base)
    above = np.full((len(theta), p), np.nan)
    whole = np.flatnonzero(np.isfinite(columns).all(axis=(1, 2)) & np.isfinite(target).all(axis=1))
    scale = np.linalg.norm(columns[whole], axis=1) + 1e-300
    x, y = columns[whole] / scale[:, None], target[whole, :, None]
    turned = np.swapaxes(x, 1, 2)
    above[whole] = np.linalg.solve(turned @ x + RIDGE * np.eye(p), turned @ y)[..., 0] / scale
    for i in whole[(above[whole] < 0).any(axis=1)] if is_bounded.all() else ():
        with contextlib.suppress(RuntimeError):  # it does not converge: clipped
            above[i] = nnls(columns[i], target[i])[0]
    return np.column_stack([np.clip(base + above, lower, problem.upper[:p]), theta])
