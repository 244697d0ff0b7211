"""Tables as they are analysed: several as one, probes as rows, fields of the set-up as columns; and choices of rows by
conditions (`--where`), one experiment, fresh data, the envelope."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, human, option, some
from aimscale.analysis.distributions import f_above, t_above
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.formulas import MAX_LENGTH
from aimscale.analysis.table.files import files_of
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.runs import Runs, Table, joined
from aimscale.analysis.table.schema import (
    CANONICAL,
    DEFAULT,
    DESIGN,
    FOLDER,
    KNOWN,
    PROBE_FIELDS,
    PROVENANCE,
    SECTIONS,
    Exclusion,
    varies,
)

_CONDITION = re.compile(r"([^=<>!]+?)\s*(<=|>=|!=|=|<|>)\s*(.+)")
_ORDER = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
REPEATS_FROM = 1.01
"""Passes over a pool above which images repeat; up to there a pool is seen once, but for the last batch."""
FEW_PASSES = 4.0
"""Passes over a pool that are worth nearly as much as new data (Muennighoff et al. 2023)."""
CHANCE = 0.01
"""Probability of chance below which losses of two folders, or of a column's values, differ."""
MIN_FREE = 3
"""Degrees of freedom below which nothing is tested."""


def read_tables(
    paths: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    *,
    where: Sequence[str] = (),
    groups: Mapping[str, str | float] | None = None,
) -> Runs:
    """Read tables into one, with a column for every field of the set-up that varies over them.

    Args:
        columns: our name -> the name in the files; see `read_table`.
        where: conditions that rows must meet, such as `prefix=paired` or `images_seen>=8000`; see `select`.
        groups: "sizes" or "budgets" -> the column in which rows of one agree, or a tolerance; see `Runs.with_groups`.

    Returns:
        A row per run and budget. One that two tables hold counts once, the first time it stands complete.

    Example:
        >>> read_tables(["results.parquet", "more.parquet"], where=["D>=100000"])
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise AnalysisError("name at least one table")
    folders = [path if path.is_dir() else path.parent for path in map(Path, given)]
    tables = [read_table(path, columns).assign(**{FOLDER: str(f)}) for path, f in zip(given, folders, strict=True)]
    return select(with_setup(_each_run_once(tables)), where).with_groups(groups)


def read_curves(paths: Sequence[str | Path]) -> Runs:
    """Read the points during training of sweeps: `curves.parquet` of the folders that these tables are, or lie in."""
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in map(Path, paths))
    tables = [read_table(file) for folder in folders for file in files_of(folder, "curves.parquet")]
    return _each_run_once(tables) if tables else Runs(pd.DataFrame(columns=[*KNOWN, "lr"]))


def _each_run_once(tables: Sequence[Runs]) -> Runs:
    """Join tables, each run and budget once: the first time that it stands complete."""
    if len(tables) == 1:
        return tables[0]
    runs, keys = joined(tables), ["run_id", "images_seen"]
    if "probes" in runs:  # some of the tables may have none
        runs = runs.assign(probes=runs["probes"].map(lambda entries: entries if isinstance(entries, list) else []))
    if not {*keys} <= {*runs}:
        return runs
    ordered = runs.frame.loc[runs.complete().index.append(runs.index).unique()]
    repeats = ordered.duplicated(keys) & ordered[keys].notna().all(axis=1)
    once = runs.take(ordered.index[~repeats].sort_values()).numbered()
    if "val_loss" not in runs:
        return once
    losses = ordered["val_loss"]
    others = repeats & losses.notna() & (losses != ordered.groupby(keys)["val_loss"].transform("first"))
    text = "with a run_id and D of an earlier table, and another loss: give each table's runs ids of their own"
    return once.described(left_out=[Exclusion(kind="repeat", number=int(others.sum()), text=text)])


def probe_frame(table: Table) -> Runs:
    """Give one row per run, budget and probe: the row's columns but `probes`, then those of `PROBE_FIELDS`.

    Returns:
        No row, with these columns, where nothing was probed.

    Example:
        >>> probe_frame(read_table("results.parquet"))[["size", "task", "kind", "top1"]]
    """
    runs, names = Runs(table), [field.name for field in PROBE_FIELDS]
    entries = list(runs["probes"]) if "probes" in runs else [[] for _ in range(len(runs))]
    base = runs.frame.drop(columns=["probes", *names], errors="ignore")
    base = base.iloc[np.repeat(np.arange(len(runs)), [*map(len, entries)])]  # concatenated tables repeat labels
    numbers = {field.name: "float64" for field in PROBE_FIELDS if field.dtype in ("int64", "float64")}
    probes = pd.DataFrame([entry for row in entries for entry in row], columns=names).astype(numbers)
    return runs.with_rows(base.reset_index(drop=True).assign(**probes))


def by_probe(table: Table) -> dict[str, Runs]:
    """Map TASK:KIND of every probe to its rows of `probe_frame`."""
    runs = probe_frame(table)
    return {":".join(map(str, key)): runs.with_rows(rows) for key, rows in runs.frame.groupby(["task", "kind"])}


def with_setup(runs: Runs) -> Runs:
    """Give the fields of `setup` that vary columns of their own, e.g. `optimiser.weight_decay`, but for those that the
    table has as columns of its own (`objective.prefix`)."""
    if "setup" not in runs:
        return runs
    told = runs["setup"].dropna().map(_setup_words)
    columns = {"schedule.kind", *runs, *(f"{part}.{name}" for part in SECTIONS for name in DESIGN)}
    fields = pd.DataFrame([*told], told.index, dtype=object).fillna(DEFAULT).reindex(runs.index)
    names = sorted(str(name) for name in fields if name not in columns and varies(fields[name]))
    return runs.assign(**fields[names])


def _setup_words(text: str) -> dict[str, str]:
    """Write the fields of a set-up in words that can be compared and shown."""
    try:
        return {key: f"{v:.12g}" if type(v) in (int, float) else str(v) for key, v in json.loads(text).items()}
    except (ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise AnalysisError(f"'setup' holds {text[:60]!r}, which is no JSON object ({error}); correct it") from error


def task_level(probed: pd.DataFrame, column: str) -> float | None:
    """Find one task's `chance` (accuracy of guessing) or `ideal` (loss at which it is 1); None where rows disagree."""
    values = set(probed[column].dropna()) if column in probed.columns else set()
    return float(values.pop()) if len(values) == 1 else None


