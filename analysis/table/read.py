"""A results table, ours or a foreign one, from a file, or from a folder of other people's runs: Weights & Biases and
marin's JSON lines, TensorBoard's event files, MLflow's and Lightning's folders.

A file may be a stranger's: plain ones are read, inside of their folder, of a limited size.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.files import MAX_BYTES, check_file, files_of
from aimscale.analysis.table.logs import FROM_LOG, panel_points, run_logs
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.schema import KNOWN, SCHEMA_VERSION, is_done

MAX_VALUES = 10**8
"""Limit on the values of a Parquet file, whose pages may hold one value many times in few bytes."""
_RUN_NAMES = ("Name", "name", "run_path")
"""Columns that name a run of W&B, in its export, in the table that its guide makes with its API, and in marin's."""


def read_table(path: str | Path, columns: Mapping[str, str] | None = None) -> Runs:
    """Read a results table, or anybody's table of results, under our names.

    Args:
        path: a `.parquet`, `.csv`, `.tsv`, `.xlsx` or JSON-lines (`.jsonl`) file, an export of Weights & Biases among
            them; a sweep's folder that holds `results.parquet`; or a folder of other people's runs (`run_logs`).
        columns: our name (or letter) -> the name in the file, or a formula of columns such as `6 * N * D` or
            `1 - accuracy` (a name with other characters in backticks; see `analysis.formulas`); a file's own N, D, U, C
            and L are taken for the laws' letters, other columns that are not named keep their names. `path:PATTERN`
            takes the group of a regular expression that is found in the name or folder of a run, `log:PATTERN` the one
            found in the lines of text logs. TASK:KIND -> an accuracy from 0 to 1, TASK:chance and TASK:ideal -> its
            chance level and the loss at which it is 1: entries of `probes`.

    Returns:
        Known columns typed as the schema says (an integer column with gaps becomes float64, `probes` a list of
        dictionaries per row); other columns as they are. They remember the names of renamed columns.

    Example:
        >>> read_table("losses.csv", {"N": "params", "D": "images", "L": "loss"})
    """
    path, columns = Path(path), dict(columns or {})
    patterns = {ours: text.removeprefix(FROM_LOG) for ours, text in columns.items() if text.startswith(FROM_LOG)}
    columns |= {name: name for name in patterns}
    frame = read_file(next(files_of(path, "results.parquet"), path), patterns)
    if frame.empty:
        raise AnalysisError(f"{path} has no rows; collect the sweep's results first")
    frame, of_wandb = from_wandb(frame, path)
    return Runs(frame, of_wandb | columns, source=path)


def read_file(path: Path, patterns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read a table as it stands; of a folder the logs, by patterns where there are any (`run_logs`)."""
    if path.exists() and not path.is_dir():
        check_file(path)
    if not path.exists():
        tables = [each.name for each in path.parent.glob("*") if each.suffix in _READERS]
        near = difflib.get_close_matches(path.name, tables, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give another path, or `aimscale collect` a sweep"
        raise AnalysisError(f"there is no table {path}; {hint}")
    if path.is_file() and path.suffix not in _READERS:
        raise AnalysisError(
            f"cannot tell what {path} is: give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or the "
            "folder of a log"
        )
    try:
        frame = run_logs(path, patterns) if path.is_dir() else _READERS[path.suffix](path)
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


def _read_excel(path: Path) -> pd.DataFrame:
    """Read the first sheet."""
    with zipfile.ZipFile(path) as parts:
        if sum(part.file_size for part in parts.infolist()) > MAX_BYTES:
            raise AnalysisError(f"{path} has more than {MAX_BYTES:.0e} bytes; give a row per run and budget")
    try:
        frame = pd.read_excel(path, dtype=_TEXTS)
    except ImportError as error:
        raise AnalysisError(f"{path} is a sheet of Excel; pip install openpyxl, or save it as .csv") from error
    return frame.rename(columns=str)


_TEXTS = {name: "string" for name, column in KNOWN.items() if column.dtype == "string"}
"""Columns that are never numbers, though a hash such as 24476e35 looks like one."""
_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".parquet": _read_parquet,
    ".csv": _read_text,
    ".tsv": _read_text,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=_TEXTS),
    ".xlsx": _read_excel,
}
SUFFIXES = tuple(_READERS)
"""Endings of files that are tables."""


def from_wandb(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Give nested cells columns such as `config.model.width`, and map names of W&B's as `read_table`'s `columns` do."""
    if (points := panel_points(frame)) is not None:
        return points, {}
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
    states = [name for name in ("State", "Status", "state", "run_status") if name in frame and "status" not in frame]
    if states and frame[states[0]].dropna().map(lambda word: is_done(str(word)) is not None).all():
        frame = frame.assign(status=frame[states[0]])
    if not (is_api or "_step" in frame or {*frame} >= {"Name", "State"}):
        return frame, {}
    called = [name for name in _RUN_NAMES if name in frame and "run_id" not in frame]
    return frame, {"run_id": called[0]} if called else {}
