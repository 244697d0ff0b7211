"""Files of other people: which are read at all, how much of them, and tables as they stand in Parquet, CSV, Excel and
JSON lines."""

from __future__ import annotations

import difflib
import itertools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.schema import KNOWN, SCHEMA_VERSION

MAX_BYTES = 10**9
"""Limit on the bytes of a file that is read, and on those that its values take in memory."""
MAX_VALUES = 10**8
"""Limit on the values of a Parquet file, whose pages may hold one value many times in few bytes."""


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


def read_file(path: Path, read_folder: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    """Read a table as it stands.

    Args:
        read_folder: reads the runs of a folder.

    Raises:
        AnalysisError: it does not exist, is of no known kind, damaged or too large, or has two columns of one name.
    """
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
        frame = read_folder(path) if path.is_dir() else _READERS[path.suffix](path)
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
