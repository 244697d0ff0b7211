"""Reading a results table, ours or a foreign one, as a data frame with our names.

Every analysis verb reads through `read_table` (by way of `inputs.read_tables`).
"""

from __future__ import annotations

import codecs
import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from aimscale.analysis.table.observations import is_complete
from aimscale.analysis.table.schema import (
    CANONICAL,
    KNOWN,
    LETTERS,
    PROBE_FIELDS,
    SCHEMA_VERSION,
    STATUSES,
    THEIR_NAMES,
    Column,
    TableError,
)

FORMULAS = {
    ("flops_train", "6ND"): (("params_total", "images_seen"), lambda n, d: 6 * n * d),
    ("images_seen", "C/6N"): (("flops_train", "params_total"), lambda c, n: c / (6 * n)),
}
"""(our name, what stands for theirs) -> our columns that it is made of, and how: `--columns C=6ND` and `D=C/6N`."""


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """Turn `ours=theirs` options (several may share one string, separated by commas) into a mapping.

    Our side is a name of the schema or a letter of `CANONICAL`; theirs may be a formula of `FORMULAS`.

    Raises:
        TableError: a part without `=`, or a name of ours that the schema does not have.
    """
    mapping: dict[str, str] = {}
    for pair in (part.strip() for text in pairs for part in text.split(",") if part.strip()):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise TableError(f"--columns needs 'ours=theirs', such as N=num_params, not '{pair}'")
        mapping[CANONICAL.get(ours, ours)] = theirs
    return mapping


