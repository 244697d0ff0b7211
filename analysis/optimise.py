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
from dataclasses import dataclass, replace

import numpy as np

from analysis.law import Array, Columns, Law
from analysis.objectives import LAD_DELTA, Objective

MAX_ITERATIONS = 200
MAX_STARTS = 8
CHUNK_VALUES = 250_000
"""Residuals per chunk of a batch: keeps the Jacobian in the cache."""
GRID_VALUES = 1_000_000
"""Residuals per chunk of the grid."""
MAX_GRID_POINTS = 2000
"""Points that the grid looks at."""


@dataclass(frozen=True)
class Problem:
    """A law, its data and its objective, in the coordinates of the optimiser.

    A linear coefficient is multiplied by its basis function at the geometric mean of the data (so that A and alpha are
    nearly independent), a non-linear parameter marked `log` is replaced by its logarithm.
    """

    law: Law
    x: Columns
    """Variables (n + 1,); the last entry is the reference point."""
    y: Array
    """Measurements (n,)."""
    weights: Array
    """Weight of each measurement (n,)."""
    objective: Objective
    lower: Array
    """Bounds (k,) in the optimiser's coordinates."""
    upper: Array
    referenced: Array
    """Which linear coefficients are scaled by the reference point (p,): not those held by a finite, non-zero bound."""

    @property
    def num_linear(self) -> int:
        """p, the linear parameters; they come first."""
        return len(self.law.linear)

    @property
    def movable(self) -> Array:
        """Which parameters are not fixed (k,)."""
        return self.upper > self.lower

    def nonlinear(self, phi: Array) -> dict[str, Array]:
        """Non-linear parameters (batch, 1) of the optimiser's vectors (batch, k)."""
        columns = phi[:, self.num_linear :, None]
        return {p.name: np.exp(columns[:, j]) if p.log else columns[:, j] for j, p in enumerate(self.law.nonlinear)}

    def normalised(self, parts: tuple[Array, ...], gradients: tuple[tuple[Array, ...], ...]) -> tuple[list, list]:
        """Basis functions over their value at the reference point, and their derivatives."""
        ones = np.ones_like(self.x[self.law.variables[0]])
        out, out_gradients = [], [list[Array]() for _ in gradients]
        for j, part in enumerate(parts):
            g = part * ones
            ref = g[..., -1:] if self.referenced[j] else 1.0
            out.append(g[..., :-1] / np.abs(ref))
            for q, derivatives in enumerate(gradients):
                if np.ndim(derivatives[j]) == 0:  # a constant basis function
                    out_gradients[q].append(0.0)
                    continue
                d = derivatives[j] * ones
                dref = d[..., -1:] / ref if self.referenced[j] else 0.0
                out_gradients[q].append(d[..., :-1] / np.abs(ref) - out[j] * dref)
        return out, out_gradients

    def predict(self, phi: Array) -> Array:
        """Law's values (batch, n)."""
        g, _ = self.normalised(self.law.basis(self.x, self.nonlinear(phi)), ())
        return sum(phi[:, j, None] * part for j, part in enumerate(g))

    def predict_and_jacobian(self, phi: Array) -> tuple[Array, Array]:
        """Law's values (batch, n) and their derivatives (batch, k, n)."""
        t = self.nonlinear(phi)
        g, dg = self.normalised(*self.law.basis_and_gradient(self.x, t))
        jacobian = np.empty((len(phi), phi.shape[1], len(self.y)))
        value = np.zeros((len(phi), len(self.y)))
        for j, part in enumerate(g):
            jacobian[:, j] = part
            value += phi[:, j, None] * part
        for q, p in enumerate(self.law.nonlinear):
            row = sum(phi[:, j, None] * d for j, d in enumerate(dg[q]) if np.ndim(d))
            jacobian[:, self.num_linear + q] = row * t[p.name] if p.log else row
        return value, jacobian

    def natural(self, phi: Array) -> dict[str, Array]:
        """Parameters by name (batch,), in the formula's own units."""
        t = self.nonlinear(phi)
        parts = self.law.basis(self.x, t)
        out = {}
        for j, p in enumerate(self.law.linear):
            ref = np.broadcast_to(parts[j], (len(phi), len(self.y) + 1))[:, -1] if self.referenced[j] else 1.0
            out[p.name] = phi[:, j] / np.abs(ref)
        return out | {name: value[:, 0] for name, value in t.items()}

    def internal(self, params: dict[str, float]) -> Array:
        """The optimiser's vector (1, k) of parameters in the formula's units: the inverse of `natural`."""
        t = {p.name: np.full((1, 1), float(params[p.name])) for p in self.law.nonlinear}
        parts = self.law.basis(self.x, t)
        at_reference = [np.abs(np.broadcast_to(part, (1, len(self.y) + 1))[0, -1]) for part in parts]
        phi = [
            float(params[p.name]) * (at_reference[j] if self.referenced[j] else 1.0)
            for j, p in enumerate(self.law.linear)
        ]
        phi += [np.log(params[p.name]) if p.log else params[p.name] for p in self.law.nonlinear]
        return np.clip(np.array([phi], float), self.lower, self.upper)

    def total(self, phi: Array, weights: Array | None = None) -> Array:
        """Objective (batch,), summed over points; infinite where the law leaves the domain of T."""
        return _total(self, self.predict(phi), self.weights if weights is None else weights, None)


