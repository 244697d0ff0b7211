"""The results table as a contract: one row per run and data budget, typed, documented and versioned.

Probes are a nested column (list of struct) in Parquet and JSON text in CSV. Keys that the schema does not know are kept
as JSON in the column `extra`, never dropped.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import write_csv

from aimscale.analysis.display import plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.words import human

SCHEMA_VERSION = 1
"""Rises when a column changes its meaning, unit or type; a reader refuses a newer table than it knows."""

Dtype = Literal["string", "int64", "float64", "list<int64>", "probes", "json"]
Role = Literal["", "scale", "design", "source"]


class Column(NamedTuple):
    """One column of the table, or one field of a probe, and how it is shown."""

    name: str
    dtype: Dtype
    """Stored type; `probes` is a list of structs of `PROBE_FIELDS`, `json` is text that holds a JSON object."""
    unit: str = ""
    role: Role = ""
    """`scale`: runs of one experiment may differ in it; `design`: not those; `source`: says where a row comes from."""
    label: str = ""
    """Label of an axis, where it is not the name; behind the letter of a law and a colon for one of its variables."""
    head: str = ""
    """Heading in a table of a page, where it is not the name in words."""
    meaning: str = ""

    @property
    def heading(self) -> str:
        """Heading in a table of a page."""
        return self.head or self.name.replace("_", " ")

    @property
    def axis_label(self) -> str:
        """Label of an axis."""
        return self.label or (f"{self.name} ({self.unit})" if self.unit else self.name)

    def cell(self, value: Any) -> str:
        """Write a value as a reader of a table sees it; fractions as per cent, without the sign."""
        if isinstance(value, str | bool):
            return str(value)
        if value is None or math.isnan(value):
            return "–"
        if self.dtype == "int64":
            return f"{value:,.0f}"
        written = {"fraction": f"{100 * value:.1f}", "normalised MSE": f"{value:.4f}"}
        return written.get(self.unit, human(value))


def _columns(table: str) -> tuple[Column, ...]:
    """Read the columns of a table (results, curves, probes, comparison) from `columns.csv`, in its order."""
    with Path(__file__).with_name("columns.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("table") == table]
    return tuple(Column(**cast("dict[str, Any]", row)) for row in rows)


COLUMNS = _columns("results")
"""The schema, in the order in which columns are written."""
OF_CURVES = _columns("curves")
"""Further columns of points during training; a foreign table's `lr` is a setting."""
PROBE_FIELDS = _columns("probes")
"""Fields of one entry of the column `probes`."""
KNOWN = {column.name: column for column in COLUMNS}
_DESCRIBED = {column.name: column for column in (*_columns("comparison"), *PROBE_FIELDS, *COLUMNS)}
MFU = {"mfu_published": "published/nominal", "mfu": "executed/measured"}
"""Columns of model FLOPs utilisation: which FLOPs over which peak."""


def described(name: str) -> Column:
    """Describe a column of any table: as `columns.csv` does, or by its name alone."""
    return _DESCRIBED.get(name) or Column(name, "float64")


def frame_cells(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Write the rows of a table as a reader sees them: heading -> cell, an interval in one cell."""
    columns = [described(str(name)) for name in frame]
    cells = {c.name: [c.cell(value) for value in frame[c.name].astype(object)] for c in columns}
    heads = {c.name: c.heading for c in columns}
    for name in [name for name in cells if {f"{name}_lo95", f"{name}_hi95"} <= {*cells}]:
        ends = zip(cells[f"{name}_lo95"], cells.pop(f"{name}_hi95"), strict=True)
        cells[f"{name}_lo95"] = [f"[{low}, {high}]" for low, high in ends]
        heads[f"{name}_lo95"] = f"{heads[name]} interval"
    return [dict(zip((heads[name] for name in cells), row, strict=True)) for row in zip(*cells.values(), strict=True)]


def _field(column: Column) -> pa.Field:
    """Describe a column to Arrow: type, unit and meaning."""
    simple = {"string": pa.string(), "json": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
    kind = simple.get(column.dtype, pa.list_(pa.int64()))
    if column.dtype == "probes":
        kind = pa.list_(pa.struct([_field(field) for field in PROBE_FIELDS]))
    return pa.field(column.name, kind, metadata={"unit": column.unit, "meaning": column.meaning})


def results_table(rows: Iterable[Mapping[str, Any]], more: tuple[Column, ...] = ()) -> pa.Table:
    """Build the typed table of the schema and `more` columns from row dictionaries, as in `results.json`.

    Unit and meaning stand on every field, the version on the table. A missing key becomes null; an unknown one goes to
    `extra`.
    """
    fields = [_field(column) for column in COLUMNS + more]
    typed = [{**_typed_row(row, COLUMNS + more), "schema_version": SCHEMA_VERSION} for row in rows]
    arrays = []
    for field in fields:
        try:
            arrays.append(pa.array([row[field.name] for row in typed], field.type))
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise AnalysisError(f"'{field.name}' holds what is no {field.type} ({error}); correct it") from error
    version = {"aimscale_schema_version": str(SCHEMA_VERSION)}
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=version))


def _typed_row(row: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    """Give every column a value or null: probes as typed rows, objects as JSON; what else there is goes to `extra`."""
    typed: dict[str, Any] = {column.name: row.get(column.name) for column in columns}
    for name, dtype in ((column.name, column.dtype) for column in columns if typed[column.name] is not None):
        value = typed[name]
        if dtype == "probes":
            typed[name] = [_typed_row(probe, PROBE_FIELDS) for probe in value]
        elif dtype == "json" and not isinstance(value, str):
            typed[name] = _json(value)
        elif dtype == "int64" and isinstance(value, float) and not value.is_integer():  # Arrow would cut it
            raise AnalysisError(f"'{name}' is {value!r}, which is no whole number; correct it")
    if unknown := {key: value for key, value in row.items() if key not in typed}:
        typed["extra"] = _json(json.loads(typed["extra"] or "{}") | unknown)
    return typed


def _json(value: Any) -> str:
    """Write JSON text; numbers that JSON cannot hold become null."""
    return json.dumps(plain_types(value), sort_keys=True, default=str, allow_nan=False)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path to write to, which replaces `path` at the block's end; what killed writers left a minute ago goes.

    Of a link the target is replaced; what is no regular file, such as /dev/null, is written to.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a path holds no NUL character")
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 60:
                left.unlink()
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_table(table: pa.Table, path: Path) -> None:
    """Write Parquet or CSV (nested columns as JSON text) by the suffix of `path`, so that nobody sees half of it."""
    try:
        with written_aside(path) as aside:
            if path.suffix == ".parquet":
                pq.write_table(table, aside)
            elif path.suffix == ".csv":
                for i, field in enumerate(table.schema):
                    if pa.types.is_nested(field.type):
                        texts = [None if value is None else _json(value) for value in table[i].to_pylist()]
                        table = table.set_column(i, field.name, pa.array(texts, pa.string()))
                write_csv(table, aside)
            else:
                raise AnalysisError(f"cannot write {path}: end its name in .parquet or .csv")
    except OSError as error:
        raise AnalysisError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is yours"
        ) from error
