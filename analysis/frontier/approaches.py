"""The three approaches on one table, and how far they disagree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import ROBUST, Objective, find_objective
from aimscale.analysis.frontier.measured import envelope_frontier, isoflop_frontier
from aimscale.analysis.frontier.optimum import Frontier, parametric_frontier
from aimscale.analysis.laws.catalogue import CHINCHILLA


@dataclass(frozen=True, kw_only=True, repr=False)
class Approaches(Result):
    """Frontiers by every approach that the table allows."""

    frontiers: tuple[Frontier, ...]
    """In the order 1, 2, 3."""
    failures: dict[int, str]
    """Approach -> why it was not possible."""

    @property
    def table(self) -> pd.DataFrame:
        """One row an approach: approach, exponent, low, high, bias, method, refused."""
        return pd.concat([f.table for f in self.frontiers], ignore_index=True)

    def at(self, flops: Any) -> pd.DataFrame:
        """Optimum at budgets by every approach (see `Frontier.at`)."""
        return pd.concat([f.at(flops).assign(approach=f.approach) for f in self.frontiers], ignore_index=True)

    def apart(self) -> list[tuple[int, int]]:
        """Pairs of approaches whose exponents' intervals do not overlap."""
        ends = [(f.approach, f.exponent_interval) for f in self.frontiers]
        return [(a, b) for (a, i), (b, j) in itertools.combinations(ends, 2) if i.high < j.low or j.high < i.low]

    def disagreement(self, flops: float) -> float:
        """Largest N* over smallest N* at a budget."""
        sizes = self.at(flops)["N"]
        return float(sizes.max() / sizes.min())

    @property
    def largest_budget(self) -> float:
        """Largest C that any approach used."""
        return max(f.range[1] for f in self.frontiers)

    def headline(self) -> str:
        """Which approaches, and how far they disagree."""
        names = ", ".join(str(f.approach) for f in self.frontiers)
        return (
            f"Compute-optimal size by approach {names}; at {self.largest_budget:.3g} FLOPs their N* differ by a factor "
            f"of {self.disagreement(self.largest_budget):.2f}"
        )

    def summary(self, flops: Any = None) -> str:
        """All approaches as prose, and the optimum at budgets: by default the largest, and ten times it."""
        optima = self.at([self.largest_budget, 10 * self.largest_budget] if flops is None else flops)
        lines = "\n".join(self.sentences())
        return f"{lines}\n\n{optima.to_string(index=False, float_format=lambda v: f'{v:.4g}')}"

    def sentence(self) -> str:
        """All approaches, their disagreement at the largest budget and beyond, and what failed."""
        return " ".join(self.sentences())

    def sentences(self) -> list[str]:
        """The same, one each."""
        lines = [f.sentence() for f in self.frontiers]
        if len(self.frontiers) > 1:
            top, pairs = self.largest_budget, " and of ".join(f"{a} and {b}" for a, b in self.apart())
            apart = f"; the intervals of {pairs} do not overlap" if pairs else ""
            lines.append(
                f"Their N* differ by a factor of {self.disagreement(top):.2f} at the largest budget {top:.3g} and of "
                f"{self.disagreement(100 * top):.2f} at a hundred times it{apart}."
            )
        return lines + [f"Approach {k} was not possible: {why}" for k, why in self.failures.items()]


def all_approaches(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    budgets: int | None = None,
    objective: Objective | str = ROBUST,
    resamples: int = 500,
) -> Approaches:
    """Approaches 1, 2 and 3 on one table; an approach that the table does not allow is named with its reason.

    Args:
        columns: N, D or C -> column.
        budgets: common budgets that approach 2 interpolates to; None takes the table's own.

    Raises:
        AnalysisError: no approach is possible.
    """
    objective = find_objective(objective)
    frontiers, failures = [], {}

    def parametric() -> Frontier:
        nd = {k: v for k, v in (columns or {}).items() if k in ("N", "D")}
        law = fit(CHINCHILLA, df, y=y, columns=nd, objective=objective, resamples=resamples)
        return parametric_frontier(law, df, columns=columns)

    attempts = (
        lambda: envelope_frontier(df, y=y, columns=columns, resamples=resamples),
        lambda: isoflop_frontier(df, y=y, columns=columns, budgets=budgets, resamples=resamples),
        parametric,
    )
    for number, attempt in enumerate(attempts, start=1):
        try:
            frontiers.append(attempt())
        except AnalysisError as error:
            failures[number] = str(error)
    if not frontiers:
        reasons = [f"{number}: {why}" for number, why in failures.items()]
        once = [*failures.values()][:1] if len({*failures.values()}) == 1 else reasons
        raise AnalysisError(f"No approach is possible. {' '.join(once)}")
    return Approaches(frontiers=tuple(frontiers), failures=failures)