def make_problem(
    law: Law,
    x: dict[str, Array],
    y: Array,
    objective: Objective,
    *,
    weights: Array | None = None,
    fixed: dict[str, float] | None = None,
    bounds: dict[str, tuple[float, float]] | None = None,
) -> Problem:
    """Put a law, data (n,) and restrictions on parameters into the optimiser's coordinates."""
    reference = {
        name: float(np.exp(np.mean(np.log(v)))) if np.all(v > 0) else float(np.mean(v)) for name, v in x.items()
    }
    columns = Columns({name: np.append(np.asarray(v, float), reference[name]) for name, v in x.items()})
    limits = []
    for p in law.parameters:
        low, high = p.limits(columns)
        low, high = (bounds or {}).get(p.name, (low, high))
        low, high = ((fixed or {})[p.name],) * 2 if p.name in (fixed or {}) else (low, high)
        limits.append((np.log(low), np.log(high)) if p.log else (low, high))
    lower, upper = np.array(limits, float).reshape(-1, 2).T
    p_linear = len(law.linear)
    plain = [(lo in (0.0, -np.inf)) and (hi in (0.0, np.inf)) and lo < hi for lo, hi in limits[:p_linear]]
    return Problem(
        law=law,
        x=columns,
        y=np.asarray(y, float),
        weights=np.ones(len(y)) if weights is None else np.asarray(weights, float),
        objective=objective,
        lower=lower,
        upper=upper,
        referenced=np.array(plain, bool),
    )


