"""Pearson, Spearman and Kendall with intervals, plain or at equal compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.accuracy.coefficients import coefficient_of, fishers_variance, repetition
from aimscale.analysis.accuracy.compute import EqualCompute, equal_compute
from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.groups import SIZE_COLUMNS
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.names import Exclusion, no_column
from aimscale.analysis.table.points import Usable, usable_rows

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

    Their variance is the mean of two, by degrees of freedom: Fisher's (Bonett and Wright's for ranks) with as many rows
    as tell something of their own, and that of leaving out each cluster (row) in turn.

    Args:
        methods: any of pearson, spearman, kendall.
        partial: positive column (usually flops_train) that is held equal: rows are compared within groups that share
            it, else about a smooth function of it.
        within: column (such as size) whose groups' means are taken out of both first.
        cluster: column whose rows are not independent (a run measured at several budgets); "auto" takes `run_id` where
            four runs or more have several rows; None takes rows as independent.

    Raises:
        AnalysisError: missing or constant column, one column twice, unknown method, or fewer than 4 usable rows.
    """
    if x == y:
        raise AnalysisError(f"x and y name one column, {x}, which correlates with itself.")
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise AnalysisError(f"There is no correlation named {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    cluster = _auto(df) if cluster == "auto" else cluster
    a, b, z, groups, used = _columns(df, x, y, partial, cluster)
    kept = used.rows
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
    lost = 0 if within is None else _lost(kept[within].astype(str).to_numpy(), member)
    pair = _Pair(a=a, b=b, equal=equal, member=member, lost=lost, spent=spent - lost)
    unit = f"{len(a)} rows" if cluster is None else f"{len(labels)} clusters by {cluster}"
    out = []
    for method in methods:
        value, low, high = pair.interval(method, confidence)
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
                exclusions=used.exclusions,
            )
        )
    return tuple(out)


def _auto(df: pd.DataFrame) -> str | None:
    """Runs, where at least four have several rows."""
    runs = df["run_id"].nunique() if "run_id" in df.columns else 0
    return "run_id" if 4 <= runs < len(df) else None


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two columns to be correlated, and what their rows share."""

    a: Array
    b: Array
    equal: EqualCompute | None
    member: Array
    """Number of each row's cluster (n,)."""
    lost: int
    """Degrees of freedom between clusters that group means have taken out: where each group holds whole clusters."""
    spent: int
    """Other degrees of freedom that were taken out."""

    def sides(self, rows: Array | None = None) -> tuple[Array, Array]:
        """Both columns or some of their rows, compute taken out where it is held equal."""
        if self.equal is not None:
            return self.equal.left(self.a, rows), self.equal.left(self.b, rows)
        return (self.a, self.b) if rows is None else (self.a[rows], self.b[rows])

    def interval(self, method: str, confidence: float) -> tuple[float, float, float]:
        """Coefficient and interval; from -1 to 1 where nothing varies."""
        value, num = coefficient_of(method, *self.sides()), int(self.member.max()) + 1
        if not np.isfinite(value):
            return value, -1.0, 1.0
        limit = 1 - 1e-12
        rows = len(self.a) / repetition(method, *self.sides(), self.member, self.lost)
        fisher = fishers_variance(method, value, rows * (1 - self.spent / len(self.a)) - self.lost)
        kept = [np.flatnonzero(self.member != k) for k in range(num)] if num <= MOST_CLUSTERS else []
        without = np.array([coefficient_of(method, *self.sides(each)) for each in kept])
        without = np.arctanh(np.clip(without[np.isfinite(without)], -limit, limit))
        left_out = (len(without) - 1) * np.var(without) if len(without) else fisher
        left_out *= rows / max(1.0, rows - self.lost)  # clusters of a group mirror each other about its mean
        # A variance from a few clusters varies much: it is averaged with Fisher's, which is known. Satterthwaite's
        # degrees of freedom are those of such an average.
        degrees = num - 1 - self.lost
        variance = (FISHERS_WEIGHT * fisher + degrees * left_out) / (FISHERS_WEIGHT + degrees)
        t = student.ppf(0.5 + confidence / 2, (FISHERS_WEIGHT + degrees) ** 2 / degrees)
        z, half = float(np.arctanh(np.clip(value, -limit, limit))), t * np.sqrt(variance)
        return value, float(np.tanh(z - half)), float(np.tanh(z + half))


FISHERS_WEIGHT = 4
"""Fisher's variance counts as much as so many degrees of freedom between clusters (how chosen: docs/analysis.md)."""
MOST_CLUSTERS = 1000
"""More clusters than this are not left out in turn: Fisher's standard error is enough."""


def _lost(groups: Array, member: Array) -> int:
    """Degrees of freedom between clusters that the means of groups (n,) take: none where groups do not hold several
    clusters each, whole."""
    labels, code = np.unique(groups, return_inverse=True)
    nested = len(np.unique(np.stack([code, member]), axis=1).T) == member.max() + 1
    return len(labels) - 1 if nested and len(labels) <= member.max() else 0


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
) -> tuple[Array, Array, Array | None, Array, Usable]:
    numeric = [x, y, *([partial] if partial else [])]
    for name in (*numeric, *([cluster] if cluster else [])):
        if name not in df.columns:
            raise no_column(df, name)
    found = usable_rows(df, {name: name for name in numeric}, signed={x, y} - {partial})
    used_good = found.numbers
    if len(used_good) < 4:
        raise AnalysisError(f"Only {len(used_good)} rows have both {x} and {y}; a correlation needs at least 4.")
    for name in (x, y):
        if used_good[name].nunique() < 2:
            raise AnalysisError(f"{name} is the same in all {len(used_good)} rows, so it correlates with nothing.")
    groups = found.rows[cluster].astype(str).to_numpy() if cluster else np.arange(len(used_good))
    z = used_good[partial].to_numpy() if partial else None
    return used_good[x].to_numpy(), used_good[y].to_numpy(), z, groups, found
