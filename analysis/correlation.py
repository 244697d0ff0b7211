"""Pearson's and Spearman's correlations with intervals: at equal compute, within groups, over all rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result, by_chance, percent
from aimscale.analysis.distributions import normal_quantile, t_quantile
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE, current_level, level_words, satterthwaite
from aimscale.analysis.laws import Array
from aimscale.analysis.table.groups import SIZE_COLUMNS, chained
from aimscale.analysis.table.measures import ACCURACIES, wanted_measures
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.schema import Exclusion
from aimscale.analysis.table.select import by_probe

METHODS: dict[str, Callable[[Array], Array]] = {
    "pearson": np.asarray,
    "spearman": lambda values: pd.Series(values).rank().to_numpy(),
}
"""Coefficient -> what each column becomes before products are averaged."""
MIN_ROWS = 4
"""Rows, and clusters of rows, that an interval needs: Fisher's variance is 1 / (n - 3)."""
MAX_CLUSTERS = 200
"""Clusters that are left out one by one; more are dealt into as many groups: t is within 1 % of normal then."""
SAME_COMPUTE = 0.02
"""Relative step in compute up to which rows share it: sizes of an iso-FLOP design miss their budget by 1 to 2 %."""
DEGREE = 5
"""Degree of the polynomial in ln C that is taken out where no groups share C (how chosen: docs/evidence.md)."""
NOTHING_LEFT = 3e-4
"""Share of a column's spread below which nothing varies: a polynomial of C^-0.25 over seven decades leaves less."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """One coefficient of two columns, with an interval."""

    task: str = ""
    """Task of the accuracy, where y is one."""
    kind: str = ""
    method: str
    x: str
    y: str
    value: float
    """Coefficient, -1 to 1; NaN where nothing varies."""
    low: float
    high: float
    num_points: int
    cluster: str | None
    """Column whose rows were left out together; None for single rows."""
    num_clusters: int
    num_budgets: int
    """Budgets that were left out in turn as well; 0 where compute is held equal or they are too few."""
    degrees: float
    """Degrees of freedom of Student's t."""
    level: float = field(default_factory=current_level)
    """Level of the interval."""
    partial_on: str | None
    """Column that was held equal, if any."""
    num_groups: int | None
    """Groups of rows that share it, within which rows were compared; None: about a polynomial in its logarithm."""
    within: str | None
    """Column whose groups' means were taken out of both, if any."""
    chance: float | None
    """Accuracy of guessing, where no row's accuracy is significantly above it."""
    exclusions: tuple[Exclusion, ...]

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    @property
    def compared(self) -> str:
        """Rows that were compared, in words."""
        held = [f"at equal {self.partial_on}"] * bool(self.partial_on) + [f"within {self.within}"] * bool(self.within)
        return ", ".join(held) or "over all rows"

    @property
    def verdict(self) -> str:
        """Significance in words, with a caution where all accuracies lie at chance."""
        if math.isnan(self.value):
            return "nothing varies"
        return ("" if self.is_significant else "not ") + "significant" + ", all at chance" * (self.chance is not None)


