"""Pearson, Spearman and Kendall with intervals, plain or at equal compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, pearsonr, rankdata, spearmanr
from scipy.stats import t as student

from aimscale.analysis.accuracy.result import Correlation, Correlations
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.groups import SIZE_COLUMNS
from aimscale.analysis.fitting.result import CONFIDENCE
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.measures import wanted_measures
from aimscale.analysis.table.names import no_column, our_name, their_name
from aimscale.analysis.table.points import complete, usable_rows
from aimscale.analysis.table.read import probe_frame

METHODS = {"pearson": pearsonr, "spearman": spearmanr, "kendall": kendalltau}
MIN_ROWS = 4
"""Rows, and clusters of rows, that a correlation with an interval needs."""
FISHERS_WEIGHT = 4
"""Fisher's variance counts as much as so many degrees of freedom between clusters (how chosen: docs/evidence.md)."""
MOST_CLUSTERS = 1000
"""More clusters than this are not left out in turn: Fisher's standard error is enough."""
TOLERANCE = 0.02
"""Rows whose values differ by less than this fraction share them."""
MOST_SHAPES = 6
"""Columns of the smooth function at most, its constant included."""
NOTHING_LEFT = 3e-4
"""A column of which less than this share of its spread is left does not vary at equal compute."""


def correlate(
    df: pd.DataFrame,
    *,
    x: str = "val_loss",
    y: str = "top1",
    methods: Sequence[str] = tuple(METHODS),
    partial: str | None = None,
    within: str | None = None,
) -> Correlations:
    """Correlations of two columns with intervals on Fisher's scale.

    Their variance is the mean of two, by degrees of freedom: Fisher's (Bonett and Wright's for ranks) with as many rows
    as tell something of their own, and that of leaving out each cluster (row) in turn. Clusters are sizes, else runs,
    where there are four or more and some have several rows (runs where means of `within` take sizes out).

    Args:
        df: a results table, or rows of `probe_frame`.
        x: a column, or a law's letter.
        y: a column, or accuracies: TASK:KIND, TASK, or top1 for all of the table.
        methods: any of pearson, spearman, kendall.
        partial: positive column (usually flops_train) that is held equal: rows are compared within groups that share
            it, else about a smooth function of it.
        within: column (such as size) whose groups' means are taken out of both first.

    Returns:
        One coefficient per accuracy and method, each with its interval.

    Raises:
        AnalysisError: missing or constant column, one column twice, unknown method, or fewer than 4 usable rows.

    Example:
        >>> table = read_table("results.parquet")
        >>> correlate(table, y="photographs:linear", within="size").table
    """
    x = our_name(df, x)
    partial, within = (name and our_name(df, name) for name in (partial, within))
    y, groups = _by_accuracy(df, our_name(df, y))
    found = []
    for (task, kind), rows in groups.items():
        _check_names(rows, methods, x, y, partial, within)
        each = _coefficients(rows, methods, x, y, partial, within)
        found += [replace(c, task=task, kind=kind) for c in each]
    return Correlations(correlations=tuple(found))


def _by_accuracy(df: pd.DataFrame, y: str) -> tuple[str, dict[tuple[str, str], pd.DataFrame]]:
    """The column that y means, and (task, kind) -> the rows that have it; ("", "") for a column of the table."""
    if y in df.columns:
        return y, {("", ""): df}
    rows = complete(df)
    asked, probes = wanted_measures(rows, [y], by=""), probe_frame(rows)
    groups = {(m.task, m.kind): probes[(probes["task"] == m.task) & (probes["kind"] == m.kind)] for m in asked}
    return asked[0].column, dict(sorted(groups.items()))


def _coefficients(
    df: pd.DataFrame, methods: Sequence[str], x: str, y: str, partial: str | None, within: str | None
) -> Iterator[Correlation]:
    """One per method."""
    numeric = [name for name in (x, y, partial) if name]
    used = usable_rows(df, {name: name for name in numeric}, signed={x, y} - {partial})
    cluster = _clusters(used.rows, within)
    pair = _pair(used.rows, used.numbers, x, y, partial, within, cluster)
    for method in methods:
        value, low, high = pair.interval(method)
        yield Correlation(
            method=method,
            x=their_name(df, x),
            y=their_name(df, y),
            value=value,
            low=low,
            high=high,
            num_points=len(pair.a),
            cluster=cluster and their_name(df, cluster),
            num_clusters=int(pair.member.max()) + 1,
            partial_on=partial and their_name(df, partial),
            num_groups=pair.num_groups,
            within=within and their_name(df, within),
            exclusions=used.exclusions,
        )


