"""Approaches 2 and 3 on one table, and how far they disagree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, Result, human, p_value, power_of_ten, text_table
from aimscale.analysis.distributions import t_above
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE, level_words
from aimscale.analysis.fitting.inference import Interval
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.forecaster import Forecaster, forecaster
from aimscale.analysis.laws import Array, Law, find_law
from aimscale.analysis.optimum.frontier import (
    Frontier,
    NoFrontier,
    ensemble_frontier,
    parametric_frontier,
    rejection,
    why_not,
)
from aimscale.analysis.optimum.isoflop import isoflop_frontier
from aimscale.analysis.table.points import compute_points
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.select import table_flags

BEYOND = 1.01
"""Factor outside the table from which an optimum is said to lie beyond it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Approaches(Result):
    """Frontiers by every approach that the table allows."""

    frontiers: tuple[Frontier, ...]
    """In the order 2, 3."""
    failures: dict[int, tuple[Flag, ...]]
    """Approach -> why it was not possible; budgets that were refused follow the reason."""
    measure: str = "val_loss"
    """Quantity that is lowest at the optimum, as the table's file calls it."""
    flags: tuple[Flag, ...] = ()
    """What approaches differ in by more than their errors, and cautions about the table."""

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
    def leading(self) -> Frontier:
        """Frontier to go by: the law's where no test rejects it and approach 2 does not contradict it, else that of
        approach 2, which assumes no law; the forecast's laws where that is not possible."""
        first, last = self.frontiers[0], self.frontiers[-1]
        return last if isinstance(last.law, Fit) and not self.are_apart else first

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
        """Say the optimum at the largest budget by the leading approach, and how the best size grows by all."""
        top, best, several = self.largest_budget, self.leading, len(self.frontiers) > 1
        at = best.at(top).iloc[0]
        n, n_lo, n_hi, d = (human(at[name]) for name in ("N", "N_lo", "N_hi", "D"))
        beyond = f" ({human(at['beyond_range'])} times beyond the table)" * bool(at["beyond_range"] > BEYOND)
        text = f"At {human(top)} FLOP: N = {n} [{n_lo}, {n_hi}]{beyond}, D = {d}, by approach {best.approach}"
        text += f"{best.law_words}. "
        if not several:
            return f"{text}N grows as C^{best.exponent_words()}."
        exponents = [f"C^{f.exponent_words()} (approach {f.approach})" for f in self.frontiers]
        apart = f"There they differ by a factor of {human(self.disagreement(top), 2)} in N."
        return f"{text}N grows as {', '.join(exponents)}. {apart}"

    def cells(self) -> list[dict[str, str]]:
        """Write a row an approach: the exponent with its interval, the range of C."""
        return [
            {
                "approach": str(f.approach),
                "N* ~ C^a": f"{f.exponent:.3f}",
                f"{level_words(f.level)} interval": f.exponent_interval.words(),
                "C (FLOP)": " to ".join(power_of_ten(c, 3) for c in f.range),
            }
            for f in self.frontiers
        ]

    def facts(self) -> list[tuple[str, str]]:
        """List flags and approaches that were not possible, what is lowest, how far the approaches differ, and how each
        was found."""
        cautions, top = [*self.cautions, *failed_words(self.failures)], self.largest_budget
        facts = [*(("caution", each) for each in cautions), ("minimised", self.measure)]
        if len(self.frontiers) > 1:
            apart = (f"{self.disagreement(c):.2f} at {power_of_ten(c, 3)} FLOP" for c in (top, 100 * top))
            facts.append(("difference", f"N* differs by a factor of {', '.join(apart)}"))
        return [*facts, *((f"approach {each.approach}", each.method_words) for each in self.frontiers)]

    def summary(self, flops: Array = None) -> str:
        """Write all approaches, and the optimum at amounts of compute: by default the largest, and ten times it."""
        flops, rows = [self.largest_budget, 10 * self.largest_budget] if flops is None else flops, []
        for row in self.at(flops).to_dict("records"):
            cells = {"approach": str(row["approach"]), "C (FLOP)": power_of_ten(row["C"], 3)}
            for name, digits in (("N", 3), ("D", 3), ("loss", 4)):
                if math.isfinite(row.get(name, math.nan)):
                    ends = Interval(low=row[f"{name}_lo"], high=row[f"{name}_hi"])
                    cells[f"{name}*"] = f"{human(row[name], digits)} {ends.shown(digits)}"
            rows.append({**cells, "beyond": f"{human(row['beyond_range'])}x" if row["beyond_range"] > BEYOND else ""})
        return f"{super().summary()}\n\n{text_table(rows)}"


