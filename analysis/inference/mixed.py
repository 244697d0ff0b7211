"""A mixed model of a fitted law's residuals: errors that a size, a run and a point have to themselves.

    residual_i = J_i (truth - estimate) + size effect + run effect + point error

J is the law's Jacobian at the estimate. With few sizes a variance component is hardly known, so it is not plugged in:
every draw takes its ratios of variances from their restricted likelihood (REML) times a prior, and the error's variance
from its scaled chi-squared. They are then a mixture of Student distributions whose degrees of freedom follow the
evidence: n - k where groups share nothing, about sizes - 2 where the sizes' own errors dominate. The prior gives some
weight to groups that share nothing (else five sizes always allow for the worst), the rest to the reference prior of a
nested design: uniform in the logarithm of a group's total variance.

Runs are nested in sizes, so every matrix inverse has a closed form in sums over groups: the cost is O(n k^2) once, and
O(groups k^2) for each point of the grid of variance ratios.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from aimscale.analysis.laws.base import Array

GRID_ONE, GRID_TWO = 64, 28
"""Points per axis of the grid of variance ratios, with one and with two grouping factors."""
MAX_LOG_RATIO = 14.0
"""The largest group variance looked at is e^14 times that of a group's mean of point errors."""
TOO_CALM = 0.005
"""A spread of sizes is ruled out where residuals as calm between sizes as these are less probable than this. A law that
does not fit could else move far along what it cannot tell from sizes, and call that their error."""
SEEN = 0.5
"""Directions between sizes of which the law leaves at least this share of the variance show how much sizes differ."""
MOST_SIZES = 500
"""More sizes than this know their spread, whatever the law."""
NOTHING_SHARED = 0.3
"""Prior probability that groups share nothing: of those tried, the one whose intervals hold best (docs/analysis.md)."""


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

    def covariance_times(self, columns: Array, sizes: Array | None, runs: Array | None) -> Array:
        """Covariance of the errors of points of weight 1 times columns (n, m), by one value of each component."""
        out = self.point**2 * columns
        for spread, codes in ((self.size, sizes), (self.run, runs)):
            if codes is not None:
                out += spread**2 * np.stack([np.bincount(codes, each)[codes] for each in columns.T], axis=1)
        return out


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
    evidence: float
    """Logarithm of the restricted likelihood, averaged over the prior; models of the same points can be compared."""


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
        sizes: number of each point's size (n,), or None where sizes cannot be separated from runs or points.
        runs: number of each point's run (n,), nested in sizes, or None.
    """
    n, k = jacobian.shape
    scale = np.sqrt(np.sum(weights[:, None] * jacobian**2, axis=0))
    scale = np.maximum(scale, 1e-8 * scale.max() + 1e-300)  # a parameter without any effect gets a huge error
    a = np.column_stack([jacobian / scale, residual])
    sums = _Sums(a, weights, sizes, runs)
    size, run = sums.size.ravel(), sums.run.ravel()
    spare = n - k
    rest, log_likelihood = sums.restricted(spare)
    log_likelihood[sums.too_calm(rest / spare)] = -np.inf
    most = log_likelihood.max()
    share = np.exp(log_likelihood - most) * sums.prior
    chosen = rng.choice(len(share), size=num_draws, p=share / share.sum())
    variance = rest[chosen] / rng.chisquare(spare, num_draws)
    best = int(np.argmax(log_likelihood))
    cells, place = np.unique(np.append(chosen, best), return_inverse=True)
    bread = np.linalg.inv(sums.plain[:k, :k] + 1e-12 * np.eye(k))
    covariance = bread @ sums.meat(size[cells], run[cells])[:, :k, :k] @ bread
    values, vectors = np.linalg.eigh((covariance + covariance.transpose(0, 2, 1)) / 2)
    roots = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    noise = rng.standard_normal((num_draws, k)) * np.sqrt(variance)[:, None]
    drawn = _components(size[chosen], run[chosen], variance)
    return Mixed(
        shift=np.einsum("dij,dj->di", roots[place[:-1]], noise) / scale,
        metric=covariance[place[-1]] / np.outer(scale, scale),
        drawn=drawn,
        estimated=_components(size[best], run[best], rest[best] / spare),
        degrees=min(float(spare), _degrees(drawn.total**2)),  # few draws may say more
        evidence=float(most + np.log(share.sum() / sums.prior.sum())),
    )


def _degrees(variance: Array) -> float:
    """Degrees of freedom of a scaled inverse chi-squared with the spread of these draws' logarithms."""
    spread = float(np.var(np.log(np.maximum(variance, 1e-300))))
    return max(1.0, 2.0 / max(spread, 1e-9) + 1.0)  # var ln chi2_v is about 2 / (v - 1)


def _components(size: Array, run: Array, variance: Array) -> Components:
    """Standard deviations of variances relative to that of a point."""
    return Components(size=np.sqrt(size * variance), run=np.sqrt(run * variance), point=np.sqrt(variance))


