"""Loss and accuracies at scales not trained yet, with intervals; and the register of forecasts, written down before the
run, a line each in `forecasts.jsonl` beside the table, and scored after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, Result, beyond_words, human, percent, plain_types, scale_words
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import current_level, level_words
from aimscale.analysis.fitting.diagnostics import blind_flags
from aimscale.analysis.fitting.inference import Interval
from aimscale.analysis.forecasts.candidates import AUTO, JOINT, Cache
from aimscale.analysis.forecasts.forecaster import Forecaster, accuracy_forecaster, forecaster
from aimscale.analysis.laws import Law
from aimscale.analysis.table.columns import to_numbers
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.schema import CANONICAL, Exclusion
from aimscale.analysis.table.select import by_probe, table_flags

ENDS = ("value", "ci_lo", "ci_hi", "pi_lo", "pi_hi")
REGISTER = "forecasts.jsonl"
SCORES = "forecast-scores.csv"
SAME_SCALE = 0.01
"""A row within 1 % of every variable is the run that was forecast: budgets are rounded to whole batches."""
SCORE_COLUMNS = (
    "registered", "quantity", "at", "law", "forecast", "pi_lo", "pi_hi", "measured", "num_rows", "error", "inside",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecast(Result):
    """Forecasts at one scale or several."""

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
    level: float = field(default_factory=current_level)
    """Level of the intervals."""
    flags: tuple[Flag, ...] = ()
    """Cautions about the table, errors that it hardly tells, and accuracies that were not forecast and why."""

    @property
    def loss(self) -> Forecaster:
        """Laws that forecast the loss."""
        return next(iter(self.forecasters.values()))

    def headline(self) -> str:
        """Say the loss that is expected at every scale."""
        name = next(iter(self.forecasters))
        what = "a loss" if name == "val_loss" else self.names.get(name, name)
        told = list[str]()
        for row in self.table[self.table["quantity"] == name].to_dict("records"):
            at = scale_words(self.scales[row["at"]], 3)
            value, low, high = (human(row[end], 4) for end in ("value", "pi_lo", "pi_hi"))
            told.append(f"At {at} ({beyond_words(row['distance'])}) {what} of {value} [{low}, {high}].")
        return " ".join(told)

    def facts(self) -> list[tuple[str, str]]:
        """List flags, the laws and their backtests, how such forecasts fared, what intervals cover, rows left out."""
        facts = [("caution", str(flag)) for flag in self.flags] + self.loss.facts()
        far = self.table["distance"].unique().tolist()
        if max(far) > 1 and not self.loss.is_tested:
            reason = "none: public tables that were forecast were large enough for backtests, this one is not"
            facts.append(("record", reason))
        elif set(JOINT) <= {law.name for law in self.loss.laws}:  # as on the public tables
            told = (words for each in far for words in record_words(each, accuracies=len(self.forecasters) > 1))
            facts += [("record", words) for words in dict.fromkeys(told)]
        parts = "its noise, the parameters, the laws' spread and their misfit"
        wide = f"; of accuracies those of 95 % held {percent(records()['accuracy_inside'].min())} on public tables"
        parts += wide * (len(self.forecasters) > 1)
        facts.append(("intervals", f"{level_words(self.level)} of one new run: {parts}"))
        return facts + [("left out", "; ".join(map(str, self.exclusions)))] * bool(self.exclusions)

    def cells(self) -> list[dict[str, str]]:
        """Write a row a scale and quantity, accuracies as fractions."""
        return [
            {
                "quantity": self.names.get(row["quantity"], row["quantity"]),
                "of a run at": scale_words(self.scales[row["at"]]),
                "forecast": human(row["value"], 4),
                f"{level_words(self.level)} interval": Interval(low=row["pi_lo"], high=row["pi_hi"]).shown(),
                "times beyond the table": human(row["distance"]) if row["distance"] > 1 else "",
                "single laws": f"{human(row['rival_lo'], 4)} to {human(row['rival_hi'], 4)}"
                * (len(self.forecasters[row["quantity"]].fits) > 1),
            }
            for row in self.table.to_dict("records")
        ]


def forecast(
    table: Table,
    at: str | Mapping[str, float] | Sequence[Mapping[str, float]],
    *,
    law: Forecaster | Sequence[Law | str] | str = AUTO,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
) -> Forecast:
    """Forecast the loss at scales not trained yet, and every probe's accuracy, directly or by way of the loss.

    Args:
        table: one row per point, with `probes` for accuracies.
        at: N and D of a run (C, or U of repeated data, where the laws have them), or several; or "N=7e9,D=2B".
        law: "auto", or the laws to try (`forecaster`), or what forecasts the loss.
        y: column of the loss.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

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
    runs, fits = Runs(table, columns), Cache()
    y = runs.column(y)
    loss = law if isinstance(law, Forecaster) else forecaster(runs, law=law, y=y, cache=fits)
    flags, by = list[Flag](), {y: loss}
    if not isinstance(law, Forecaster):  # of one that was made before its maker tells them, as the report does
        flags += table_flags(runs, [*loss.points.x], y, scales)
    flags += blind_flags(loss.fits[loss.weights.index[0]].estimate.groups)
    for name, probed in by_probe(runs.complete()).items():
        try:
            measured = probed[probed[["top1", y]].notna().all(axis=1)]
            by[name] = accuracy_forecaster(measured, fits, law=loss.laws, loss=y)
        except AnalysisError as error:
            flags.append(Flag(kind="not_forecast", subject=name, text=f"{name} is not forecast: {error}"))
    rows = [
        forecaster_of.predict(each).assign(at=number, quantity=name, **each)
        for number, each in enumerate(scales)
        for name, forecaster_of in by.items()
    ]
    order = ["at", *dict.fromkeys(v for each in scales for v in each), "quantity", *ENDS]
    order += ["distance", "rival_lo", "rival_hi"]
    return Forecast(
        table=pd.concat(rows, ignore_index=True)[order],
        scales=tuple(scales),
        forecasters=by,
        exclusions=loss.points.exclusions,
        names=runs.names,
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
        out[name] = float(to_numbers(pd.Series([value])).iloc[0])
        if not 0 < out[name] < np.inf:
            raise AnalysisError(f"{option} takes positive numbers as in N=1e9,D=2B (k, M, B or T), not {part!r}.")
    return out


def register(result: Forecast, table: Table, path: Path) -> None:
    """Append forecasts to a register, before the runs: not where the table already holds a measurement."""
    points, runs = result.loss.points, Runs(table)
    for at in result.scales:
        if num := len(_rows_at(runs, at, points.columns)):
            held = f"The table already holds {num} measurements at {scale_words(at)}"
            raise AnalysisError(f"{held}, so this would be no forecast; register before the run.")
    numbers = np.column_stack([*points.x.values(), points.y])
    text = "\n".join(sorted(",".join(f"{v:.12g}" for v in row) for row in numbers))  # whatever the order of rows
    shared = {
        "registered": datetime.now(UTC).isoformat(timespec="seconds"),
        "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_points": len(points.y),
        "confidence": result.level,
    }
    lines = []
    for row in result.table.to_dict("records"):
        at, weights = result.scales[row["at"]], result.forecasters[row["quantity"]].weights
        names = {v: points.columns.get(v, CANONICAL.get(v, v)) for v in at}
        entry = {**shared, "at": at, "columns": names, "law": weights.index[0], "weights": weights.to_dict()}
        entry |= {name: row[name] for name in ("distance", "quantity", *ENDS)}
        lines.append(json.dumps(plain_types(entry)) + "\n")
    try:
        with path.open("a") as file:
            file.write("".join(lines))
    except OSError as error:
        problem = f"Cannot write the register {path} ({error.strerror})"
        raise AnalysisError(f"{problem}; choose a folder that exists and is yours.") from None


def read_register(path: Path) -> list[dict[str, Any]]:
    """Read the forecasts of a register, oldest first; none where the file does not exist."""
    out = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            entry = json.loads(line)
            at = {str(name): float(value) for name, value in entry["at"].items()}
            ends = {name: np.nan if entry[name] is None else float(entry[name]) for name in ("value", "pi_lo", "pi_hi")}
            told = {name: str(entry[name]) for name in ("registered", "quantity", "law")}
            out.append({**entry, **ends, **told, "at": at, "columns": dict(entry["columns"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise AnalysisError(f"Line {number} of {path} is no forecast; restore or remove that line.") from None
    return out


def scores(path: Path, table: Table) -> pd.DataFrame:
    """Compare every registered forecast with the runs that were measured there since.

    Returns:
        One row per forecast and run (`SCORE_COLUMNS`), for an interval is one run's and a mean over seeds is nearly
        always inside: error is measured / forecast - 1, num_rows the runs found there. One row without a measurement,
        and num_rows 0, where there is none yet.
    """
    rows, runs = [], Runs(table)
    for entry in read_register(path):
        rows_there, quantity = _rows_at(runs, entry["at"], entry["columns"]), entry["quantity"]
        probed = {name: each["top1"] for name, each in by_probe(rows_there).items()}
        measured = rows_there[quantity] if quantity in rows_there else probed.get(quantity, pd.Series(dtype=float))
        values = pd.to_numeric(measured, errors="coerce").dropna().to_numpy(float)
        shared = {name: entry[name] for name in ("registered", "quantity", "law", "pi_lo", "pi_hi")}
        shared |= {"at": scale_words(entry["at"]), "forecast": entry["value"], "num_rows": len(values)}
        for value in values if len(values) else (np.nan,):
            inside = entry["pi_lo"] <= value <= entry["pi_hi"] if len(values) else None
            rows.append({**shared, "measured": value, "error": value / entry["value"] - 1, "inside": inside})
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


def score_words(table: pd.DataFrame) -> str:
    """Say how many of the measured runs lie inside their intervals, and how many forecasts wait for theirs."""
    inside, waiting = table["inside"].dropna(), int((table["num_rows"] == 0).sum())
    return f"{int(inside.sum())} of {len(inside)} runs inside their registered intervals, {waiting} not measured yet"


def _rows_at(runs: Runs, at: Mapping[str, float], columns: Mapping[str, str]) -> pd.DataFrame:
    """Find the complete rows within the tolerance of a scale; variables without a column do not tell rows apart."""
    rows = runs.complete().frame
    for variable, value in at.items():
        name = columns.get(variable, CANONICAL.get(variable, variable))
        if name in rows:
            values = pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
            rows = rows[np.abs(values / value - 1) <= SAME_SCALE]
    return rows
