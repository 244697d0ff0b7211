"""Exports of Weights & Biases as tables: its runs table, and the runs and history that its API gives (docs/wandb.md).

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
    """Give a table one row per run or point where W&B wrote it, and our names for its columns.

    Returns:
        The frame, and our name -> its name, as of `read_table`'s `columns`; a table of anybody else as it is, and {}.

    Raises:
        AnalysisError: an export of our own runs without a budget's validation loss.
    """
    there = set(frame.columns.map(str))
    if there >= _API:
        cells = {name: frame[name].map(lambda cell: _parsed(cell, path)) for name in ("config", "summary")}
        frame = frame.rename(columns={"name": "Name"}).assign(**cells)
    elif not (there >= {"Name", "State"} or "_step" in there):
        return frame, {}
    frame = _flat(frame)
    names = {ours: theirs for ours, theirs in _OURS.items() if theirs in frame and ours not in frame}
    if {*frame.columns} >= _OWN:
        frame = _budgets(frame, path)
        names["images_seen"] = "val/images_seen"  # training may have gone on since
        tasks = [name for name in frame.columns if name.startswith(_PROBE)]
        names |= {":".join(name.removeprefix(_PROBE).rsplit("/", 1)): name for name in tasks}
        if "flops_per_image" in frame:
            names["flops_train"] = "flops_per_image * images_seen"
    elif "State" in frame:
        frame = frame.assign(status=frame["State"].where(frame["State"] != "finished", "complete"))
    return frame, names


def _parsed(cell: Any, path: Path) -> Any:
    """Read a dictionary, which a CSV has as text."""
    try:
        return ast.literal_eval(cell) if isinstance(cell, str) else cell
    except (ValueError, SyntaxError) as error:
        raise AnalysisError(
            f"{path}: 'config' or 'summary' is no dictionary ({error}); write the runs to a .jsonl or .parquet file"
        ) from error


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Give nested parts of a configuration columns such as `model.width`."""
    for name in [name for name in frame if frame[name].map(lambda cell: isinstance(cell, dict)).any()]:
        cells = [cell if isinstance(cell, dict) else {} for cell in frame[name]]
        inner = pd.json_normalize(cells).set_index(frame.index).add_prefix(f"{name}.")
        frame = frame.drop(columns=name).join(inner[[each for each in inner if each not in frame]])
    return frame


def _budgets(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Keep the budgets of our own runs, each as it was told last, and the columns that a results table has."""
    keep = [name for name in frame if name in KNOWN or str(name).startswith(("val/", _PROBE))]
    found = frame.loc[frame["val/loss"].notna(), keep]
    if found.empty:
        raise AnalysisError(
            f"{path}: no run has a val/loss yet; W&B gets it when a budget is evaluated, after training"
        )
    return found.drop_duplicates(["run_id", "val/images_seen"], keep="last").reset_index(drop=True)
