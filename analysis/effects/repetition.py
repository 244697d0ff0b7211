"""What repeated images are worth: Muennighoff et al.'s law, read in words that hold even where R_D has no upper end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import ROBUST, Objective
from aimscale.analysis.fitting.result import Fit, interval
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import REPEATED, REPEATED_DATA, effective
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.names import their_name
from aimscale.analysis.table.points import complete, resolve_columns

PUBLISHED = 15.387
"""R_D of Muennighoff et al. 2023, language, up to 44 epochs."""
EPOCHS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
UNBOUNDED = 0.9e3
"""An R_D beyond this is the search's own end (1e3): repeats cannot be told from new images."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Repeats(Result):
    """What the k-th sight of an image is worth."""

    fit: Fit
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

    def summary(self) -> str:
        """Sentences and the table."""
        shown = self.table.to_string(index=False, float_format=lambda v: f"{v:.3g}")
        return "\n".join([*self.sentences(), "", shown])


def repeats(
    df: pd.DataFrame,
    *,
    y: str = "val_loss",
    columns: dict[str, str] | None = None,
    objective: Objective | str = ROBUST,
    resamples: int = 1000,
) -> Repeats:
    """Fit the law of repeated data; with one model size, its data half alone.

    Args:
        df: a table with images seen D, different images U and, where it varies, N.
        columns: variable -> column.

    Raises:
        AnalysisError: no repeats in the table, a single pool size, or too few points.
    """
    names = resolve_columns(REPEATED_DATA, df, columns)
    rows = complete(df)
    uniques = rows[names["U"]].dropna().unique()
    ratio = (rows[names["D"]] / rows[names["U"]]).dropna()
    if len(uniques) < 2:
        raise AnalysisError(
            f"{their_name(df, names['U'])} takes {len(uniques)} value{'s' * (len(uniques) != 1)}, so what repeats are "
            "worth cannot be told from what new data are worth; run pools of several sizes."
        )
    if not (ratio > 1.5).any():
        raise AnalysisError(
            f"No row repeats its data (most passes: {ratio.max():.3g}); run small pools at large budgets."
        )
    n = next((c for c in ((columns or {}).get("N"), "N", "params_total") if c and c in rows), None)
    law = REPEATED if n is not None and varies(rows[n]) else REPEATED_DATA
    found = fit(law, rows, y=y, columns=columns, objective=objective, resamples=resamples)
    most = float(ratio.max())
    draws = found.draws.get("R_D", np.array([found.law_params["R_D"]]))
    passes = sorted({k for k in EPOCHS if k <= 4 * most} | {max(2, int(most))})
    records = [_record(k, found.law_params["R_D"], draws, most, found.confidence) for k in passes]
    return Repeats(fit=found, max_epochs=most, table=pd.DataFrame(records), num_uniques=len(uniques))


def _record(k: int, r: float, draws: Array, most: float, confidence: float) -> dict[str, Any]:
    """A row of `Repeats.table`."""

    def worth(r_d: Array) -> dict[str, Array]:
        return {"worth": np.exp(-(k - 1) / r_d), "effective": effective(np.ones(len(r_d)), np.full(len(r_d), k), r_d)}

    row: dict[str, Any] = {"epochs": k}
    value = worth(np.array([r]))
    for name, each in worth(draws).items():
        ends = interval(each, confidence)
        row |= {name: float(value[name][0]), f"{name}_low": ends.low, f"{name}_high": ends.high}
    return row | {"measured": k <= most}