def _total(problem: Problem, value: Array, weights: Array, delta: Array | None) -> Array:
    """Objective (batch,) of the law's values (batch, n); with `delta`, the Huber sum that continuation minimises."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = problem.objective.transform(problem.y) - problem.objective.transform(value)
        if delta is None:
            total = problem.objective.total(r, weights)
        else:
            total = np.sum(weights * problem.objective.loss(r, delta), axis=-1)
    return np.where(np.isfinite(total), total, np.inf)


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
    phi = np.concatenate([np.zeros((len(theta), problem.num_linear)), theta], axis=1)
    parts, _ = problem.normalised(problem.law.basis(problem.x, problem.nonlinear(phi)), ())
    shape = (len(theta), len(problem.y))
    return (
        np.stack([np.broadcast_to(part, shape) for part in parts], axis=1)
        if parts
        else np.zeros((*shape[:1], 0, shape[1]))
    )


def project(problem: Problem, g: Array, weights: Array) -> Array:
    """Best bounded linear coefficients (m, p) of weighted least squares on designs (m, p, n).

    All 2^p choices of coefficients held at their nearest finite bound are tried; p is at most a few.
    """
    p = problem.num_linear
    gw = g * (weights[:, None, :] if weights.ndim == 2 else weights)
    gram = gw @ g.transpose(0, 2, 1)
    moment = gw @ problem.y
    scale = np.sqrt(np.einsum("mjj->mj", gram)) + 1e-300
    gram = gram / (scale[:, :, None] * scale[:, None, :]) + 1e-11 * np.eye(p)
    moment = moment / scale
    lower, upper = problem.lower[:p] * scale, problem.upper[:p] * scale
    held_at = np.where(np.isfinite(lower), lower, np.where(np.isfinite(upper), upper, 0.0))
    best, best_value = np.zeros((len(g), p)), np.full(len(g), np.inf)
    can_hold = np.isfinite(problem.lower[:p]) | np.isfinite(problem.upper[:p])
    must_hold = ~problem.movable[:p]
    for held in itertools.product((False, True), repeat=p):
        mask = np.array(held)
        if np.any(mask & ~can_hold) or np.any(must_hold & ~mask):
            continue
        todo = (
            np.isinf(best_value) if not np.any(mask & ~must_hold) else ~_settled(best, best_value, lower, upper, mask)
        )
        if not np.any(todo):
            continue
        c = np.where(mask, held_at[todo], 0.0)
        free = ~mask
        if np.any(free):
            sub = gram[todo][:, free][:, :, free]
            rhs = moment[todo][:, free] - np.einsum("mij,mj->mi", gram[todo][:, free][:, :, mask], c[:, mask])
            c[:, free] = np.linalg.solve(sub, rhs[..., None])[..., 0]
        inside = np.all((c >= lower[todo] - 1e-12) & (c <= upper[todo] + 1e-12), axis=1)
        value = 0.5 * np.einsum("mi,mij,mj->m", c, gram[todo], c) - np.einsum("mi,mi->m", c, moment[todo])
        value = np.where(inside, value, np.inf)
        rows = np.flatnonzero(todo)
        better = value < best_value[rows]
        best[rows[better]], best_value[rows[better]] = c[better], value[better]
    return np.where(
        np.isfinite(best_value)[:, None], best / scale, np.clip(held_at / scale, problem.lower[:p], problem.upper[:p])
    )


def _settled(best: Array, value: Array, lower: Array, upper: Array, mask: Array) -> Array:
    """Grid points whose unconstrained solution was inside the bounds: nothing can beat it."""
    inside = np.all((best > lower) & (best < upper), axis=1)
    return inside & np.isfinite(value)


def starts(problem: Problem, *, count: int = MAX_STARTS) -> Array:
    """The best distinct grid points with projected coefficients (count, k), by the objective itself."""
    problem = _thinned(problem)
    theta = grid_points(problem.lower[problem.num_linear :], problem.upper[problem.num_linear :])
    rows = max(1, GRID_VALUES // len(problem.y))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # far corners of the grid may overflow
        chunks = [_project_chunk(problem, theta[i : i + rows]) for i in range(0, len(theta), rows)]
    phi, total = (np.concatenate(part) for part in zip(*chunks, strict=True))
    span = np.where(problem.movable, problem.upper - problem.lower, 1.0)[problem.num_linear :]
    radius = 0.08 if theta.shape[1] <= 2 else 0.15
    chosen: list[int] = []
    for i in np.argsort(total, kind="stable"):
        if not np.isfinite(total[i]) or len(chosen) == count:
            break
        near = np.abs(theta[chosen] - theta[i]) / span < radius
        if not chosen or not np.any(np.all(near, axis=1)):
            chosen.append(int(i))
    return phi[chosen]


def _thinned(problem: Problem) -> Problem:
    """The problem on evenly spaced points where there are many: enough to find starts, which are refined on all."""
    n = len(problem.y)
    if n <= MAX_GRID_POINTS:
        return problem
    keep = np.linspace(0, n - 1, MAX_GRID_POINTS).astype(int)
    x = Columns({v: problem.x[v][np.append(keep, n)] for v in problem.law.variables})
    return replace(problem, x=x, y=problem.y[keep], weights=problem.weights[keep])


def _project_chunk(problem: Problem, theta: Array) -> tuple[Array, Array]:
    """Projected grid points (m, k) and their objective (m,); the better quarter is reweighted once if it is robust."""
    objective = problem.objective
    relative = problem.weights / problem.y**2 if objective.log else problem.weights
    g = design(problem, theta)
    c = project(problem, g, relative)
    value = np.einsum("mp,mpn->mn", c, g)
    total = _total(problem, value, problem.weights, None)
    if objective.robust:
        best = np.argsort(total)[: max(8, len(theta) // 4)]
        size = np.abs(problem.y - value[best]) * (1 / problem.y if objective.log else 1.0)
        middle = np.median(size, axis=1, keepdims=True) + 1e-300
        again = project(problem, g[best], relative / np.maximum(size, middle))
        total_again = _total(problem, np.einsum("mp,mpn->mn", again, g[best]), problem.weights, None)
        better = total_again < total[best]
        c[best[better]], total[best[better]] = again[better], total_again[better]
    return np.concatenate([c, theta], axis=1), total


def minimise(problem: Problem, phi: Array, weights: Array | None = None) -> tuple[Array, Array]:
    """Refine starts (batch, k) under weights (n,) or (batch, n); returns the optima and their objective (batch,)."""
    w = problem.weights if weights is None else weights
    rows = max(1, CHUNK_VALUES // len(problem.y))
    out, total = [], []
    for i in range(0, len(phi), rows):
        chunk = w[i : i + rows] if np.ndim(w) == 2 else w
        with np.errstate(over="ignore", invalid="ignore"):  # a trial step may overflow; it is rejected
            refined = _continue(problem, phi[i : i + rows], chunk)
        out.append(refined)
        total.append(_total(problem, problem.predict(refined), chunk, None))
    return np.concatenate(out), np.concatenate(total)


def _continue(problem: Problem, phi: Array, weights: Array) -> Array:
    """Newton's method at a shrinking quadratic zone; plain for least squares."""
    objective = problem.objective
    if not objective.robust:
        return _newton(problem, phi, weights, np.full((len(phi), 1), np.inf), MAX_ITERATIONS)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = objective.transform(problem.y) - objective.transform(problem.predict(phi))
    r = np.where(np.isfinite(r), r, 1.0)
    middle = np.median(np.abs(r), axis=1, keepdims=True) + 1e-300
    target = np.maximum(objective.zone(r, weights), LAD_DELTA * middle)
    delta = np.maximum(2 * middle, target)
    vertex = objective.delta == 0
    while np.any(delta > target):
        phi = _newton(problem, phi, weights, delta, 12 if vertex else 4)
        smaller = np.maximum(delta / 6, target)
        phi = _follow_path(problem, phi, weights, delta, smaller)
        delta = smaller
    phi = _newton(problem, phi, weights, target, MAX_ITERATIONS)
    return _follow_path(problem, phi, weights, target, 1e-6 * target) if vertex else phi


