"""Covariance of an estimate and scatter of a measurement, where points of a size, a run or a budget share errors.

The covariance is the cluster-robust sandwich with the CR2 correction and degrees of freedom for each contrast (Bell and
McCaffrey 2002; Pustejovsky and Tipton 2018). Weights, such as compute, need not be precisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.optimize import nnls
from scipy.special import stdtridf, stdtrit

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws import Array
from aimscale.analysis.table.groups import MANY, Groups, indicators
from aimscale.analysis.table.points import KnownErrors

CONFIDENCE = 0.95
"""Level of intervals outside `at_level`, and of every decision: tests, flags and what is identified stay at it."""
_LEVEL: ContextVar[float] = ContextVar("level", default=CONFIDENCE)
FLAT, NULL = 1e-6, 1e-10
"""Singular values of the design below `FLAT` times the largest are raised to it (a direction that is hardly identified
gets a large, finite error); below `NULL` times the largest they are dropped."""


@contextmanager
def at_level(level: float) -> Iterator[None]:
    """Give all intervals that results made in this block have, and the verdicts on them, another level than 95 %.

    Returns:
        A context manager.

    Example:
        >>> with at_level(0.68):
        ...     forecast(read_table("results.parquet"), "N=1e6,D=1e6")
    """
    if not 0 < level < 1:
        raise AnalysisError(f"The level of an interval lies between 0 and 1, such as 0.9, so it cannot be {level:g}.")
    token = _LEVEL.set(level)
    try:
        yield
    finally:
        _LEVEL.reset(token)


def current_level() -> float:
    """Return the level of intervals that are made now."""
    return _LEVEL.get()


def level_words(level: float) -> str:
    """Write a level: 95 %."""
    return f"{100 * level:g} %"


@dataclass(frozen=True, kw_only=True)
class Design:
    """Linear model y = X b + e in a basis of the parameters in which X' W X is the identity."""

    x: Array
    """Derivatives (n, k) by the coordinates of the basis."""
    weights: Array
    to_params: Array
    """Parameters (k, k) per coordinate."""

    @cached_property
    def weighted(self) -> Array:
        """W X (n, k)."""
        return self.x * self.weights[:, None]

    @cached_property
    def squared(self) -> Array:
        """X' W^2 X (k, k)."""
        return self.weighted.T @ self.weighted

    @property
    def inverse(self) -> Array:
        """Change of the parameters (k, n) by each point's error."""
        return self.to_params @ self.weighted.T


