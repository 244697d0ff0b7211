"""Columns of a table under our names: named by the user, by a law's letter, or counted by a formula of others; cells
typed as the schema says; accuracies of a foreign table as entries of `probes`, which every verb takes as our own.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import SUFFIXES, Flag, option, some
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.formulas import FormulaError, parse_formula, quoted
from aimscale.analysis.table.schema import CANONICAL, KNOWN, PROBE_FIELDS, Column, Exclusion, column_words

_NEXT_PAIR = re.compile(r",(?=[^,=]+=)")  # formulas may have commas of their own
Named = tuple[pd.DataFrame, dict[str, str], list[Exclusion]]
"""A frame under our names, what the file calls its columns, and the rows that were left out."""
FROM_PATH = "path:"
"""What a column begins with that a regular expression finds in the name or folder of a run."""
_LOOKS = re.compile(r"(?<![a-z])acc(?:uracy)?(?![a-z])|top[-_ @]?[15](?!\d)", re.IGNORECASE)
_TYPES: dict[str, Callable[[Any], Any]] = {"string": str, "list<int64>": lambda values: [int(each) for each in values]}
_FIELDS = {field.name: _TYPES.get(field.dtype, float) for field in PROBE_FIELDS if field.dtype != "json"}
"""Fields of a probe and what types them; whole numbers become floats, as in a data frame."""


def named(frame: pd.DataFrame, columns: Mapping[str, str], source: str | Path) -> Named:
    """Put our names for theirs, type the columns that the schema knows, and make accuracies entries of `probes`."""
    columns = {CANONICAL.get(ours, ours): theirs for ours, theirs in columns.items()}
    frame, columns = _renamed(frame, columns, source)
    names = {ours: theirs for ours, theirs in columns.items() if ours != theirs and not is_accuracy(ours)}
    if (unit := counted(frame)) is not None:
        names.setdefault(CANONICAL["D"], unit)
    frame, left_out = _without_words(frame, names.get("val_loss", "val_loss"))
    for name in [name for name in frame.columns if name in KNOWN]:
        frame[name] = typed(frame[name], KNOWN[name], source, names.get(name, name))
    accuracies = {ours: theirs for ours, theirs in columns.items() if is_accuracy(ours)}
    return (with_accuracies(frame, accuracies, source) if accuracies else frame), names, left_out


def counted(frame: pd.DataFrame) -> str | None:
    """Name what D counts in a table of another program's runs, in the plural; None for any other table."""
    units = set(frame["unit"].dropna()) if {"unit", "schema_version"} <= {*frame} else set()
    return str(units.pop()) if len(units) == 1 else None


def _renamed(
    frame: pd.DataFrame, columns: Mapping[str, str], source: str | Path
) -> tuple[pd.DataFrame, Mapping[str, str]]:
    """Put our names for theirs, formulas included; return the mapping with the letters that the frame has itself.

    A letter of the file that holds numbers is a law's, unless another column was named so, beside which it keeps its
    values under another name (L for layers beside a loss of another name).
    """
    for letter, ours in CANONICAL.items():
        is_free = letter in frame and letter not in columns.values() and (ours in columns or ours not in frame)
        if is_free and to_numbers(frame[letter]).notna().any():
            columns = {f"their {letter}" if ours in columns else ours: letter, **columns}
    plain = {ours: theirs for ours, theirs in columns.items() if theirs in frame.columns}
    renamed = frame.drop(columns={*columns, *plain.values()} & {*frame})
    renamed = renamed.assign(**{ours: frame[theirs] for ours, theirs in plain.items()})
    for ours in sorted((name for name in columns if name not in plain), key=is_accuracy):
        renamed[ours] = _computed(columns[ours], frame, renamed, source)
    return renamed, columns


def _computed(text: str, theirs: pd.DataFrame, ours: pd.DataFrame, source: str | Path) -> pd.Series:
    """Make a column of others, by their names or a law's letters."""
    letters = {letter: ours[name] for letter, name in CANONICAL.items() if name in ours}
    columns: dict[str, pd.Series] = {**theirs, **ours, **letters}
    if text.startswith(FROM_PATH):
        return _from_path(text.removeprefix(FROM_PATH), theirs, source)
    try:
        formula = parse_formula(text)
        numbers = {name: to_numbers(columns[name]) for name in formula.names if name in columns}
        return pd.Series(formula({k: v if v.notna().any() else columns[k] for k, v in numbers.items()}), theirs.index)
    except FormulaError as error:
        reason = "" if text.isidentifier() else f", and it is no formula of columns: {error}"
        raise AnalysisError(
            f"{source} has no column {text:.80} that {option('columns')} names{reason}; "
            f"{column_words(theirs.columns, text[:80])}"
        ) from error


