"""Loss against tuned settings near its minimum: a parabola per cell of equal size and data.

There ln loss is quadratic in the logarithms of learning rate and batch. Every cell has a level and a place of its own;
curvature is linear in ln N and ln D over all cells, so that three rates a cell are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from aimscale.analysis.distributions import f_above
from aimscale.analysis.fitting.covariance import half_width, linear_design
from aimscale.analysis.laws import Array

SIGNIFICANT = 0.05
"""Level at which curvature is taken to vary: three more coefficients double the error of an optimum."""
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
    """A row (cells, k) of a level, p slopes, and q coefficients of each of the p (p + 1) / 2 curvatures, which are
    those of all cells."""
    covariance: Array
    """Covariance (cells, k, k) of each cell's row, for errors of one variance; zero where nothing is left over."""
    degrees: int
    """Degrees of freedom of that variance; 0: there is no interval."""
    noise: float
    """Standard deviation of ln loss about the surface."""

    def curvatures(self, scale: Array, coefficients: Array | None = None) -> Array:
        """Return the Hessian (n, p, p) at scales (n, q), of the surface or of rows of coefficients (n, k)."""
        p, (n, q) = self.origin.shape[1], scale.shape
        rows = self.coefficients[:1] if coefficients is None else coefficients
        out, parts = np.empty((n, p, p)), rows[:, 1 + p :].reshape(len(rows), -1, q)
        for number, (i, j) in enumerate(_pairs(p)):
            out[:, i, j] = out[:, j, i] = np.sum(parts[:, number] * scale, axis=1)
        return out

    def optima_of(self, coefficients: Array) -> Array:
        """Return the settings (cells, p) of the lowest loss, logarithms."""
        hessian, slopes = self.curvatures(self.scale, coefficients), coefficients[:, 1 : 1 + self.origin.shape[1]]
        return self.origin - np.einsum("cij,cj->ci", np.linalg.pinv(hessian), slopes)

    def is_better_than(self, other: Surface) -> bool:
        """Test at 5 % whether the further coefficients of this surface explain what another leaves over (F)."""
        more, squares = other.degrees - self.degrees, self.degrees * self.noise**2
        if min(more, self.degrees) < 1 or squares == 0:
            return False
        ratio = (other.degrees * other.noise**2 - squares) / more / self.noise**2
        return bool(f_above(ratio, more, self.degrees) < SIGNIFICANT)

    @cached_property
    def optima(self) -> Array:
        """Settings (cells, p) of the lowest loss, logarithms."""
        return self.optima_of(self.coefficients)

    @cached_property
    def optima_covariance(self) -> Array:
        """Covariance (cells, p, p) of each cell's `optima`."""
        return self._covariance_of(self.optima_of)

    def optima_errors(self, setting: int) -> Array:
        """Return the errors (cells, m + cells) of the optima of a setting by independent causes: those of curvature,
        which all cells share, and of each cell alone."""
        k = 1 + self.origin.shape[1]
        common = self.covariance[:, k:, k:]
        moved = self.covariance[:, :, k:] @ np.linalg.pinv(common) @ _roots(common)
        shared = (self._gradient_of(self.optima_of) @ moved)[:, setting]
        own_variance = self.optima_covariance[:, setting, setting] - np.sum(shared**2, axis=1)
        return np.column_stack([shared, np.diag(np.sqrt(np.maximum(own_variance, 0.0)))])

    @cached_property
    def lowest(self) -> Array:
        """Logarithms of the lowest losses (cells,), raised by what the error of the optima puts them too low by."""
        hessian, away = self.curvatures(self.scale), self.optima - self.origin
        too_low = np.einsum("cij,cji->c", hessian, self.optima_covariance) / 2
        return self.coefficients[:, 0] - np.einsum("ci,cij,cj->c", away, hessian, away) / 2 + too_low

    @cached_property
    def has_minimum(self) -> Array:
        """Whether the loss rises in every direction from its stationary point (cells,)."""
        return np.linalg.eigvalsh(self.curvatures(self.scale)).min(axis=1) > 0

    def _covariance_of(self, function: Callable[[Array], Array]) -> Array:
        """Return the covariance (cells, m, m) of a function (cells, m) of each cell's row, by the delta method."""
        gradient = self._gradient_of(function)
        return gradient @ self.covariance @ np.swapaxes(gradient, 1, 2)

    def _gradient_of(self, function: Callable[[Array], Array]) -> Array:
        """Return the derivatives (cells, m, k) of a function (cells, m) by each cell's row."""
        values, steps = function(self.coefficients), np.zeros_like(self.covariance)
        size = STEP * np.sqrt(np.maximum(np.diagonal(self.covariance, axis1=1, axis2=2), 1e-24))
        np.einsum("cii->ci", steps)[:] = size
        moved = [function(self.coefficients + steps[:, j]) - values for j in range(size.shape[1])]
        return np.stack(moved, axis=2) / size[:, None]

    def regret_of_own(self, settings: Array) -> Array:
        """Return the regret of a setting (cells, p) of every cell by its own optimum, and its interval: (cells, 3)."""

        def distance(coefficients: Array) -> Array:
            root = np.linalg.cholesky(self.curvatures(self.scale, coefficients))
            return np.einsum("nji,nj->ni", root, settings - self.optima_of(coefficients))

        away = distance(self.coefficients)
        return _shares(away, half_width(_along(away, self._covariance_of(distance)), self.degrees))

    def regret_about(self, settings: Array, optimum: Array, half: Array, scale: Array) -> Array:
        """Return the regret of settings (n, p) about optima with half-widths (n, p), and its interval: (n, 3)."""
        root = np.linalg.cholesky(self.curvatures(scale))
        away = np.einsum("nji,nj->ni", root, settings - optimum)
        return _shares(away, _along(away, np.einsum("nji,nj,njk->nik", root, half**2, root)))


