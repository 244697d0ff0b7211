"""Coefficients of correlation, and the variance that they have on Fisher's scale where rows of a cluster are alike."""

from __future__ import annotations

import numpy as np

from aimscale.analysis.laws.base import Array


def coefficient_of(method: str, a: Array, b: Array) -> float:
    """One correlation coefficient of two arrays (n,); NaN if either is constant."""
    if method == "kendall":
        return _kendall(a, b)
    if method == "spearman":
        a, b = _ranks(a), _ranks(b)
    da, db = a - a.mean(), b - b.mean()
    norm = np.sqrt((da @ da) * (db @ db))
    return float(da @ db / norm) if norm > 1e-15 * (np.abs(a).max() * np.abs(b).max() + 1e-300) else float("nan")


def _ranks(a: Array) -> Array:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(a, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _kendall(a: Array, b: Array) -> float:
    """Kendall's tau-b. Pairs are compared all at once up to 500 points; scipy's O(n log n) method above."""
    if len(a) > 500:
        from scipy.stats import kendalltau

        return float(kendalltau(a, b).statistic)
    sa, sb = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    norm = np.sqrt(np.sum(sa * sa) * np.sum(sb * sb))
    return float(np.sum(sa * sb) / norm) if norm > 0 else float("nan")


def fishers_variance(method: str, value: float, rows: float) -> float:
    """Variance of a coefficient of so many independent normal rows (Bonett and Wright's for ranks)."""
    spare = max(1.0, rows - 3)
    factor = {"pearson": 1.0, "spearman": 1 + value**2 / 2, "kendall": 0.437 * spare / max(1.0, spare - 1)}[method]
    return factor / spare


def repetition(method: str, a: Array, b: Array, member: Array, lost: int) -> float:
    """By how much the rows of a cluster repeat each other: as many of them tell as much as one independent row.

    The error of a correlation is a sum of u^2 - v^2 over the rows, with u = a + b and v = a - b of standardised
    columns. Two normal rows share as much of it as the mean square of their correlations in u and in v, which analysis
    of variance tells.

    Args:
        a: one column (n,).
        b: the other.
        member: number of each row's cluster (n,).
        lost: degrees of freedom that means taken out of groups of clusters have cost.
    """
    sizes = np.bincount(member)
    n, degrees = len(a), len(sizes) - 1 - lost
    if len(sizes) == n:
        return 1.0
    a, b = (a, b) if method == "pearson" else (_ranks(a), _ranks(b))
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    size, shares = (n - np.sum(sizes**2) / n) / (len(sizes) - 1), []
    for each in (a + b, a - b):
        means = np.bincount(member, each) / sizes
        between, inside = np.sum(sizes * means**2) / degrees, np.sum((each - means[member]) ** 2) / (n - len(sizes))
        shares.append(max(0.0, between - inside) / max(between + (size - 1) * inside, 1e-300))
    return float(1 + (np.sum(sizes**2) / n - 1) * np.mean(np.square(shares)))
