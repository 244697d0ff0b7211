"""What correlations hand back: coefficients with intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.table.names import Exclusion


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """One coefficient of two columns."""

    task: str = ""
    """Task of the accuracy, where y is one."""
    kind: str = ""
    """Kind of its probe."""
    method: str
    """pearson, spearman or kendall."""
    x: str
    y: str
    value: float
    """Coefficient, -1 to 1."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    num_points: int
    cluster: str | None
    """Column whose rows were left out together; None for single rows."""
    num_clusters: int
    partial_on: str | None = None
    """Column that was held equal, if any."""
    num_groups: int | None = None
    """Groups of rows that share it, within which rows were compared; None: about a smooth function of it."""
    within: str | None = None
    """Column whose groups' means were taken out of both, if any."""
    exclusions: tuple[Exclusion, ...] = ()

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True, repr=False)
class Correlations(Result):
    """How two columns go together, or a column and several accuracies."""

    correlations: tuple[Correlation, ...]
    """One per accuracy and method."""

    def __iter__(self) -> Iterator[Correlation]:
        return iter(self.correlations)

    @property
    def table(self) -> pd.DataFrame:
        """One row per accuracy and method: task, kind, method, value, low, high, num_points, verdict."""
        of = ("task", "kind") if any(c.task for c in self) else ()
        names = (*of, "method", "value", "low", "high", "num_points")
        verdicts = {True: "significant", False: "not significant"}
        return pd.DataFrame([{n: getattr(c, n) for n in names} | {"verdict": verdicts[c.is_significant]} for c in self])

    def headline(self) -> str:
        """What was correlated, and what was held equal."""
        first = self.correlations[0]
        held = f", at equal {first.partial_on}" if first.partial_on else ""
        return f"Correlation of {first.x} and {first.y}{held}{f', within {first.within}' if first.within else ''}"

    def facts(self) -> list[tuple[str, str]]:
        """What was correlated, how intervals were found and what was left out."""
        found = [("correlated", self.headline().removeprefix("Correlation of "))]
        for c in self:
            over = f"{c.num_points} rows" if c.cluster is None else f"{c.num_clusters} clusters by {c.cluster}"
            found.append(("intervals", f"95 %, Fisher's z, standard error over {over}"))
            groups = f"within {c.num_groups} groups of equal" if c.num_groups else "about a smooth function of"
            found += [("held equal", f"{groups} {c.partial_on}")] if c.partial_on else []
            found += [("left out", "; ".join(map(str, c.exclusions)))] if c.exclusions else []
        return list(dict.fromkeys(found))

    def cells(self) -> list[dict[str, str]]:
        """One row per accuracy and method."""
        return [
            {
                "task": c.task,
                "probe": c.kind,
                "coefficient": c.method,
                "value": f"{c.value:.3f}",
                "95 % interval": f"[{c.low:.3f}, {c.high:.3f}]",
                "n": str(c.num_points),
                "significance": "significant" if c.is_significant else "not significant",
            }
            for c in self
        ]
