"""The three approaches on one table, how far they disagree, and whether another measure asks for another size."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import ROBUST, Objective
from aimscale.analysis.fitting.result import Fit, Interval, interval
from aimscale.analysis.frontier.measured import envelope_frontier, isoflop_frontier
from aimscale.analysis.frontier.optimum import points_of
from aimscale.analysis.frontier.parametric import parametric_frontier
from aimscale.analysis.frontier.result import Frontier, NoFrontier
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.laws.catalogue import CHINCHILLA, find_law
from aimscale.analysis.table.names import their_name
from aimscale.analysis.words import Flag, flag_words


@dataclass(frozen=True, kw_only=True, repr=False)
class Approaches(Result):
    """Frontiers by every approach that the table allows."""

    frontiers: tuple[Frontier, ...]
    """In the order 1, 2, 3."""
    failures: dict[int, tuple[Flag, ...]]
    """Approach -> why it was not possible; budgets that were refused follow the reason."""
    measure: str = "val_loss"
    """What is lowest at the optimum, as the table's file calls it."""

    @property
    def table(self) -> pd.DataFrame:
        """One row an approach: approach, exponent, low, high, bias, method, refused."""
        return pd.concat([f.table for f in self.frontiers], ignore_index=True)

    def at(self, flops: Array) -> pd.DataFrame:
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
            f"Compute-optimal size for {self.measure} by approach {names}; at {self.largest_budget:.3g} FLOPs their N* "
            f"differ by a factor of {self.disagreement(self.largest_budget):.2f}"
        )

    def summary(self, flops: Array = None) -> str:
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
        failed = [(k, "; ".join(flag_words(flags))) for k, flags in self.failures.items()]
        return lines + [f"Approach {k} was not possible: {why.rstrip('.')}." for k, why in failed]


def all_approaches(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    budgets: int | None = None,
    law: Law | Fit | str = "chinchilla",
    objective: Objective | str = ROBUST,
    resamples: int = 500,
) -> Approaches:
    """Approaches 1, 2 and 3 on one table; an approach that the table does not allow is named with its reason.

    Args:
        y: what is lowest at the optimum: a loss, or the error rate of a probe (`table.measures.to_minimise`).
        columns: N, D or C -> column.
        budgets: common budgets that approach 2 interpolates to; None takes the table's own.
        law: that of approach 3, or a fit of it to this table.

    Raises:
        AnalysisError: a column is missing, no row is usable, or no approach is possible.
    """
    points_of(df, y=y, columns=columns)  # raises before an approach is blamed for a missing column
    law = find_law(law) if isinstance(law, str) else law
    options: dict[str, Any] = {"y": y, "columns": columns, "resamples": resamples}
    joint = _fitted(CHINCHILLA, df, objective, options)
    measured = options | {"joint": joint if isinstance(joint, Fit) else None}

    def parametric() -> Frontier:
        found = law if isinstance(law, Fit) else joint
        if isinstance(law, Law) and law.name != CHINCHILLA.name:
            found = _fitted(law, df, objective, options)
        if isinstance(found, Flag):
            raise NoFrontier(found)
        return parametric_frontier(found, df, columns=columns)

    attempts = (
        lambda: envelope_frontier(df, **measured),
        lambda: isoflop_frontier(df, budgets=budgets, **measured),
        parametric,
    )
    frontiers, failures = [], {}
    for number, attempt in enumerate(attempts, start=1):
        try:
            frontiers.append(attempt())
        except NoFrontier as error:
            failures[number] = error.flags
    if not frontiers:
        reasons = [f"{number}: {'; '.join(flag_words(flags))}." for number, flags in failures.items()]
        raise AnalysisError(f"No approach is possible. {' '.join(reasons)}")
    return Approaches(frontiers=tuple(frontiers), failures=failures, measure=their_name(df, y))


def _fitted(law: Law, df: pd.DataFrame, objective: Objective | str, options: dict[str, Any]) -> Fit | Flag:
    """The fit of a law, or why there is none."""
    try:
        return fit(law, df, objective=objective, **options)
    except AnalysisError as error:
        return Flag(kind="no_law", subject=law.name, more=(str(error),))


@dataclass(frozen=True, kw_only=True)
class Gap:
    """By how much the optimum of one measure differs from that of another, by one approach on the same rows."""

    approach: int
    measures: tuple[str, str]
    exponents: tuple[str, str]
    """Of N*(C), with their intervals, in words."""
    difference: float
    """The first exponent less the second, each less its approach's own bias."""
    interval: Interval
    flops: float
    """Largest budget that every approach to both used."""
    ratio: float
    """The first N* over the second there."""
    ratio_interval: Interval

    def sentence(self) -> str:
        """Both exponents and the ratio of sizes, and whether these are more than chance."""
        i, ratio = self.interval, self.ratio_interval
        differs = "" if not i.is_known else "no significant difference" if i.low <= 0 <= i.high else "they differ"
        larger = "" if not ratio.is_known else ", not significantly" if ratio.low <= 1 <= ratio.high else ""
        return (
            f"By {self.measures[0]} N grows as C^{self.exponents[0]}, by {self.measures[1]} as C^{self.exponents[1]} "
            f"(approach {self.approach}{f'; {differs}' if differs else ''}); at {self.flops:.3g} FLOPs the best size "
            f"by the first is {self.ratio:.2g} {ratio.words('.2g')} times that by the second{larger}."
        )


def gaps_to_loss(found: Approaches, df: pd.DataFrame, y: str, **options: Any) -> list[Gap]:
    """How far the optima of another measure lie from those of the loss on its rows; nothing where y is the loss."""
    if y == "val_loss" or "val_loss" not in df.columns:
        return []
    rows = df[df[y].notna()]
    try:
        return gaps(found, all_approaches(rows, **options))
    except AnalysisError:  # no frontier by the loss, so nothing to compare with
        return []


def gaps(found: Approaches, other: Approaches, *, confidence: float = 0.95) -> list[Gap]:
    """How far apart the optima by two measures are, for every approach that both allow.

    The errors of the two are taken for independent, which widens the intervals where they go together.
    """
    others = {f.approach: f for f in other.frontiers}
    flops = min(f.range[1] for f in (*found.frontiers, *other.frontiers))
    out = []
    for f in [f for f in found.frontiers if f.approach in others]:
        g = others[f.approach]
        exponents = _difference(f.draws[:, 1], g.draws[:, 1])
        sizes = _difference(*(each.log_sizes(np.array([flops]))[1][:, 0] for each in (f, g)))
        bias = (f.bias or 0.0) - (g.bias or 0.0)
        out.append(
            Gap(
                approach=f.approach,
                measures=(found.measure, other.measure),
                exponents=(f.exponent_words(), g.exponent_words()),
                difference=f.exponent - g.exponent - bias,
                interval=interval(exponents, confidence),
                flops=flops,
                ratio=float(f.at(flops)["N"].iloc[0] / g.at(flops)["N"].iloc[0]),
                ratio_interval=interval(np.exp(sizes), confidence),
            )
        )
    return out


def _difference(a: Array, b: Array) -> Array:
    """Draws of a less those of b, each with another of the other's."""
    num = min(len(a), len(b))
    return a[:num] - b[np.random.default_rng(0).permutation(num)]


def sharpest(found: list[Gap]) -> Gap | None:
    """The gap whose ratio of sizes is known best, if any is known."""
    known = [gap for gap in found if gap.ratio_interval.is_known]
    return min(known, key=lambda gap: gap.ratio_interval.high / gap.ratio_interval.low, default=None)
