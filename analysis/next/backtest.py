"""Which law? The simplest of those that predict the table's own largest scales from the smaller ones equally well.

Never by R^2 on the points that a law was fitted to: a law with more parameters always wins that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.holdout import SHARE, largest, scale_values
from aimscale.analysis.fitting.objectives import ROBUST, Objective
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.table.names import no_column, our_name

AUTO = "auto"
"""Name that stands for a choice: of the joint laws, or with `auto:C` of the laws in one variable."""
JOINT = ("overtrained", "chinchilla", "kaplan", "coupled", "farseer")
WITH_REPEATS = ("repeated", "overfitting")
"""Further candidates where rows see their pool more than once."""
ONE_VARIABLE = ("power", "power_offset", "saturating")
STANDARD_ERRORS = 1.0
"""A law is as good as the best if its mean error exceeds that by at most so many standard errors."""
SCALES_PER_PARAMETER = 2.0
"""Fewer scales below the cut than this for each parameter are too few to fit a law to (seeds of a scale count once).
Above it a point for each parameter is asked for: five points cannot judge nine parameters."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Choice(Result):
    """Laws ranked by what they predict beyond their data."""

    table: pd.DataFrame
    """One row a law, best first: law, num_params, mean_error (mean |log error|), log_rmse, difference (of mean_error
    from the best law's), difference_se, reason (why it was not ranked), as_good."""
    best: Fit
    """The chosen law, fitted to all points."""
    by: str
    """The scale that was held out."""
    cut: float
    """Rows at this value or above were held out."""
    num_train: int
    """Points below it."""
    num_test: int
    """Points held out."""

    def headline(self) -> str:
        """The law and how it was found."""
        return f"{self.best.law.name} of {len(self.table)} laws, by predicting the largest {self.by}"

    def summary(self) -> str:
        """The ranking in words, then the law."""
        return f"{self.sentence()}\n\n{self.best.summary()}"

    def sentence(self) -> str:
        """The choice, the ranking and its error, in words."""
        ranked = self.table.dropna(subset="log_rmse")
        gaps = [
            f" (+{d:.2%} ± {se:.2%})" if d else ""
            for d, se in zip(ranked["difference"], ranked["difference_se"], strict=True)
        ]
        told = ", ".join(
            f"{law} {e:.2%}{gap}" for law, e, gap in zip(ranked["law"], ranked["mean_error"], gaps, strict=True)
        )
        equal = [law for law in ranked.loc[ranked["as_good"], "law"] if law != self.best.law.name]
        why = (
            f"the simplest of those within one standard error of the best ({', '.join(equal)} as good)"
            if equal
            else "no other comes within one standard error"
        )
        reasons = zip(self.table["law"], self.table["reason"], strict=True)
        unranked = "".join(f" {law} was not ranked: {reason}" for law, reason in reasons if reason)
        return (
            f"Chosen: {self.best.law.name}, {why}. Each law was fitted to the {self.num_train} points below "
            f"{self.by} = {self.cut:.3g} and predicted the {self.num_test} at or above it; mean error {told}.{unranked}"
        )


def candidates(name: str, df: pd.DataFrame, columns: Mapping[str, str] | None = None) -> list[Law]:
    """The laws that `auto` (joint laws) or `auto:N` (laws of N alone) stands for on this table.

    Raises:
        AnalysisError: another name.
    """
    base, _, variable = name.partition(":")
    if base != AUTO:
        raise AnalysisError(f"{name!r} is one law and no choice; give auto, or auto:N for laws of N alone.")
    if variable:
        return [find_law(f"{law}:{variable}") for law in ONE_VARIABLE]
    unique, seen = (_column(df, columns, v) for v in ("U", "D"))
    repeats = unique is not None and seen is not None and bool(np.nanmax(df[seen] / df[unique]) > 1.01)
    return [find_law(law) for law in (*JOINT, *(WITH_REPEATS if repeats else ()))]