def _follow_path(problem: Problem, phi: Array, weights: Array, delta: Array, smaller: Array) -> Array:
    """One step along the path of minima as the quadratic zone shrinks: the points inside stay inside, scaled down.

    (Madsen and Nielsen 1993.) For absolute values this ends in a vertex, where as many residuals vanish as there are
    parameters. Rows where the step does not lower the objective keep their place.
    """
    total, gradient, hessian, diagonal = _derivatives(problem, phi, weights, smaller, np.full(len(phi), 1e-9), delta)
    step = _bounded_step(problem, phi, gradient, hessian, diagonal * 1e-12)
    new = np.clip(phi + step, problem.lower, problem.upper)
    better = _total(problem, problem.predict(new), weights, smaller) < total
    return np.where(better[:, None], new, phi)


def _newton(problem: Problem, phi: Array, weights: Array, delta: Array, max_iterations: int) -> Array:
    """Bounded Levenberg-Marquardt on a batch; a row leaves when its step or its gain is at rounding level."""
    phi = np.clip(phi, problem.lower, problem.upper)
    damping = np.full(len(phi), 1e-3)
    active = np.arange(len(phi))
    for _ in range(max_iterations):
        w = weights[active] if np.ndim(weights) == 2 else weights
        old = phi[active]
        total, gradient, hessian, diagonal = _derivatives(problem, old, w, delta[active], damping[active])
        step = _bounded_step(problem, old, gradient, hessian, diagonal * damping[active][:, None])
        new = np.clip(old + step, problem.lower, problem.upper)
        new_total = _total(problem, problem.predict(new), w, delta[active])
        accept = new_total <= total
        gain = total - new_total
        phi[active[accept]] = new[accept]
        damping[active] = np.clip(np.where(accept, damping[active] * 0.15, damping[active] * 6.0), 1e-9, 1e9)
        small = np.max(np.abs(new - old) / (np.abs(old) + 1e-3), axis=1) < 1e-10
        done = (accept & (gain <= 1e-14 * np.abs(total)) & (damping[active] < 1e-4)) | small | (damping[active] >= 1e9)
        active = active[~done]
        if len(active) == 0:
            break
    return phi


