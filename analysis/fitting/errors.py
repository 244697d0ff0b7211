"""The error of an estimate and of a new measurement, where points of a size or of a run share errors.

The estimate's covariance is the cluster-robust sandwich with the CR2 correction (Bell and McCaffrey 2002; Pustejovsky
and Tipton 2018): it holds whatever the points of a cluster have in common, and its intervals are Student's with the
degrees of freedom of Bell and McCaffrey, found for each contrast. What a new measurement scatters by is a sum of
variance components of sizes, runs and points, by equating sums of squares to their expectations (Henderson's method).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from aimscale.analysis.fitting.groups import Groups
from aimscale.analysis.laws.base import Array

MANY_CLUSTERS = 200
"""More clusters than this are as good as normal, whatever the contrast."""
LOOSE_CLUSTERS = 2000
"""Of more clusters than this none has a leverage to correct for."""
FLAT, NULL = 1e-6, 1e-10
"""A direction of the parameters that moves the law less than the first share of the strongest one is taken to move it
by that: its error is huge, not zero. One below the second does not move it at all and has no error to tell."""


@dataclass(frozen=True, kw_only=True)
class Sandwich:
    """Covariance of a weighted least-squares estimate in an orthonormal basis Q (n, k) of its design."""

    to_params: Array
    """Parameters (k, k) per coordinate of the basis."""
    covariance: Array
    """CR2 covariance (k, k) of the coordinates."""
    squares: Array
    """B_g' B_g (clusters, k, k), B_g = (I - Q_g Q_g')^-1/2 Q_g."""
    overlaps: Array
    """Q_g' B_g (clusters, k, k)."""

    def degrees(self, contrasts: Array) -> Array:
        """Bell and McCaffrey's degrees of freedom (m,) of contrasts of the coordinates (m, k), for independent errors.

        The variance is a quadratic form with the eigenvalues of P_gh = s_g' (I - Q Q')_gh s_h, s_g = B_g a.
        """
        if len(self.squares) > MANY_CLUSTERS:
            return np.full(len(contrasts), len(self.squares) - float(len(self.covariance)))
        own = np.einsum("mi,gij,mj->mg", contrasts, self.squares, contrasts, optimize=True)
        u = np.einsum("gij,mj->mgi", self.overlaps, contrasts)
        shared = np.sum(u**2, axis=2)
        cross = u.transpose(0, 2, 1) @ u
        trace = np.sum(own - shared, axis=1)
        squared = np.sum(own**2 - 2 * own * shared, axis=1) + np.sum(cross**2, axis=(1, 2))
        return np.maximum(1.0, trace**2 / np.maximum(squared, 1e-300))

    def of_contrasts(self, contrasts: Array) -> tuple[Array, Array]:
        """Standard errors and degrees of freedom (m,) of contrasts of the parameters (m, k)."""
        a = contrasts @ self.to_params
        return np.sqrt(np.maximum(np.einsum("mi,ij,mj->m", a, self.covariance, a), 0.0)), self.degrees(a)

    def draws(self, num: int, rng: np.random.Generator) -> Array:
        """Errors of the parameters (num, k): Student's, each draw with the degrees of freedom of its own direction.

        The same for rows in another order: an axis points where it moves a parameter most.
        """
        values, axes = np.linalg.eigh(self.covariance)
        moved = self.to_params @ axes
        axes = axes * np.sign(np.take_along_axis(moved, np.argmax(np.abs(moved), axis=0)[None], axis=0))
        roots = np.sqrt(np.maximum(values, 0.0))
        z = rng.standard_normal((num, len(values)))
        inverse = np.where(roots > 1e-9 * roots.max(), 1 / np.maximum(roots, 1e-300), 0.0)
        degrees = self.degrees((z * inverse) @ axes.T)  # of the contrast in which a draw deviates most
        spread = np.sqrt(rng.chisquare(degrees) / degrees)
        return ((z * roots) @ axes.T / spread[:, None]) @ self.to_params.T


