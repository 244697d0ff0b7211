"""A mixed model of a fitted law's residuals: errors that a size, a run and a point have to themselves.

    residual_i = J_i (truth - estimate) + size effect + run effect + point error

J is the law's Jacobian at the estimate. With few sizes a variance component is hardly known, so it is not plugged in:
every draw takes its ratios of variances from their restricted likelihood (REML, with the reference prior of a
nested design: uniform in the logarithm of a group's total variance) and the error's variance from its scaled
chi-squared. They are then a mixture of Student distributions whose degrees of freedom follow the evidence: n - k where
groups share nothing, about sizes - 2 where the sizes' own errors dominate.

Runs are nested in sizes, so every matrix inverse has a closed form in sums over groups: the cost is O(n k^2) once, and
O(groups k^2) for each point of the grid of variance ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aimscale.analysis.laws.base import Array

GRID_ONE, GRID_TWO = 64, 28
"""Points per axis of the grid of variance ratios, with one and with two grouping factors."""
MAX_LOG_RATIO = 14.0
"""The largest group variance looked at is e^14 times that of a group's mean of point errors."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """Standard deviations of the errors; estimates (), or one draw each (num_draws,)."""

    size: Array
    """Of what all points of a size share."""
    run: Array
    """Of what all points of a run share beyond their size."""
    point: Array
    """Of a point of weight 1 alone."""

    @property
    def total(self) -> Array:
        """Of one measurement of weight 1 of a new size and run."""
        return np.sqrt(self.size**2 + self.run**2 + self.point**2)


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Draws of the estimate's error and of the variance components."""

    shift: Array
    """Truth minus estimate (num_draws, k)."""
    metric: Array
    """Covariance (k, k) of the estimate at the components' estimates, up to a factor."""
    drawn: Components
    """Components of every draw."""
    estimated: Components
    """Their REML estimates."""
    degrees: float
    """Degrees of freedom of the errors' total variance: sizes - 2 or so where sizes differ, n - k where they do not."""


def simulated_errors(
    drawn: Components, weights: Array, sizes: Array | None, runs: Array | None, rng: np.random.Generator
) -> Array:
    """Errors (num_draws, n) of a table measured again, one table for every draw of the components."""
    shape = (len(drawn.point), len(weights))
    errors = drawn.point[:, None] * rng.standard_normal(shape) / np.sqrt(weights)
    for spread, codes in ((drawn.size, sizes), (drawn.run, runs)):
        if codes is not None:
            errors += (spread[:, None] * rng.standard_normal((shape[0], codes.max() + 1)))[:, codes]
    return errors


def mixed_model(
    jacobian: Array,
    residual: Array,
    weights: Array,
    sizes: Array | None,
    runs: Array | None,
    *,
    num_draws: int,
    rng: np.random.Generator,
) -> Mixed:
    """Variance components of residuals, and draws of the error of the weighted least-squares estimate they belong to.

    Args:
        jacobian: derivatives (n, k) of the prediction by every free parameter.
        residual: measurement minus prediction (n,) at the estimate.
        weights: the estimate's weights (n,), taken for relative inverse variances of the point errors.
        sizes: number of each point's size (n,), or None where sizes are not told apart from runs or points.
        runs: number of each point's run (n,), nested in sizes, or None.
        num_draws: draws.
        rng: source of randomness.
    """
    n, k = jacobian.shape
    scale = np.sqrt(np.sum(weights[:, None] * jacobian**2, axis=0))
    scale = np.maximum(scale, 1e-8 * scale.max() + 1e-300)  # a parameter without any effect gets a huge error
    a = np.column_stack([jacobian / scale, residual])
    sums = _Sums(a, weights, sizes, runs)
    first, second = sums.axes()
    spare = n - k
    cells = [(x, y) for x in first for y in second]
    found = [sums.at(x, y) for x, y in cells]
    log_likelihood = np.array([_restricted(each, spare) for each in found])
    share = np.exp(log_likelihood - log_likelihood.max())
    share /= share.sum()
    chosen = rng.choice(len(cells), size=num_draws, p=share)
    variance = np.array([each.rest for each in found])[chosen] / rng.chisquare(spare, num_draws)
    noise = rng.standard_normal((num_draws, k))
    shift = np.empty((num_draws, k))
    bread = np.linalg.inv(sums.plain[:k, :k] + 1e-12 * np.eye(k))
    for cell in np.unique(chosen):
        rows = chosen == cell
        root = _root(bread @ sums.meat(*cells[cell])[:k, :k] @ bread)
        shift[rows] = noise[rows] @ root.T
    shift *= np.sqrt(variance)[:, None] / scale
    best = int(np.argmax(log_likelihood))
    return Mixed(
        shift=shift,
        metric=bread @ sums.meat(*cells[best])[:k, :k] @ bread / np.outer(scale, scale),
        drawn=sums.components(np.array(cells)[chosen], variance),
        estimated=sums.components(np.array(cells[best])[None], np.array([found[best].rest / spare])),
        degrees=_degrees(sums.components(np.array(cells)[chosen], variance).total ** 2),
    )


