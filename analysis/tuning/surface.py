"""Loss against tuned settings near its minimum: a parabola per cell of equal size and data.

Near its minimum the logarithm of the loss is a quadratic function of the logarithms of learning rate and batch. Every
cell has a level and a place of its own; curvature varies slowly, linearly in ln N and ln D over all cells, so that
three rates a cell are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from aimscale.analysis.fitting.covariance import half_width
from aimscale.analysis.laws.base import Array

WINDOW = 0.01
"""Losses within this fraction of a cell's lowest are taken for a parabola: on Step Law's 1,730 dense runs a window of
0.03 calls the best of 100 settings .25 to .5 % worse than the optimum, one of 0.01 .02 to .15 %."""
MIN_ROWS = 8
"""Rows of the lowest losses that count for two settings, whose parabola has six coefficients."""
MIN_VALUES = 3
"""Different values of a setting that show a cell's minimum."""
STEP = 1e-6
"""Step of numerical derivatives, relative to a coefficient's standard error: everything is nearly linear in that."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """ln loss = level_c + slope_c' s + s' H_c s / 2 over settings s = ln(setting) of the rows of cells c."""

    origin: Array
    """Settings (cells, p) of each cell's lowest loss, from which `s` is measured."""
    scale: Array
    """Rows (cells, q) of 1 and the centred ln N and ln D, those that vary."""
    coefficients: Array
    """Levels (cells,), slopes (cells * p,), and q coefficients of each of the p (p + 1) / 2 curvatures."""
    covariance: Array
    """Covariance of the coefficients, for errors of one variance; zero where nothing is left over."""
    degrees: int
    """Degrees of freedom of that variance; 0: there is no interval."""
    noise: float
    """Standard deviation of ln loss about the surface."""

    @property
    def num_settings(self) -> int:
        """Number p of settings."""
        return int(self.origin.shape[1])

    def curvatures(self, scale: Array, coefficients: Array) -> Array:
        """Return the Hessian (n, p, p) at scales (n, q)."""
        p, q = self.num_settings, scale.shape[1]
        out, parts = np.empty((len(scale), p, p)), coefficients[-q * p * (p + 1) // 2 :].reshape(-1, q)
        for (i, j), part in zip(_pairs(p), parts, strict=True):
            out[:, i, j] = out[:, j, i] = scale @ part
        return out

    def optima_of(self, coefficients: Array) -> Array:
        """Return the settings (cells, p) of the lowest loss, logarithms."""
        cells, p = self.origin.shape
        slopes = coefficients[cells : cells * (1 + p)].reshape(cells, p)
        hessian = self.curvatures(self.scale, coefficients)
        return self.origin - np.einsum("cij,cj->ci", np.linalg.pinv(hessian), slopes)

    @cached_property
    def optima(self) -> Array:
        """Settings (cells, p) of the lowest loss, logarithms."""
        return self.optima_of(self.coefficients)

    def lowest(self) -> tuple[Array, Array]:
        """Return ln of the lowest losses (cells,), and by how much error of the optima puts them too low, twice."""
        cells, p = self.origin.shape
        hessian = self.curvatures(self.scale, self.coefficients)
        away = self.optima - self.origin
        values = self.coefficients[:cells] - np.einsum("ci,cij,cj->c", away, hessian, away) / 2
        _, covariance = self.errors_of(lambda c: self.optima_of(c).ravel())
        blocks = covariance.reshape(cells, p, cells, p)[np.arange(cells), :, np.arange(cells), :]
        return values, np.einsum("cij,cji->c", hessian, blocks)

    @cached_property
    def has_minimum(self) -> Array:
        """Whether the loss rises in every direction from its stationary point (cells,)."""
        return np.linalg.eigvalsh(self.curvatures(self.scale, self.coefficients)).min(axis=1) > 0

    def errors_of(self, function: Callable[[Array], Array]) -> tuple[Array, Array]:
        """Return the values (m,) of a function of the coefficients and their covariance (m, m), by the delta method."""
        values = function(self.coefficients)
        steps = STEP * np.sqrt(np.maximum(np.diag(self.covariance), 1e-24))
        moved = [function(self.coefficients + step) for step in np.diag(steps)]
        gradient = (np.array(moved) - values).T / steps
        return values, gradient @ self.covariance @ gradient.T

    def half(self, errors: Array, confidence: float) -> Array:
        """Return half of Student's interval; NaN where no error can be told."""
        return half_width(errors, self.degrees, confidence) if self.degrees > 0 else np.full_like(errors, np.nan)

    def regret_of_own(self, settings: Array, confidence: float) -> Array:
        """Return the regret of a setting (cells, p) of every cell by its own optimum, and its interval: (cells, 3)."""

        def distance(coefficients: Array) -> Array:
            root = np.linalg.cholesky(self.curvatures(self.scale, coefficients))
            return np.einsum("nji,nj->ni", root, settings - self.optima_of(coefficients)).ravel()

        values, covariance = self.errors_of(distance)
        n, p = settings.shape
        blocks = covariance.reshape(n, p, n, p)[np.arange(n), :, np.arange(n), :]
        away = values.reshape(n, p)
        return _shares(away, self.half(_along(away, blocks), confidence))

    def regret_about(self, settings: Array, optimum: Array, half: Array, scale: Array) -> Array:
        """Return the regret of settings (n, p) about optima with half-widths (n, p), and its interval: (n, 3)."""
        root = np.linalg.cholesky(self.curvatures(scale, self.coefficients))
        away = np.einsum("nji,nj->ni", root, settings - optimum)
        return _shares(away, _along(away, np.einsum("nji,nj,njk->nik", root, half**2, root)))


def _along(away: Array, covariance: Array) -> Array:
    """Return the error (n,) of a distance from its components (n, p) and their covariance (n, p, p)."""
    length = np.linalg.norm(away, axis=1, keepdims=True)
    unit = np.where(length > 0, away / np.maximum(length, 1e-300), 1 / np.sqrt(away.shape[1]))
    return np.sqrt(np.maximum(np.einsum("ni,nij,nj->n", unit, covariance, unit), 0.0))


def _shares(away: Array, half: Array) -> Array:
    """Turn distances (n, p), in roots of twice the loss, into shares of the loss with their interval (n, 3)."""
    length = np.linalg.norm(away, axis=1)
    ends = np.stack([length, np.maximum(length - half, 0.0), length + half], axis=1)
    return np.expm1(ends**2 / 2)


def _pairs(p: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(p) for j in range(i, p)]


def near_minimum(log_loss: Array, cell: Array, settings: Array) -> Array:
    """Select the rows (mask) near each cell's minimum: within `WINDOW` of its lowest loss, and at least those of the
    lowest `MIN_VALUES` values of a lone setting, or the lowest `MIN_ROWS` rows of several."""
    keep = np.zeros(len(cell), bool)
    for each in range(cell.max() + 1):
        rows = np.flatnonzero(cell == each)
        rows = rows[np.argsort(log_loss[rows], kind="stable")]
        near = log_loss[rows] <= log_loss[rows[0]] + np.log1p(WINDOW)
        if settings.shape[1] == 1:
            values, first = np.unique(settings[rows, 0], return_index=True)
            least = np.isin(settings[rows, 0], values[np.argsort(first)][:MIN_VALUES])
        else:
            least = np.arange(len(rows)) < MIN_ROWS
        keep[rows[near | least]] = True
    return keep


def is_tuned(cell: Array, settings: Array) -> Array:
    """Tell which cells (mask) have `MIN_VALUES` different values of every setting."""
    return np.array(
        [min(len(np.unique(each)) for each in settings[cell == c].T) >= MIN_VALUES for c in range(cell.max() + 1)]
    )


def fit_surface(log_loss: Array, cell: Array, settings: Array, scale: Array) -> Surface:
    """Fit the surface by least squares to rows near the minima.

    Args:
        log_loss: ln loss (n,).
        cell: number of each row's cell (n,), 0 to cells - 1.
        settings: logarithms (n, p).
        scale: rows (cells, q) of what curvature depends on, its first column ones.
    """
    num_cells, p = cell.max() + 1, settings.shape[1]
    order = np.lexsort((log_loss, cell))
    origin = settings[order[np.searchsorted(cell[order], np.arange(num_cells))]]
    s, own, of_row = settings - origin[cell], np.eye(num_cells)[cell], scale[cell]
    slopes = (own[:, :, None] * s[:, None, :]).reshape(len(s), -1)
    squares = [of_row * (s[:, i] * s[:, j] / (2 if i == j else 1))[:, None] for i, j in _pairs(p)]
    design = np.column_stack([own, slopes, *squares])
    coefficients, _, rank, _ = np.linalg.lstsq(design, log_loss)
    degrees = len(s) - int(rank)
    variance = float(np.sum((log_loss - design @ coefficients) ** 2)) / max(degrees, 1)
    return Surface(
        origin=origin,
        scale=scale,
        coefficients=coefficients,
        covariance=variance * np.linalg.pinv(design.T @ design),
        degrees=degrees,
        noise=float(np.sqrt(variance)),
    )