def frontier(
    table: Table,
    *,
    y: str = "val_loss",
    law: Law | Fit | str = "chinchilla",
    laws: Forecaster | None = None,
    columns: Mapping[str, str] | None = None,
) -> Approaches:
    """Draw the compute-optimal frontier by Chinchilla's approaches 2 and 3, naming those that the table does not allow.

    A table without training FLOPs has C = 6 N D, as a flag says.

    Args:
        y: what is lowest at the optimum: a loss, or the error rate of a probe (`table.measures.to_minimise`).
        law: that of approach 3, or a fit of it to this table.
        laws: those of the forecast, which stand in for it where its own test rejects it; None weighs them here.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        A frontier per approach, or the flags that say why there is none.

    Raises:
        AnalysisError: a column is missing, no row is usable, or no approach is possible.

    Example:
        >>> table = read_table("results.parquet")
        >>> frontier(table).at(1e13)
    """
    given = Runs(table, columns)
    runs, y = given.with_compute(), given.column(y)
    compute_points(runs, y)  # raises before an approach is blamed for a missing column

    def by_law(rows: Runs, *, y: str) -> Frontier:
        drawn = parametric_frontier(law if isinstance(law, Fit) else find_law(law), rows, y=y)
        if isinstance(drawn.law, Fit) and drawn.law.is_rejected:
            flags = (rejection(drawn.law),)
            return ensemble_frontier(laws or forecaster(rows, y=y), rows, y=y, law=drawn.law, flags=flags)
        return drawn

    draws: dict[int, Callable[..., Frontier]] = {2: isoflop_frontier, 3: by_law}
    frontiers, failures = [], {}
    for number, draw in draws.items():
        try:
            frontiers.append(draw(runs, y=y))
        except NoFrontier as error:
            failures[number] = error.flags
    if not frontiers:
        raise AnalysisError(f"No frontier can be drawn. {' '.join(failed_words(failures))}")
    flags, measure = apart_flags(frontiers), runs.called(y)
    if runs.column("C") not in given:
        flags += (Flag(kind="counted", subject="C", text="The table counts no training FLOPs, so C is 6 N D."),)
    flags += other_laws_flags(frontiers[-1], laws, runs, y) if laws else ()
    flags += () if isinstance(law, Fit) else table_flags(runs, ["N", "D", "C"], y)  # a fit has flags of its own
    return Approaches(frontiers=tuple(frontiers), failures=failures, measure=measure, flags=flags)


def apart_flags(frontiers: Sequence[Frontier]) -> tuple[Flag, ...]:
    """Flag approaches 2 and 3 where they differ in the exponent, or in N* at the largest compute: tests at 5 % together
    of the differences, whose errors follow from the losses that both share."""
    if len(frontiers) < 2:
        return ()
    first, last = frontiers
    top, flags = min(each.range[1] for each in frontiers), list[Flag]()
    optima = [tuple(float(part[0]) for part in each.optimum(np.array([top]))) for each in frontiers]
    apart = np.array([first.exponent - last.exponent, optima[0][0] - optima[1][0]])
    errors = np.array([[each.exponent_error, optimum[1:]] for each, optimum in zip(frontiers, optima, strict=True)])
    sd, degrees = np.hypot(*errors[..., 0]), errors[..., 1].min(axis=0)  # of unrelated errors
    if first.moves and last.moves and first.errors is not None:
        moved = first.moves(top).sub(last.moves(top), fill_value=0.0).reindex(first.errors.index)
        shared = np.sqrt(np.diag(moved.T @ first.errors @ moved))
        sd, degrees = np.where(np.isfinite(sd), shared, np.nan), np.full(2, first.exponent_error[1])
    p_values = 2 * t_above(np.abs(apart) / np.maximum(sd, 1e-300), degrees)
    for what, by, p in zip(("the exponent", "N*"), np.abs(apart), p_values, strict=True):
        if p < (1 - CONFIDENCE) / 2:  # nor where nothing tells an error
            words = f"by {by:.2f}" if what != "N*" else f"by a factor of {math.exp(by):.2f}"
            text = f"Approaches 2 and 3 differ in {what} {words} ({p_value(p)}); go by approach 2."
            flags.append(Flag(kind="apart", subject=what, number=float(by), p=float(p), text=text))
    return tuple(flags)


def other_laws_flags(drawn: Frontier, laws: Forecaster, runs: Runs, y: str) -> tuple[Flag, ...]:
    """Flag a law's N* at the largest compute whose interval does not hold that of the forecast's laws."""
    if not isinstance(drawn.law, Fit):
        return ()
    try:
        others = ensemble_frontier(laws, runs, y=y, law=drawn.law)
    except NoFrontier:  # most of them have no optimum
        return ()
    at, mean = (each.at(drawn.range[1]).iloc[0] for each in (drawn, others))
    if at["N_lo"] <= mean["N"] <= at["N_hi"]:
        return ()
    n, low, high = (human(mean[name]) for name in ("N", "N_lo", "N_hi"))
    text = (
        f"By the {others.method} N* is {n} [{low}, {high}] there, outside the interval of the {drawn.law.law.name} law."
    )
    return (Flag(kind="other_laws", subject="N*", number=float(mean["N"]), text=text),)


def failed_words(failures: Mapping[int, Sequence[Flag]]) -> list[str]:
    """Say which approaches were not possible and why."""
    return [f"Approach {k} is not possible: {why_not(flags).rstrip('.')}." for k, flags in failures.items()]