def select(runs: Runs, conditions: Sequence[str]) -> Runs:
    """Keep rows that meet every condition `column SIGN value`, SIGN one of = != <= >= < >; `a|b` after = is a choice.

    Letters of laws stand for their columns (`N>=1e6`). A word of `PARTS` alone is that part of the table.
    """
    for text in map(str.strip, conditions):
        chosen = PARTS[text](runs) if text in PARTS else runs[_condition(runs, text)]
        number, words = len(runs) - len(chosen), f"not chosen by {option('where', text)}"
        runs = chosen.described(left_out=[Exclusion(kind="where", subject=text, number=number, text=words)])
    return runs.numbered() if conditions else runs


def _condition(runs: Runs, text: str) -> pd.Series:
    """Find the rows (n,) that meet a condition."""
    if len(text) > MAX_LENGTH or (parts := _CONDITION.fullmatch(text)) is None:
        raise AnalysisError(f"{option('where')} needs a condition such as prefix=paired or D>=8000, not '{text:.80}'")
    typed, sign, wanted = parts.groups()
    if (name := runs.column(typed)) not in runs:
        raise runs.no_column(name, f" for {option('where', text)}")
    words, numbers = runs[name].astype(str), pd.to_numeric(runs[name], errors="coerce")
    choice = pd.Series(wanted.split("|")).str.strip()
    limits = pd.to_numeric(choice, errors="coerce").dropna()
    if sign in ("=", "!="):
        meets = (words.isin(choice) | numbers.isin(limits)) == (sign == "=")
    elif len(limits) == 1 and numbers.notna().any():
        meets = _ORDER[sign](numbers, limits.iloc[0])
    else:
        raise AnalysisError(f"{option('where', text)}: only numbers can be compared by {sign}")
    if not meets.any():
        values = some([f"{each:.40}" for each in words[runs[name].notna()].unique()])
        raise AnalysisError(f"{option('where', text)}: no row is left; {name} takes {values}")
    return meets