def _degrees(variance: Array) -> float:
    """Degrees of freedom of a scaled inverse chi-squared with the spread of these draws' logarithms."""
    spread = float(np.var(np.log(np.maximum(variance, 1e-300))))
    return max(1.0, 2.0 / max(spread, 1e-9) + 1.0)  # var ln chi2_v is about 2 / (v - 1)


def _root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * np.sqrt(np.maximum(values, 0.0))


@dataclass(frozen=True)
class _Cell:
    """The restricted likelihood's ingredients at one pair of variance ratios."""

    rest: float
    """Residual sum of squares in the metric of V^-1."""
    log_v: float
    """ln |V|, up to a constant."""
    log_information: float
    """ln |J' V^-1 J|."""


def _restricted(cell: _Cell, spare: int) -> float:
    return -0.5 * (cell.log_v + cell.log_information + spare * np.log(max(cell.rest, 1e-300)))


class _Sums:
    """Weighted sums over groups, from which every inverse of V = R + run blocks + size blocks follows."""

    def __init__(self, a: Array, weights: Array, sizes: Array | None, runs: Array | None) -> None:
        self.plain = a.T @ (weights[:, None] * a)
        self.has_sizes, self.has_runs = sizes is not None, runs is not None
        inner = runs if runs is not None else np.arange(len(a))
        first = np.unique(inner, return_index=True)[1]
        self.run_weight = np.bincount(inner, weights)
        self.run_sum = np.stack([np.bincount(inner, weights * column) for column in a.T], axis=1)
        self.size_of_run = sizes[first] if sizes is not None else np.zeros(len(first), int)
        self.run_mean = float(np.mean(self.run_weight))
        self.size_mean = float(np.mean(np.bincount(self.size_of_run, self.run_weight)))

    def axes(self) -> tuple[Array, Array]:
        """Grid of ln(1 + variance of sizes) and ln(1 + variance of runs), relative to the error of a group's mean."""
        num = GRID_TWO if self.has_sizes and self.has_runs else GRID_ONE
        axis = (np.arange(num) + 0.5) * MAX_LOG_RATIO / num
        return axis if self.has_sizes else np.zeros(1), axis if self.has_runs else np.zeros(1)

    def ratios(self, size_axis: Array, run_axis: Array) -> tuple[Array, Array]:
        """Variances of sizes and runs, relative to that of a point of weight 1."""
        run = np.expm1(run_axis) / self.run_mean
        return np.expm1(size_axis) * (1 + self.run_mean * run) / self.size_mean, run

    def at(self, size_axis: float, run_axis: float) -> _Cell:
        """A' V^-1 A of the matrix A = [J, residual], reduced to what the likelihood needs."""
        size, run = self.ratios(size_axis, run_axis)
        shrink = 1 + run * self.run_weight
        inner = self.plain - (self.run_sum * (run / shrink)[:, None]).T @ self.run_sum
        log_v = float(np.log(shrink).sum())
        if self.has_sizes:
            total = np.bincount(self.size_of_run, self.run_weight / shrink)
            sums = np.stack([np.bincount(self.size_of_run, c / shrink) for c in self.run_sum.T], axis=1)
            inner = inner - (sums * (size / (1 + size * total))[:, None]).T @ sums
            log_v += float(np.log1p(size * total).sum())
        information, cross = inner[:-1, :-1] + 1e-12 * np.eye(len(inner) - 1), inner[:-1, -1]
        rest = float(inner[-1, -1] - cross @ np.linalg.solve(information, cross))
        return _Cell(rest=rest, log_v=log_v, log_information=float(np.linalg.slogdet(information)[1]))

    def meat(self, size_axis: float, run_axis: float) -> Array:
        """A' W V W A: what the weighted estimate's error spreads by, over the variance of a point."""
        size, run = self.ratios(size_axis, run_axis)
        sums = np.stack([np.bincount(self.size_of_run, c) for c in self.run_sum.T], axis=1)
        return self.plain + run * self.run_sum.T @ self.run_sum + (size * sums.T @ sums if self.has_sizes else 0.0)

    def components(self, axes: Array, variance: Array) -> Components:
        """Standard deviations (m,) at grid points (m, 2) and variances (m,) of a point."""
        size, run = self.ratios(axes[:, 0], axes[:, 1])
        none = np.zeros(len(axes))
        return Components(
            size=np.sqrt(size * variance) if self.has_sizes else none,
            run=np.sqrt(run * variance) if self.has_runs else none,
            point=np.sqrt(variance),
        )