class _Sums:
    """Weighted sums over groups, from which every inverse of V = R + run blocks + size blocks follows.

    Cells are pairs of variance ratios: F of sizes, times S of runs.
    """

    def __init__(self, a: Array, weights: Array, sizes: Array | None, runs: Array | None) -> None:
        self.plain = a.T @ (weights[:, None] * a)
        inner = runs if runs is not None else np.arange(len(a))
        outer = sizes if sizes is not None else np.zeros(len(a), int)
        first = np.unique(inner, return_index=True)[1]
        order = np.argsort(outer[first], kind="stable")
        self.weight = np.bincount(inner, weights)[order]
        self.sums = np.stack([np.bincount(inner, weights * column) for column in a.T], axis=1)[order]
        self.starts = np.unique(outer[first][order], return_index=True)[1]
        axis, prior = _axis(GRID_TWO if sizes is not None and runs is not None else GRID_ONE)
        first_axis, first_prior = (axis, prior) if sizes is not None else (np.zeros(1), np.ones(1))
        second_axis, second_prior = (axis, prior) if runs is not None else (np.zeros(1), np.ones(1))
        mean, of_size = np.mean(self.weight), np.mean(np.add.reduceat(self.weight, self.starts))
        self.run_axis = np.expm1(second_axis) / mean
        self.size = np.expm1(first_axis)[:, None] * (1 + mean * self.run_axis) / of_size
        """Variances of sizes (F, S) relative to that of a point of weight 1."""
        self.run = np.broadcast_to(self.run_axis, self.size.shape)
        """The same of runs."""
        self.prior = np.outer(first_prior, second_prior).ravel()
        """Prior probability of every cell (F S,)."""

    def restricted(self, spare: int) -> tuple[Array, Array]:
        """Residual sum of squares in the metric of V^-1, and restricted log-likelihood, of every cell (F S,)."""
        shrink = 1 + self.run_axis[:, None] * self.weight  # (S, runs)
        pull = self.sums.T * (self.run_axis[:, None] / shrink)[:, None, :]
        total = np.add.reduceat(self.weight / shrink, self.starts, axis=1)  # (S, sizes)
        sums = np.add.reduceat(self.sums / shrink[..., None], self.starts, axis=1)  # (S, sizes, k + 1)
        held = self.size[..., None] / (1 + self.size[..., None] * total)  # (F, S, sizes)
        inner = self.plain - pull @ self.sums - (sums.transpose(0, 2, 1) * held[:, :, None, :]) @ sums
        log_v = np.log(shrink).sum(axis=1) + np.log1p(self.size[..., None] * total).sum(axis=2)
        information, cross = inner[..., :-1, :-1] + 1e-12 * np.eye(len(self.plain) - 1), inner[..., :-1, -1:]
        rest = inner[..., -1, -1] - (cross * np.linalg.solve(information, cross)).sum(axis=(-2, -1))
        log_information = np.linalg.slogdet(information)[1]
        log_likelihood = -0.5 * (log_v + log_information + spare * np.log(np.maximum(rest, 1e-300)))
        return rest.ravel(), log_likelihood.ravel()

    def too_calm(self, variance: Array) -> Array:
        """Cells (F S,), of a point's variance (F S,), whose sizes should differ by far more than the residuals do.

        With Z the sizes' indicators and M what the law leaves, Z'r has the covariance K (size variance) K + K (point
        variance), K = Z'MZ. Counted are the directions that the law hardly touches; runs add to their size's variance.
        """
        of_size, weight = np.add.reduceat(self.sums, self.starts, axis=0), np.add.reduceat(self.weight, self.starts)
        if not 1 < len(weight) <= MOST_SIZES:
            return np.zeros(self.size.size, bool)
        known = np.linalg.pinv(self.plain[:-1, :-1], rcond=1e-12, hermitian=True)
        left = np.diag(weight) - of_size[:, :-1] @ known @ of_size[:, :-1].T
        values, vectors = np.linalg.eigh(left / np.sqrt(np.outer(weight, weight)))
        seen = values > SEEN
        squares = (vectors[:, seen].T @ (of_size[:, -1] / np.sqrt(weight))) ** 2 / values[seen]
        per_run = np.mean(np.add.reduceat(self.weight**2, self.starts) / weight**2)
        shared = (self.size + per_run * self.run).ravel()[:, None] * values[seen] * np.mean(weight)
        ratio = np.sum(squares / (1 + shared), axis=1) / variance
        return (self.size.ravel() > 0) & (chi2.cdf(ratio, max(1, seen.sum())) < TOO_CALM)

    def meat(self, size: Array, run: Array) -> Array:
        """A' W V W A (m, k + 1, k + 1) at variance ratios (m,): what the weighted estimate's error spreads by."""
        of_sizes = np.add.reduceat(self.sums, self.starts, axis=0)
        size, run = size[:, None, None], run[:, None, None]
        return self.plain + run * (self.sums.T @ self.sums) + size * (of_sizes.T @ of_sizes)


def _axis(num: int) -> tuple[Array, Array]:
    """Grid of ln(1 + variance of a group over the error of its mean), and its prior: 0 has a weight of its own."""
    axis = np.append(0.0, (np.arange(num) + 0.5) * MAX_LOG_RATIO / num)
    return axis, np.append(NOTHING_SHARED, np.full(num, (1 - NOTHING_SHARED) / num))
