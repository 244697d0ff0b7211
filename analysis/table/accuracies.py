"""Accuracies of a foreign table: its columns as entries of `probes`, so that every verb takes them as our own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError, option
from aimscale.analysis.table.schema import KNOWN
from aimscale.analysis.words import Flag, some

LEVELS = ("chance", "ideal")
"""What `TASK:` is followed by to give a task's levels instead of an accuracy."""
_LOOKS = re.compile(r"(?<![a-z])acc(?:uracy)?(?![a-z])|top[-_ @]?[15](?!\d)", re.IGNORECASE)


def is_accuracy(ours: str) -> bool:
    """Whether our side of `--columns` means an accuracy or a level of a task, TASK:KIND, instead of a column."""
    return ":" in ours or ours in ("top1", "last_top1")


def with_accuracies(
    frame: pd.DataFrame, values: Mapping[str, pd.Series], theirs: Mapping[str, str], path: Path
) -> pd.DataFrame:
    """The frame with accuracies of the file as entries of `probes`, behind those that it has; missing ones make none.

    Args:
        values: TASK:KIND, TASK:chance or TASK:ideal -> a number for every row.
        theirs: the same -> what the file calls it.

    Raises:
        AnalysisError: a name that is not of this form, a level of a task without accuracies, an accuracy or a chance
            level that is no fraction.
    """
    keys = {ours: tuple(part.strip() for part in ours.split(":")) for ours in values}
    tasks = {key[0] for key in keys.values() if key[-1] not in LEVELS}
    for ours, key in keys.items():
        if len(key) != 2 or not all(key):
            raise AnalysisError(f"{option('columns')} names an accuracy as TASK:KIND, such as dtd:linear, not '{ours}'")
        if key[0] not in tasks:
            typed = option("columns", f"{key[0]}:KIND=THEIRS")
            raise AnalysisError(f"{ours}: no accuracy of {key[0]} is named; add {typed}")
    numbers = {keys[ours]: _checked(each, ours, theirs[ours], path) for ours, each in values.items()}
    entries = [list(row) for row in frame["probes"]] if "probes" in frame else [[] for _ in range(len(frame))]
    for task, kind in [key for key in numbers if key[1] not in LEVELS]:
        levels = {level: numbers[task, level] for level in LEVELS if (task, level) in numbers}
        for row, known in enumerate(pd.DataFrame({"top1": numbers[task, kind], **levels}).to_dict("records")):
            if not np.isnan(known["top1"]):
                entry = {name: value for name, value in known.items() if not np.isnan(value)}
                entries[row].append({"task": task, "kind": kind, **entry})
    return frame.assign(probes=pd.Series(entries, index=frame.index, dtype=object))


def _checked(values: pd.Series, ours: str, theirs: str, path: Path) -> pd.Series:
    """Numbers, and fractions unless they are losses."""
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    bad = (numbers.isna() & values.notna()) | np.isinf(numbers)
    if not ours.endswith(":ideal"):
        bad |= (numbers < 0) | (numbers > 1)
    if bad.any():
        row = int(np.flatnonzero(bad.to_numpy())[0])
        typed = option("columns", f"{ours}={quoted(theirs)}/100")
        percent = f"; per cent is read by {typed}" if 1 < numbers.max() <= 100 else ""
        what = "number" if ours.endswith(":ideal") else "fraction from 0 to 1"
        raise AnalysisError(
            f"{path}: '{theirs}' for {ours} is {values.iloc[row]} in row {row + 1}, which is no {what}{percent}"
        )
    return numbers


def quoted(name: str) -> str:
    """A column as a formula takes it."""
    return name if name.isidentifier() else f"`{name}`"


def unnamed(frame: pd.DataFrame) -> tuple[Flag, ...]:
    """Accuracies that a foreign table seems to hold and nobody named; nothing is decided by them."""
    if "schema_version" in frame and frame["schema_version"].notna().any():
        return ()
    if "probes" in frame and frame["probes"].map(len).any():
        return ()
    names = [name for name in map(str, frame.columns) if looks_like_accuracy(frame, name)]
    if not names:
        return ()
    typed = f"TASK:KIND={quoted(names[0])}/100" if frame[names[0]].max() > 1 else f"TASK:KIND={names[0]}"
    return (Flag(kind="accuracies_unnamed", subject=some(names), more=(typed,)),)


def named_like_accuracy(name: str) -> bool:
    """Whether a column of the file bears such a name: more of it is better."""
    return name not in KNOWN and bool(_LOOKS.search(name))


def looks_like_accuracy(frame: pd.DataFrame, name: str) -> bool:
    """A column of such a name whose numbers lie from 0 to 1, or to 100, and are not all whole (steps, counts)."""
    if not named_like_accuracy(name) or not pd.api.types.is_numeric_dtype(frame[name]):
        return False
    values = frame[name].dropna().astype(float)
    return bool(len(values) and values.between(0, 100).all() and (values % 1 != 0).any())