def _roots(covariance: Array) -> Array:
    """Return roots R (n, m, m) of covariances (n, m, m) = R R'."""
    size, turn = np.linalg.eigh(covariance)
    return turn * np.sqrt(np.maximum(size, 0.0))[:, None]


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


def fit_surface(log_loss: Array, cell: Array, settings: Array, scale: Array) -> Surface:
    """Fit the surface by least squares to rows near the minima.

    Args:
        log_loss: ln loss (n,).
        cell: number of each row's cell (n,), 0 to cells - 1.
        settings: logarithms (n, p).
        scale: rows (cells, q) of what curvature depends on, its first column ones.
    """
    num, num_columns, rows = len(scale), 1 + settings.shape[1], np.arange(len(cell))
    lowest = pd.Series(log_loss).groupby(cell).idxmin().to_numpy()
    s, y = settings - settings[lowest][cell], log_loss - log_loss[lowest][cell]
    of_cells = np.zeros((len(s), num, num_columns))
    of_cells[rows, cell] = np.column_stack([np.ones(len(s)), s])
    squares = [scale[cell] * (s[:, i] * s[:, j] / (2 if i == j else 1))[:, None] for i, j in _pairs(num_columns - 1)]
    design = linear_design(np.column_stack([of_cells.reshape(len(s), -1), *squares]), np.ones(len(s)))
    solution, residual = design.inverse @ y, y - design.x @ (design.x.T @ y)
    degrees = len(s) - int(np.any(design.x, axis=0).sum())
    variance = float(np.sum(residual**2)) / max(degrees, 1)
    of_cell = np.arange(num * num_columns).reshape(num, num_columns)  # the coefficients of each cell, and common ones
    which = np.column_stack([of_cell, np.tile(np.arange(of_cell.size, len(solution)), (num, 1))])
    coefficients, moved = solution[which], design.inverse[which]
    coefficients[:, 0] += log_loss[lowest]
    return Surface(
        origin=settings[lowest],
        scale=scale,
        coefficients=coefficients,
        covariance=variance * moved @ np.swapaxes(moved, 1, 2),
        degrees=degrees,
        noise=float(np.sqrt(variance)),
    )
