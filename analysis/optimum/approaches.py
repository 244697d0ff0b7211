"""Approaches 2 and 3 on one table, and how far they disagree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from aimscale.analysis.display import Drawing, Result, text_table
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.optimum.frontier import Frontier, NoFrontier, parametric_frontier, points_of, why_not
from aimscale.analysis.optimum.isoflop import isoflop_frontier
from aimscale.analysis.table.names import our_name, their_name
from aimscale.analysis.table.select import table_flags
from aimscale.analysis.words import Flag, human, power_of_ten


@dataclass(frozen=True, kw_only=True, repr=False)
class Approaches(Result):
    """Frontiers by every approach that the table allows."""

    plot = Drawing("scaling.plot_approaches")

    frontiers: tuple[Frontier, ...]
    """In the order 2, 3."""
    failures: dict[int, tuple[Flag, ...]]
    """Approach -> why it was not possible; budgets that were refused follow the reason."""
    measure: str = "val_loss"
    """Quantity that is lowest at the optimum, as the table's file calls it."""
    flags: tuple[Flag, ...] = ()
    """Approaches whose intervals do not overlap, and cautions about the table."""

    @property
    def table(self) -> pd.DataFrame:
        """One row an approach: approach, exponent, low, high, method, refused."""
        rows = [
            {"approach": f.approach, "exponent": f.exponent, **vars(f.exponent_interval), "method": f.method}
            | {"refused": len(f.refusals)}
            for f in self.frontiers
        ]
        return pd.DataFrame(rows)

    def at(self, flops: Array) -> pd.DataFrame:
        """Return the optimum at budgets by every approach (see `Frontier.at`)."""
        return pd.concat([each.at(flops).assign(approach=each.approach) for each in self.frontiers], ignore_index=True)

    @property
    def are_apart(self) -> bool:
        """Whether two approaches contradict each other, so that none of them can be relied on."""
        return any(flag.kind == "apart" for flag in self.flags)

    @property
    def cautions(self) -> list[str]:
        """Sentences of all flags: those of all approaches first, then of each."""
        of_each = [f"Approach {each.approach}: {flag}" for each in self.frontiers for flag in each.flags]
        return [*map(str, self.flags), *of_each]

    def disagreement(self, flops: float) -> float:
        """Return the largest N* over the smallest N* at a budget."""
        sizes = self.at(flops)["N"]
        return float(sizes.max() / sizes.min())

    @property
    def largest_budget(self) -> float:
        """Largest C that any approach used."""
        return max(each.range[1] for each in self.frontiers)

    def headline(self) -> str:
        """Say the optimum at the largest budget by the last approach, and how the best size grows by all."""
        top, best, several = self.largest_budget, self.frontiers[-1], len(self.frontiers) > 1
        at = best.at(top).iloc[0]
        n, n_lo, n_hi, d = (human(at[name]) for name in ("N", "N_lo", "N_hi", "D"))
        law = f" on the {best.law.law.name} law" if best.law else ""
        found = f"At {human(top)} FLOP: N = {n} [{n_lo}, {n_hi}], D = {d}, by approach {best.approach}{law}. "
        if not several:
            return f"{found}N grows as C^{best.exponent_words()}."
        exponents = [f"C^{f.exponent_words()} (approach {f.approach})" for f in self.frontiers]
        apart = f"There they differ by a factor of {human(self.disagreement(top), 2)} in N."
        return f"{found}N grows as {', '.join(exponents)}. {apart}"

    def cells(self) -> list[dict[str, str]]:
        """Write a row an approach: the exponent with its interval, the range of C."""
        return [
            {
                "approach": str(f.approach),
                "N* ~ C^a": f"{f.exponent:.3f}",
                "95 % interval": f.exponent_interval.words(),
                "C (FLOP)": " to ".join(power_of_ten(c, 3) for c in f.range),
            }
            for f in self.frontiers
        ]

    def facts(self) -> list[tuple[str, str]]:
        """List flags and approaches that were not possible, what is lowest, how far the approaches differ, and how each
        was found."""
        cautions, top = [*self.cautions, *failed_words(self.failures)], self.largest_budget
        found = [*(("caution", each) for each in cautions), ("minimised", self.measure)]
        if len(self.frontiers) > 1:
            apart = (f"{self.disagreement(c):.2f} at {power_of_ten(c, 3)} FLOP" for c in (top, 100 * top))
            found.append(("difference", f"N* differs by a factor of {', '.join(apart)}"))
        return [*found, *((f"approach {each.approach}", each.method_words) for each in self.frontiers)]

    def summary(self, flops: Array = None) -> str:
        """Write all approaches, and the optimum at amounts of compute: by default the largest, and ten times it."""
        flops, rows = [self.largest_budget, 10 * self.largest_budget] if flops is None else flops, []
        for row in self.at(flops).to_dict("records"):
            cells = {"approach": str(row["approach"]), "C (FLOP)": power_of_ten(row["C"], 3)}
            for name, digits in (("N", 3), ("D", 3), ("loss", 4)):
                if math.isfinite(row.get(name, math.nan)):
                    ends = Interval(low=row[f"{name}_lo"], high=row[f"{name}_hi"])
                    cells[f"{name}*"] = f"{human(row[name], digits)} {ends.shown(digits)}"
            rows.append({**cells, "beyond": f"{human(row['beyond_range'])}x" if row["beyond_range"] > 1 else ""})
        return f"{super().summary()}\n\n{text_table(rows)}"


