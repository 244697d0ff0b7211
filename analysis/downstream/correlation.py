"""Pearson, Spearman and Kendall with intervals, plain or at equal compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.downstream.compute import EqualCompute, equal_compute
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.inference.groups import SIZE_COLUMNS
from aimscale.analysis.laws.base import Array
from aimscale.analysis.tables.observations import Exclusion
from aimscale.analysis.tables.schema import no_column

METHODS = ("pearson", "spearman", "kendall")


@dataclass(frozen=True, kw_only=True, repr=False)
class Correlation(Result):
    """How two columns go together."""

    method: str
    """pearson, spearman or kendall."""
    x: str
    y: str
    value: float
    """Coefficient, -1 to 1."""
    low: float
    high: float
    confidence: float
    num_points: int
    interval_method: str
    partial_on: str | None = None
    """Column that was held equal, if any."""
    adjusted: str = ""
    """How it was held equal, e.g. "within 5 groups of equal flops_train"."""
    within: str | None = None
    """Column whose groups' means were taken out of both, if any."""
    exclusions: tuple[Exclusion, ...] = ()

    @property
    def table(self) -> pd.DataFrame:
        """One row: method, x, y, value, low, high, num_points."""
        names = ("method", "x", "y", "value", "low", "high", "num_points")
        return pd.DataFrame([{name: getattr(self, name) for name in names}])

    def headline(self) -> str:
        """Coefficient and interval."""
        return f"{self.method.capitalize()} {self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def summary(self) -> str:
        """The correlation as prose."""
        return self.sentence()

    def sentence(self) -> str:
        """Coefficient, interval, n and what was held equal."""
        partial = f", {self.adjusted}" if self.partial_on else ""
        partial += f", within {self.within}" if self.within else ""
        left = f" Left out: {'; '.join(map(str, self.exclusions))}." if self.exclusions else ""
        nothing = "" if self.low > 0 or self.high < 0 else ", nothing shown"
        return (
            f"{self.method.capitalize()} correlation of {self.x} and {self.y}{partial}: {self.value:.3f}{nothing} "
            f"({self.confidence:.0%} interval {self.low:.3f} to {self.high:.3f}; n = {self.num_points}; "
            f"{self.interval_method}).{left}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        own = vars(self) | {"exclusions": [str(e) for e in self.exclusions], "sentence": self.sentence()}
        return plain_types(own)


def correlate(
    df: pd.DataFrame,
    *,
    x: str,
    y: str,
    methods: Sequence[str] = METHODS,
    partial: str | None = None,
    within: str | None = None,
    cluster: str | None = "auto",
    confidence: float = 0.95,
) -> tuple[Correlation, ...]:
    """Correlations of two columns with intervals on Fisher's scale.

    The wider of two: Fisher's (Bonett and Wright's for ranks), with the rows' degrees of freedom, and that of leaving
    out each cluster (row) in turn, with Student's t of as many degrees as there are clusters less one.

    Args:
        methods: any of pearson, spearman, kendall.
        partial: positive column (usually flops_train) that is held equal: rows are compared within groups that share
            it, else about a smooth function of it.
        within: column (such as size) whose groups' means are taken out of both first.
        cluster: column whose rows are not independent (a run measured at several budgets); "auto" takes `run_id` where
            four runs or more have several rows; None takes rows as independent.

    Raises:
        AnalysisError: missing or constant column, unknown method, or fewer than 4 usable rows.
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise AnalysisError(f"There is no correlation named {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    cluster = _auto(df) if cluster == "auto" else cluster
    a, b, z, groups, exclusions = _columns(df, x, y, partial, cluster)
    kept = df.loc[df.index.difference([row for e in exclusions for row in e.rows], sort=False)]
    if within is not None:
        a, b = _without_group_means(kept, within, a, b)
    labels, member = np.unique(groups, return_inverse=True)
    if len(labels) < 4:
        raise AnalysisError(
            f"A correlation over {len(labels)} groups has no interval; give at least 4 rows (or clusters)."
        )
    name = next((c for c in SIZE_COLUMNS if c in kept), None)
    sizes = kept[name].astype(str).to_numpy() if name else np.arange(len(a)).astype(str)
    equal = None if z is None else equal_compute(z, sizes, str(partial))
    spent = (0 if equal is None else equal.basis.shape[1] - 1) + (0 if within is None else kept[within].nunique() - 1)
    unit = f"{len(a)} rows" if cluster is None else f"{len(labels)} clusters by {cluster}"
    out = []
    for method in methods:
        value, low, high = _interval(method, a, b, equal, member, spent, confidence)
        out.append(
            Correlation(
                method=method,
                x=x,
                y=y,
                value=value,
                low=low,
                high=high,
                confidence=confidence,
                num_points=len(a),
                interval_method=f"Fisher's z, standard error over {unit}",
                partial_on=partial,
                adjusted="" if equal is None else equal.words,
                within=within,
                exclusions=exclusions,
            )
        )
    return tuple(out)


def _auto(df: pd.DataFrame) -> str | None:
    """Runs, where at least four have several rows."""
    runs = df["run_id"].nunique() if "run_id" in df.columns else 0
    return "run_id" if 4 <= runs < len(df) else None


def _interval(
    method: str, a: Array, b: Array, equal: EqualCompute | None, member: Array, spent: int, confidence: float
) -> tuple[float, float, float]:
    """Coefficient and interval; from -1 to 1 where nothing varies."""

    def at(rows: Array | None) -> float:
        if equal is not None:
            return coefficient_of(method, equal.left(a, rows), equal.left(b, rows))
        return coefficient_of(method, a, b) if rows is None else coefficient_of(method, a[rows], b[rows])

    value, n, num = at(None), len(a), int(member.max()) + 1
    if not np.isfinite(value):
        return value, -1.0, 1.0
    limit = 1 - 1e-12
    z = float(np.arctanh(np.clip(value, -limit, limit)))
    without = np.array([at(np.flatnonzero(member != k)) for k in range(num)]) if num <= MOST_CLUSTERS else np.array([])
    without = np.arctanh(np.clip(without[np.isfinite(without)], -limit, limit))
    left_out = (len(without) - 1) / len(without) * np.sum((without - without.mean()) ** 2) if len(without) else 0.0
    spare = max(1, n - 3 - spent)
    factor = {"pearson": 1.0, "spearman": 1 + value**2 / 2, "kendall": 0.437 * spare / max(1, spare - 1)}[method]
    fisher = factor / spare
    # a variance from a few clusters varies much: Fisher's counts in it as one cluster more
    clustered = (fisher + (num - 1) * left_out) / num
    own, shared = (student.ppf(0.5 + confidence / 2, degrees) for degrees in (spare, num))
    half = max(own * np.sqrt(fisher), shared * np.sqrt(clustered))
    return value, float(np.tanh(z - half)), float(np.tanh(z + half))


MOST_CLUSTERS = 1000
"""More clusters than this are not left out in turn: Fisher's standard error is enough."""


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
            raise no_column(df, name)
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
    z = used_good[partial].to_numpy() if partial else None
    return used_good[x].to_numpy(), used_good[y].to_numpy(), z, groups, exclusions
