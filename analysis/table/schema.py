"""The results table as a contract: one row per run and data budget, typed, documented and versioned.

Probes are a nested column (list of struct) in Parquet and JSON text in CSV. Keys that the schema does not know are kept
as JSON in the column `extra`, never dropped.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    unit: str
    meaning: str
    role: Role = ""
    """`scale`: runs of one experiment may differ in it; `design`: not those; `source`: says where a row comes from."""
    label: str = ""
    """Label of an axis, where it is not the name; behind the letter of a law and a colon for one of its variables."""
    head: str = ""
    """Heading in a table of a page, where it is not the name in words."""

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


PROBE_FIELDS = tuple(
    Column(*row)
    for row in (
        ("task", "string", "", "Name of the labelled task; name@evaluation where it is not the sweep's own evaluation"),
        ("evaluation", "string", "", "What tells evaluations of a task apart: hashes of its settings and of its data"),
        ("kind", "string", "", "attentive, efficient, linear or knn on frozen features; lora adapts the backbone"),
        ("blocks", "list<int64>", "", "0-based backbone blocks whose outputs were averaged"),
        ("num_classes", "int64", "", "Classes of the task"),
        ("chance", "float64", "fraction", "Accuracy of always naming the commonest class of the test split"),
        ("ideal", "float64", "", "Loss at which the accuracy would be 1; null where none is known"),
        ("n", "int64", "images", "Images of the test split, scored once"),
        ("top1", "float64", "fraction", "Test accuracy on the blocks that the hold-out chose", "", "top-1 accuracy"),
        ("top1_lo95", "float64", "fraction", "Lower end of the 95 % interval of top1"),
        ("top1_hi95", "float64", "fraction", "Upper end of the 95 % interval of top1"),
        ("top5", "float64", "fraction", "Share of test images whose class is among the five first"),
        ("last_blocks", "list<int64>", "", "The last six blocks (half of a shallow backbone): nothing is chosen there"),
        ("last_top1", "float64", "fraction", "Test accuracy on the last blocks (lora uses no others)"),
        ("last_top1_lo95", "float64", "fraction", "Lower end of the 95 % interval of last_top1"),
        ("last_top1_hi95", "float64", "fraction", "Upper end of the 95 % interval of last_top1"),
        ("holdout_top1", "float64", "fraction", "Accuracy on the hold-out of the training split that made the choices"),
        ("lr", "float64", "", "Chosen learning rate"),
        ("weight_decay", "float64", "", "Chosen weight decay"),
        ("extra", "json", "", "Further keys that the probe wrote"),
    )
)  # fmt: skip
"""Fields of one entry of the column `probes`."""

COLUMNS = tuple(
    Column(*row)
    for row in (
        ("schema_version", "int64", "", "Version of this schema", "source"),
        ("sweep", "string", "", "Name of the sweep", "source"),
        ("run_id", "string", "", "Identity of the run: slug and hash of what defines its result", "", "", "run"),
        ("status", "string", "", "Of this budget: complete, unfinished, diverged, failed; during: of a point"),
        ("size", "string", "", "Named model size", "scale"),
        ("seed", "int64", "", "Seed of the initial weights and of the stream", "scale"),
        ("images_seen", "int64", "images", "D: training images seen, repeats included",
         "scale", "D: training images seen", "D"),
        ("unique_images", "int64", "images", "U: different training images in the pool",
         "scale", "U: different training images", "U"),
        ("epochs", "float64", "passes", "images_seen / unique_images"),
        ("batch_size", "int64", "images", "Images per optimiser step, over all ranks", "scale"),
        ("lr_peak", "float64", "", "Learning rate after warm-up", "scale"),
        ("lr_multiplier", "float64", "", "Factor on the recipe's learning rate; null for an unplanned run", "scale"),
        ("schedule", "string", "", "wsd or cosine", "design"),
        ("precision", "string", "", "fp32 or bf16", "design"),
        ("patch_order", "string", "", "Order in which patches are predicted", "design"),
        ("prefix", "string", "", "How prefix lengths are drawn; null for a masked model", "design"),
        ("target", "string", "", "normalised (per patch, as in the paper) or raw pixels", "design"),
        ("head_rule", "string", "", "How the pixel head follows the backbone", "design"),
        ("head_width", "int64", "channels", "Width of the pixel head's blocks; null for a linear head", "scale"),
        ("head_depth", "int64", "blocks", "Blocks of the pixel head; 0 where a linear layer is all of it", "scale"),
        ("setup", "json", "", "Configuration fields off their defaults, but for scale, data, rate, batch and probes"),
        ("image_size", "int64", "pixels", "Side of the square input", "design"),
        ("patch_size", "int64", "pixels", "Side of a patch", "design"),
        ("params_preprocessor", "int64", "parameters", "Patch embedding and its norm"),
        ("params_trunk", "int64", "parameters", "Transformer backbone: what the paper calls the size",
         "", "N: backbone parameters"),
        ("params_head", "int64", "parameters", "Pixel head, not kept after training", "", "N: pixel-head parameters"),
        ("params_total", "int64", "parameters", "N: preprocessor, backbone and head",
         "", "N: parameters, pixel head included", "N"),
        ("flops_per_image", "float64", "FLOP", "Training FLOPs of one image (3 x forward, head and attention counted)"),
        ("flops_train", "float64", "FLOP", "C: flops_per_image x images_seen",
         "", "C: training compute (FLOP)", "C (FLOP)"),
        ("flops_6nd", "float64", "FLOP", "6 x params_total x tokens seen, the usual approximation of C",
         "", "C: training compute, 6 × N × tokens (FLOP)"),
        ("flops_executed", "float64", "FLOP", "C without what training skips (tokens that are not scored)",
         "", "C: training compute, executed (FLOP)"),
        ("val_loss", "float64", "normalised MSE", "L: mean squared error per scored target on fixed held-out images",
         "", "validation loss", "loss"),
        ("val_loss_se", "float64", "normalised MSE", "Standard error of val_loss over validation images", "", "", "SE"),
        ("val_num_images", "int64", "images", "Validation images", "design"),
        ("train_loss", "float64", "normalised MSE", "Mean over the last 5 % of the budget", "", "training loss"),
        ("probes", "probes", "", "Frozen-feature results: a list of entries with PROBE_FIELDS"),
        ("wall_s", "float64", "s", "Wall time of training to this budget; validation and probes are not in it"),
        ("device_hours", "float64", "h", "Wall time x devices, in hours"),
        ("images_per_s", "float64", "images/s", "Training throughput over all ranks"),
        ("mfu_published", "float64", "fraction", "FLOPs by flops_per_image over the device's nominal peak",
         "", "", "MFU published/nominal (%)"),
        ("mfu", "float64", "fraction", "FLOPs executed over the matrix-multiplication peak measured on the device",
         "", "", "MFU executed/measured (%)"),
        ("num_skipped_steps", "int64", "steps", "Optimiser steps skipped because of non-finite gradients"),
        ("num_bad_samples", "int64", "images", "Samples that could not be decoded"),
        ("num_loss_spikes", "int64", "steps", "Training losses far above those before them"),
        ("device", "string", "", "Device model", "source"),
        ("world_size", "int64", "", "Number of ranks", "source"),
        ("zero_stage", "int64", "", "DeepSpeed ZeRO stage", "source"),
        ("config_hash", "string", "", "Hash of what is trained, as in the run's name"),
        ("data_fingerprint", "string", "", "Fingerprint of the training data", "design"),
        ("git_commit", "string", "", "Commit of the code, with a mark when the tree was dirty", "source"),
        ("finished_at", "string", "UTC", "When the row was written, ISO 8601"),
        ("extra", "json", "", "Further keys that the run wrote"),
    )
)  # fmt: skip
"""The schema, in the order in which columns are written."""

OF_CURVES = (Column("lr", "float64", "", "Learning rate at that point"),)
"""Further columns of points during training; a foreign table's `lr` is a setting."""
KNOWN = {column.name: column for column in COLUMNS}
_PROBED = {field.name: field for field in PROBE_FIELDS}
_SHARES = ("aim_7b", "gap", "best_frozen_top1", "baseline_top1", "detectable")
"""Prefixes of columns of `compare` that hold accuracies or differences of these."""
MFU = {"mfu_published": "published/nominal", "mfu": "executed/measured"}
"""Columns of model FLOPs utilisation: which FLOPs over which peak."""


