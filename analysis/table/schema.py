"""The results table as a contract: one row per run and data budget, typed, documented and versioned; letters of laws,
and roles of columns.

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
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import write_csv

from aimscale.analysis.display import SUFFIXES, did_you_mean, human, option, plain_types, some
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.formulas import quoted

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
CANONICAL = {"N": "params_total", "D": "images_seen", "U": "unique_images", "C": "flops_train", "L": "val_loss"}
"""Variable of a law -> its column in a results table, unless the table has a column of the variable's own name."""
LETTERS = {name: letter for letter, name in CANONICAL.items()}
MEANT = {
    "N": re.compile(r"(?=.*(param|model.?size))(?!.*(per|/))", re.IGNORECASE),
    "D": re.compile(r"(?=.*(token|image|sample|example))(?!.*(per|/|size|rate|batch|ratio))", re.IGNORECASE),
    "L": re.compile(r"(?=.*loss)(?!.*(train|weight|aux))", re.IGNORECASE),
}
"""Letter of a law -> what names of columns in tables of others begin to match where they mean it."""
UNIT = re.compile(r"[(\[_ ]([kMBGT])[)\]]?$|\bin (thousand|million|billion|trillion)s?\b")
"""Unit in a column's name."""
UNIT_WORDS = {"thousand": "k", "million": "M", "billion": "B", "trillion": "T"}
FOLDER = "table_folder"
"""Column that `read_tables` adds: the folder a row's table lies in, where its run directories are looked for."""
SCALE = tuple(column.name for column in COLUMNS if column.role == "scale")
"""Columns of scale and chance, in which runs of one experiment may differ."""
DESIGN = tuple(column.name for column in COLUMNS if column.role == "design")
"""Columns of the results table that make runs another experiment, not another scale of the same."""
MEASURED_ON = ("data_fingerprint", "val_num_images")
"""Other training data or another validation set: losses that cannot share a law."""
HEAD = ("head_rule", "head_depth", "head_width", "model.head_depth", "model.head_width")
FOLLOWS = {
    **dict.fromkeys(HEAD, HEAD),
    "schedule": ("schedule.decay_fraction", "schedule.lr_end"),
    "image_size": ("patch_size", *MEASURED_ON),
    "patch_size": ("image_size",),
    "size": ("head_depth", "head_width", "lr_peak", "lr_multiplier", "batch_size"),
    "lr_multiplier": ("lr_peak",),
    "lr_peak": ("lr_multiplier",),
    "init": ("lr_peak", "lr_multiplier", "batch_size"),
    "objective.masked": ("prefix",),
}
"""Column in question -> columns that change with it and so cannot be held equal."""
TUNED = ("lr_multiplier", "lr_peak", "batch_size", "optimiser.weight_decay")
"""Tuned columns of a results table."""
TUNED_BY_OTHERS = re.compile(
    r"(?!.*(min|end|final|start|warm|schedule|lr[ _-]?decay|index))"
    r".*(?<![a-z])(lr|learning[ _-]?rate|batch([ _-]?size)?|bsz?|weight[ _-]?decay|wd)(?![a-z])",
    re.IGNORECASE,
)
"""Names of a learning rate, a batch or a weight decay in tables of others; not of the schedule's, nor counts."""
STEPS = ("step", "_step", "global_step", "trainer/global_step", "iteration", "iter", "iter_num", "epoch")
"""What programs call the count that a line of their log stands at, the finest first."""
SECTIONS = ("model", "data", "objective", "optimiser", "schedule")
"""Parts of a run's configuration whose fields `read_tables` makes into columns."""
SCRATCH = "scratch"
"""Value of `init` of runs whose weights were drawn, where other runs of the table started from weights."""
DEFAULT = "default"
"""Value of a column of the set-up where a run left the field at its default."""
PROVENANCE = ("sweep", FOLDER)
"""Columns that say where a row comes from: one experiment may stand in several sweeps and folders."""
DONE = "complete completed finished done success succeeded successful ok during terminated"
"""What tools call a run that is done, and a point of one."""
NOT_DONE = (
    "failed fail failure error errored crashed killed canceled cancelled canceling cancelling aborted pruned diverged "
    "running active pending queued waiting scheduled submitted created initializing configuring starting resuming "
    "recovering completing preempted suspended paused pausing stopped stopping interrupted unfinished incomplete "
    "timeout timed_out out_of_memory oom node_fail boot_fail deadline revoked requeued unknown lost nan "
    "failed_setup failed_precheck failed_driver failed_no_resource failed_controller"
)
"""What tools call any other."""