def read_table(path: str | Path, columns: Mapping[str, str] | None = None, require: Sequence[str] = ()) -> pd.DataFrame:
    """Read a results table, or anybody's table of results, as a data frame with our names.

    Args:
        path: a `.parquet`, `.csv`, `.tsv` or JSON-lines (`.jsonl`) file, or a sweep's folder that holds
            `results.parquet`.
        columns: our name (or letter) -> the name in the file; a file's own N, D, U, C and L are taken for the laws'
            letters, other columns that are not named keep their names. "6ND" for C and "C/6N" for D are computed where
            the file has no column of that name.
        require: our names that must be there.

    Returns:
        Known columns typed as the schema says (an integer column with gaps becomes float64, `probes` a list of
        dictionaries per row); other columns as they are. `attrs` keeps their names of renamed columns.

    Raises:
        TableError: no such file, an unreadable, half-written or empty table, a missing column, or a text where
            a number should be; one sentence.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.parquet"
    frame = _read_file(path)
    if frame.empty:
        raise TableError(f"{path} has no rows; collect the sweep's results first")
    frame = _rename(frame, {CANONICAL.get(o, o): t for o, t in (columns or {}).items()}, path)
    require_columns(frame, require, path)
    for name in [name for name in frame.columns if name in KNOWN]:
        frame[name] = _coerce(frame[name], KNOWN[name], path, frame.attrs[THEIR_NAMES])
    return _computed(frame, path)


def _read_file(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise TableError(f"there is no table at {path}; `aimscale collect` writes one, or give another path")
    try:
        if path.suffix in _READERS:
            return _READERS[path.suffix](path)
    except pd.errors.EmptyDataError as error:
        raise TableError(f"{path} is empty; write the table again") from error
    except (pa.ArrowException, pd.errors.ParserError, csv.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise TableError(f"cannot read {path} as a table ({reason}): it may be half-written; write it again") from error
    raise TableError(f"cannot tell what {path} is: give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")


def _read_separated(path: Path) -> pd.DataFrame:
    _refuse_half_written(path)
    return pd.read_csv(path, sep=_separator(path))


def _read_json_lines(path: Path) -> pd.DataFrame:
    return pd.read_json(path, lines=True)


def _read_parquet(path: Path) -> pd.DataFrame:
    table = pq.read_table(path)
    version = int((table.schema.metadata or {}).get(b"aimscale_schema_version", b"0"))
    if version > SCHEMA_VERSION:
        raise TableError(
            f"{path} was written with schema {version}, newer than {SCHEMA_VERSION} known here; update aimscale"
        )
    frame = table.to_pandas()
    return frame.reset_index(drop=not any(frame.index.names))  # labels of frames that were joined may stand twice


def _separator(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _refuse_semicolons(header: str, path: Path) -> None:
    """Spreadsheets of many countries write CSV with semicolons and decimal commas; nothing would be read from it."""
    if path.suffix == ".csv" and "," not in header and ";" in header:
        raise TableError(f"{path} is separated by semicolons; save it with commas and decimal points")


def _refuse_half_written(path: Path) -> None:
    """A text table whose last line has no newline and too few fields was cut off while it was written."""
    separator = _separator(path)
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise TableError(f"{path} is in UTF-16; save it as CSV in UTF-8")
        file.seek(0)
        header = file.readline().decode("utf-8", "replace")
        file.seek(max(0, path.stat().st_size - 65536))
        tail = file.read().decode("utf-8", "replace")
    _refuse_semicolons(header, path)
    if tail.endswith("\n") or not tail.strip() or "\n" not in tail:
        return
    num_fields = len(next(csv.reader([header], delimiter=separator)))
    last = next(csv.reader([tail.rsplit("\n", 1)[1]], delimiter=separator))
    if len(last) < num_fields:
        raise TableError(f"the last line of {path} breaks off; it is half-written, write it again")


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": _read_parquet,
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
}
SUFFIXES = tuple(_READERS)
"""Of files that are tables."""


def _rename(frame: pd.DataFrame, columns: Mapping[str, str], path: Path) -> pd.DataFrame:
    """Our names for theirs; `attrs` remembers theirs, formulas included."""
    columns = _with_letters(frame, columns)
    formulas = {o: t for o, t in columns.items() if t not in frame.columns and (o, t) in FORMULAS}
    columns = {ours: theirs for ours, theirs in columns.items() if ours not in formulas}
    absent = [theirs for theirs in columns.values() if theirs not in frame.columns]
    if absent:
        there = _list(map(str, frame.columns))
        raise TableError(f"{path} has no column {_list(absent)} that --columns names; it has {there}")
    taken = {theirs: frame[theirs] for theirs in columns.values()}
    frame = frame.drop(columns=[name for name in (*columns, *formulas) if name in frame.columns and name not in taken])
    frame = frame.drop(columns=list(taken)).assign(**{ours: taken[theirs] for ours, theirs in columns.items()})
    frame.attrs[THEIR_NAMES] = {ours: theirs for ours, theirs in (columns | formulas).items() if ours != theirs}
    return frame


def _with_letters(frame: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, str]:
    """`columns` and the letters among the file's own: N is the law's N where it holds numbers and no other was named.

    Such a column of another meaning (L for layers beside a loss of another name) keeps its values under another name.
    """
    letters = [letter for letter in CANONICAL if letter in frame.columns and letter not in columns.values()]
    theirs = [letter for letter in letters if pd.to_numeric(frame[letter], errors="coerce").notna().any()]
    free = {CANONICAL[letter]: letter for letter in theirs if CANONICAL[letter] not in {*columns, *frame.columns}}
    other = {f"their {letter}": letter for letter in theirs if CANONICAL[letter] in columns}
    return {**free, **other, **columns}


def _computed(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The frame with the columns that `--columns` gives as formulas."""
    for ours, theirs in frame.attrs.get(THEIR_NAMES, {}).items():
        if ours in frame or (ours, theirs) not in FORMULAS:
            continue
        names, function = FORMULAS[ours, theirs]
        for name in names:
            if name not in frame:
                letter = LETTERS[name]
                raise TableError(
                    f"{path} has no column {letter} to compute {theirs} from; name yours with --columns {letter}=THEIRS"
                )
        frame[ours] = function(*(frame[name].astype(float) for name in names))
    return frame


def require_columns(frame: pd.DataFrame, names: Sequence[str], where: str | Path = "the table") -> None:
    """Refuse a table without the needed columns.

    Raises:
        TableError: one sentence that names what is missing, what is there, and the option that maps names.
    """
    missing = [name for name in names if name not in frame.columns or frame[name].isna().all()]
    if missing:
        there = _list(str(name) for name in frame.columns)
        raise TableError(
            f"{where} has no values for {_list(missing)} (columns: {there}); "
            f"name yours with --columns {missing[0]}=THEIRS"
        )


