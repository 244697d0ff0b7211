"""Pearson, Spearman and Kendall with intervals, plain or with log compute regressed out of both columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.bootstrap import interval
from aimscale.analysis.fitting.result import Correlation
from aimscale.analysis.laws.base import Array
from aimscale.analysis.tables.observations import Exclusion

METHODS = ("pearson", "spearman", "kendall")


def correlate(
    df: pd.DataFrame,
    *,
    x: str,
    y: str,
    methods: Sequence[str] = METHODS,
    partial: str | None = None,
    within: str | None = None,
    cluster: str | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Correlation, ...]:
    """Correlations of two columns with bootstrap intervals.

    Args:
        df: one row a point.
        x: first column, e.g. val_loss.
        y: second column, e.g. top1.
        methods: any of pearson, spearman, kendall.
        partial: positive column (usually flops_train) whose logarithm is regressed out of both first.
        within: column (such as size) whose groups' means are taken out of both first.
        cluster: column whose groups are resampled whole (a run measured at several budgets).
        resamples: bootstrap resamples.
        confidence: coverage of the intervals.
        seed: seed of the bootstrap.

    Raises:
        AnalysisError: missing or constant column, unknown method, or fewer than 4 usable rows.
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise AnalysisError(f"There is no correlation named {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    a, b, z, groups, exclusions = _columns(df, x, y, partial, cluster)
    n = len(a)
    if within is not None:
        kept = df.index.difference([row for e in exclusions for row in e.rows], sort=False)
        a, b = _without_group_means(df.loc[kept], within, a, b)
    rng = np.random.default_rng(seed)
    labels, member = np.unique(groups, return_inverse=True)
    if len(labels) < 4:
        raise AnalysisError(
            f"A correlation over {len(labels)} groups has no interval; give at least 4 rows (or clusters)."
        )
    rows_of = [np.flatnonzero(member == k) for k in range(len(labels))]
    draws = [np.concatenate([rows_of[k] for k in rng.integers(0, len(labels), len(labels))]) for _ in range(resamples)]
    unit = f"{n} rows" if cluster is None else f"{len(labels)} clusters by {cluster}"
    out = []
    for method in methods:
        value = coefficient_of(method, *_without(a, b, z, np.arange(n)))
        samples = np.array([coefficient_of(method, *_without(a, b, z, rows)) for rows in draws])
        low, high = interval(samples, confidence)
        out.append(
            Correlation(
                method=method,
                x=x,
                y=y,
                value=value,
                low=low,
                high=high,
                confidence=confidence,
                num_points=n,
                interval_method=f"percentile bootstrap, {resamples} resamples of {unit}",
                partial_on=partial,
                within=within,
                exclusions=exclusions,
            )
        )
    return tuple(out)


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


def _without(a: Array, b: Array, z: Array | None, rows: Array) -> tuple[Array, Array]:
    """Both columns, with the straight line on z regressed out if z is given."""
    if z is None:
        return a[rows], b[rows]
    design = np.stack([np.ones(len(rows)), z[rows]], axis=1)
    both = np.stack([a[rows], b[rows]], axis=1)
    left = both - design @ np.linalg.lstsq(design, both, rcond=None)[0]
    return left[:, 0], left[:, 1]


def _without_group_means(rows: pd.DataFrame, within: str, a: Array, b: Array) -> tuple[Array, Array]:
    """Both columns less the mean of their group."""
    if within not in rows.columns:
        raise AnalysisError(f"The table has no column {within!r} to correlate within.")
    _, member = np.unique(rows[within].astype(str).to_numpy(), return_inverse=True)
    sizes = np.bincount(member)
    if sizes.max() < 2:
        raise AnalysisError(f"Every {within} has a single row, so nothing varies within it.")
    return a - (np.bincount(member, a) / sizes)[member], b - (np.bincount(member, b) / sizes)[member]


def _columns(
    df: pd.DataFrame, x: str, y: str, partial: str | None, cluster: str | None
) -> tuple[Array, Array, Array | None, Array, tuple[Exclusion, ...]]:
    for name in (x, y, *([partial] if partial else []), *([cluster] if cluster else [])):
        if name not in df.columns:
            raise AnalysisError(f"The table has no column {name!r}; its columns are {', '.join(map(str, df.columns))}.")
    numeric = [x, y] + ([partial] if partial else [])
    used = df[numeric].apply(pd.to_numeric, errors="coerce").astype(float)
    good = np.isfinite(used).all(axis=1)
    if partial:
        good &= used[partial] > 0
    used_good = used[good]
    if len(used_good) < 4:
        raise AnalysisError(f"Only {len(used_good)} rows have both {x} and {y}; a correlation needs at least 4.")
    for name in (x, y):
        if used_good[name].nunique() < 2:
            raise AnalysisError(f"{name} is the same in all {len(used_good)} rows, so it correlates with nothing.")
    exclusions: tuple[Exclusion, ...] = ()
    if not good.all():
        exclusions = (Exclusion(reason=f"with a missing {' or '.join(numeric)}", rows=tuple(df.index[~good])),)
    groups = df.loc[good, cluster].astype(str).to_numpy() if cluster else np.arange(len(used_good))
    z = np.log(used_good[partial].to_numpy()) if partial else None
    return used_good[x].to_numpy(), used_good[y].to_numpy(), z, groups, exclusions
