"""Bootstrap as weights: a resample is a row of counts, and all resamples are refitted in one batch."""

from __future__ import annotations

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array


def point_counts(num_points: int, num_resamples: int, seed: int) -> Array:
    """Counts (num_resamples, num_points) of ordinary resamples with replacement."""
    rng = np.random.default_rng(seed)
    draws = (np.bincount(rng.integers(0, num_points, num_points), minlength=num_points) for _ in range(num_resamples))
    return np.stack([counts.astype(np.uint16) for counts in draws])


def legacy_counts(num_points: int, num_resamples: int, seed: int) -> Array:
    """Counts of repeated `np.random.choice(n, n)` after `np.random.seed(seed)`, to repeat a published bootstrap."""
    stream = np.random.RandomState(seed)
    draws = [np.bincount(stream.choice(num_points, num_points), minlength=num_points) for _ in range(num_resamples)]
    return np.stack(draws)


def cluster_counts(clusters: Array, num_resamples: int, seed: int) -> Array:
    """Counts when whole clusters (runs, sizes) are drawn with replacement; clusters (num_points,) are labels.

    Raises:
        AnalysisError: fewer than three clusters, from which no spread can be told.
    """
    labels, member = np.unique(np.asarray(clusters).astype(str), return_inverse=True)
    if len(labels) < 3:
        raise AnalysisError(
            f"A bootstrap over {len(labels)} cluster(s) says nothing about the spread; it needs at least 3."
        )
    return point_counts(len(labels), num_resamples, seed)[:, member]


def interval(draws: Array, confidence: float) -> tuple[float, float]:
    """Percentile interval of the finite draws."""
    tail = 50 * (1 - confidence)
    finite = draws[np.isfinite(draws)]
    low, high = np.percentile(finite, [tail, 100 - tail]) if len(finite) else (np.nan, np.nan)
    return float(low), float(high)