@dataclass(frozen=True, kw_only=True, repr=False)
class Correlations(Result):
    """Correlations of two columns, or of a column and several accuracies."""

    correlations: tuple[Correlation, ...]
    """One per accuracy, comparison and method: at equal compute first."""

    def __iter__(self) -> Iterator[Correlation]:
        return iter(self.correlations)

    @property
    def table(self) -> pd.DataFrame:
        """One row per coefficient: task, kind, compared, method, value, low, high, num_points, verdict."""
        names = ["task", "kind", "compared", "method", "value", "low", "high", "num_points", "verdict"]
        table = pd.DataFrame([{name: getattr(c, name) for name in names} for c in self])
        return table if table["task"].any() else table.drop(columns=["task", "kind"])

    def headline(self) -> str:
        """Return what was correlated, and what was held equal."""
        first = self.correlations[0]
        return f"Correlation of {first.x} and {first.y}, {', then '.join(dict.fromkeys(c.compared for c in self))}"

    def facts(self) -> list[tuple[str, str]]:
        """Return cautions, what was correlated, how intervals were found and what was left out."""
        text = "all accuracies{} lie at chance ({}) within their binomial error"
        names = {c.task and f" of {c.task}:{c.kind}": c.chance for c in self if c.chance is not None}
        facts = [("caution", text.format(name, percent(chance, 3))) for name, chance in names.items()]
        facts.append(("correlated", self.headline().removeprefix("Correlation of ")))
        if len({c.partial_on for c in self}) > 1:
            facts.append(("over all rows", "both may follow compute, which alone makes them correlate"))
        for c in self:
            over = f"{c.num_clusters} clusters by {c.cluster}" if c.cluster else f"{c.num_points} rows"
            over += f" and {c.num_budgets} budgets" * bool(c.num_budgets)
            how = f"jackknife of Fisher's z over {over}, t with {c.degrees:.3g} degrees of freedom"
            facts.append(("intervals", f"{level_words(c.level)}, {how}"))
            how = f"within {c.num_groups} groups of equal" if c.num_groups else "about a polynomial in the logarithm of"
            facts += [("held equal", f"{how} {c.partial_on}")] * bool(c.partial_on)
            facts += [("left out", "; ".join(map(str, c.exclusions)))] * bool(c.exclusions)
        if len(self.correlations) > 1:
            facts.append(("significant", by_chance([c.is_significant for c in self], self.correlations[0].level)))
        return list(dict.fromkeys(facts))


