"""Loss and accuracies at a scale not trained yet, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.links import chance_level, forecast, link
from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import ROBUST, Objective
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Law
from aimscale.analysis.next.backtest import AUTO, choose, with_compute
from aimscale.analysis.next.proposal import place_of
from aimscale.analysis.table.points import complete
from aimscale.analysis.table.read import probe_frame
from aimscale.analysis.words import Flag

ENDS = ("value", "ci_lo", "ci_hi", "pi_lo", "pi_hi")
MIN_PROBED = 6
"""Probed rows below which no link from loss to accuracy is fitted."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Ahead(Result):
    """Forecasts at one scale."""

    table: pd.DataFrame
    """One row a quantity: quantity (a column, or TASK:KIND for a probe's accuracy), value, ci_lo, ci_hi (of the curve),
    pi_lo, pi_hi (of one measurement)."""
    at: dict[str, float]
    """Variable -> value."""
    law: Fit
    """The law of the loss."""
    beyond_range: float
    """Largest factor by which a variable lies outside the fitted range; 1 inside."""
    flags: tuple[Flag, ...] = ()
    """Which accuracies were not forecast and why, and what to be careful about in the law."""

    def headline(self) -> str:
        """Scale, law, distance."""
        fresh = ["U = D"] if "U" in self.law.law.variables and "U" not in self.at else []  # as `with_variables` has it
        place = ", ".join([f"{k} = {v:.4g}" for k, v in self.at.items()] + fresh)
        far = f"{self.beyond_range:.3g} times beyond the fitted range" if self.beyond_range > 1 else "inside the range"
        return f"At {place}, {far}, by {self.law.law.formula} on {self.law.num_points} points"

    def summary(self) -> str:
        """A line a quantity, with what the intervals are."""
        lines = [
            f"  {self.law.names.get(quantity, quantity)}: {value:.4g} (curve {ci_lo:.4g} to {ci_hi:.4g}; "
            f"one measurement {pi_lo:.4g} to {pi_hi:.4g})"
            for quantity, value, ci_lo, ci_hi, pi_lo, pi_hi in self.table.to_numpy()
        ]
        note = f"Intervals of {self.law.confidence:.0%}: {self.law.interval_method}."
        gone = [f"Left out: {'; '.join(map(str, self.law.exclusions))}."] if self.law.exclusions else []
        return "\n".join([f"{self.headline()}:", *lines, note, *gone, *map(str, self.flags)])


_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_scale(text: str, option: str) -> dict[str, float]:
    """`N=1e9,D=2B` as numbers (k, M, B, T), N and D at least.

    Raises:
        AnalysisError: not of that form.
    """
    out: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (each.strip() for each in part.partition("="))
        if name in out:
            raise AnalysisError(f"{option} names {name} twice in {text!r}.")
        try:
            out[name] = float(value[:-1]) * _UNITS[value[-1]] if value[-1:] in _UNITS else float(value)
        except ValueError:
            raise AnalysisError(f"{option} takes numbers as in N=1e9,D=2B (k, M, B or T), not {part!r}.") from None
        if not 0 < out[name] < np.inf:
            raise AnalysisError(f"{option} takes positive values as in N=1e9,D=2B, not {part!r}.")
    if not {"N", "D"} <= set(out):
        raise AnalysisError(f"{option} needs both N and D, as in N=1e9,D=2B, not {text!r}.")
    return out


def ahead(
    df: pd.DataFrame,
    at: Mapping[str, float],
    *,
    law: Law | str = AUTO,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    objective: Objective | str = ROBUST,
    link_kind: str = "sigmoid",
    resamples: int = 1000,
) -> Ahead:
    """Forecast the loss at a scale by a law, and every probe's accuracy by a link from the loss.

    Args:
        df: one row per point, with `probes` for accuracies.
        at: N and D of the run (and U where the law has it).
        law: a law, its name, or "auto" (`choose`).
        columns: variable of the law -> column.

    Raises:
        AnalysisError: a variable is missing or unknown, or the law cannot be fitted.
    """
    if y in df.columns and complete(df).empty:
        raise AnalysisError("No row of the table is complete, so there is nothing to forecast from.")
    df = with_compute(df, columns)
    options: dict[str, Any] = {"y": y, "columns": columns, "objective": objective, "resamples": resamples}
    found = choose(law, df, **options).best if law == AUTO else fit(law, df, **options)
    place = place_of(at, found, df)
    loss = found.predict(place)
    rows: list[dict[str, Any]] = [{"quantity": y, **{name: float(loss[name].iloc[0]) for name in ENDS}}]
    flags = []
    probes = probe_frame(complete(df)) if "probes" in df.columns else pd.DataFrame()
    for key, group in probes.groupby(["task", "kind"], sort=True) if len(probes) else ():
        name, probed = ":".join(map(str, key)), group.dropna(subset=["top1", y])
        try:
            if len(probed) < MIN_PROBED:
                raise AnalysisError(f"it has {len(probed)} probed rows, and a link needs {MIN_PROBED}.")
            second = link(probed, kind=link_kind, loss=y, chance=chance_level(probed), resamples=resamples)
            accuracy = forecast(found, second, place).table.rename(columns={"accuracy": "value"})
        except AnalysisError as error:
            flags.append(Flag(kind="not_forecast", subject=name, more=(str(error),)))
            continue
        rows.append({"quantity": name, **{each: float(accuracy[each].iloc[0]) for each in ENDS}})
    return Ahead(
        table=pd.DataFrame(rows),
        at={k: float(v) for k, v in at.items()},
        law=found,
        beyond_range=float(loss["beyond_range"].iloc[0]),
        flags=(*flags, *found.flags),
    )
