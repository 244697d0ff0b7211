"""A results table, ours or a foreign one, from a file, or from a folder of other people's runs: Weights & Biases and
marin's JSON lines, TensorBoard's event files, MLflow's and Lightning's folders.

A file may be a stranger's: plain ones are read, inside of their folder, of a limited size.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import itertools
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.schema import KNOWN, SCHEMA_VERSION

MAX_BYTES = 10**9
"""Limit on the bytes of a file that is read, and on those that its values take in memory."""
MAX_VALUES = 10**8
"""Limit on the values of a Parquet file, whose pages may hold one value many times in few bytes."""
_RUN_NAMES = ("Name", "name", "run_path")
"""Columns that name a run of W&B, in its export, in the table that its guide makes with its API, and in marin's."""

MAX_YAML_BYTES, MAX_YAML_VALUES = 10**7, 10**5


def read_table(path: str | Path, columns: Mapping[str, str] | None = None) -> Runs:
    """Read a results table, or anybody's table of results, under our names.

    Args:
        path: a `.parquet`, `.csv`, `.tsv` or JSON-lines (`.jsonl`) file, an export of Weights & Biases among them; a
            sweep's folder that holds `results.parquet`; or a folder of other people's runs (`run_logs`).
        columns: our name (or letter) -> the name in the file, or a formula of columns such as `6 * N * D` or
            `1 - accuracy` (a name with other characters in backticks; see `analysis.formulas`); a file's own N, D, U, C
            and L are taken for the laws' letters, other columns that are not named keep their names. TASK:KIND -> an
            accuracy from 0 to 1, TASK:chance and TASK:ideal -> its chance level and the loss at which it is 1: entries
            of `probes`.

    Returns:
        Known columns typed as the schema says (an integer column with gaps becomes float64, `probes` a list of
        dictionaries per row); other columns as they are. They remember the names of renamed columns.

    Example:
        >>> read_table("losses.csv", {"N": "params", "D": "images", "L": "loss"})
    """
    path = Path(path)
    frame = read_file(next(files_of(path, "results.parquet"), path))
    if frame.empty:
        raise AnalysisError(f"{path} has no rows; collect the sweep's results first")
    frame, of_wandb = from_wandb(frame, path)
    return Runs(frame, of_wandb | dict(columns or {}), source=path)


def files_of(folder: Path, pattern: str) -> Iterator[Path]:
    """Yield the files of a folder that a pattern or a name finds, sorted; folders are passed over.

    Raises:
        AnalysisError: one is a pipe or a device, is too large, or lies elsewhere, behind a link.
    """
    for path in sorted(folder.glob(pattern)):
        if not path.is_dir():
            check_file(path)
            if not path.resolve().is_relative_to(folder.resolve()):
                raise AnalysisError(f"{path} links to a file outside of {folder}; put a copy of that file in its place")
            yield path


