"""Cells of a table as the schema types them: numbers with suffixes, probes, and the fields of a set-up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError, option
from aimscale.analysis.table.schema import PROBE_FIELDS, Column

_SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "%": 1e-2}


def to_numbers(values: pd.Series) -> pd.Series:
    """Read numbers, also of texts such as `44M`, `1.5k` and `26.2 %`; what is none becomes NaN."""
    numbers = pd.to_numeric(values, errors="coerce")
    texts = values[numbers.isna() & values.notna()].map(str)
    if texts.empty:
        return numbers
    parts = texts.str.extract(rf"^\s*(.*?)\s*([{''.join(_SUFFIXES)}])\s*$")
    found = pd.to_numeric(parts[0], errors="coerce") * parts[1].map(_SUFFIXES).astype(float)
    return numbers.astype(float).fillna(found)


def typed(values: pd.Series, column: Column, path: Path, called: str) -> pd.Series:
    """Type one column; the only text that may stand for a missing number is an empty one.

    Raises:
        AnalysisError: a text where a number should be, or probes that cannot be read.
    """
    if column.dtype == "probes":
        parsed = [_parse_probes(value, row, path) for row, value in enumerate(values, 1)]
        return pd.Series(parsed, index=values.index, dtype=object)
    if column.dtype not in ("int64", "float64"):
        return values.astype(object).map(str, na_action="ignore").where(values.notna(), None)
    numbers = to_numbers(values)
    bad = numbers.isna() & values.notna()
    if bad.any():
        row = int(np.flatnonzero(bad.to_numpy())[0])
        raise AnalysisError(
            f"{path}: column '{called}' holds {values.iloc[row]!r:.60} in row {row + 1}; make it a number"
        )
    whole = column.dtype == "int64" and numbers.notna().all() and (numbers % 1 == 0).all()
    return numbers.astype("int64" if whole else "float64")


def _parse_probes(value: Any, row: int, path: Path) -> list[dict[str, Any]]:
    """Read the entries of a cell: names as texts, numbers as numbers, missing ones left out."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return []
    try:
        listed = json.loads(value) if isinstance(value, str) else value
        if np.isscalar(listed):
            named = option("columns", "TASK:KIND=THEIRS")
            raise TypeError(f"{listed!r:.60} is a number; name an accuracy with {named}")
        return [_typed_probe(dict(entry)) for entry in listed]
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise AnalysisError(f"{path}: 'probes' of row {row} is no list of probes ({error}); correct it") from error


def _typed_probe(entry: dict[str, Any]) -> dict[str, Any]:
    """Type the fields of a probe; task and kind must be there."""
    for name in ("task", "kind"):
        if not isinstance(entry[name], str | int | float):
            raise TypeError(f"its {name} is {entry[name]!r:.60}")
    known = {each.name: _TYPES[each.dtype] for each in PROBE_FIELDS if each.dtype != "json"}
    return {**entry, **{k: known[k](v) for k, v in entry.items() if k in known and v is not None}}


_TYPES: dict[str, Callable[[Any], Any]] = {
    "string": str,
    "int64": float,
    "float64": float,
    "list<int64>": lambda values: [int(each) for each in values],
}


def setup_words(text: str) -> dict[str, str]:
    """Write the fields of a set-up in words that can be compared and shown."""
    try:
        return {key: f"{v:.12g}" if type(v) in (int, float) else str(v) for key, v in json.loads(text).items()}
    except (ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise AnalysisError(f"'setup' holds {text[:60]!r}, which is no JSON object ({error}); correct it") from error