def _check_names(df: pd.DataFrame, methods: Sequence[str], x: str, y: str, *others: str | None) -> None:
    """Refuse unknown methods, missing columns, and one column twice."""
    if len({x, y} - {*others}) < 2:
        raise AnalysisError(f"{x} and {y} must be two columns, and others than what is held equal.")
    if unknown := [m for m in methods if m not in METHODS]:
        raise AnalysisError(f"There is no correlation named {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    if absent := [name for name in (x, y, *others) if name is not None and name not in df.columns]:
        raise no_column(df, absent[0])


def _clusters(df: pd.DataFrame, within: str | None) -> str | None:
    """The column of the largest groups that share errors: sizes, unless means of `within` take those out, else runs."""
    for name in (*SIZE_COLUMNS, "run_id"):
        if name not in df.columns or df[name].isna().any() or not MIN_ROWS <= df[name].nunique() < len(df):
            continue
        if name == "run_id" or within is None or df.groupby(within)[name].nunique().max() > 1:
            return name
    return None


def equal_compute(values: Array, sizes: Array) -> tuple[Array, int | None]:
    """Orthonormal columns (n, q) that take a positive column out of others where they are projected out.

    A straight line in its logarithm does not do: two power laws of compute bend about it and then correlate, whatever
    else they have in common. Where most rows share their compute with another size, groups are compared within;
    elsewhere what is taken out is spanned by all power laws of it.

    Args:
        values: the column (n,), positive.
        sizes: sizes (n,), so that seeds of one size make no group.

    Returns:
        The columns, and how many groups of rows share the values; None where they span a smooth function.
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
        return np.linalg.qr(spanned)[0], int(several.sum())
    z = log_c - log_c.mean()
    exponents = np.linspace(-0.8, 0.1, 60)
    shapes = np.exp(np.clip(np.outer(z, exponents), -30, 30))
    shapes = shapes / np.linalg.norm(shapes, axis=0)
    num = max(2, min(MOST_SHAPES, (group.max() + 1) // 2))
    left = np.linalg.svd(shapes - shapes.mean(axis=0), full_matrices=False)[0][:, : num - 1]
    ones = np.ones((len(z), 1)) / np.sqrt(len(z))
    return np.column_stack([ones, left]), None


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two columns to be correlated, and what their rows share."""

    a: Array
    b: Array
    basis: Array | None
    """What is projected out of both (n, q), where something is held equal."""
    num_groups: int | None
    """Groups of rows that share it."""
    member: Array
    """Number of each row's cluster (n,)."""
    lost: int
    """Degrees of freedom between clusters that group means have taken out: where each group holds whole clusters."""
    spent: int
    """Other degrees of freedom that were taken out."""

    def sides(self, rows: Array | None = None) -> tuple[Array, Array]:
        """Both columns or some of their rows, compute taken out where it is held equal; zeros where nothing is left."""
        a, b = (each if rows is None else each[rows] for each in (self.a, self.b))
        if self.basis is None:
            return a, b
        basis = self.basis if rows is None else np.linalg.qr(self.basis[rows])[0]
        rest = [each - basis @ (basis.T @ each) for each in (a, b)]
        is_left = [np.std(r) > NOTHING_LEFT * np.std(each) for r, each in zip(rest, (self.a, self.b), strict=True)]
        return rest[0] * is_left[0], rest[1] * is_left[1]

    def interval(self, method: str) -> tuple[float, float, float]:
        """Coefficient and interval; from -1 to 1 where nothing varies.

        The variance of leaving clusters out is that of the coefficient itself, brought to Fisher's scale by the delta
        method: without one row ranks may agree perfectly, which lies at infinity there.
        """
        n, value = len(self.a), coefficient(method, *self.sides())
        if not np.isfinite(value):
            return value, -1.0, 1.0
        # a perfect order of ranks tells no more than that no two neighbours are swapped
        step = {"pearson": 0.0, "spearman": 6 / (n * (n**2 - 1)), "kendall": 2 / (n * (n - 1))}[method]
        inner = float(np.clip(value, step + 1e-12 - 1, 1 - step - 1e-12))
        rows = n / repetition(method, *self.sides(), self.member, self.lost)
        variance = fisher = fishers_variance(method, value, rows * (1 - self.spent / n) - self.lost)
        num_clusters = int(self.member.max()) + 1
        degrees = num_clusters - 1 - self.lost
        if num_clusters <= MOST_CLUSTERS:
            kept = (np.flatnonzero(self.member != k) for k in range(num_clusters))
            without = np.array([coefficient(method, *self.sides(each)) for each in kept])
            without = without[np.isfinite(without)]
            left_out = (len(without) - 1) * np.var(without) / (1 - inner**2) ** 2 if len(without) else fisher
            left_out *= rows / max(1.0, rows - self.lost)  # clusters of a group mirror each other about its mean
            # A variance from a few clusters varies much: it is averaged with Fisher's, which is known. Satterthwaite's
            # degrees of freedom are those of such an average.
            variance = (FISHERS_WEIGHT * fisher + degrees * left_out) / (FISHERS_WEIGHT + degrees)
        half = student.ppf(0.5 + CONFIDENCE / 2, (FISHERS_WEIGHT + degrees) ** 2 / degrees) * np.sqrt(variance)
        z = np.arctanh(inner)
        return value, float(min(value, np.tanh(z - half))), float(max(value, np.tanh(z + half)))


def _pair(
    rows: pd.DataFrame,
    numbers: pd.DataFrame,
    x: str,
    y: str,
    partial: str | None,
    within: str | None,
    cluster: str | None,
) -> _Pair:
    """Both columns with what is taken out of them."""
    if len(rows) < MIN_ROWS:
        raise AnalysisError(f"Only {len(rows)} rows have both {x} and {y}; a correlation needs at least {MIN_ROWS}.")
    for name in (x, y):
        if numbers[name].nunique() < 2:
            raise AnalysisError(f"{name} is the same in all {len(rows)} rows, so it correlates with nothing.")
    columns, lost, spent = numbers[[x, y]], 0, 0
    member = np.unique(rows[cluster].astype(str), return_inverse=True)[1] if cluster else np.arange(len(rows))
    if within is not None:
        groups = rows[within].astype(str)
        if groups.is_unique:
            raise AnalysisError(f"Every {within} has a single row, so nothing varies within it.")
        columns = columns - columns.groupby(groups).transform("mean")
        # group means cost degrees of freedom between clusters where groups hold several clusters each, whole
        is_nested = pd.Series(groups.to_numpy()).groupby(member).nunique().max() == 1
        lost = groups.nunique() - 1 if is_nested and groups.nunique() <= member.max() else 0
        spent = groups.nunique() - 1 - lost
    basis, num_groups = None, None
    if partial is not None:
        named = next((rows[name] for name in SIZE_COLUMNS if name in rows), pd.Series(np.arange(len(rows))))
        basis, num_groups = equal_compute(numbers[partial].to_numpy(), named.map(str).to_numpy())
        spent += basis.shape[1] - 1
    a, b = columns.to_numpy().T
    return _Pair(a=a, b=b, basis=basis, num_groups=num_groups, member=member, lost=lost, spent=spent)


def coefficient(method: str, a: Array, b: Array) -> float:
    """One correlation coefficient of two arrays (n,); NaN if either is constant."""
    scales = np.abs(a).max(), np.abs(b).max()
    if any(np.std(each) <= 1e-14 * scale for each, scale in zip((a, b), scales, strict=True)):
        return float("nan")
    return float(METHODS[method](a, b).statistic)


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
    a, b = (a, b) if method == "pearson" else (rankdata(a), rankdata(b))
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    size, shares = (n - np.sum(sizes**2) / n) / (len(sizes) - 1), []
    for each in (a + b, a - b):
        means = np.bincount(member, each) / sizes
        between, inside = np.sum(sizes * means**2) / degrees, np.sum((each - means[member]) ** 2) / (n - len(sizes))
        shares.append(max(0.0, between - inside) / max(between + (size - 1) * inside, 1e-300))
    return float(1 + (np.sum(sizes**2) / n - 1) * np.mean(np.square(shares)))