def _from_path(pattern: str, frame: pd.DataFrame, source: str | Path) -> pd.Series:
    """Find a column in the names of runs (their folders, mostly), or in the table's own where it names none."""
    names = frame["run_id"].map(str) if "run_id" in frame else pd.Series(str(source), frame.index)
    try:
        cells = names.map(lambda name: match[match.re.groups and 1] if (match := re.search(pattern, name)) else None)
    except re.error as error:
        raise AnalysisError(f"{option('columns')}: {pattern!r:.80} is no regular expression: {error}") from error
    if cells.isna().all():
        raise AnalysisError(
            f"{option('columns')}: {pattern!r:.80} is found in no name of a run, such as {names.iloc[0]}"
        )
    return cells


def _without_words(frame: pd.DataFrame, called: str) -> tuple[pd.DataFrame, list[Exclusion]]:
    """Leave out the rows whose loss is a word, such as `diverged`, where others are numbers."""
    numbers = to_numbers(frame["val_loss"]) if "val_loss" in frame else pd.Series(dtype=float)
    if numbers.isna().all():
        return frame, []
    words = frame["val_loss"].where(numbers.isna()).dropna().map(str)
    counts = Counter(words)
    left_out = [
        Exclusion(kind="word", subject=word, number=counts[word], text=f"with {word!r:.60} in {called}")
        for word in dict.fromkeys(words)
    ]
    return frame.drop(index=words.index).reset_index(drop=True), left_out


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """Turn `ours=theirs` options (several may share one string, separated by commas) into a mapping."""
    mapping: dict[str, str] = {}
    for pair in (part.strip(" ,") for text in pairs for part in _NEXT_PAIR.split(text) if part.strip(" ,")):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise AnalysisError(f"--columns needs 'ours=theirs', such as N=num_params, not '{pair}'")
        mapping[CANONICAL.get(ours, ours)] = theirs
    return mapping


def parse_groups(pairs: Iterable[str]) -> dict[str, str | float]:
    """Turn `sizes=column` and `budgets=tolerance` options into a mapping."""
    rules = {kind.strip(): rule.strip() for kind, _, rule in (pair.partition("=") for pair in pairs)}
    tolerances = pd.to_numeric(pd.Series(rules), errors="coerce")
    return {kind: rule if pd.isna(tolerances[kind]) else float(tolerances[kind]) for kind, rule in rules.items()}


def to_numbers(values: pd.Series) -> pd.Series:
    """Read numbers, also of texts such as `44M`, `1.5k` and `26.2 %`; what is none becomes NaN."""
    try:
        numbers = pd.to_numeric(values, errors="coerce")
    except OverflowError as error:
        raise AnalysisError(f"column '{values.name}' holds a number above 1.8e308; correct it") from error
    texts = values[numbers.isna() & values.notna()].map(str)
    if texts.empty:
        return numbers
    parts = texts.str.extract(rf"^\s*(.*?)\s*([{''.join(SUFFIXES)}])\s*$")
    with_suffix = pd.to_numeric(parts[0], errors="coerce") * parts[1].map(SUFFIXES).astype(float)
    return numbers.astype(float).fillna(with_suffix)


def typed(values: pd.Series, column: Column, path: str | Path, called: str) -> pd.Series:
    """Type one column; the only text that may stand for a missing number is an empty one."""
    if column.dtype == "probes":
        parsed = [_parse_probes(value, row, path) for row, value in enumerate(values, 1)]
        return pd.Series(parsed, index=values.index, dtype=object)
    if column.dtype not in ("int64", "float64"):
        return values.astype(object).map(str, na_action="ignore").where(values.notna(), None)
    numbers = to_numbers(values)
    if len(bad := np.flatnonzero(numbers.isna() & values.notna())):
        cell = f"{values.iloc[bad[0]]!r:.60} in row {bad[0] + 1}"
        raise AnalysisError(f"{path}: column '{called}' holds {cell}; make it a number")
    whole = column.dtype == "int64" and numbers.notna().all() and (numbers % 1 == 0).all()
    return numbers.astype("int64" if whole else "float64")


