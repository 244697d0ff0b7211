"""What repeated images are worth: Muennighoff et al.'s law, read in words that hold even where R_D has no upper end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.laws.base import Law
from aimscale.analysis.laws.catalogue import effective, repeated
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.names import their_name
from aimscale.analysis.table.points import complete, resolve_columns

PUBLISHED = 15.387
"""R_D of Muennighoff et al. 2023, language, up to 44 epochs."""
EPOCHS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
UNBOUNDED = 0.9e3
"""An R_D beyond this is the search's own end (1e3): repeats cannot be told from new images."""
REPEATS = 1.5
"""Most passes of a table that repeats its data are more than this."""
SHARE = 0.05
"""Pools and sizes of fewer of the rows are not left out in turn: none of them decides."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Repeats(Result):
    """What the k-th sight of an image is worth."""

    fit: Fit
    """The law; the interval of R_D holds what the table gives without any one pool or size, too."""
    without: dict[str, float]
    """R_D without one pool or size, such as "U = 1000", rising; empty where the rest of the table has no such law."""
    max_epochs: float
    """Most passes over the same images in the table."""
    table: pd.DataFrame
    """One row a number of passes k: epochs; worth, worth_low, worth_high (of the k-th sight, a share of a new image's);
    effective, effective_low, effective_high (all k passes in passes of new images); measured (within the table)."""
    num_uniques: int

    @property
    def is_unbounded(self) -> bool:
        """Whether the data allow that repeats are as good as new images."""
        i = self.fit.intervals.get("R_D")
        return self.fit.params["R_D"] > UNBOUNDED or (i is not None and i.high > UNBOUNDED)

    @property
    def sample(self) -> str:
        """What a pool is of, in words; a foreign table, whose losses have no unit of ours, does not say."""
        return "image" if self.fit.loss_unit else "sample"

    def sentences(self) -> list[str]:
        """R_D, what passes are worth, and what cannot be said."""
        r, i, what = self.fit.params["R_D"], self.fit.intervals.get("R_D"), self.sample
        ends = f" [{i.low:.3g}, {i.high:.3g}]" if i else ""
        lines = [
            f"R_D = {r:.3g}{ends} ({PUBLISHED:.1f} for language, Muennighoff et al. 2023): a repeat is worth half of a "
            f"new {what} after {r * np.log(2):.3g} repeats."
            if not self.is_unbounded
            else f"R_D has no upper end in these data; it is at least {i.low if i else r:.3g}. Up to "
            f"{self.max_epochs:.3g} passes, repeats cannot be told from new {what}s."
        ]
        if self.without:
            rest = [f"{r if r <= UNBOUNDED else np.inf:.3g} without {name}" for name, r in self.without.items()]
            lines.append(f"R_D is {rest[0]}, {rest[-1]}; the interval holds both.")
        measured = self.table[self.table["measured"]]
        told = measured[measured["epochs"].isin((2, 4, 8, 16, 32)) | (measured["epochs"] == measured["epochs"].max())]
        lines += [
            f"Pass {row.epochs} over the same {what}s is worth {100 * row.worth:.0f} % [{100 * row.worth_low:.0f}, "
            f"{100 * row.worth_high:.0f}] of a pass over new ones; all {row.epochs} are worth {row.effective:.2f} "
            f"[{row.effective_low:.2f}, {row.effective_high:.2f}]."
            for row in told.itertuples()
        ]
        lines.append(
            f"Fitted to {self.fit.num_points} points at {self.num_uniques} pool sizes, up to {self.max_epochs:.3g} "
            f"passes; {self.fit.interval_method}."
        )
        return [*lines, *(str(flag) for flag in self.fit.flags if flag.subject != "R_D")]

    def headline(self) -> str:
        """R_D in words."""
        return self.sentences()[0]


def repeats(df: pd.DataFrame, *, y: str = "val_loss", resamples: int = 1000) -> Repeats:
    """Fit the law of repeated data; with one model size, its data half alone.

    Args:
        df: a table with images seen D, different images U and, where it varies, N.

    Returns:
        The law, and what each pass over the same data is worth.

    Raises:
        AnalysisError: no repeats in the table, a single pool size, or too few points.

    Example:
        >>> repeats(read_table("repeats.parquet"), resamples=20).table
    """
    names = resolve_columns(repeated(sizes=False), df)
    rows = complete(df)
    uniques = rows[names["U"]].dropna().unique()
    most = _passes(rows, names)
    if len(uniques) < 2:
        raise AnalysisError(
            f"{their_name(df, names['U'])} takes {len(uniques)} value{'s' * (len(uniques) != 1)}, so what repeats are "
            "worth cannot be told from what new data are worth; run pools of several sizes."
        )
    if not most > REPEATS:
        raise AnalysisError(f"No row repeats its data (most passes: {most:.3g}); run small pools at large budgets.")
    n = next((c for c in ("N", "params_total") if c in rows), None)
    law = repeated(sizes=n is not None and varies(rows[n]))
    found = fit(law, rows, y=y, resamples=resamples)
    without = dict(sorted(_without(law, rows, found.columns), key=lambda each: each[1]))
    if "R_D" in found.intervals:
        ends = [found.intervals["R_D"].low, found.intervals["R_D"].high, *without.values()]
        held = Interval(low=min(ends), high=max(ends), method="widened to each pool and size left out")
        found = replace(found, intervals={**found.intervals, "R_D": held})
    passes = sorted({k for k in EPOCHS if k <= 4 * most} | {max(2, int(most))})
    return Repeats(
        fit=found,
        without=without,
        max_epochs=most,
        table=pd.DataFrame([_record(k, found, most) for k in passes]),
        num_uniques=len(uniques),
    )


def _passes(rows: pd.DataFrame, names: Mapping[str, str]) -> float:
    """Most passes over the same images."""
    return float((rows[names["D"]] / rows[names["U"]]).max())


def _without(law: Law, rows: pd.DataFrame, names: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    """R_D without each pool and each size in turn, as far as the rest still repeats its data and allows the law."""
    for column in (names[v] for v in ("U", "N") if v in names):
        for value in np.unique(rows[column].dropna()):
            rest = rows[rows[column] != value]
            if len(rows) - len(rest) >= SHARE * len(rows) and _passes(rest, names) > REPEATS:
                with contextlib.suppress(AnalysisError):  # a single pool or size is left
                    r_d = fit(law, rest, y=names["y"], resamples=0).params["R_D"]
                    yield f"{their_name(rows, column)} = {value:.4g}", r_d


def _record(k: int, found: Fit, most: float) -> dict[str, Any]:
    """A row of `Repeats.table`: what passes are worth rises with R_D, so its interval gives theirs."""
    value, known = found.params["R_D"], found.intervals.get("R_D")
    r_d = np.array([value, *((known.low, known.high) if known else (np.nan, np.nan))])
    worth, sums = np.exp(-(k - 1) / r_d), effective(np.ones(3), np.full(3, k), r_d)
    row: dict[str, Any] = {"epochs": k}
    for name, ends in (("worth", worth), ("effective", sums)):
        row |= {f"{name}{end}": float(v) for end, v in zip(("", "_low", "_high"), ends, strict=True)}
    return row | {"measured": k <= most}
