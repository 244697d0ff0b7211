"""Worth of repeated images: Muennighoff et al.'s law, read in words that hold even where R_D has no upper end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array, Params
from aimscale.analysis.laws.catalogue import effective, repeated
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.names import their_name
from aimscale.analysis.table.points import complete, resolve_columns

PUBLISHED = 15.387
"""R_D of Muennighoff et al. 2023, language, up to 44 epochs."""
EPOCHS = (2, 4, 8, 16, 32, 64, 128, 256)
"""Passes that the table tells of beside the most that were measured, up to four times these."""
UNBOUNDED = 0.9e3
"""An R_D beyond this is the search's own end (1e3): repeats cannot be told from new images."""
REPEATS = 1.5
"""Most passes of a table that repeats its data are more than this."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Repeats(Result):
    """Worth of the k-th pass over the same images."""

    fit: Fit
    """The law."""
    max_epochs: float
    """Most passes over the same images in the table."""
    table: pd.DataFrame
    """One row a number of passes k: epochs; worth, worth_low, worth_high (of the k-th pass, a share of one over new
    images); effective, effective_low, effective_high (all k passes in passes over new images); measured (within the
    table)."""
    num_uniques: int
    """Pool sizes in the table."""

    @property
    def is_unbounded(self) -> bool:
        """Whether the data allow that repeats are as good as new images."""
        return max(self.fit.params["R_D"], self.fit.intervals["R_D"].high) > UNBOUNDED

    @property
    def sample(self) -> str:
        """Name of one item of a pool; a foreign table, whose losses have no unit of ours, does not say."""
        return "image" if self.fit.loss_unit else "sample"

    def headline(self) -> str:
        """Tell R_D."""
        r, i = self.fit.params["R_D"], self.fit.intervals["R_D"]
        if self.is_unbounded:
            return (
                f"R_D has no upper end in these data; it is at least {i.low:.3g}. Up to {self.max_epochs:.3g} passes, "
                f"repeats cannot be told from new {self.sample}s."
            )
        return (
            f"R_D = {r:.3g} [{i.low:.3g}, {i.high:.3g}] ({PUBLISHED:.1f} for language, Muennighoff et al. 2023): a "
            f"repeat is worth half of a new {self.sample} after {r * np.log(2):.3g} repeats."
        )

    def facts(self) -> list[tuple[str, str]]:
        """Return cautions about the fit, R_D, and what it was fitted to."""
        pools = f"{self.fit.num_points} points at {self.num_uniques} pool sizes, up to {self.max_epochs:.3g} passes"
        cautions = [("with care", str(flag)) for flag in self.fit.flags if flag.subject != "R_D"]
        return [*cautions, ("worth", self.headline()), ("fitted to", f"{pools}; {self.fit.interval_method}")]


def repeats(df: pd.DataFrame, *, y: str = "val_loss") -> Repeats:
    """Fit the law of repeated data; with one model size, its data half alone.

    Args:
        df: a table with images seen D, different images U and, where it varies, N.

    Returns:
        The law, and what each pass over the same data is worth.

    Raises:
        AnalysisError: no repeats in the table, a single pool size, or too few points.

    Example:
        >>> repeats(read_table("repeats.parquet")).table
    """
    names, rows = resolve_columns(repeated(sizes=False), df), complete(df)
    num_uniques, most = rows[names["U"]].nunique(), float((rows[names["D"]] / rows[names["U"]]).max())
    if num_uniques < 2:
        raise AnalysisError(
            f"{their_name(df, names['U'])} takes {num_uniques} value{'s' * (num_uniques != 1)}, so what repeats are "
            "worth cannot be told from what new data are worth; run pools of several sizes."
        )
    if not most > REPEATS:
        raise AnalysisError(f"No row repeats its data (most passes: {most:.3g}); run small pools at large budgets.")
    size = next((c for c in ("N", "params_total") if c in rows), None)
    found = fit(rows, repeated(sizes=size is not None and varies(rows[size])), y=y)
    passes = sorted({k for k in EPOCHS if k <= 4 * most} | {max(2, int(most))})
    table = _worths(np.array(passes), found).assign(measured=[k <= most for k in passes])
    return Repeats(fit=found, max_epochs=most, table=table, num_uniques=num_uniques)


def _worths(passes: Array, found: Fit) -> pd.DataFrame:
    """Return the columns of `Repeats.table`, with intervals of the worths themselves: R_D may have no upper end."""

    def totals(params: Params, passes: Array = passes) -> Array:
        return effective(np.ones(len(passes)), passes, np.atleast_1d(params["R_D"])[:, None])

    def worths(params: Params) -> Array:
        return totals(params) - totals(params, passes - 1)

    out = {"epochs": passes}
    for name, function, most in (("worth", worths, 1), ("effective", totals, passes)):
        value, *_ = found.estimate.error_of(function)
        low, high = np.clip(found.estimate.interval_of(function), 0, most)
        out |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(out)