def described(name: str) -> Column:
    """Describe a column of any table, or a field of a probe: as the schema does, or by its name alone."""
    unit = "fraction" if name.startswith(_SHARES) else ""
    return KNOWN.get(name) or _PROBED.get(name) or Column(name, "float64", unit, "")


def frame_cells(frame: pd.DataFrame) -> list[dict[str, str]]:
    """Write the rows of a table as a reader sees them: heading -> cell, an interval in one cell."""
    columns = [described(str(name)) for name in frame]
    cells = {c.name: [c.cell(value) for value in frame[c.name].astype(object)] for c in columns}
    heads = {c.name: c.heading for c in columns}
    for name in [name for name in cells if {f"{name}_lo95", f"{name}_hi95"} <= {*cells}]:
        ends = zip(cells[f"{name}_lo95"], cells.pop(f"{name}_hi95"), strict=True)
        cells[f"{name}_lo95"] = [f"[{low}, {high}]" for low, high in ends]
        heads[f"{name}_lo95"] = f"{heads[name]} interval"
    return [dict(zip(map(heads.get, cells), row, strict=True)) for row in zip(*cells.values(), strict=True)]


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
    typed = [_typed_row(row, COLUMNS + more) for row in rows]
    arrays = []
    for field in fields:
        try:
            arrays.append(pa.array([row[field.name] for row in typed], field.type))
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise AnalysisError(f"'{field.name}' holds what is no {field.type} ({error}); correct it") from error
    version = {"aimscale_schema_version": str(SCHEMA_VERSION)}
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=version))


def _typed_row(row: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    """Give every column a value or null; what else there is goes to `extra` as JSON."""
    typed = {column.name: _value(row.get(column.name), column) for column in columns}
    if unknown := {key: value for key, value in row.items() if key not in typed}:
        typed["extra"] = _json(json.loads(typed["extra"] or "{}") | unknown)
    return typed


def _value(value: Any, column: Column) -> Any:
    """Write a value as its column holds it: probes as typed rows, objects as JSON; no number is cut to a whole one."""
    if value is None:
        return SCHEMA_VERSION if column.name == "schema_version" else None
    if column.dtype == "probes":
        return [_typed_row(probe, PROBE_FIELDS) for probe in value]
    if column.dtype == "json" and not isinstance(value, str):
        return _json(value)
    if column.dtype == "int64" and isinstance(value, float) and not value.is_integer():
        raise AnalysisError(f"'{column.name}' is {value!r}, which is no whole number; correct it")
    return value


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