def main_part(runs: Runs, free: Collection[str] = ()) -> tuple[Runs, str]:
    """Keep the experiment with most (size, images seen) cells, with most rows among equals, whose rows may differ in
    columns that are `free`; and say what it is, or nothing where there are no others."""
    frame = runs.frame
    names = [name for name in runs.design_columns() if name not in free]
    if not names or frame.empty:
        return runs, ""
    best = max((rows for _, rows in frame.groupby(names, dropna=False)), key=lambda rows: (_num_cells(rows), len(rows)))
    return runs.with_rows(best), ", ".join(f"{name} {best[name].iloc[0]}" for name in names)


def fresh_part(runs: Runs) -> tuple[Runs, str]:
    """Keep the rows at the number of unique images with most cells, the largest among equals; and say what they are.

    Where half of these see their pool more than `FEW_PASSES` times, the rows of any pool that do not, if they make as
    many as a third of the cells: data hardly repeated.
    """
    name, frame = "unique_images", runs.frame
    if name not in frame or not varies(frame[name]):
        return runs, ""
    best = max((rows for _, rows in frame.groupby(name)), key=lambda rows: (_num_cells(rows), rows[name].iloc[0]))
    if "images_seen" in frame and (best["images_seen"] / best[name]).median() > FEW_PASSES:
        few = frame[frame["images_seen"] <= FEW_PASSES * frame[name]]
        if 3 * _num_cells(few) >= _num_cells(best):
            return runs.with_rows(few), f"at most {FEW_PASSES:g} passes over their pool"
    return runs.with_rows(best), f"{best[name].iloc[0]:,.0f} {runs.called(name, 'unique images')}"


def _num_cells(rows: pd.DataFrame) -> int:
    names = [name for name in ("size", "params_total", "N", "images_seen", "D") if name in rows]
    return len(rows[names].drop_duplicates()) if names else len(rows)


def lower_envelope(runs: Runs) -> Runs:
    """Keep the complete rows whose loss no complete row of equal or lower compute undercuts."""
    names = ["flops_train", "val_loss"]
    usable = usable_rows(runs, dict(zip(names, names, strict=True))).rows
    rows = usable.frame.sort_values(names, kind="stable")
    rows = rows[rows["val_loss"] < rows["val_loss"].cummin().shift(fill_value=np.inf)]
    return usable.with_rows(rows).described(by_loss_of=len(runs))


PARTS: dict[str, Callable[[Runs], Runs]] = {
    "main": lambda runs: main_part(runs)[0],
    "fresh": lambda runs: fresh_part(runs)[0],
    "envelope": lower_envelope,
}
"""Name that `--where` takes -> the rows that it selects."""


def mixture_flags(runs: Runs, variables: Sequence[str], y: str = "val_loss") -> tuple[Flag, ...]:
    """Flag columns in which the rows differ and which a law of these variables does not know, and points during
    training. Sweeps and folders count where their losses of equal cells differ: they may well be one experiment."""
    of_law = {*variables, *(CANONICAL.get(v, v) for v in variables)}
    rows, flags = runs.complete(), list[Flag]()
    ours = {*rows.design_columns(), *PROVENANCE}
    names = [n for n in rows.experiment_columns() if n not in PROVENANCE or _differ(rows.frame, n, y)]
    names = [n for n in names if n in ours or _matters(rows.frame, n, y)]
    names += ["unique_images"] * (most_passes(rows) > REPEATS_FROM)
    names += ["images_seen"] * ("params_total" in of_law) + ["params_total"] * ("images_seen" in of_law)
    for name in [name for name in names if name in rows and name not in of_law and varies(rows[name])]:
        called, number = runs.called(name), rows[name].nunique()
        unknown = f"The rows differ in {called} ({number} values), which is no variable of the law"
        text = f"{unknown}; choose one by {option('where')}."
        flags.append(Flag(kind="mixed", subject=called, number=number, text=text))
    if runs.by_loss_of:
        chosen = f"These {len(rows)} of {runs.by_loss_of} rows were chosen by their loss (envelope)"
        text = f"{chosen}, so they lie low by chance, too, which no interval counts."
        flags.append(Flag(kind="by_loss", number=len(rows), text=text))
    if during := int((runs["status"] == "during").sum()) if "status" in runs else 0:
        is_mixed = during < len(rows)
        text = f"{during} rows are points during training, where losses are higher than at budgets"
        text += f"; leave them out by {option('where', 'status=complete')}." if is_mixed else "."
        flags.append(Flag(kind="during_mixed" if is_mixed else "during", number=during, text=text))
    return tuple(flags)