def is_done(status: str) -> bool | None:
    """Tell whether a run is done by the word of a tool (W&B, MLflow, Lightning, Determined, Ray, Optuna, SkyPilot,
    stable-pretraining, Slurm; `during`: a point of training); None where the word is none of theirs."""
    word = status.lower().rpartition(".")[2].partition(" by ")[0].strip(" +").replace("-", "_").replace(" ", "_")
    word = word.removeprefix("state_")
    return True if word in DONE.split() else False if word in NOT_DONE.split() else None


def varies(values: pd.Series) -> bool:
    """Tell whether a column takes several values, missing ones aside."""
    return len(pd.unique(values.dropna())) > 1


def is_plain(values: pd.Series) -> bool:
    """Tell whether a column holds what can be compared: no lists, no dictionaries."""
    return bool(values.map(pd.api.types.is_hashable).all())


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """Rows that were left out, and why."""

    kind: str
    subject: str = ""
    """Column, as its file calls it, or the condition that was not met."""
    number: int
    text: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.number} row{'s' if self.number != 1 else ''} {self.text}"


def missing_column(name: str, columns: Iterable[str], purpose: str = "") -> AnalysisError:
    """Make the error about a column that a table lacks: what for, the option that names it, which columns there are."""
    columns = [each for each in map(str, columns) if each != FOLDER]
    letter = LETTERS.get(CANONICAL.get(name, name), name if len(name) == 1 else "")
    meant, error = columns_meant(columns), f"The table has no column {name!r}{purpose}"
    if letter in meant:
        typed = option("columns", meant)
        return AnalysisError(f"{error}; name yours, for instance by {typed}; its columns are {some(columns)}.")
    formula = {"C": "C=6*N*D", "D": "D=C/(6*N)"}.get(letter)
    count = f", or count it: {option('columns', formula)}" if formula else ""
    named = f"; name yours by {option('columns', f'{letter}=THEIRS')}{count}" if letter else ""
    return AnalysisError(f"{error}{named}; {column_words(columns, name)}")


def columns_meant(columns: Sequence[str]) -> dict[str, str]:
    """Guess the columns of a foreign table that are meant by N, D and L, where none has that name: letter -> column, or
    its formula where the name ends in a unit such as (M)."""
    meant = dict[str, str]()
    for letter, pattern in MEANT.items():
        name = next(filter(pattern.match, columns), None)
        if name is None or {letter, CANONICAL[letter]} & {*columns}:
            continue
        meant[letter] = name
        if unit := UNIT.search(name):
            meant[letter] = f"{quoted(name)}*1e{math.log10(SUFFIXES[unit[1] or UNIT_WORDS[unit[2]]]):.0f}"
    return meant


def column_words(columns: Iterable[str], like: str) -> str:
    """Name the columns of a table that may be meant, or some of them."""
    return did_you_mean(like, (name for name in map(str, columns) if name != FOLDER), "its columns are")


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
        kind = pa.list_(pa.struct([_field(each) for each in PROBE_FIELDS]))
    return pa.field(column.name, kind, metadata={"unit": column.unit, "meaning": column.meaning})


def results_table(rows: Iterable[Mapping[str, Any]], more: tuple[Column, ...] = ()) -> pa.Table:
    """Build the typed table of the schema and `more` columns from row dictionaries, as in `results.json`.

    Unit and meaning stand on every field, the version on the table. A missing key becomes null; an unknown one goes to
    `extra`.
    """
    fields = [_field(column) for column in COLUMNS + more]
    typed = [{**_typed_row(row, COLUMNS + more), "schema_version": SCHEMA_VERSION} for row in rows]
    arrays = []
    for column in fields:
        try:
            arrays.append(pa.array([row[column.name] for row in typed], column.type))
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise AnalysisError(f"'{column.name}' holds what is no {column.type} ({error}); correct it") from error
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
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 60:
                stale.unlink()
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # a name that nobody can foresee and link away
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