def frontier(df: pd.DataFrame, *, y: str = "val_loss", law: Law | Fit | str = "chinchilla") -> Approaches:
    """Draw the compute-optimal frontier by Chinchilla's approaches 2 and 3, naming those that the table does not allow.

    Args:
        y: what is lowest at the optimum: a loss, or the error rate of a probe (`table.measures.to_minimise`).
        law: that of approach 3, or a fit of it to this table.

    Returns:
        A frontier per approach, or the flags that say why there is none.

    Raises:
        AnalysisError: a column is missing, no row is usable, or no approach is possible.

    Example:
        >>> table = read_table("results.parquet")
        >>> frontier(table).at(1e13)
    """
    y = our_name(df, y)
    points_of(df, y)  # raises before an approach is blamed for a missing column
    by_law = partial(parametric_frontier, law if isinstance(law, Fit) else find_law(law))
    draws: dict[int, Callable[..., Frontier]] = {2: isoflop_frontier, 3: by_law}
    frontiers, failures = [], {}
    for number, draw in draws.items():
        try:
            frontiers.append(draw(df, y=y))
        except NoFrontier as error:
            failures[number] = error.flags
    if not frontiers:
        raise AnalysisError(f"No frontier can be drawn. {' '.join(failed_words(failures))}")
    flags, measure = apart_flags(frontiers), their_name(df, y)
    flags += () if isinstance(law, Fit) else table_flags(df, ["N", "D", "C"], y)  # a fit has flags of its own
    return Approaches(frontiers=tuple(frontiers), failures=failures, measure=measure, flags=flags)


def apart_flags(frontiers: Sequence[Frontier]) -> tuple[Flag, ...]:
    """Flag approaches whose exponents' intervals do not overlap."""
    ends = [each.exponent_interval for each in frontiers]
    if not max(i.low for i in ends) > min(i.high for i in ends):  # nor where there is no interval
        return ()
    named = " and ".join(str(each.approach) for each in frontiers)
    return (Flag(kind="apart", subject=named, text=f"The intervals of approaches {named} do not overlap."),)


def failed_words(failures: Mapping[int, Sequence[Flag]]) -> list[str]:
    """Say which approaches were not possible and why."""
    return [f"Approach {k} is not possible: {why_not(flags).rstrip('.')}." for k, flags in failures.items()]
