"""Reading of results tables, ours or foreign ones, as one data frame with our names."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from aimscale.analysis.errors import AnalysisError, option
from aimscale.analysis.table.accuracies import is_accuracy, to_numbers, typed, with_accuracies
from aimscale.analysis.table.design import DEFAULT, DESIGN, SECTIONS, varies
from aimscale.analysis.table.logs import from_wandb, run_logs
from aimscale.analysis.table.names import CANONICAL, FOLDER, Exclusion, column_words, joined, remember, their_name
from aimscale.analysis.table.points import complete
from aimscale.analysis.table.schema import KNOWN, PROBE_FIELDS, SCHEMA_VERSION
from aimscale.analysis.table.select import select

_NEXT_PAIR = re.compile(r",(?=[^,=]+=)")  # formulas may have commas of their own
_NUMBER = re.compile(r"`[^`]*`|\w*[^\W\d]\w*|(?<![\w.])(\d+)(?![\w.])")
"""Whole numbers of a formula (the group), and the names that hold digits: powers of integers have no end."""
MAX_BYTES = 10**9  # a table is held in memory, and several times over


def read_tables(
    paths: str | Path | Sequence[str | Path], columns: Mapping[str, str] | None = None, *, where: Sequence[str] = ()
) -> pd.DataFrame:
    """Read tables into one frame, with a column for every field of the set-up that varies over them.

    Args:
        columns: our name -> the name in the files; see `read_table`.
        where: conditions that rows must meet, such as `prefix=paired` or `images_seen>=8000`; see `select`.

    Returns:
        A row per run and budget. One that two tables hold counts once, the first time it stands complete.

    Example:
        >>> read_tables(["results.parquet", "more.parquet"], where=["D>=100000"])
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise AnalysisError("name at least one table")
    folders = [path if path.is_dir() else path.parent for path in map(Path, given)]
    frames = [read_table(path, columns).assign(**{FOLDER: str(f)}) for path, f in zip(given, folders, strict=True)]
    return select(with_setup(_each_run_once(frames)), where)


