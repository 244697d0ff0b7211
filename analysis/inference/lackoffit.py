"""Does a law fit? Tests of residuals: against replicates where there are any, for patterns where there are none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import f as fisher

from aimscale.analysis.laws.base import Array


@dataclass(frozen=True, kw_only=True)
class Test:
    """A test that a law fits."""

    statistic: float
    """F."""
    p_value: float
    """Probability of so large an F if the law fits; of simulated tables where errors are shared."""
    degrees: tuple[int, int]
    """Degrees of freedom of numerator and denominator."""
    pattern: str = ""
    """The strongest pattern, of the test for patterns, such as "ln N x ln D"."""


def left_over(jacobian: Array, weights: Array, errors: Array) -> Array:
    """Residuals (num, n), times the root of their weights, that the linearised law leaves of errors (num, n)."""
    root = np.sqrt(weights)
    basis, _ = np.linalg.qr(jacobian * root[:, None])
    scaled = errors * root
    return scaled - (scaled @ basis) @ basis.T


def replicate_test(
    residual: Array, jacobian: Array, weights: Array, cells: Array, errors: Array | None = None
) -> Test | None:
    """Exact F-test of the scatter of cells about the law against that of replicates within them.

    Args:
        residual: residuals (n,) of the fit.
        jacobian: the linearised law (n, k).
        weights: weights (n,).
        cells: number of each point's cell (n,); points of a cell differ by noise alone.
        errors: simulated errors (num, n) where replicates share those of runs; None takes the F-distribution.

    Returns:
        None where no cell has replicates or there are no more cells than parameters.
    """
    n, k, num_cells = len(residual), jacobian.shape[1], int(cells.max()) + 1
    if num_cells == n or num_cells <= k:
        return None
    spare = (num_cells - k, n - num_cells)
    root = np.sqrt(weights)

    def statistic(scaled: Array) -> Array:
        raw = scaled / root
        sums = np.array([np.bincount(cells, weights * row, num_cells) for row in raw])
        means = sums / np.bincount(cells, weights, num_cells)
        pure = np.sum(weights * (raw - means[:, cells]) ** 2, axis=1)
        lack = np.sum(scaled**2, axis=1) - pure
        return lack / spare[0] / np.maximum(pure / spare[1], 1e-300)

    value = float(statistic((residual * root)[None])[0])
    if errors is None:
        p = float(fisher.sf(value, *spare))
    else:
        p = float((1 + np.sum(statistic(left_over(jacobian, weights, errors)) >= value)) / (1 + len(errors)))
    return Test(statistic=value, p_value=p, degrees=spare)


def pattern_test(
    residual: Array, jacobian: Array, weights: Array, x: Mapping[str, Array], errors: Array
) -> Test | None:
    """F-test for what is left of squares and products of the variables' logarithms in the residuals.

    Args:
        residual: residuals (n,) of the fit.
        jacobian: the linearised law (n, k).
        weights: weights (n,).
        x: variables (n,), positive.
        errors: simulated errors (num, n), shared ones included: a pattern over sizes alone may be their own errors.
    """
    plain = {f"ln {name}": np.log(v) for name, v in x.items() if np.all(v > 0) and np.ptp(v) > 0}
    logs = {name: (v - v.mean()) / v.std() for name, v in plain.items()}
    named = {
        f"{a} x {b}" if a != b else f"{a} squared": logs[a] * logs[b]
        for a, b in itertools.combinations_with_replacement(logs, 2)
    }
    if not named:
        return None
    columns = left_over(jacobian, weights, np.array(list(named.values())))
    size = np.sqrt(np.sum(columns**2, axis=1))
    kept = size > 1e-3 * np.sqrt(np.sum(weights))
    columns, names = columns[kept] / size[kept, None], [name for name, keep in zip(named, kept, strict=True) if keep]
    n, k, q = len(residual), jacobian.shape[1], len(names)
    if q == 0 or n - k - q < 1:
        return None
    basis, _ = np.linalg.qr(columns.T)

    def statistic(scaled: Array) -> Array:
        explained = np.sum((scaled @ basis) ** 2, axis=1)
        rest = np.sum(scaled**2, axis=1) - explained
        return explained / q / np.maximum(rest / (n - k - q), 1e-300)

    scaled = residual * np.sqrt(weights)
    value = float(statistic(scaled[None])[0])
    p = float((1 + np.sum(statistic(left_over(jacobian, weights, errors)) >= value)) / (1 + len(errors)))
    strongest = names[int(np.argmax(np.abs(columns @ scaled)))]
    return Test(statistic=value, p_value=p, degrees=(q, n - k - q), pattern=strongest)