def _list(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _coerce(values: pd.Series, column: Column, path: Path, theirs: Mapping[str, str]) -> pd.Series:
    """Type one column; the only text that may stand for a missing number is an empty one."""
    if column.dtype in ("int64", "float64"):
        numbers = pd.to_numeric(values, errors="coerce")
        bad = numbers.isna() & values.notna()
        if bad.any():
            row = int(np.flatnonzero(bad.to_numpy())[0])
            name = theirs.get(column.name, column.name)
            raise TableError(f"{path}: column '{name}' holds {values.iloc[row]!r} in row {row + 1}; make it a number")
        whole = column.dtype == "int64" and numbers.notna().all() and (numbers % 1 == 0).all()
        return numbers.astype("int64") if whole else numbers.astype("float64")
    if column.dtype == "probes":
        parsed = [_parse_probes(value, row, path) for row, value in enumerate(values)]
        return pd.Series(parsed, index=values.index, dtype=object)
    return values.astype("string").astype(object).where(values.notna(), None)


def _parse_probes(value: Any, row: int, path: Path) -> list[dict[str, Any]]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    try:
        entries = json.loads(value) if isinstance(value, str) else list(value)
        return [_checked_probe(dict(entry)) for entry in entries]
    except (TypeError, ValueError) as error:
        raise TableError(f"{path}: 'probes' of row {row + 1} is no list of probes ({error}); correct it") from error


def _checked_probe(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as it is; ValueError where a number is none, or where there is no task."""
    values = _with_extra(entry)
    for field in PROBE_FIELDS:
        value = values.get(field.name)
        kind = (int, float) if field.dtype in ("int64", "float64") else str if field.dtype == "string" else object
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{field.name} is {value!r}")
    return entry


def probe_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run, budget and probe: the row's columns but `probes`, then those of `PROBE_FIELDS`.

    Returns:
        An empty frame with these columns where nothing was probed.
    """
    keep = [name for name in frame.columns if name not in ("probes", "extra")]
    names = [field.name for field in PROBE_FIELDS]
    entries = list(frame["probes"]) if "probes" in frame else [[] for _ in range(len(frame))]
    counts = [len(entry) for entry in entries]
    base = frame[keep].loc[frame.index.repeat(counts)].reset_index(drop=True)
    flat = [{name: entry.get(name) for name in names} for row in entries for entry in map(_with_extra, row)]
    probes = pd.DataFrame(flat, columns=names)
    for field in PROBE_FIELDS:
        if field.dtype in ("int64", "float64"):
            probes[field.name] = pd.to_numeric(probes[field.name]).astype("float64")
    clash = [name for name in names if name in base.columns]
    return pd.concat([base.drop(columns=clash), probes], axis=1)


def _with_extra(entry: dict[str, Any]) -> dict[str, Any]:
    """A probe with the fields that tables of earlier schemas kept in `extra`."""
    extra = json.loads(entry["extra"]) if entry.get("extra") else {}
    names = {field.name for field in PROBE_FIELDS} & extra.keys() if isinstance(extra, dict) else set()
    return entry | {name: extra[name] for name in names if entry.get(name) is None}


def usable_rows(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Rows that a law may be fitted to, and one sentence per reason for leaving others out.

    A row is left out when its budget is not `complete` or when its val_loss is missing, infinite or not positive.
    """
    kept, exclusions = frame, []
    if "status" in frame:
        for status in [s for s in STATUSES if s != "complete"]:
            num = int((frame["status"] == status).sum())
            if num:
                exclusions.append(f"{num} row{'s' if num > 1 else ''} left out: {status}.")
        kept = frame[is_complete(frame)]
    if "val_loss" not in kept:
        return kept.iloc[:0], [*exclusions, "All rows left out: the table has no column val_loss."]
    values = kept["val_loss"].astype("float64")
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        num = int((~good).sum())
        exclusions.append(f"{num} row{'s' if num > 1 else ''} left out: no positive, finite val_loss.")
    return kept[good], exclusions


def loss_unit(frame: pd.DataFrame) -> str:
    """Unit of a table's losses: ours by their target; a foreign table, which has none, does not say."""
    targets = set(frame["target"].dropna()) if "target" in frame else set()
    return {"normalised": "normalised MSE", "raw": "MSE"}.get(targets.pop(), "") if len(targets) == 1 else ""