def check_file(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Raise AnalysisError for what would be waited for, or read without end."""
    if not path.is_file():
        raise AnalysisError(f"{path} is a pipe or a device; save what it gives to a file first")
    if path.stat().st_size > max_bytes:
        raise AnalysisError(f"{path} has more than {max_bytes:.0e} bytes; give a smaller one")


def read_file(path: Path) -> pd.DataFrame:
    """Read a table as it stands."""
    if path.exists() and not path.is_dir():
        check_file(path)
    if not path.exists():
        tables = [each.name for each in path.parent.glob("*") if each.suffix in _READERS]
        near = difflib.get_close_matches(path.name, tables, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give another path, or `aimscale collect` a sweep"
        raise AnalysisError(f"there is no table {path}; {hint}")
    if path.is_file() and path.suffix not in _READERS:
        raise AnalysisError(f"cannot tell what {path} is: give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    try:
        frame = run_logs(path) if path.is_dir() else _READERS[path.suffix](path)
        if not frame.columns.is_unique:
            name = frame.columns[frame.columns.duplicated()][0]
            raise AnalysisError(f"{path} has two columns named '{name}'; rename one of them")
        return frame
    except AnalysisError:
        raise
    except Exception as error:  # whatever damaged bytes make a parser raise
        reason = " ".join(str(error).split())[:160]
        raise AnalysisError(
            f"cannot read {path} as a table ({reason}): it may be half-written; write it again"
        ) from error


def _read_parquet(path: Path) -> pd.DataFrame:
    with pq.ParquetFile(path) as file:
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        num_values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
        if max(num_values, file.metadata.num_rows) > MAX_VALUES:
            raise AnalysisError(f"{path} has more than {MAX_VALUES:.0e} values; give a row per run and budget")
        batches, num_bytes = list[pa.RecordBatch](), 0
        for batch in file.iter_batches(1024):
            batches.append(batch)
            if (num_bytes := num_bytes + batch.nbytes) > MAX_BYTES:
                raise AnalysisError(f"{path} has more than {MAX_BYTES:.0e} bytes; give a row per run and budget")
        table = pa.Table.from_batches(batches, file.schema_arrow)
    table.validate(full=True)  # else bytes that are no text fail where they are first used
    version = int((table.schema.metadata or {}).get(b"aimscale_schema_version", b"0"))
    if version > SCHEMA_VERSION:
        raise AnalysisError(f"{path} has schema {version}, newer than {SCHEMA_VERSION} known here; update aimscale")
    frame = table.to_pandas()
    frame.columns = frame.columns.map(str)  # pandas brings numbers back as names
    return frame.reset_index(drop=not any(frame.index.names))  # labels of frames that were joined may stand twice


def _read_text(path: Path) -> pd.DataFrame:
    """Read a text behind lines that begin with #; commas, semicolons or tabs part its cells, whichever part most of its
    head. Beside semicolons 1,5 is a number."""
    with path.open(errors="replace") as file:
        lines = [*itertools.islice(file, 1000)]
    notes = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    sep = max(",;\t", key="".join(lines[notes : notes + 1]).count)
    has_commas = sep == ";" and re.search(r"(^|;)\s*-?\d+,\d+\s*[a-zA-Z%]?\s*(;|$)", "".join(lines), re.MULTILINE)
    frame = pd.read_csv(path, sep=sep, skiprows=notes, dtype=_TEXTS, decimal="," if has_commas else ".")
    texts = frame.select_dtypes(exclude="number")  # words among numbers, or suffixes
    texts = texts.replace(r"^(\s*[-+]?\d+),(\d+\D*)$", r"\1.\2", regex=True) if has_commas else texts
    return frame.assign(**texts)


_TEXTS = {name: "string" for name, column in KNOWN.items() if column.dtype == "string"}
"""Columns that are never numbers, though a hash such as 24476e35 looks like one."""
_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": _read_parquet,
    ".csv": _read_text,
    ".tsv": _read_text,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=_TEXTS),
}
SUFFIXES = tuple(_READERS)
"""Endings of files that are tables."""


def from_wandb(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Give nested cells columns such as `config.model.width`, and map names of W&B's as `read_table`'s `columns` do."""
    if is_api := {*frame} >= {"summary", "config"} and not {*frame}.isdisjoint(_RUN_NAMES):
        try:  # a CSV has dictionaries as text
            told = frame[["config", "summary"]].map(lambda c: ast.literal_eval(c) if isinstance(c, str) else c)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:  # the last two: of thousands of signs
            raise AnalysisError(
                f"{path}: 'config' or 'summary' is no dictionary ({error}); write the runs to a .jsonl or .parquet file"
            ) from error
        frame = frame.assign(**told)
    for name in frame.columns[frame.dtypes.map(str) == "object"]:
        cells = [cell if isinstance(cell, dict) else {} for cell in frame[name]]
        if any(cells):
            inner = pd.json_normalize(cells).set_index(frame.index).add_prefix(f"{name}.")
            frame = frame.drop(columns=name).join(inner[[each for each in inner if each not in frame]])
    if not (is_api or "_step" in frame or {*frame} >= {"Name", "State"}):
        return frame, {}
    called = [name for name in _RUN_NAMES if name in frame and "run_id" not in frame]
    if "State" in frame:
        frame = frame.assign(status=frame["State"].where(frame["State"] != "finished", "complete"))
    return frame, {"run_id": called[0]} if called else {}


def run_logs(folder: Path) -> pd.DataFrame:
    """Read a folder of runs as points: a row per run and step, with its settings.

    The last row of a run has the last value of every metric and the status `complete`, those before it `during`.
    """
    frames = []
    for run, settings, points, status in (each for reader in _LOG_READERS for each in reader(folder) if len(each[2])):
        points = points.sort_index()
        points.iloc[-1] = points.ffill().iloc[-1]
        statuses = [*["during"] * (len(points) - 1), status]
        told = {name: value for name, value in settings.items() if name not in points}
        frames.append(points.reset_index().assign(**told, run_id=run, status=statuses))
    if not frames:
        expected = "results.parquet nor runs of TensorBoard, MLflow or Lightning"
        raise AnalysisError(f"{folder} holds neither {expected}; give another folder, or `aimscale collect` a sweep")
    return pd.concat(frames, ignore_index=True)


_Run = tuple[str, dict[str, Any], pd.DataFrame, str]
"""Identity of a run (its folder, or MLflow's id: names may stand twice), settings, metrics by step, and status."""


def _mlflow_store(folder: Path) -> Iterator[_Run]:
    """Read MLflow's database, `mlflow.db`."""
    for file in files_of(folder, "**/mlflow.db"):
        with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as store:
            read = {name: pd.read_sql(f"SELECT * FROM {name}", store) for name in ("runs", "params", "metrics")}
        for run in read["runs"].to_dict("records"):
            params, metrics = (read[name][read[name]["run_uuid"] == run["run_uuid"]] for name in ("params", "metrics"))
            points = metrics.pivot_table(index="step", columns="key", values="value", aggfunc="last")
            settings = {key: _value(value) for key, value in zip(params["key"], params["value"], strict=True)}
            yield run["run_uuid"], settings, points, "complete" if run["status"] == "FINISHED" else "unfinished"


def _mlflow_files(folder: Path) -> Iterator[_Run]:
    """Read MLflow's folder of files, `mlruns`: lines `time value step` in a file for every metric."""
    for meta in files_of(folder, "**/meta.yaml"):
        files = [*files_of(meta.parent, "metrics/**/*")]
        names = [each.relative_to(meta.parent / "metrics").as_posix() for each in files]
        values = [pd.read_csv(each, sep=" ", header=None).groupby(2)[1].last() for each in files]
        points = pd.DataFrame(dict(zip(names, values, strict=True))).rename_axis("step")
        settings = {each.name: _value(each.read_text()) for each in files_of(meta.parent, "params/*")}
        status = "complete" if _yaml(meta).get("status") == "3" else "unfinished"  # FINISHED
        yield meta.parent.name, settings, points, status


def _lightning(folder: Path) -> Iterator[_Run]:
    """Read the folders of Lightning's CSV logger: `metrics.csv`, and `hparams.yaml` beside it."""
    for file in files_of(folder, "**/metrics.csv"):
        points = pd.read_csv(file).groupby("step").last()
        yield file.parent.as_posix(), _hparams(file.parent), points, "complete"


def _tensorboard(folder: Path) -> Iterator[_Run]:
    """Read the scalars of TensorBoard's event files, and settings that `add_hparams` or Lightning wrote."""
    files = sorted({each.parent for each in files_of(folder, "**/events.out.tfevents.*")})
    if not files:
        return
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    except ImportError as error:
        raise AnalysisError(f"{folder} holds event files of TensorBoard; pip install tensorboard") from error
    for parent in files:
        events = EventAccumulator(str(parent), size_guidance={"scalars": 0}).Reload()
        settings = _hparams(parent)
        for tag, content in events.summary_metadata.items():
            if tag == "_hparams_/session_start_info":
                given = HParamsPluginData.FromString(content.plugin_data.content).session_start_info.hparams
                settings |= {name: getattr(value, value.WhichOneof("kind")) for name, value in sorted(given.items())}
        scalars = {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        yield parent.as_posix(), settings, pd.DataFrame(scalars).rename_axis("step"), "complete"


def _hparams(folder: Path) -> dict[str, Any]:
    """Read Lightning's hyperparameters, nested ones under dotted names."""
    told = [_yaml(file) for file in files_of(folder, "hparams.yaml")]
    return {str(name): _value(v) for name, v in pd.json_normalize(told).iloc[0].items()} if any(told) else {}


def _yaml(path: Path) -> dict[str, Any]:
    """Read a mapping of texts, whatever Python tags say."""
    check_file(path, MAX_YAML_BYTES)
    values = yaml.load(path.read_text(), yaml.BaseLoader) or {}
    if not isinstance(values, dict) or _num_values(values, {}) > MAX_YAML_VALUES:
        raise AnalysisError(f"{path} is no mapping, or has more than {MAX_YAML_VALUES} values; write it again")
    return values


def _num_values(value: Any, sizes: dict[int, int]) -> int:
    """Count the values of a document, each alias as what it stands for; one that contains itself has too many."""
    if isinstance(value, dict | list) and id(value) not in sizes:
        sizes[id(value)] = MAX_YAML_VALUES + 1  # until it is counted
        inner = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = sum(_num_values(each, sizes) for each in inner)
    return sizes.get(id(value), 1)


def _value(text: Any) -> Any:
    """Read a hyperparameter, which was written as a text."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


_LOG_READERS = (_mlflow_store, _mlflow_files, _lightning, _tensorboard)