def correlate(
    table: Table,
    *,
    x: str = "val_loss",
    y: str = "top1",
    methods: Sequence[str] = tuple(METHODS),
    partial: str | None = None,
    within: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Correlations:
    """Correlate two columns, with intervals by a cluster jackknife on Fisher's scale.

    Loss and accuracy both follow compute, so over all rows they can hardly fail to correlate. Without `partial` and
    `within`, a table that has training FLOPs is correlated at equal compute first, then over all rows.

    Clusters are sizes, else runs, where there are four or more and some have several rows, else rows. Four budgets or
    more (equal D, else equal C) are clusters, too, unless compute is held equal: variances of both add.

    Args:
        table: a results table, or rows of `probe_frame`.
        x: a column, or a law's letter.
        y: a column, or accuracies: TASK:KIND, TASK, or top1 for all of the table.
        methods: pearson, spearman or both.
        partial: positive column (usually flops_train) that is held equal: rows are compared within groups that share
            it, else about a polynomial in its logarithm.
        within: column (such as size) whose groups' means are taken out of both.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        One coefficient per accuracy, comparison and method, each with its interval.

    Raises:
        AnalysisError: missing or constant column, one column twice, unknown method, or fewer than 4 usable rows.

    Example:
        >>> table = read_table("results.parquet")
        >>> correlate(table, y="photographs:knn", within="size").table
    """
    runs = Runs(table, columns)
    x, y = runs.column(x), runs.column(y)
    partial, within = (name and runs.column(name) for name in (partial, within))
    if unknown := [m for m in methods if m not in METHODS]:
        raise AnalysisError(f"There is no correlation named {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    parts = {("", ""): runs}
    if y not in runs:
        asked, probes = wanted_measures(runs.complete(), [y]), by_probe(runs.complete())
        y, pairs = asked[0].column, sorted({(m.task, m.kind) for m in asked})
        parts = {pair: probes[":".join(pair)] for pair in pairs}
    correlations = list[Correlation]()
    for (task, kind), rows in parts.items():
        for held in (rows.column("C"), None) if _is_split(rows, x, y, partial, within) else (partial,):
            of_part = _correlate(rows, methods, x, y, held, within)
            correlations += [replace(c, task=task, kind=kind) for c in of_part]
    return Correlations(correlations=tuple(correlations))


def _is_split(runs: Runs, x: str, y: str, *held: str | None) -> bool:
    """Return whether nothing is held, and rows at three amounts of compute or more have both columns, which vary."""
    compute = runs.column("C")
    if any(held) or compute in (x, y) or not {compute, x, y} <= {*runs}:
        return False
    numbers = usable_rows(runs, {name: name for name in (x, y, compute)}, signed={x, y}).numbers
    return len(numbers) >= MIN_ROWS and numbers[compute].nunique() > 2 and min(numbers[[x, y]].nunique()) > 1


def _correlate(
    runs: Runs, methods: Sequence[str], x: str, y: str, partial: str | None, within: str | None
) -> Iterator[Correlation]:
    """Correlate by each method."""
    if len({x, y} - {partial, within}) < 2:
        raise AnalysisError(f"{x} and {y} must be two columns, and others than what is held equal.")
    if absent := [name for name in (x, y, partial, within) if name is not None and name not in runs]:
        raise runs.no_column(absent[0])
    used = usable_rows(runs, {name: name for name in (x, y, partial) if name}, signed={x, y})
    rows, numbers = used.rows.frame, used.numbers
    if len(rows) < MIN_ROWS:
        raise AnalysisError(f"Only {len(rows)} rows have both {x} and {y}; a correlation needs at least {MIN_ROWS}.")
    if constant := [name for name in (x, y) if numbers[name].nunique() < 2]:
        raise AnalysisError(f"{constant[0]} is the same in all {len(rows)} rows, so it correlates with nothing.")
    if within is not None and rows[within].astype(str).is_unique:
        raise AnalysisError(f"Every {within} has a single row, so nothing varies within it.")
    group, held, num_groups = np.zeros(len(rows), int), np.empty((len(rows), 0)), None
    if partial is not None:
        size = next((name for name in SIZE_COLUMNS if name in rows), None)
        group, held, num_groups = _equal_compute(numbers[partial].to_numpy(), _codes(rows, size))
    if within is not None:
        held = np.column_stack([held, np.eye(group.max() + 1)[group][:, 1:]])
        group = _codes(rows, within)
    cluster = _cluster_column(rows, within)
    members, sides = [_codes(rows, cluster)], numbers[[x, y]].to_numpy()
    budgets = None if partial is not None else used.rows.shared_groups({}).get("budgets")
    members += [] if budgets is None or budgets.max() + 1 < MIN_ROWS else [budgets]
    sides = sides / np.abs(sides).max(axis=0)  # squares of 1e308 are no numbers
    names = {"x": x, "y": y, "cluster": cluster, "partial_on": partial, "within": within}
    about: dict[str, Any] = {key: name and runs.called(name) for key, name in names.items()}
    about |= {"num_clusters": len({*members[0]}), "num_budgets": len({*members[-1]}) if len(members) > 1 else 0}
    about |= {"num_points": len(rows), "num_groups": num_groups}
    about |= {"chance": _chance_of_all(rows, y), "exclusions": used.exclusions}
    for method in methods:
        value, low, high, degrees = _interval(method, sides, group, held, members)
        yield Correlation(method=method, value=value, low=low, high=high, degrees=degrees, **about)


def _codes(rows: pd.DataFrame, name: str | None) -> Array:
    """Encode the values of a column as integers; without one, the rows."""
    return np.arange(len(rows)) if name is None else np.unique(rows[name].astype(str), return_inverse=True)[1]


def _cluster_column(df: pd.DataFrame, within: str | None) -> str | None:
    """Name the largest groups that share errors: sizes, unless means of `within` take those out, else runs."""
    names = [name for name in (*SIZE_COLUMNS, "run_id") if name in df.columns and df[name].notna().all()]
    names = [name for name in names if MIN_ROWS <= df[name].nunique() < len(df)]
    cross = (n for n in names if n == "run_id" or within is None or df.groupby(within)[n].nunique().max() > 1)
    return next(cross, None)


def _chance_of_all(rows: pd.DataFrame, y: str) -> float | None:
    """Return the accuracy of guessing if no row's is above it by a binomial test at 5 % over all rows, else None."""
    if y not in ACCURACIES or not {"chance", "n"} <= {*rows.columns}:
        return None
    chance, n = (rows[name].to_numpy(float) for name in ("chance", "n"))
    highest = chance + normal_quantile(1 - (1 - CONFIDENCE) / len(rows)) * np.sqrt(chance * (1 - chance) / n)
    return float(np.median(chance)) if (rows[y].to_numpy(float) <= highest).all() else None


def _equal_compute(values: Array, sizes: Array) -> tuple[Array, Array, int | None]:
    """Find what holds compute (n,) equal: groups of several sizes that share it, else a polynomial in its logarithm,
    about which two power laws bend less than about a line.

    Returns the group of each row, columns (n, q) to take out besides groups' means, and the number of groups.
    """
    log_c = np.log(values)
    group = chained(log_c, SAME_COMPUTE)
    several = pd.Series(sizes).groupby(group).nunique().to_numpy() > 1
    z = (log_c - log_c.mean()) / max(np.ptp(log_c), SAME_COMPUTE)
    if several.sum() > 2 and several[group].mean() > 0.6:
        # rows of a group differ a little: a slope in that, which may itself change with compute, goes too
        middle = pd.Series(z).groupby(group).transform("mean").to_numpy()[:, None]
        tilts = (z[:, None] - middle) * middle ** np.arange(2)
        return group, tilts[:, tilts.std(axis=0) > 1e-9], int(several.sum())
    degree = max(1, min(DEGREE, (group.max() + 1) // 2 - 1))
    return np.zeros(len(z), int), z[:, None] ** np.arange(1, degree + 1), None


def _coefficient(method: str, sides: Array, held: Array) -> float:
    """Correlate what columns (n, q) leave of the two sides (n, 2); NaN where one of the two does not vary then."""
    rest = sides - held @ np.linalg.lstsq(held, sides)[0]
    if (rest.std(axis=0) <= np.maximum(NOTHING_LEFT * sides.std(axis=0), 1e-14)).any():
        return float("nan")
    return float(np.corrcoef([METHODS[method](each) for each in rest.T.round(12)])[0, 1])  # ties stay ties


def _interval(
    method: str, sides: Array, group: Array, held: Array, members: Sequence[Array]
) -> tuple[float, float, float, float]:
    """Return the coefficient of both sides (n, 2), its interval and degrees of freedom.

    The interval is Student's with clusters - 1 degrees of freedom, less those that groups' means take out, and never
    narrower than Fisher's of as many independent rows; from -1 to 1 where it rests on one cluster of a clustering (n,).
    """
    n, num_means = len(sides), group.max()
    basis = np.column_stack([np.eye(num_means + 1)[group], held])
    value = _coefficient(method, sides, basis)
    # perfect ranks, infinite on Fisher's scale, tell no more than that no two neighbours are swapped
    most = 1 - (6 / (n * (n**2 - 1)) if method == "spearman" else 1e-12)
    variances, freedoms = np.empty(len(members)), np.empty(len(members))
    for i, member in enumerate(members):
        part = member % MAX_CLUSTERS
        without = [_coefficient(method, sides[part != k], basis[part != k]) for k in range(part.max() + 1)]
        # means cost degrees of freedom between clusters where their groups hold several clusters each, whole
        is_nested = pd.Series(group).groupby(part).nunique().max() == 1
        freedoms[i] = part.max() - num_means * (is_nested and num_means < part.max())
        variances[i] = freedoms[i] * np.var(np.arctanh(np.clip(without, -most, most)))
    degrees = float(freedoms[0])
    if not np.isfinite([value, *variances]).all():
        return value, -1.0, 1.0, degrees
    if len(members) > 1:
        degrees = float(satterthwaite(np.sqrt(variances), freedoms))
    z = np.arctanh(np.clip(value, -most, most))
    independent = max(1, n - 3 - num_means - held.shape[1])
    fisher = (1 + value**2 / 2 if method == "spearman" else 1) / independent  # of ranks: Bonett and Wright (2000)
    tail = 0.5 + current_level() / 2
    half = max(t_quantile(tail, degrees) * np.sqrt(variances.sum()), normal_quantile(tail) * np.sqrt(fisher))
    return value, float(min(value, np.tanh(z - half))), float(max(value, np.tanh(z + half))), degrees