def sandwich(jacobian: Array, residual: Array, weights: Array, clusters: Array) -> Sandwich:
    """CR2 covariance of the weighted least-squares estimate that left these residuals.

    Args:
        jacobian: derivatives (n, k) of the prediction by every free parameter.
        residual: measurement minus prediction (n,) at the estimate.
        weights: the estimate's weights (n,).
        clusters: number of each point's cluster (n,); errors are shared within clusters alone.
    """
    root = np.sqrt(weights)
    scaled = jacobian * root[:, None]
    scale = np.linalg.norm(scaled, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    q, singular, turn = np.linalg.svd(scaled / scale, full_matrices=False)
    q = q * (singular > NULL * singular.max())  # else rounding would decide which way it points
    error, order = residual * root, np.argsort(clusters, kind="stable")
    to_params = (turn.T / np.maximum(singular, FLAT * singular.max())) / scale[:, None]
    if (num := int(clusters.max()) + 1) > LOOSE_CLUSTERS:
        scores, none = _sums(clusters, q * error[:, None]), np.empty((num, 0, 0))
        return Sandwich(to_params=to_params, covariance=scores.T @ scores, squares=none, overlaps=none)
    scores, squares, overlaps = [], [], []
    for rows in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
        p, d, w = np.linalg.svd(q[rows], full_matrices=False)
        left = 1 - d**2
        b = (p * np.where(left > FLAT, d / np.sqrt(np.maximum(left, FLAT)), 0.0)) @ w
        scores.append(error[rows] @ b)
        squares.append(b.T @ b)
        overlaps.append(q[rows].T @ b)
    return Sandwich(
        to_params=to_params,
        covariance=np.array(scores).T @ np.array(scores),
        squares=np.array(squares),
        overlaps=np.array(overlaps),
    )


def _sums(codes: Array, columns: Array) -> Array:
    """Sums (groups, k) of columns (n, k) over groups."""
    return np.stack([np.bincount(codes, column) for column in columns.T], axis=1)


@dataclass(frozen=True, kw_only=True)
class Components:
    """Standard deviations of the errors."""

    size: float
    """Of what all points of a size share."""
    run: float
    """Of what all points of a run share beyond their size."""
    point: float
    """Of a point of weight 1 alone."""
    degrees: float
    """Degrees of freedom of their total variance (Satterthwaite)."""

    @property
    def total(self) -> float:
        """Of one measurement of weight 1 of a new size and run."""
        return float(np.sqrt(self.size**2 + self.run**2 + self.point**2))

    def simulate(self, weights: Array, groups: Groups, num: int, rng: np.random.Generator) -> Array:
        """Errors (num, n) of tables measured again."""
        errors = self.point * rng.standard_normal((num, len(weights))) / np.sqrt(weights)
        for spread, codes in ((self.size, groups.sizes), (self.run, groups.runs)):
            if codes is not None and spread > 0:
                errors += spread * rng.standard_normal((num, int(codes.max()) + 1))[:, codes]
        return errors

    def covariance(self, weights: Array, groups: Groups) -> Array:
        """Covariance (n, n) of the errors times the roots of the weights (n,)."""
        out = np.zeros((len(weights),) * 2)
        for spread, codes in ((self.size, groups.sizes), (self.run, groups.runs)):
            if codes is not None:
                out += spread**2 * (codes[:, None] == codes)
        root = np.sqrt(weights)
        return out * root[:, None] * root + self.point**2 * np.eye(len(weights))

    def variance_of(self, contrasts: Array, weights: Array, groups: Groups) -> Array:
        """Variances (m,) of contrasts (m, n) of the points' errors."""
        out = self.point**2 * np.sum(contrasts**2 / weights, axis=1)
        for spread, codes in ((self.size, groups.sizes), (self.run, groups.runs)):
            if codes is not None and spread > 0:
                out += spread**2 * np.sum((contrasts @ np.eye(int(codes.max()) + 1)[codes]) ** 2, axis=1)
        return out

    def scatter(self, weights: Array, num: int, rng: np.random.Generator) -> Array:
        """Errors (num, n) of new measurements, each of a new run and size, the components' own error included."""
        spread = np.sqrt(self.size**2 + self.run**2 + self.point**2 / weights)
        known = np.sqrt(rng.chisquare(self.degrees, (num, 1)) / self.degrees)
        return spread * rng.standard_normal((num, len(weights))) / known


def components_of(jacobian: Array, residual: Array, weights: Array, groups: Groups) -> Components:
    """Variance components of residuals (n,), by equating their sums of squares over groups to what they expect.

    With scaled indicators F_l of groups and M what the fit leaves, E|F_l' M e|^2 = sum_m v_m |F_l' M F_m|^2; the
    variances v are the non-negative least-squares solution.
    """
    root = np.sqrt(weights)
    q, _ = np.linalg.qr(jacobian * root[:, None])
    error, (n, k) = residual * root, jacobian.shape
    named = groups.named
    sums = {name: _sums(codes, q * root[:, None]) for name, codes in named.items()}  # F_l' Q
    names = [*named, "points"]
    squares, expected, own = np.empty(len(names)), np.empty((len(names),) * 2), {}
    for i, (name, codes) in enumerate(named.items()):
        squares[i] = np.sum(np.bincount(codes, error * root) ** 2)
        total = np.bincount(codes, weights)
        expected[i, -1] = expected[-1, i] = np.sum(total) - np.sum(sums[name] ** 2)
        own[name] = _degrees(total, sums[name])
        for j, (other, others) in enumerate(named.items()):
            cells, place = np.unique(np.stack([codes, others]), axis=1, return_inverse=True)
            weight = np.bincount(place.ravel(), weights)
            overlap = np.sum(sums[name][cells[0]] * sums[other][cells[1]], axis=1)
            inner = np.sum((sums[name].T @ sums[name]) * (sums[other].T @ sums[other]))
            expected[i, j] = np.sum(weight**2) - 2 * np.sum(weight * overlap) + inner
    spare = max(1, n - k)
    squares[-1], expected[-1, -1] = np.sum(error**2), spare
    size = np.sqrt(np.where(np.diag(expected) > 0, np.diag(expected), 1.0))  # 0 where the law leaves nothing of groups
    variances = dict(zip(names, nnls(expected / np.outer(size, size), squares / size)[0] / size, strict=True))
    own["points"] = max(1.0, spare - sum(own.values()))
    whole = sum(variances.values())
    uncertain = sum(v**2 / own[name] for name, v in variances.items())
    return Components(
        size=float(np.sqrt(variances.get("sizes", 0.0))),
        run=float(np.sqrt(variances.get("runs", 0.0))),
        point=float(np.sqrt(variances["points"])),
        degrees=float(min(spare, whole**2 / uncertain)) if uncertain > 0 else float(spare),
    )


def _degrees(total: Array, sums: Array) -> float:
    """Degrees of freedom of a variance of groups that is told from their sums of squares.

    Args:
        total: weight of each group (groups,).
        sums: F' Q (groups, k).
    """
    if len(total) > MANY_CLUSTERS:
        return float(len(total) - sums.shape[1])
    left = np.diag(total) - sums @ sums.T
    squared = left @ left
    return max(1e-9, float(np.trace(squared) ** 2 / max(np.sum(squared**2), 1e-300)))
