"""Loss and accuracies at scales not trained yet, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result, fact_lines, text_table
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.forecasts.points import AUTO, Forecaster, accuracy_forecaster, forecaster
from aimscale.analysis.forecasts.stack import CONFIDENCE
from aimscale.analysis.laws.base import Law
from aimscale.analysis.table.names import Exclusion, names_of
from aimscale.analysis.table.points import complete
from aimscale.analysis.table.read import probe_frame
from aimscale.analysis.words import Flag, human, percent

ENDS = ("value", "ci_lo", "ci_hi", "pi_lo", "pi_hi")
RECORD = Path(__file__).with_name("record.csv")
"""How forecasts at a distance fared on public tables, as `tests/experiments/board.py` writes it."""
BINS = (1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
"""Distances, in factors beyond the table, between which forecasts are counted together."""
_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True, kw_only=True)
class Record:
    """How forecasts of one range of distances fared; every family of tables counts alike."""

    low: float
    high: float
    """Factors beyond the largest compute."""
    num_families: int
    """Families of tables, those that share runs counting once."""
    inside: float
    """Share of losses inside their 95 % intervals."""
    error: float
    """Mean absolute error of ln loss."""
    accuracy_inside: float
    """Share of accuracies inside their intervals."""
    accuracy_error: float
    """Mean absolute error of accuracies, as fractions."""


@cache
def records() -> tuple[Record, ...]:
    """The record that comes with the package, nearest first."""
    rows = pd.read_csv(RECORD, comment="#").to_dict("records")
    return tuple(Record(**{str(k): v for k, v in row.items()}) for row in rows)


def record(distance: float) -> Record | None:
    """The record at a distance; of the farthest range beyond it, None inside the table."""
    if distance <= BINS[0]:
        return None
    return next((each for each in records() if distance <= each.high), records()[-1])


@dataclass(frozen=True, kw_only=True, repr=False)
class Ahead(Result):
    """Forecasts at one scale or several."""

    table: pd.DataFrame
    """One row a scale and quantity: at (its number), the scale's variables, quantity (a column, or TASK:KIND for an
    accuracy), value, ci_lo, ci_hi (of the curve), pi_lo, pi_hi (of one measurement), distance (how many times beyond
    the table), rival_lo, rival_hi (the lowest and highest law or link)."""
    scales: tuple[dict[str, float], ...]
    """The scales: variable -> value."""
    forecasters: Mapping[str, Forecaster] = field(repr=False)
    """Quantity -> the laws and links that forecast it, the loss first."""
    exclusions: tuple[Exclusion, ...]
    names: Mapping[str, str]
    """Column -> its name in the file, where that differs."""
    flags: tuple[Flag, ...] = ()
    """Which accuracies were not forecast and why."""

    @property
    def loss(self) -> Forecaster:
        """What forecasts the loss."""
        return next(iter(self.forecasters.values()))

    def headline(self) -> str:
        """How many scales, from how many runs."""
        where = "1 scale" if len(self.scales) == 1 else f"{len(self.scales)} scales"
        return f"Forecast of {len(self.forecasters)} quantities at {where} from {len(self.loss.basis.index)} rows"

    def facts(self) -> list[tuple[str, str]]:
        """Flags, the laws and their backtests, what intervals cover, what was left out."""
        parts = "its noise, the parameters, the laws' spread and their misfit"
        return [
            *(("with care", str(flag)) for flag in self.flags),
            *self.loss.stack.facts(),
            ("intervals", f"{CONFIDENCE:.0%} of one new run: {parts}".replace("%", " %")),
            *([("left out", "; ".join(map(str, self.exclusions)))] if self.exclusions else []),
        ]

    def summary(self) -> str:
        """The facts, then a block a scale, with how forecasts at its distance fared."""
        blocks = [fact_lines(self.facts())]
        for number, place in enumerate(self.scales):
            rows = self.table[self.table["at"] == number]
            far = float(rows["distance"].iloc[0])
            reach = f"{human(far)} times beyond the table" if far > 1 else "inside the table"
            said = [("at", f"{scale_words(place)}, {reach}")]
            said += [("record", words) for words in self._record(far)]
            cells = [self._cells(row) for row in rows.to_dict("records")]
            blocks.append(f"{fact_lines(said)}\n{text_table(cells)}")
        return "\n\n".join(blocks)

    def _record(self, distance: float) -> list[str]:
        """Tell how forecasts at a distance fared, or why none is alike."""
        if distance > 1 and not self.loss.stack.is_tested:
            return ["none: public tables that were forecast were large enough for backtests, this one is not"]
        return record_words(record(distance) if self.loss.is_usual else None, accuracies=len(self.forecasters) > 1)

    def _cells(self, row: Mapping[Any, Any]) -> dict[str, str]:
        several = len(self.forecasters[row["quantity"]].stack.curves) > 1
        return {
            "quantity": self.names.get(row["quantity"], row["quantity"]),
            "forecast": human(row["value"], 4),
            "95 % interval": f"[{human(row['pi_lo'], 4)}, {human(row['pi_hi'], 4)}]",
            "single laws": f"{human(row['rival_lo'], 4)} to {human(row['rival_hi'], 4)}" if several else "",
        }


def record_words(found: Record | None, *, accuracies: bool = False) -> list[str]:
    """How forecasts at a distance fared on public tables, in a line."""
    if found is None:
        return []
    inside, error = f"{percent(found.inside)} of losses", f"{percent(found.error)}"
    if accuracies:
        inside += f" and {percent(found.accuracy_inside)} of accuracies"
        error += f" and {100 * found.accuracy_error:.1f} points"
    return [
        f"{inside} inside their intervals, mean error {error}, on {found.num_families} families of public tables "
        f"forecast {found.low:g} to {found.high:g} times beyond"
    ]


def forecast(
    df: pd.DataFrame,
    at: str | Mapping[str, float] | Sequence[Mapping[str, float]],
    *,
    law: Forecaster | Sequence[Law | str] | str = AUTO,
    y: str = "val_loss",
) -> Ahead:
    """Forecast the loss at scales not trained yet, and every probe's accuracy, directly or by way of the loss.

    Args:
        df: one row per point, with `probes` for accuracies.
        at: N and D of a run (C, or U of repeated data, where the laws have them), or several; or "N=7e9,D=2B".
        law: "auto", or the laws to try (`forecaster`), or what forecasts the loss.
        y: column of the loss.

    Returns:
        A forecast per scale and quantity, with intervals of the curve and of one run.

    Raises:
        AnalysisError: a variable is missing or unknown, or no law can be fitted.

    Example:
        >>> forecast(read_table("results.parquet"), {"N": 7e9, "D": 2e9})
    """
    if isinstance(at, str):
        at = parse_scale(at, "at")
    scales = [dict(at)] if isinstance(at, Mapping) else [dict(each) for each in at]
    if not scales:
        raise AnalysisError("There is no scale to forecast at; give N and D.")
    loss = law if isinstance(law, Forecaster) else forecaster(df, law=law, y=y)
    by = {y: loss}
    flags = []
    probes = probe_frame(complete(df)) if "probes" in df.columns else pd.DataFrame()
    for key, probed in probes.groupby(["task", "kind"], sort=True) if len(probes) else ():
        name = ":".join(map(str, key))
        try:
            known = probed.dropna(subset=["top1", y])
            by[name] = accuracy_forecaster(known, law=loss.basis.laws, loss=y, made=loss.made)
        except AnalysisError as error:
            flags.append(Flag(kind="not_forecast", subject=name, more=(str(error),)))
    rows = [_row(name, found, number, each) for number, each in enumerate(scales) for name, found in by.items()]
    return Ahead(
        table=pd.concat(rows, ignore_index=True),
        scales=tuple({v: float(value) for v, value in each.items()} for each in scales),
        forecasters=by,
        exclusions=loss.basis.exclusions,
        names=names_of(df),
        flags=tuple(flags),
    )


def _row(name: str, found: Forecaster, number: int, at: Mapping[str, float]) -> pd.DataFrame:
    row = found.predict(at).assign(at=number, quantity=name, **at)
    return row[["at", *at, "quantity", *ENDS, "distance", "rival_lo", "rival_hi"]]


def parse_scale(text: str, option: str) -> dict[str, float]:
    """`N=1e9,D=2B` as numbers (k, M, B, T).

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
    return out


def scale_words(at: Mapping[str, float]) -> str:
    """A scale in words."""
    return ", ".join(f"{v} = {human(value, 4)}" for v, value in at.items())