def choose(
    laws: Sequence[Law | str] | str,
    df: pd.DataFrame,
    *,
    by: str | None = None,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    objective: Objective | str = ROBUST,
    share: float = SHARE,
    **options: Any,
) -> Choice:
    """Choose a law by a backtest: fit the candidates to the smaller scales, predict the largest, compare.

    Every law predicts the same points, so the difference of two laws' mean log errors has a paired standard error.
    Of the laws within one of it from the best, the one with fewest parameters is taken (Breiman's rule): the extra
    parameters of another have earned nothing that can be told from luck.

    Args:
        laws: candidates, or "auto" (see `candidates`).
        by: scale to hold out: C (default; 6 N D where the table has no such column), or a column or variable.
        columns: variable of the laws -> column.
        share: share of the points held out, those of largest scale.
        options: further arguments of `fit` for the law that is chosen (`resamples`, `weights`...).

    Raises:
        AnalysisError: no law could be scored, or too few points are held out.
    """
    named = candidates(laws, df, columns) if isinstance(laws, str) else laws
    found = [find_law(each) if isinstance(each, str) else each for each in named]
    df = with_compute(df, columns)
    by = by or (found[0].variables[0] if len(found[0].variables) == 1 else "C")
    test, cut = _held_out(df, by, y, columns, share)
    misses: dict[str, Array] = {}
    reasons: dict[str, str] = {}
    for law in found:
        try:
            misses[law.name] = _misses(law, df, test, y, columns, objective)
        except AnalysisError as error:
            reasons[law.name] = str(error)
    if not misses:
        raise AnalysisError(
            f"No law could be scored by holding out {by}: {next(iter(reasons.values()))} Name one with --law."
        )
    table = _ranked(found, misses, reasons)
    good = table[table["as_good"]].sort_values(["num_params", "mean_error"])
    chosen = next(law for law in found if law.name == good["law"].iloc[0])
    best = fit(chosen, df, y=y, columns=columns, objective=objective, **options)
    return Choice(table=table, best=best, by=by, cut=cut, num_train=int((~test).sum()), num_test=int(test.sum()))


def _column(df: pd.DataFrame, columns: Mapping[str, str] | None, variable: str) -> str | None:
    """The table's column of a variable, if it has one."""
    name = (columns or {}).get(variable) or our_name(df, variable)
    return name if name in df.columns else None


def with_compute(df: pd.DataFrame, columns: Mapping[str, str] | None) -> pd.DataFrame:
    """The table with a column C = 6 N D where it counts no FLOPs of its own."""
    n, d = _column(df, columns, "N"), _column(df, columns, "D")
    if _column(df, columns, "C") is not None or n is None or d is None:
        return df
    size, seen = (pd.to_numeric(df[name], errors="coerce").astype(float) for name in (n, d))  # integers overflow
    return df.assign(C=6 * size * seen)


def _held_out(
    df: pd.DataFrame, by: str, y: str, columns: Mapping[str, str] | None, share: float
) -> tuple[Array, float]:
    """Which rows to hold out (mask), and from which value of the scale on."""
    scale = scale_values(df, by, columns)
    if y not in df.columns:
        raise no_column(df, y)
    usable = np.isfinite(scale) & np.isfinite(pd.to_numeric(df[y], errors="coerce").to_numpy(float))
    test = np.zeros(len(df), bool)
    test[usable] = largest(scale[usable], share=share)
    return test, float(scale[test].min())


def _misses(
    law: Law, df: pd.DataFrame, test: Array, y: str, columns: Mapping[str, str] | None, objective: Objective | str
) -> Array:
    """|ln prediction - ln measurement| (num_test,) of a law fitted to the rest; infinite where it predicts none.

    Raises:
        AnalysisError: the law cannot be fitted, or has more parameters than the points can carry or judge.
    """
    below = fit(law, df[~test], y=y, columns=columns, objective=objective, resamples=0)
    num = len(law.parameters)
    scales = len(below.data[list(law.variables)].drop_duplicates())
    if scales < SCALES_PER_PARAMETER * num:
        raise AnalysisError(f"{scales} scales below the cut are too few for its {num} parameters.")
    if test.sum() < num:
        raise AnalysisError(f"{test.sum()} points above the cut are too few to judge its {num} parameters by.")
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.abs(np.log(below.predict(df[test])["value"].to_numpy() / pd.to_numeric(df.loc[test, y]).to_numpy()))
    return np.where(np.isfinite(out), out, np.inf)


def _ranked(laws: Sequence[Law], misses: Mapping[str, Array], reasons: Mapping[str, str]) -> pd.DataFrame:
    """Every law's error, its paired difference from the best and the standard error of that, best first."""
    best = min(misses.values(), key=np.mean)
    rows = []
    for law in laws:
        miss = misses.get(law.name, np.full(len(best), np.nan))
        rows.append(
            {
                "law": law.name,
                "num_params": len(law.parameters),
                "mean_error": np.mean(miss),
                "log_rmse": np.sqrt(np.mean(miss**2)),
                "difference": np.mean(miss - best),
                "difference_se": np.std(miss - best, ddof=1) / np.sqrt(len(best)),
                "reason": reasons.get(law.name, ""),
            }
        )
    table = pd.DataFrame(rows)
    table["as_good"] = table["difference"] <= STANDARD_ERRORS * table["difference_se"]
    return table.sort_values("mean_error", na_position="last", ignore_index=True)
