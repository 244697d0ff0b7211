"""Exports of Weights & Biases as tables: its runs table, a panel, and the history that its API gives (docs/wandb.md).

Names of this project's own runs are mapped to ours, so that their exports need no `--columns`.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.schema import KNOWN

_OURS = {"run_id": "Name", "images_seen": "val/images_seen", "val_loss": "val/loss", "val_loss_se": "val/loss_se"}
"""Our columns, as W&B calls them."""
_PROBE = "probe/"
_OWN = {"run_id", "val/loss", "val/images_seen"}
"""What no other project's export has together."""
_API = {"summary", "config", "name"}
"""Columns of the table that W&B's own guide makes with its API: two dictionaries for each run."""


def from_wandb(frame: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """A table, with one row per run or point where W&B wrote it, and our names for its columns.

    Returns:
        The frame, and our name -> its name, as of `read_table`'s `columns`; a table of anybody else as it is, and {}.

    Raises:
        AnalysisError: an export of our own runs without a budget's validation loss.
    """
    there = set(frame.columns.map(str))
    if any(f"{name}__MIN" in there for name in there):
        frame = _points_of_panel(frame)
    elif there >= _API:
        cells = {name: frame[name].map(lambda cell: _parsed(cell, path)) for name in ("config", "summary")}
        frame = frame.rename(columns={"name": "Name"}).assign(**cells)
    elif not (there >= {"Name", "State"} or "_step" in there):
        return frame, {}
    frame = _flat(frame)
    is_own = {*frame.columns} >= _OWN
    names = {ours: theirs for ours, theirs in _OURS.items() if theirs in frame and ours not in frame}
    if is_own:
        frame = _budgets(frame, path)
        names["images_seen"] = "val/images_seen"  # training may have gone on since
        tasks = [name for name in frame.columns if name.startswith(_PROBE)]
        names |= {":".join(name.removeprefix(_PROBE).rsplit("/", 1)): name for name in tasks}
        if "flops_per_image" in frame:
            names["flops_train"] = "flops_per_image * images_seen"
    elif "State" in frame:
        frame = frame.assign(status=frame["State"].where(frame["State"] != "finished", "complete"))
    return frame, names


def _points_of_panel(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each run and point of a panel's export: `Step`, then `run - metric` with its least and greatest."""
    axis = frame.columns[0]
    runs: dict[str, dict[str, str]] = {}
    for column in [name for name in frame.columns if f"{name}__MIN" in frame]:
        run, _, metric = column.rpartition(" - ")
        if metric != "_step":
            runs.setdefault(run, {})[column] = metric
    points = [
        frame[[axis, *metrics]].rename(columns=metrics).dropna(subset=[*metrics.values()], how="all").assign(run_id=run)
        for run, metrics in runs.items()
    ]
    return pd.concat(points, ignore_index=True)


def _parsed(cell: Any, path: Path) -> Any:
    """A dictionary, which a CSV has as text."""
    try:
        return ast.literal_eval(cell) if isinstance(cell, str) else cell
    except (ValueError, SyntaxError) as error:
        raise AnalysisError(
            f"{path}: 'config' or 'summary' is no dictionary ({error}); write the runs to a .jsonl or .parquet file"
        ) from error


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Nested parts of a configuration as columns such as `model.width`."""
    for name in [name for name in frame if frame[name].map(lambda cell: isinstance(cell, dict)).any()]:
        cells = [cell if isinstance(cell, dict) else {} for cell in frame[name]]
        inner = pd.json_normalize(cells).set_index(frame.index).add_prefix(f"{name}.")
        frame = frame.drop(columns=name).join(inner[[each for each in inner if each not in frame]])
    return frame


def _budgets(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Of our own runs, the lines of budgets, each as it was told last, and the columns that a results table has."""
    keep = [name for name in frame if name in KNOWN or str(name).startswith(("val/", _PROBE))]
    found = frame.loc[frame["val/loss"].notna(), keep]
    if found.empty:
        raise AnalysisError(
            f"{path}: no run has a val/loss yet; W&B gets it when a budget is evaluated, after training"
        )
    return found.drop_duplicates(["run_id", "val/images_seen"], keep="last").reset_index(drop=True)