def table_flags(
    runs: Runs, variables: Sequence[str], y: str, scales: Sequence[Mapping[str, float]] = ()
) -> tuple[Flag, ...]:
    """Flag what a law of these variables does not know, what was tuned, and scales that see their pool more often than
    any row."""
    points = usable_rows(runs, y, best_by=y)
    passes = [flag for at in scales for flag in passes_flags(points.rows, f"D = {human(at.get('D', 0))}", at)]
    return (*mixture_flags(runs, variables, y), *points.flags, *passes)


def _differ(rows: pd.DataFrame, name: str, y: str) -> bool:
    """Test whether losses of the two commonest values of a column differ in sizes and budgets that both hold."""
    cell = [each for each in ("params_total", "N", "images_seen", "D") if each in rows]
    if y not in rows or not cell:
        return False
    losses = pd.to_numeric(rows[y], errors="coerce")
    means = np.log(losses.where(losses > 0)).groupby([rows[each] for each in (*cell, name)]).mean()
    one, other = (means.xs(value, level=name) for value in rows[name].value_counts().index[:2])
    differences = (one - other).dropna().groupby(level=cell[0]).mean()
    return len(differences) > 2 and bool(
        2 * t_above(abs(differences.mean()) / differences.sem(), len(differences) - 1) < CHANCE
    )


def _matters(rows: pd.DataFrame, name: str, y: str) -> bool:
    """Test whether losses differ by a column's values beside a smooth function of N and D, as they do not by a colour
    or by D / N; where there are too few rows to tell, they may."""
    scale = [numbers for numbers in ("params_total", "N", "images_seen", "D") if numbers in rows]
    logs = np.log(rows[[*scale, y]].apply(pd.to_numeric, errors="coerce").where(lambda numbers: numbers > 0)).dropna()
    if not scale or logs.empty:
        return True
    x = logs[scale].to_numpy()
    smooth = np.column_stack(
        [np.ones(len(x)), x, *(x[:, i] * x[:, j] for i in range(len(scale)) for j in range(i + 1))]
    )
    levels = pd.get_dummies(pd.factorize(rows.loc[logs.index, name])[0], dtype=float).to_numpy()
    ranks, squares = list[int](), list[float]()
    for columns in (smooth, np.column_stack([smooth, levels])):
        basis = columns - columns.mean(0) * (columns.std(0) > 0)
        solution, _, rank, _ = np.linalg.lstsq(basis, logs[y], rcond=1e-9)
        ranks.append(int(rank))
        squares.append(float(((logs[y] - basis @ solution) ** 2).sum()))
    more, free = ranks[1] - ranks[0], len(logs) - ranks[1]
    if more == 0 or free < MIN_FREE:
        return more > 0
    return bool(f_above((squares[0] - squares[1]) / more / (squares[1] / free), more, free) < CHANCE)


def most_passes(rows: Runs) -> float:
    """Count the most passes over its pool that a row made, D / U; NaN where no row tells."""
    is_known = {"images_seen", "unique_images"} <= {*rows}
    return float((rows["images_seen"] / rows["unique_images"]).max()) if is_known else np.nan


def passes_flags(rows: Runs, what: str, at: Mapping[str, float]) -> tuple[Flag, ...]:
    """Flag a scale, called `what`, that sees its pool (without a U the largest that rows of several D share) more often
    than any of the rows that a law was fitted to."""
    most = most_passes(rows)
    if np.isnan(most) or "D" not in at:
        return ()
    budgets = rows["images_seen"].groupby(rows["unique_images"]).nunique()
    pool = at.get("U", budgets.index[budgets > 1].max())
    passes = at["D"] / pool
    if not passes > max(most, REPEATS_FROM):
        return ()
    times, seen = human(passes), human(most)
    text = f"{what} means {times} passes over the pool of {human(pool)}, beyond the {seen} that were seen."
    return (Flag(kind="passes", subject=what, number=passes, text=text),)