def _derivatives(
    problem: Problem, phi: Array, weights: Array, delta: Array, damping: Array, zone: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Objective, gradient, a positive Hessian model and its diagonal.

    `zone` counts points up to another width than `delta` as quadratic (see `_follow_path`). The model is Newton's,
    blended with that of reweighted least squares (which always descends) as the damping grows.
    """
    objective = problem.objective
    value, jacobian = problem.predict_and_jacobian(phi)
    if objective.log:
        value = np.maximum(value, 1e-300)
        r = np.log(problem.y) - np.log(value)
        jacobian /= value[:, None, :]
    else:
        r = problem.y - value
    size = np.abs(r)
    side = objective.side(r) * weights
    total = np.sum(side * _huber(size, delta), axis=1)
    inside = size <= (delta if zone is None else zone)
    pull = side * (np.where(inside, r, delta * np.sign(r)) if np.all(np.isfinite(delta)) else r)
    ratio = np.minimum(1.0, delta / np.maximum(size, 1e-300))
    blend = np.minimum(damping, 1.0)[:, None]
    curvature = side * (inside + blend * (ratio - inside))
    gradient = -np.einsum("bkn,bn->bk", jacobian, pull)
    hessian = (jacobian * curvature[:, None, :]) @ jacobian.transpose(0, 2, 1)
    diagonal = np.einsum("bkk->bk", hessian)
    return total, gradient, hessian, diagonal + 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300


def _huber(size: Array, delta: Array) -> Array:
    inner = np.minimum(size, delta)
    return inner * (size - 0.5 * inner)


def _bounded_step(problem: Problem, phi: Array, gradient: Array, hessian: Array, damping: Array) -> Array:
    """Newton step with parameters held that are fixed or pushed outward at a bound."""
    held = ((phi <= problem.lower) & (gradient > 0)) | ((phi >= problem.upper) & (gradient < 0)) | ~problem.movable
    k = phi.shape[1]
    free = ~held
    scale = np.sqrt(np.einsum("bkk->bk", hessian) + damping)
    matrix = hessian / (scale[:, :, None] * scale[:, None, :]) * (free[:, :, None] & free[:, None, :])
    matrix[:, np.arange(k), np.arange(k)] = 1.0 + 1e-13
    step = np.linalg.solve(matrix, (-(gradient / scale) * free)[..., None])[..., 0]
    return step / scale


@dataclass(frozen=True)
class Minimum:
    """A local minimum."""

    phi: Array
    """The optimiser's vector (k,)."""
    total: float
    """Objective, summed over points."""


def global_minimum(problem: Problem, *, extra: Array | None = None, count: int = MAX_STARTS) -> list[Minimum]:
    """Distinct local minima, best first: the grid's best points, refined."""
    first = starts(problem, count=count)
    if extra is not None:
        first = np.concatenate([first, extra])
    if len(first) == 0:
        first = np.clip(np.zeros((1, len(problem.lower))), problem.lower, problem.upper)
    phi, total = minimise(problem, first)
    minima: list[Minimum] = []
    for i in np.argsort(total, kind="stable"):
        distance = [np.max(np.abs(m.phi - phi[i]) / (np.abs(m.phi) + 1e-2)) for m in minima]
        if np.isfinite(total[i]) and all(d > 1e-2 for d in distance):
            minima.append(Minimum(phi=phi[i], total=float(total[i])))
    return minima


def with_weights(problem: Problem, weights: Array) -> Problem:
    """The same problem under other weights (n,)."""
    return replace(problem, weights=weights)
