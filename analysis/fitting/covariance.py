"""Covariance of an estimate and scatter of a measurement, where points of a size, a run or a budget share errors.

The covariance is the cluster-robust sandwich with the CR2 correction (Bell and McCaffrey 2002; Pustejovsky and Tipton
2018), with their degrees of freedom for each contrast. It holds whatever the points of a cluster have in common.
Weights need not be precisions: a fit weighted by compute counts large runs more, whose errors are as large as others'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import t as student

from aimscale.analysis.fitting.groups import Groups
from aimscale.analysis.laws.base import Array

MANY_CLUSTERS = 200
"""More clusters than this are as good as normal, whatever the contrast."""
LOOSE_CLUSTERS = 2000
"""Of more clusters than this none has a leverage to correct for."""
FLAT, NULL = 1e-6, 1e-10
"""Singular values of the design below `FLAT` times the largest are raised to it (a direction that is hardly identified
gets a large, finite error); below `NULL` times the largest they are dropped."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Linear model y = X b + e in a basis of the parameters in which X' W X is the identity."""

    x: Array
    """Derivatives (n, k) by the coordinates of the basis."""
    weights: Array
    """Weights of the estimate (n,)."""
    to_params: Array
    """Parameters (k, k) per coordinate."""
    squared: Array
    """X' W^2 X (k, k); the identity where all weights are 1."""

    @property
    def inverse(self) -> Array:
        """Change of the parameters (k, n) by each point's error."""
        return self.to_params @ (self.x * self.weights[:, None]).T


