"""A results table, ours or a foreign one, from a file, or from a folder of other people's runs: Weights & Biases and
marin's JSON lines, TensorBoard's event files, MLflow's and Lightning's folders."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.files import files_of, read_file
from aimscale.analysis.table.logs import FROM_LOG, run_logs, step_rows
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.schema import is_done

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
    file = next(files_of(path, "results.parquet"), path)
    frame = read_file(file, lambda folder: run_logs(folder, patterns))
    if frame.empty:
        raise AnalysisError(f"{path} has no rows; collect the sweep's results first")
    frame, of_wandb = from_wandb(frame, path)
    return Runs(frame, of_wandb | columns, source=path)


def from_wandb(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Give nested cells columns such as `config.model.width`, and map names of W&B's as `read_table`'s `columns` do."""
    if (points := _panel_points(frame)) is not None:
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


def _panel_points(frame: pd.DataFrame) -> pd.DataFrame | None:
    """Read a panel that W&B exported, with columns `RUN - METRIC` and their `__MIN`, as points; None for another table.

    The first column counts the steps.
    """
    lines = [str(name) for name in frame if {f"{name}__MIN", f"{name}__MAX"} <= {*frame} and " - " in str(name)]
    if not lines:
        return None
    step = str(frame.columns[0])
    by_run = pd.DataFrame([name.rpartition(" - ")[::2] for name in lines], lines, ["run", "metric"])
    runs = []
    for run, of_run in by_run.groupby("run", sort=False):
        metrics = frame.set_index(step)[[*of_run.index]].set_axis([*of_run["metric"]], axis=1).dropna(how="all")
        runs += [step_rows(str(run), {}, metrics, "complete")] * (len(metrics) > 0)
    return pd.concat(runs, ignore_index=True) if runs else None