def linear_design(jacobian: Array, weights: Array) -> Design:
    """Bring a weighted least-squares problem of derivatives (n, k) into an orthonormal basis."""
    scaled = jacobian * np.sqrt(weights)[:, None]
    scale = np.linalg.norm(scaled, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    _, singular, turn = np.linalg.svd(scaled / scale, full_matrices=False)
    to_params = turn.T / np.maximum(singular, FLAT * singular.max()) / scale[:, None]
    x = (jacobian / scale) @ turn.T / np.maximum(singular, 1e-300)
    x = np.where(singular > NULL * singular.max(), x, 0.0)  # else rounding would decide which way it points
    return Design(x=x, weights=weights, to_params=to_params)


@dataclass(frozen=True, kw_only=True)
class Sandwich:
    """CR2 covariance of a weighted least-squares estimate over one clustering of its points."""

    design: Design
    clusters: Array
    """Number of each point's cluster (n,)."""
    adjusted: Array
    """B (n, k): the weighted derivatives of each cluster, adjusted for what the fit takes of its residuals."""
    loadings: Array
    """Errors (k, clusters) of the parameters by those of each cluster."""
    errors: Components | None = None
    """Errors of the points that degrees of freedom are counted for; None: independent ones of one variance."""
    groups: Groups = field(default_factory=Groups)
    """Points that share these."""

    def of_contrasts(self, contrasts: Array) -> tuple[Array, Array]:
        """Return standard errors and degrees of freedom (m,) of contrasts (m, k) of the parameters."""
        degrees = [self._degrees(each) for each in contrasts @ self.design.to_params]
        return np.linalg.norm(contrasts @ self.loadings, axis=1), np.array(degrees)

    def _degrees(self, contrast: Array) -> float:
        """Return Bell and McCaffrey's degrees of freedom of a contrast (k,) of the coordinates.

        For errors of covariance V the variance has the eigenvalues of P_gh = s_g' ((I - H) V (I - H)')_gh s_h, with
        s_g = B_g a. V is the identity, or what was estimated (Imbens and Kolesar 2016): five budgets that differ tell
        less than as many that do not.
        """
        s = self.adjusted @ contrast
        if self.errors is not None and any(self.errors.shared.values()) and self.clusters.max() < MANY:
            sums = np.zeros((len(s), self.clusters.max() + 1))
            sums[np.arange(len(s)), self.clusters] = s
            residual = sums - self.design.weighted @ (self.design.x.T @ sums)
            p = self.errors.covariance_of(residual, self.groups)
            return max(1.0, float(np.trace(p) ** 2 / max(np.sum(p**2), 1e-300)))
        u, v = (_sums(self.clusters, each * s[:, None]) for each in (self.design.x, self.design.weighted))
        return max(1.0, _degrees(np.bincount(self.clusters, s**2), u, v, self.design.squared))


def sandwich(
    design: Design, residual: Array, clusters: Array, errors: Components | None = None, groups: Groups | None = None
) -> Sandwich:
    """Estimate the CR2 covariance from residuals (n,) and the number of each point's cluster (n,).

    The working model of the correction is independent errors of one variance, whatever the weights: the derivatives of
    a cluster are multiplied by ((I - H)(I - H)')_gg^(-1/2), which differs from I in the span of X_g and W_g X_g alone.
    """
    k, adjusted = design.x.shape[1], design.weighted.copy()
    middle = np.block([[-design.squared, np.eye(k)], [np.eye(k), np.zeros((k, k))]])
    order = np.argsort(clusters, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1):
        q, r = np.linalg.qr(np.column_stack([design.x[rows], design.weighted[rows]]))
        taken, axes = np.linalg.eigh(r @ middle @ r.T)  # of I - ((I - H)(I - H)')_gg
        remaining, axes = 1 - taken, q @ axes
        root = np.where(remaining > FLAT, 1 / np.sqrt(np.maximum(remaining, FLAT)), 0.0)
        adjusted[rows] += axes @ ((root - 1)[:, None] * (axes.T @ design.weighted[rows]))
    loadings = design.to_params @ _sums(clusters, adjusted * residual[:, None]).T
    fields = {"design": design, "clusters": clusters, "adjusted": adjusted, "loadings": loadings}
    return Sandwich(**fields, errors=errors, groups=groups or Groups())


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Sum of the CR2 covariances over sizes and over budgets, whose errors cross each other.

    Nothing is subtracted for the errors of single points, which both count: so the sum is positive definite and never
    too small (Davezies, D'Haultfoeuille and Guyonvarch 2021; docs/evidence.md).
    """

    by: Mapping[str, Sandwich | KnownErrors]
    """Clustering, or other source of errors of the parameters -> its covariance."""
    least: tuple[str, ...] = ()
    """Clusterings by which alone no interval may be wider than by the sum."""

    def of_contrasts(self, contrasts: Array) -> tuple[Array, Array]:
        """Return standard errors and degrees of freedom (m,) of contrasts (m, k) of the parameters.

        Satterthwaite's degrees, or so few that an interval is no narrower than by one of `least` alone: where the
        errors of five budgets look small by chance, many sizes do not lend them certainty (docs/evidence.md).
        """
        parts = {name: each.of_contrasts(np.atleast_2d(contrasts)) for name, each in self.by.items()}
        errors, degrees = np.swapaxes([*parts.values()], 0, 1)
        whole, sums = np.sqrt(np.sum(errors**2, axis=0)), satterthwaite(errors, degrees)
        alone = [half_width(*parts[name], CONFIDENCE) for name in self.least]
        widest = np.max([np.zeros_like(whole), *alone], axis=0) / np.where(whole > 0, whole, 1.0)
        narrow = widest > half_width(1.0, sums, CONFIDENCE)
        return whole, np.where(narrow, stdtridf(0.5 + CONFIDENCE / 2, np.where(narrow, widest, 2.0)), sums)

    @property
    def matrix(self) -> Array:
        """Covariance (k, k) of the parameters."""
        return sum(each.loadings @ each.loadings.T for each in self.by.values())

    @property
    def degrees(self) -> float:
        """Fewest degrees of freedom that any parameter has."""
        return float(self.of_contrasts(np.eye(len(self.matrix)))[1].min())


def satterthwaite(errors: Array, degrees: Array) -> Array:
    """Return the degrees of freedom (m,) of a sum of variances, errors^2 (parts, m) of so many degrees (parts, m)."""
    uncertain = np.sum(errors**4 / degrees, axis=0)
    whole, fewest = np.sum(errors**2, axis=0), np.min(degrees, axis=0)
    with np.errstate(invalid="ignore"):  # an infinite error
        return np.where((uncertain > 0) & np.isfinite(uncertain), whole**2 / np.maximum(uncertain, 1e-300), fewest)


def half_width(errors: Array | float, degrees: Array, level: float | None = None) -> Array:
    """Return half of Student's interval, of the current level unless another is given."""
    return stdtrit(degrees, 0.5 + (current_level() if level is None else level) / 2) * errors


@dataclass(frozen=True, kw_only=True)
class Components:
    """Standard deviations of the errors that points share, and of single points."""

    shared: Mapping[str, float]
    """Kind of group (sizes, budgets, runs) -> standard deviation of the error that all points of a group share."""
    point: float
    """Standard deviation of the error of a point alone."""
    degrees: float
    """Degrees of freedom of the total variance (Satterthwaite)."""

    @property
    def total(self) -> float:
        """Standard deviation of one measurement of a new size, budget and run."""
        return float(np.sqrt(self.point**2 + sum(sd**2 for sd in self.shared.values())))

    def covariance(self, groups: Groups, num_points: int) -> Array:
        """Return the covariance (n, n) of the errors."""
        shared = (self.shared.get(name, 0.0) ** 2 * (codes[:, None] == codes) for name, codes in groups.items())
        return sum(shared, start=self.point**2 * np.eye(num_points))

    def covariance_of(self, columns: Array, groups: Groups) -> Array:
        """Return the covariance (m, m) of the sums of the points' errors times columns (n, m)."""
        sums = (self.shared.get(name, 0.0) * _sums(codes, columns) for name, codes in groups.items())
        return sum((each.T @ each for each in sums), start=self.point**2 * (columns.T @ columns))

    def variance_of(self, contrasts: Array, groups: Groups) -> Array:
        """Return the variances (m,) of contrasts (m, n) of the points' errors."""
        sums = {name: contrasts @ indicators(codes) for name, codes in groups.items() if name in self.shared}
        shared = (self.shared[name] ** 2 * np.sum(each**2, axis=1) for name, each in sums.items())
        return sum(shared, start=self.point**2 * np.sum(contrasts**2, axis=1))


def components_of(design: Design, residual: Array, groups: Groups) -> Components:
    """Estimate variance components of residuals (n,): Henderson's method III.

    With R the roots of the weights, F_l the indicators of groups (of points: I) and I - H what the fit leaves, the
    expected sum of squares E|F_l' R (I - H) e|^2 is sum_m v_m |F_l' R (I - H) F_m|^2; the variances v are its
    non-negative least-squares solution. Errors are of one size whatever a point's weight.
    """
    root, (n, k) = np.sqrt(design.weights), design.x.shape
    kinds, spare, degrees_by_kind = {**groups, "points": np.arange(n)}, max(1, n - k), dict[str, float]()
    u = [_sums(codes, design.x * root[:, None]) for codes in kinds.values()]  # F' R X
    v = [_sums(codes, design.weighted) for codes in kinds.values()]  # F' W X
    squares = np.array([np.sum(np.bincount(codes, residual * root) ** 2) for codes in kinds.values()])
    expected = np.empty((len(kinds), len(kinds)))
    for i, (name, rows) in enumerate(kinds.items()):
        for j, columns in enumerate(kinds.values()):  # |A - U V'|^2, A = F_l' R F_m by pairs of groups
            cells = np.bincount(np.unique(rows * n + columns, return_inverse=True)[1], root)
            crossed = _sums(columns, root[:, None] * u[i][rows])  # A' U
            expected[i, j] = np.sum(cells**2) - 2 * np.sum(crossed * v[j]) + np.sum((u[i].T @ u[i]) * (v[j].T @ v[j]))
        if name != "points":
            sums = np.bincount(rows, root)  # K K' of K = F' R (I - H) F = diag(sums) - U V'
            degrees_by_kind[name] = max(1e-9, _degrees(sums**2, u[i], sums[:, None] * v[i], v[i].T @ v[i]))
    scale = np.sqrt(np.where(np.diag(expected) > 0, np.diag(expected), 1.0))  # 0 where the law leaves nothing of groups
    variances = nnls(expected / np.outer(scale, scale), squares / scale)[0] / scale
    degrees_by_kind["points"] = max(1.0, spare - sum(degrees_by_kind.values()))
    total, uncertain = (
        variances.sum(),
        sum(variance**2 / degrees_by_kind[name] for name, variance in zip(kinds, variances, strict=True)),
    )
    *shared, point = np.sqrt(variances).tolist()
    degrees = min(spare, total**2 / uncertain) if uncertain > 0 else spare
    return Components(shared=dict(zip(groups, shared, strict=True)), point=point, degrees=float(degrees))


def _sums(codes: Array, columns: Array) -> Array:
    """Sum columns (n, k) over groups (groups, k)."""
    return np.stack([np.bincount(codes, column) for column in columns.T], axis=1)


def _degrees(diagonal: Array, u: Array, v: Array, squared: Array) -> float:
    """Return the degrees of freedom (tr P)^2 / tr P^2 of P = diag + U S U' - U V' - V U' (m, m), S (k, k)."""
    w, eye = np.column_stack([u, v]), np.eye(len(squared))
    turned = w @ np.block([[squared, -eye], [-eye, np.zeros_like(eye)]])  # P = diag + turned W'
    inner_products, inner = np.sum(turned * w, axis=1), w.T @ turned
    trace = np.sum(diagonal + inner_products)
    squares = np.sum(diagonal**2 + 2 * diagonal * inner_products) + np.sum(inner * inner.T)
    return float(trace**2 / max(squares, trace**2 / len(w), 1e-300))
