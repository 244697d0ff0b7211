"""Correlation coefficients with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from aimscale.analysis.display import Drawing, Result
from aimscale.analysis.table.names import Exclusion
from aimscale.analysis.words import percent


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """One coefficient of two columns, with a 95 % interval."""

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

    plot = Drawing("intervals.plot_correlations")

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
        at_chance = {c.task and f" of {c.task}:{c.kind}": c.chance for c in self if c.chance is not None}
        text = "all accuracies{} lie at chance ({}) within their binomial error"
        found = [("with care", text.format(name, percent(chance, 3))) for name, chance in at_chance.items()]
        found.append(("correlated", self.headline().removeprefix("Correlation of ")))
        if len({c.partial_on for c in self}) > 1:
            found.append(("over all rows", "both may follow compute, and then they correlate whatever else they share"))
        for c in self:
            over = f"{c.num_clusters} clusters by {c.cluster}" if c.cluster else f"{c.num_points} rows"
            over += f" and {c.num_budgets} budgets" * bool(c.num_budgets)
            how = f"95 %, jackknife of Fisher's z over {over}, t with {c.degrees:.3g} degrees of freedom"
            groups = (
                f"within {c.num_groups} groups of equal" if c.num_groups else "about a polynomial in the logarithm of"
            )
            found.append(("intervals", how))
            found += [("held equal", f"{groups} {c.partial_on}")] * bool(c.partial_on)
            found += [("left out", "; ".join(map(str, c.exclusions)))] * bool(c.exclusions)
        return list(dict.fromkeys(found))