def read_curves(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Read the points during training of sweeps: `curves.parquet` of the folders that these tables are, or lie in."""
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in map(Path, paths))
    frames = [read_table(file) for folder in folders if (file := folder / "curves.parquet").is_file()]
    return _each_run_once(frames) if frames else pd.DataFrame(columns=[*KNOWN, "lr"])


def _each_run_once(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join tables, each run and budget once: the first time that it stands complete."""
    if len(frames) == 1:
        return frames[0]
    frame, keys = joined(frames), ["run_id", "images_seen"]
    if "probes" in frame:  # some of the tables may have none
        frame["probes"] = frame["probes"].map(lambda entries: entries if isinstance(entries, list) else [])
    if not {*keys} <= {*frame}:
        return frame
    ordered = frame.loc[complete(frame).index.append(frame.index).unique()]
    repeats = ordered.duplicated(keys) & ordered[keys].notna().all(axis=1)
    rows = ordered[~repeats].sort_index(ignore_index=True)
    if "val_loss" not in frame:
        return rows
    losses = ordered["val_loss"]
    others = repeats & losses.notna() & (losses != ordered.groupby(keys)["val_loss"].transform("first"))
    text = "with a run_id and D of an earlier table, and another loss: give each table's runs ids of their own"
    return remember(rows, left_out=[Exclusion(kind="repeat", number=int(others.sum()), text=text)])


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """Turn `ours=theirs` options (several may share one string, separated by commas) into a mapping."""
    mapping: dict[str, str] = {}
    for pair in (part.strip(" ,") for text in pairs for part in _NEXT_PAIR.split(text) if part.strip(" ,")):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (ours and equals and theirs):
            raise AnalysisError(f"--columns needs 'ours=theirs', such as N=num_params, not '{pair}'")
        mapping[CANONICAL.get(ours, ours)] = theirs
    return mapping


def read_table(path: str | Path, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read a results table, or anybody's table of results, as a data frame with our names.

    Args:
        path: a `.parquet`, `.csv`, `.tsv` or JSON-lines (`.jsonl`) file, an export of Weights & Biases among them; a
            sweep's folder that holds `results.parquet`; or a folder of other people's runs (`run_logs`).
        columns: our name (or letter) -> the name in the file, or a formula of columns such as `6 * N * D` or
            `1 - accuracy` (a name with other characters in backticks); a file's own N, D, U, C and L are taken for the
            laws' letters, other columns that are not named keep their names. TASK:KIND -> an accuracy from 0 to 1,
            TASK:chance and TASK:ideal -> its chance level and the loss at which it is 1: entries of `probes`.

    Returns:
        Known columns typed as the schema says (an integer column with gaps becomes float64, `probes` a list of
        dictionaries per row); other columns as they are. The frame remembers their names of renamed columns.

    Example:
        >>> read_table("losses.csv", {"N": "params", "D": "images", "L": "loss"})
    """
    path = Path(path)
    frame = _read_file(path / "results.parquet" if (path / "results.parquet").is_file() else path)
    if frame.empty:
        raise AnalysisError(f"{path} has no rows; collect the sweep's results first")
    frame, known = from_wandb(frame, path)
    columns = known | {CANONICAL.get(ours, ours): theirs for ours, theirs in (columns or {}).items()}
    frame = _without_words(_rename(frame, columns, path))
    for name in [name for name in frame.columns if name in KNOWN]:
        frame[name] = typed(frame[name], KNOWN[name], path, their_name(frame, name))
    accuracies = {ours: theirs for ours, theirs in columns.items() if is_accuracy(ours)}
    return with_accuracies(frame, accuracies, path) if accuracies else frame


def _read_file(path: Path) -> pd.DataFrame:
    if path.exists() and not (path.is_file() or path.is_dir()):  # it would be waited for, or read without end
        raise AnalysisError(f"{path} is a pipe or a device; save what it gives to a file first")
    if not path.exists():
        there = [each.name for each in path.parent.glob("*") if each.suffix in _READERS]
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give another path, or `aimscale collect` a sweep"
        raise AnalysisError(f"there is no table {path}; {hint}")
    if path.is_file() and path.suffix not in _READERS:
        raise AnalysisError(f"cannot tell what {path} is: give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    if path.stat().st_size > MAX_BYTES:
        raise AnalysisError(f"{path} has more than {MAX_BYTES:.0e} bytes; give a row per run and budget")
    try:
        return run_logs(path) if path.is_dir() else _READERS[path.suffix](path)
    except AnalysisError:
        raise
    except Exception as error:  # whatever damaged bytes make a parser raise
        reason = " ".join(str(error).split())[:160]
        raise AnalysisError(
            f"cannot read {path} as a table ({reason}): it may be half-written; write it again"
        ) from error


def _read_parquet(path: Path) -> pd.DataFrame:
    table = pq.read_table(path)
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


def _rename(frame: pd.DataFrame, columns: Mapping[str, str], path: Path) -> pd.DataFrame:
    """Put our names for theirs; the frame remembers theirs, formulas included.

    A letter of the file that holds numbers is a law's, unless another column was named so, beside which it keeps its
    values under another name (L for layers beside a loss of another name).
    """
    for letter, ours in CANONICAL.items():
        is_free = letter in frame and letter not in columns.values() and (ours in columns or ours not in frame)
        if is_free and to_numbers(frame[letter]).notna().any():
            columns = {f"their {letter}" if ours in columns else ours: letter, **columns}
    named = {ours: theirs for ours, theirs in columns.items() if theirs in frame.columns}
    renamed = frame.drop(columns={*columns, *named.values()} & {*frame})
    renamed = renamed.assign(**{ours: frame[theirs] for ours, theirs in named.items()})
    for ours in sorted((name for name in columns if name not in named), key=is_accuracy):
        renamed[ours] = _computed(columns[ours], frame, renamed, path)
    return remember(renamed, names={o: t for o, t in columns.items() if o != t and not is_accuracy(o)})


def _computed(formula: str, theirs: pd.DataFrame, ours: pd.DataFrame, path: Path) -> pd.Series:
    """Make a column of others, by their names or a law's letters; whole numbers as floats, for 6 N D outgrows int64."""
    letters = {letter: ours[name] for letter, name in CANONICAL.items() if name in ours}
    known = pd.DataFrame({**theirs, **ours, **letters})
    for name in [name for name in known if str(name) in formula and not pd.api.types.is_bool_dtype(known[name])]:
        numbers = to_numbers(known[name]).astype(float)
        known[name] = numbers if numbers.notna().any() else known[name]
    as_floats = _NUMBER.sub(lambda found: f"{found[1]}.0" if found[1] else found[0], formula)
    try:
        found = known.eval(as_floats, engine="python", local_dict={}, global_dict={})
        if isinstance(found, pd.DataFrame):
            raise ValueError("it has a '='")
        return pd.Series(found, index=theirs.index)
    except Exception as error:  # whatever the formula makes Python raise
        why = "" if formula.isidentifier() else f", and it is no formula of columns ({error})"
        raise AnalysisError(
            f"{path} has no column {formula:.80} that {option('columns')} names{why}; {column_words(theirs, formula)}"
        ) from error


def _without_words(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave out the rows whose loss is a word, such as `diverged`, where others are numbers."""
    numbers = to_numbers(frame["val_loss"]) if "val_loss" in frame else pd.Series(dtype=float)
    if numbers.isna().all():
        return frame
    words = frame["val_loss"].where(numbers.isna()).dropna().map(str)
    texts = {word: f"with {word!r:.60} in {their_name(frame, 'val_loss')}" for word in words}
    counts = Counter(words)
    left_out = [Exclusion(kind="word", subject=word, number=counts[word], text=text) for word, text in texts.items()]
    return remember(frame.drop(index=words.index).reset_index(drop=True), left_out=left_out)


def probe_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Give one row per run, budget and probe: the row's columns but `probes`, then those of `PROBE_FIELDS`.

    Returns:
        An empty frame with these columns where nothing was probed.

    Example:
        >>> probe_frame(read_table("results.parquet"))[["size", "task", "kind", "top1"]]
    """
    names = [field.name for field in PROBE_FIELDS]
    entries = list(frame["probes"]) if "probes" in frame else [[] for _ in range(len(frame))]
    base = frame.drop(columns=["probes", *names], errors="ignore")
    base = base.iloc[np.repeat(np.arange(len(frame)), [*map(len, entries)])]  # concatenated tables repeat labels
    numbers = {field.name: "float64" for field in PROBE_FIELDS if field.dtype in ("int64", "float64")}
    probes = pd.DataFrame([entry for row in entries for entry in row], columns=names).astype(numbers)
    return base.reset_index(drop=True).assign(**probes)


def loss_unit(frame: pd.DataFrame) -> str:
    """Tell the unit of losses by their target; empty for a foreign table, or an objective that is not ours."""
    setups = " ".join(frame["setup"].dropna().astype(str)) if "setup" in frame else ""
    if set(re.findall(r'"objective\.(\w+)"', setups)) - {"target", "prefix", "masked"}:
        return ""
    targets = set(frame["target"].dropna()) if "target" in frame else set()
    return {"normalised": "normalised MSE", "raw": "MSE"}.get(targets.pop(), "") if len(targets) == 1 else ""


def with_setup(frame: pd.DataFrame) -> pd.DataFrame:
    """Give the fields of `setup` that vary columns of their own, e.g. `optimiser.weight_decay`, but for those that the
    table has as columns of its own (`objective.prefix`)."""
    if "setup" not in frame:
        return frame
    told = frame["setup"].dropna().map(_setup_words)
    own = {"schedule.kind", *frame, *(f"{part}.{name}" for part in SECTIONS for name in DESIGN)}
    fields = pd.DataFrame([*told], told.index, dtype=object).fillna(DEFAULT).reindex(frame.index)
    return frame.assign(**fields[sorted(str(name) for name in fields if name not in own and varies(fields[name]))])


def _setup_words(text: str) -> dict[str, str]:
    """Write the fields of a set-up in words that can be compared and shown."""
    try:
        return {key: f"{v:.12g}" if type(v) in (int, float) else str(v) for key, v in json.loads(text).items()}
    except (ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise AnalysisError(f"'setup' holds {text[:60]!r}, which is no JSON object ({error}); correct it") from error
