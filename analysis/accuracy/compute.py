"""What is left of a column at equal compute: within groups that share it, else about a smooth function of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aimscale.analysis.laws.base import Array

TOLERANCE = 0.02
"""Rows whose values differ by less than this fraction share them."""
MOST_SHAPES = 6
"""Columns of the smooth function at most, its constant included."""
NOTHING_LEFT = 3e-4
"""A column of which less than this share of its spread is left does not vary at equal compute."""


@dataclass(frozen=True, kw_only=True)
class EqualCompute:
    """How compute is taken out of a column."""

    basis: Array
    """Orthonormal columns (n, q) that are projected out."""
    num_groups: int | None
    """Groups of rows that share it, within which rows are compared; None: about a smooth function of it."""

    def left(self, values: Array, rows: Array | None = None) -> Array:
        """What is left of values (n,), or of some of their rows; zeros where nothing is."""
        a = values if rows is None else values[rows]
        basis = self.basis if rows is None else np.linalg.qr(self.basis[rows])[0]
        rest = a - basis @ (basis.T @ a)
        return rest if np.std(rest) > NOTHING_LEFT * np.std(values) else np.zeros_like(a)


def equal_compute(values: Array, sizes: Array) -> EqualCompute:
    """Take a positive column out.

    A straight line in its logarithm does not do: two power laws of compute bend about it and then correlate, whatever
    else they have in common. Where most rows share their compute with another size, groups are compared within;
    elsewhere what is taken out is spanned by all power laws of it.

    Args:
        values: the column (n,), positive.
        sizes: sizes (n,), so that seeds of one size make no group.
    """
    log_c = np.log(values)
    order = np.argsort(log_c, kind="stable")
    group = np.empty(len(log_c), int)
    group[order] = np.concatenate([[0], np.cumsum(np.diff(log_c[order]) > TOLERANCE)])  # close neighbours chain
    several = np.array([len(np.unique(sizes[group == g])) > 1 for g in range(group.max() + 1)])
    if several.sum() > 2 and several[group].mean() > 0.6:
        member = (group[:, None] == np.arange(group.max() + 1)).astype(float)
        means = member.T @ log_c / member.sum(axis=0)
        inside, middle = log_c - means[group], means[group] - log_c.mean()
        # rows of a group differ a little: a slope in that, which may itself change with compute, goes too
        tilts = np.column_stack([inside, inside * middle, inside * middle**2])
        spanned = np.column_stack([member, tilts[:, np.std(tilts, axis=0) > 1e-9]])
        return EqualCompute(basis=np.linalg.qr(spanned)[0], num_groups=int(several.sum()))
    z = log_c - log_c.mean()
    exponents = np.linspace(-0.8, 0.1, 60)
    shapes = np.exp(np.clip(np.outer(z, exponents), -30, 30))
    shapes = shapes / np.linalg.norm(shapes, axis=0)
    num = max(2, min(MOST_SHAPES, (group.max() + 1) // 2))
    left = np.linalg.svd(shapes - shapes.mean(axis=0), full_matrices=False)[0][:, : num - 1]
    ones = np.ones((len(z), 1)) / np.sqrt(len(z))
    return EqualCompute(basis=np.column_stack([ones, left]), num_groups=None)
