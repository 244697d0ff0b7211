"""Forecasts written down before the run, a line each in `forecasts.jsonl` beside the table, and scored after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE
from aimscale.analysis.forecasts.forecast import ENDS, Forecast, scale_words
from aimscale.analysis.table.names import CANONICAL
from aimscale.analysis.table.points import complete
from aimscale.analysis.table.read import probe_frame

REGISTER = "forecasts.jsonl"
SCORES = "forecast-scores.csv"
SAME_SCALE = 0.01
"""A row within 1 % of every variable is the run that was forecast: budgets are rounded to whole batches."""
SCORE_COLUMNS = (
    "registered", "quantity", "at", "law", "forecast", "pi_lo", "pi_hi", "measured", "num_rows", "error", "inside",
)  # fmt: skip


def register(found: Forecast, df: pd.DataFrame, path: Path) -> None:
    """Append forecasts to a register, before the runs: not where the table already holds a measurement."""
    points = found.loss.points
    for at in found.scales:
        if num := len(_rows_at(df, at, points.columns)):
            held = f"The table already holds {num} measurements at {scale_words(at)}"
            raise AnalysisError(f"{held}, so this would be no forecast; register before the run.")
    numbers = np.column_stack([*points.x.values(), points.y])
    text = "\n".join(sorted(",".join(f"{v:.12g}" for v in row) for row in numbers))  # whatever the order of rows
    shared = {
        "registered": datetime.now(UTC).isoformat(timespec="seconds"),
        "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "num_points": len(points.y),
        "confidence": CONFIDENCE,
    }
    lines = []
    for row in found.table.to_dict("records"):
        at, weights = found.scales[row["at"]], found.forecasters[row["quantity"]].weights
        names = {v: points.columns.get(v, CANONICAL.get(v, v)) for v in at}
        entry = {**shared, "at": at, "columns": names, "law": weights.index[0], "weights": weights.to_dict()}
        entry |= {name: row[name] for name in ("distance", "quantity", *ENDS)}
        lines.append(json.dumps(plain_types(entry)) + "\n")
    try:
        with path.open("a") as file:
            file.write("".join(lines))
    except OSError as error:
        why = f"Cannot write the register {path} ({error.strerror})"
        raise AnalysisError(f"{why}; choose a folder that exists and is yours.") from None


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


def scores(path: Path, df: pd.DataFrame) -> pd.DataFrame:
    """Compare every registered forecast with the runs that were measured there since.

    Returns:
        One row per forecast and run (`SCORE_COLUMNS`), for an interval is one run's and a mean over seeds is nearly
        always inside: error is measured / forecast - 1, num_rows the runs found there. One row without a measurement,
        and num_rows 0, where there is none yet.
    """
    rows = []
    for entry in read_register(path):
        found, quantity = _rows_at(df, entry["at"], entry["columns"]), entry["quantity"]
        if quantity not in found:
            probes, (task, _, kind) = probe_frame(found), quantity.rpartition(":")
            found = probes[(probes["task"] == task) & (probes["kind"] == kind)].rename(columns={"top1": quantity})
        values = pd.to_numeric(found[quantity], errors="coerce").dropna().to_numpy(float)
        shared = {name: entry[name] for name in ("registered", "quantity", "law", "pi_lo", "pi_hi")}
        shared |= {"at": scale_words(entry["at"]), "forecast": entry["value"], "num_rows": len(values)}
        for measured in values if len(values) else (np.nan,):
            inside = entry["pi_lo"] <= measured <= entry["pi_hi"] if len(values) else None
            rows.append({**shared, "measured": measured, "error": measured / entry["value"] - 1, "inside": inside})
    return pd.DataFrame(rows, columns=list(SCORE_COLUMNS))


def score_words(found: pd.DataFrame) -> str:
    """Say how many of the measured runs lie inside their intervals, and how many forecasts wait for theirs."""
    inside, waiting = found["inside"].dropna(), int((found["num_rows"] == 0).sum())
    return f"{int(inside.sum())} of {len(inside)} runs inside their registered intervals, {waiting} not measured yet"


def _rows_at(df: pd.DataFrame, at: Mapping[str, float], columns: Mapping[str, str]) -> pd.DataFrame:
    """Find the complete rows within the tolerance of a scale; variables without a column do not tell rows apart."""
    rows = complete(df)
    for variable, value in at.items():
        name = columns.get(variable, CANONICAL.get(variable, variable))
        if name in rows:
            there = pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
            rows = rows[np.abs(there / value - 1) <= SAME_SCALE]
    return rows