def _parse_probes(value: Any, row: int, path: str | Path) -> list[dict[str, Any]]:
    """Read the entries of a cell: names as texts, numbers as numbers, missing ones left out; all have task and kind."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return []
    try:
        entries = [dict(entry) for entry in (json.loads(value) if isinstance(value, str) else value)]
        if not all(isinstance(e[name], str | int | float) for e in entries for name in ("task", "kind")):
            raise TypeError("a task or kind is no text")
        return [{**e, **{k: _FIELDS[k](v) for k, v in e.items() if k in _FIELDS and v is not None}} for e in entries]
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        named = option("columns", "TASK:KIND=THEIRS")
        raise AnalysisError(
            f"{path}: 'probes' of row {row} is no list of probes ({error}); correct it, or name accuracies with {named}"
        ) from error


def is_accuracy(ours: str) -> bool:
    """Tell whether our side of `--columns` means an accuracy or a level of a task, TASK:KIND, instead of a column."""
    return ":" in ours or ours in ("top1", "last_top1")


def with_accuracies(frame: pd.DataFrame, theirs: Mapping[str, str], path: str | Path) -> pd.DataFrame:
    """Make columns (TASK:KIND, TASK:chance and TASK:ideal -> the file's name) entries of `probes`, behind those that
    it has; missing values make none."""
    numbers = defaultdict[str, dict[str, pd.Series]](dict)
    for ours in theirs:
        task, _, kind = (part.strip() for part in ours.partition(":"))
        if not task or not kind or ":" in kind:
            raise AnalysisError(f"{option('columns')} names an accuracy as TASK:KIND, such as dtd:linear, not '{ours}'")
        numbers[task][kind] = _checked(frame[ours], ours, theirs[ours], path)
    entries = [list(row) for row in frame["probes"]] if "probes" in frame else [[] for _ in range(len(frame))]
    for task, of_task in numbers.items():
        levels: dict[str, pd.Series] = {kind: of_task.pop(kind) for kind in ("chance", "ideal") if kind in of_task}
        if not of_task:
            typed = option("columns", f"{task}:KIND=THEIRS")
            raise AnalysisError(f"{task}:{next(iter(levels))}: no accuracy of {task} is named; add {typed}")
        for kind, top1 in of_task.items():
            rows = pd.DataFrame({"top1": top1, **levels}).to_dict("records")
            for entry, row in zip(entries, rows, strict=True):
                entry_fields = {name: value for name, value in row.items() if not np.isnan(value)}
                entry += [{"task": task, "kind": kind, **entry_fields}] if "top1" in entry_fields else []
    return frame.drop(columns=list(theirs)).assign(probes=pd.Series(entries, index=frame.index, dtype=object))


def _checked(values: pd.Series, ours: str, theirs: str, path: str | Path) -> pd.Series:
    """Read numbers; fractions unless they are losses."""
    numbers, is_loss = to_numbers(values).astype(float), ours.endswith(":ideal")
    good = np.isfinite(numbers) & (numbers.between(0, 1) | is_loss)
    if len(bad := np.flatnonzero(values.notna() & ~good)):
        what = "number" if is_loss else "fraction from 0 to 1"
        if 1 < numbers.max() <= 100:
            what += f"; per cent is read by {option('columns', f'{ours}={quoted(theirs)}/100')}"
        cell = f"{values.iloc[bad[0]]} in row {bad[0] + 1}"
        raise AnalysisError(f"{path}: '{theirs}' for {ours} is {cell}, which is no {what}")
    return numbers


def unnamed(frame: pd.DataFrame) -> tuple[Flag, ...]:
    """Flag accuracies that a foreign table seems to hold and nobody named; nothing is decided by them."""
    is_ours = "schema_version" in frame and frame["schema_version"].notna().any()
    names = [name for name in map(str, frame.columns) if looks_like_accuracy(frame, name)]
    if is_ours or not names or ("probes" in frame and frame["probes"].map(len).any()):
        return ()
    typed = f"TASK:KIND={quoted(names[0])}/100" if frame[names[0]].max() > 1 else f"TASK:KIND={names[0]}"
    text = f"Not read as accuracies: {some(names)}. Name them with {option('columns', typed)}."
    return (Flag(kind="accuracies_unnamed", subject=some(names), text=text),)


def named_like_accuracy(name: str) -> bool:
    """Tell whether a column of the file bears an accuracy's name: more of it is better."""
    return name not in KNOWN and bool(_LOOKS.search(name))


def looks_like_accuracy(frame: pd.DataFrame, name: str) -> bool:
    """Tell whether a column of such a name holds numbers from 0 to 1, or to 100, not all whole (steps, counts)."""
    if not named_like_accuracy(name) or not pd.api.types.is_numeric_dtype(frame[name]):
        return False
    values = frame[name].dropna().astype(float)
    return bool(len(values) and values.between(0, 100).all() and (values % 1 != 0).any())