def linear_design(jacobian: Array, weights: Array) -> Design:
    """Bring a weighted least-squares problem of derivatives (n, k) into an orthonormal basis."""
    scaled = jacobian * np.sqrt(weights)[:, None]
    scale = np.linalg.norm(scaled, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    _, singular, turn = np.linalg.svd(scaled / scale, full_matrices=False)
    floor = np.maximum(singular, FLAT * singular.max())
    to_params = turn.T / floor / scale[:, None]
    x = (jacobian / scale) @ turn.T / np.maximum(singular, 1e-300)
    x = np.where(singular > NULL * singular.max(), x, 0.0)  # else rounding would decide which way it points
    return Design(x=x, weights=weights, to_params=to_params, squared=x.T @ (x * weights[:, None] ** 2))


@dataclass(frozen=True, kw_only=True)
class Sandwich:
    """CR2 covariance of a weighted least-squares estimate over one clustering of its points."""

    design: Design
    covariance: Array
    """Covariance (k, k) of the coordinates."""
    adjusted: Array
    """B_g' B_g (clusters, k, k), with B_g the adjusted, weighted derivatives of cluster g."""
    overlaps: Array
    """X_g' B_g (clusters, k, k)."""
    weighted: Array
    """X_g' W_g B_g (clusters, k, k)."""

    def degrees(self, contrasts: Array) -> Array:
        """Bell and McCaffrey's degrees of freedom (m,) of contrasts (m, k) of the coordinates, for independent errors.

        The variance is a quadratic form with the eigenvalues of P_gh = s_g' ((I - H)(I - H)')_gh s_h, s_g = B_g a.
        """
        if len(self.adjusted) > MANY_CLUSTERS or not len(self.adjusted):
            return np.full(len(contrasts), len(self.design.x) - float(len(self.covariance)))
        own = np.einsum("mi,gij,mj->mg", contrasts, self.adjusted, contrasts, optimize=True)
        u, v = (np.einsum("gij,mj->mgi", each, contrasts) for each in (self.overlaps, self.weighted))
        p = u @ self.design.squared @ u.transpose(0, 2, 1) - u @ v.transpose(0, 2, 1) - v @ u.transpose(0, 2, 1)
        p[:, np.arange(p.shape[1]), np.arange(p.shape[1])] += own
        trace = np.trace(p, axis1=1, axis2=2)
        return np.maximum(1.0, trace**2 / np.maximum(np.sum(p**2, axis=(1, 2)), 1e-300))

    def of_contrasts(self, contrasts: Array) -> tuple[Array, Array]:
        """Return standard errors and degrees of freedom (m,) of contrasts (m, k) of the parameters."""
        a = np.atleast_2d(contrasts) @ self.design.to_params
        return np.sqrt(np.maximum(np.einsum("mi,ij,mj->m", a, self.covariance, a), 0.0)), self.degrees(a)


def sandwich(design: Design, residual: Array, clusters: Array) -> Sandwich:
    """Estimate the CR2 covariance from residuals (n,) and the number of each point's cluster (n,).

    The working model of the correction is independent errors of one variance, whatever the weights.
    """
    k = design.x.shape[1]
    weighted = design.x * design.weights[:, None]
    if int(clusters.max()) + 1 > LOOSE_CLUSTERS:
        scores = np.stack([np.bincount(clusters, each) for each in (weighted * residual[:, None]).T], axis=1)
        none = np.empty((0, k, k))
        return Sandwich(design=design, covariance=scores.T @ scores, adjusted=none, overlaps=none, weighted=none)
    middle = np.block([[-design.squared, np.eye(k)], [np.eye(k), np.zeros((k, k))]])
    order = np.argsort(clusters, kind="stable")
    sums, parts = list[Array](), list[tuple[Array, Array, Array]]()
    for rows in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
        x, wx = design.x[rows], weighted[rows]
        q, r = np.linalg.qr(np.column_stack([x, wx]))
        taken, axes = np.linalg.eigh(r @ middle @ r.T)  # of I - ((I - H)(I - H)')_gg
        left = 1 - taken
        root = np.where(left > FLAT, 1 / np.sqrt(np.maximum(left, FLAT)), 0.0)
        axes = q @ axes
        b = wx + axes @ ((root - 1)[:, None] * (axes.T @ wx))
        sums.append(residual[rows] @ b)
        parts.append((b.T @ b, x.T @ b, wx.T @ b))
    adjusted, overlaps, crossed = (np.array(each) for each in zip(*parts, strict=True))
    covariance = np.array(sums).T @ np.array(sums)
    return Sandwich(design=design, covariance=covariance, adjusted=adjusted, overlaps=overlaps, weighted=crossed)


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Sum of the CR2 covariances over sizes and over budgets, whose errors cross each other.

    Two-way clustering (Cameron, Gelbach and Miller 2011) subtracts what both count, the errors of single points;
    without that the sum is never too small and positive definite (Davezies, D'Haultfoeuille and Guyonvarch 2021). In
    simulated
    tables it holds what it is meant to hold, where the larger of the two holds more at twice the width and the
    difference less (docs/evidence.md).
    """

    by: Mapping[str, Sandwich]
    """Clustering -> its covariance."""

    def of_contrasts(self, contrasts: Array) -> tuple[Array, Array]:
        """Return standard errors and Satterthwaite's degrees of freedom (m,) of contrasts (m, k) of the parameters."""
        errors, degrees = zip(*(each.of_contrasts(contrasts) for each in self.by.values()), strict=True)
        variances = np.square(errors)
        whole = variances.sum(axis=0)
        uncertain = np.sum(variances**2 / np.array(degrees), axis=0)
        return np.sqrt(whole), np.where(
            uncertain > 0, whole**2 / np.maximum(uncertain, 1e-300), np.min(degrees, axis=0)
        )

    @property
    def matrix(self) -> Array:
        """Covariance (k, k) of the parameters."""
        return sum(each.design.to_params @ each.covariance @ each.design.to_params.T for each in self.by.values())


def half_width(errors: Array, degrees: Array, confidence: float) -> Array:
    """Half of Student's interval."""
    return student.ppf(0.5 + confidence / 2, degrees) * errors


@dataclass(frozen=True, kw_only=True)
class Components:
    """Standard deviations of the errors that points share, and of single points."""

    shared: Mapping[str, float]
    """Kind of group (sizes, budgets, runs) -> of what all points of a group share."""
    point: float
    """Standard deviation of the error of a point alone."""
    degrees: float
    """Degrees of freedom of the total variance (Satterthwaite)."""

    @property
    def total(self) -> float:
        """Standard deviation of one measurement of a new size, budget and run."""
        return float(np.sqrt(self.point**2 + sum(sd**2 for sd in self.shared.values())))

    def simulate(self, groups: Groups, num_points: int, num: int, rng: np.random.Generator) -> Array:
        """Draw errors (num, n) of tables measured again."""
        errors = self.point * rng.standard_normal((num, num_points))
        for name, codes in groups.named.items():
            if sd := self.shared.get(name, 0.0):
                errors += sd * rng.standard_normal((num, int(codes.max()) + 1))[:, codes]
        return errors

    def covariance(self, groups: Groups, num_points: int) -> Array:
        """Covariance (n, n) of the errors."""
        out = self.point**2 * np.eye(num_points)
        for name, codes in groups.named.items():
            out += self.shared.get(name, 0.0) ** 2 * (codes[:, None] == codes)
        return out

    def variance_of(self, contrasts: Array, groups: Groups) -> Array:
        """Variances (m,) of contrasts (m, n) of the points' errors."""
        out = self.point**2 * np.sum(contrasts**2, axis=1)
        for name, codes in groups.named.items():
            if sd := self.shared.get(name, 0.0):
                out += sd**2 * np.sum((contrasts @ np.eye(int(codes.max()) + 1)[codes]) ** 2, axis=1)
        return out


def components_of(design: Design, residual: Array, groups: Groups) -> Components:
    """Estimate variance components of residuals (n,): Henderson's method III.

    With R the roots of the weights, F_l the indicators of groups and I - H what the fit leaves, the expected sum of
    squares E|F_l' R (I - H) e|^2 is sum_m v_m |F_l' R (I - H) F_m|^2; the variances v are its non-negative
    least-squares solution. Errors are of one size whatever a point's weight.
    """
    root, names = np.sqrt(design.weights), [*groups.named, "points"]
    expected, squares, own = np.empty((len(names),) * 2), np.empty(len(names)), dict[str, float]()
    whole, spare = float(design.weights.sum()), max(1, len(residual) - design.x.shape[1])
    rx, wx = design.x * root[:, None], design.x * design.weights[:, None]
    squares[-1] = np.sum((residual * root) ** 2)
    expected[-1, -1] = whole - np.trace(design.squared)
    for i, codes in enumerate(groups.named.values()):
        squares[i] = np.sum(_sums(codes, (residual * root)[:, None]) ** 2)
        a, b, c = (_sums(codes, each) for each in (rx, wx * root[:, None], wx))
        expected[i, -1] = whole - 2 * np.sum(a * b) + np.sum((a @ design.squared) * a)
        expected[-1, i] = whole - np.sum(c**2)
        for j, others in enumerate(groups.named.values()):
            kept = _crossed(codes, others, root) - a @ _sums(others, wx).T
            expected[i, j] = np.sum(kept**2)
            if i == j:
                own[names[i]] = _degrees(kept, design.x.shape[1])
    scale = np.sqrt(np.where(np.diag(expected) > 0, np.diag(expected), 1.0))  # 0 where the law leaves nothing of groups
    found = nnls(expected / np.outer(scale, scale), squares / scale)[0] / scale
    variances = dict(zip(names, found.tolist(), strict=True))
    own["points"] = max(1.0, spare - sum(own.values()))
    total = sum(variances.values())
    uncertain = sum(v**2 / own[name] for name, v in variances.items())
    return Components(
        shared={name: float(np.sqrt(variances[name])) for name in groups.named},
        point=float(np.sqrt(variances["points"])),
        degrees=float(min(spare, total**2 / uncertain)) if uncertain > 0 else float(spare),
    )


def _sums(codes: Array, columns: Array) -> Array:
    """Sum columns (n, k) over groups (groups, k)."""
    return np.stack([np.bincount(codes, column) for column in columns.T], axis=1)


def _crossed(codes: Array, others: Array, values: Array) -> Array:
    """Sum values (n,) over the cells of two groupings (groups, others)."""
    shape = int(codes.max()) + 1, int(others.max()) + 1
    return np.bincount(codes * shape[1] + others, values, minlength=shape[0] * shape[1]).reshape(shape)


def _degrees(kept: Array, num_params: int) -> float:
    """Degrees of freedom of a variance of groups that is told from F' R (I - H) F (groups, groups)."""
    if len(kept) > MANY_CLUSTERS:
        return float(len(kept) - num_params)
    squared = kept @ kept.T
    return max(1e-9, float(np.trace(squared) ** 2 / max(np.sum(squared**2), 1e-300)))
