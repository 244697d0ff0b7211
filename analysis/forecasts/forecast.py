"""Loss and accuracies at scales not trained yet, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis.display import Drawing, Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE
from aimscale.analysis.fitting.diagnostics import blind_flags
from aimscale.analysis.fitting.result import Interval
from aimscale.analysis.forecasts.forecaster import Forecaster, accuracy_forecaster, forecaster
from aimscale.analysis.forecasts.points import AUTO, JOINT, Cache
from aimscale.analysis.laws.base import Law
from aimscale.analysis.table.names import Exclusion, names_of
from aimscale.analysis.table.points import complete
from aimscale.analysis.table.read import probe_frame
from aimscale.analysis.words import Flag, human, percent

ENDS = ("value", "ci_lo", "ci_hi", "pi_lo", "pi_hi")
_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecast(Result):
    """Forecasts at one scale or several."""

    plot = Drawing("scaling.plot_forecast")

    table: pd.DataFrame
    """One row a scale and quantity: at (its number), the scale's variables, quantity (a column, or TASK:KIND for an
    accuracy), value, ci_lo, ci_hi (of the curve), pi_lo, pi_hi (of one measurement), distance (how many times beyond
    the table), rival_lo, rival_hi (the lowest and highest law or link)."""
    scales: tuple[dict[str, float], ...]
    """Scales: variable -> value."""
    forecasters: Mapping[str, Forecaster] = field(repr=False)
    """Quantity -> the laws and links that forecast it, the loss first."""
    exclusions: tuple[Exclusion, ...]
    names: Mapping[str, str]
    """Column -> its name in the file, where that differs."""
    flags: tuple[Flag, ...] = ()
    """Errors that the table hardly tells, and accuracies that were not forecast and why."""

    @property
    def loss(self) -> Forecaster:
        """Laws that forecast the loss."""
        return next(iter(self.forecasters.values()))

    def headline(self) -> str:
        """Say how many scales, from how many runs."""
        where = "1 scale" if len(self.scales) == 1 else f"{len(self.scales)} scales"
        return f"Forecast of {len(self.forecasters)} quantities at {where} from {len(self.loss.points.y)} rows"

    def facts(self) -> list[tuple[str, str]]:
        """List flags, the laws and their backtests, how such forecasts fared, what intervals cover, rows left out."""
        found = [("caution", str(flag)) for flag in self.flags] + self.loss.facts()
        far = self.table["distance"].unique().tolist()
        if max(far) > 1 and not self.loss.is_tested:
            why = "none: public tables that were forecast were large enough for backtests, this one is not"
            found.append(("record", why))
        elif set(JOINT) <= {law.name for law in self.loss.points.laws}:  # as on the public tables
            told = (words for each in far for words in record_words(each, accuracies=len(self.forecasters) > 1))
            found += [("record", words) for words in dict.fromkeys(told)]
        parts = "its noise, the parameters, the laws' spread and their misfit"
        found.append(("intervals", f"{percent(CONFIDENCE)} of one new run: {parts}"))
        return found + [("left out", "; ".join(map(str, self.exclusions)))] * bool(self.exclusions)

    def cells(self) -> list[dict[str, str]]:
        """Write a row a scale and quantity, accuracies as fractions."""
        return [
            {
                "quantity": self.names.get(row["quantity"], row["quantity"]),
                "of a run at": scale_words(self.scales[row["at"]]),
                "forecast": human(row["value"], 4),
                "95 % interval": Interval(low=row["pi_lo"], high=row["pi_hi"]).shown(),
                "times beyond the table": human(row["distance"]) if row["distance"] > 1 else "",
                "single laws": f"{human(row['rival_lo'], 4)} to {human(row['rival_hi'], 4)}"
                * (len(self.forecasters[row["quantity"]].curves) > 1),
            }
            for row in self.table.to_dict("records")
        ]


def forecast(
    df: pd.DataFrame,
    at: str | Mapping[str, float] | Sequence[Mapping[str, float]],
    *,
    law: Forecaster | Sequence[Law | str] | str = AUTO,
    y: str = "val_loss",
) -> Forecast:
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
    at = parse_scale(at, "at") if isinstance(at, str) else at
    scales = [{v: float(value) for v, value in each.items()} for each in ([at] if isinstance(at, Mapping) else at)]
    if not scales:
        raise AnalysisError("There is no scale to forecast at; give N and D.")
    fits = Cache()
    loss = law if isinstance(law, Forecaster) else forecaster(df, law=law, y=y, cache=fits)
    heaviest = loss.curves[loss.weights.index[0]].law
    flags = [*blind_flags(heaviest.groups)]
    by = {y: loss}
    probes = probe_frame(complete(df)) if "probes" in df.columns else pd.DataFrame()
    for key, probed in probes.groupby(["task", "kind"]) if len(probes) else ():
        name = ":".join(map(str, key))
        try:
            known = probed.dropna(subset=["top1", y])
            by[name] = accuracy_forecaster(known, fits, law=loss.points.laws, loss=y)
        except AnalysisError as error:
            flags.append(Flag(kind="not_forecast", subject=name, text=f"{name} is not forecast: {error}"))
    rows = [
        found.predict(each).assign(at=number, quantity=name, **each)
        for number, each in enumerate(scales)
        for name, found in by.items()
    ]
    columns = ["at", *dict.fromkeys(v for each in scales for v in each)]
    columns += ["quantity", *ENDS, "distance", "rival_lo", "rival_hi"]
    return Forecast(
        table=pd.concat(rows, ignore_index=True)[columns],
        scales=tuple(scales),
        forecasters=by,
        exclusions=loss.points.exclusions,
        names=names_of(df),
        flags=tuple(flags),
    )


@cache
def records() -> pd.DataFrame:
    """Read how forecasts fared on public tables, every family of tables alike (`tests/experiments/board.py`).

    Returns:
        One row a range of distances, nearest first: low and high (factors beyond the largest compute), num_families,
        inside (share of losses inside their 95 % intervals), error (mean absolute one of ln loss), and of accuracies
        accuracy_inside and accuracy_error.
    """
    return pd.read_csv(Path(__file__).with_name("record.csv"), comment="#")


def record_words(distance: float, *, accuracies: bool = False) -> list[str]:
    """Say how forecasts at a distance, or of the farthest range, fared on public tables; nothing inside the table."""
    if distance <= 1:
        return []
    rows = records()
    row = rows.iloc[min(int((rows["high"] < 0.999 * distance).sum()), len(rows) - 1)]
    inside, error = f"{percent(row['inside'])} of losses", percent(row["error"])
    if accuracies:
        inside += f" and {percent(row['accuracy_inside'])} of accuracies"
        error += f" and {100 * row['accuracy_error']:.1f} points"
    families = f"{row['num_families']:.0f} families of public tables forecast {row['low']:g} to {row['high']:g} times"
    return [f"{inside} inside their intervals, mean error {error}, on {families} beyond"]


def parse_scale(text: str, option: str) -> dict[str, float]:
    """Read `N=1e9,D=2B` as numbers (k, M, B, T)."""
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
    """Write a scale in words."""
    return ", ".join(f"{v} = {human(value, 4)}" for v, value in at.items())
