"""Several tables as one: how every verb reads its tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.table.observations import is_complete
from aimscale.analysis.table.results import read_table
from aimscale.analysis.table.schema import FOLDER, TableError
from aimscale.analysis.table.selection import best_of, select

OWN_COLUMN = {
    "objective.prefix": "prefix",
    "objective.target": "target",
    "model.patch_order": "patch_order",
    "model.head_rule": "head_rule",
    "model.image_size": "image_size",
    "model.patch_size": "patch_size",
    "schedule.kind": "schedule",
    "optimiser.precision": "precision",
}
"""Fields of the set-up that the table has as columns."""
DEFAULT = "default"
"""What a column of the set-up holds where a run left the field at its default."""


def read_tables(
    paths: Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    *,
    where: Sequence[str] = (),
    best: Sequence[str] = (),
    y: str = "val_loss",
    require: Sequence[str] = (),
) -> pd.DataFrame:
    """Read tables into one frame, with a column for every field of the set-up that varies over them.

    A run and budget that two tables hold (a cell that two sweeps share) counts once, the first time it stands complete.

    Args:
        paths: tables or sweeps' folders, as for `read_table`.
        columns: our name -> theirs, in every table.
        where: conditions that rows must meet, such as `prefix=paired` or `images_seen>=8000`; see `select`.
        best: tuned columns, of which only the best value in each cell is kept; see `best_of`.
        y: loss column that says what is best.
        require: our names that every table must have.

    Raises:
        TableError: no table, one that cannot be read, or conditions that no row meets.
    """
    if not paths:
        raise TableError("name at least one table")
    frames = []
    for path in map(Path, paths):
        frame = read_table(path, columns, require)
        frames.append(frame.assign(**{FOLDER: str(path if path.is_dir() else path.parent)}))
    frame = frames[0] if len(frames) == 1 else _without_repeats(pd.concat(frames, ignore_index=True))
    chosen = select(with_setup(frame), where)
    return best_of(chosen, best, y) if best else chosen


def _without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    if not {"run_id", "images_seen"} <= set(frame.columns):
        return frame
    ordered = frame.iloc[np.argsort(~is_complete(frame).to_numpy(), kind="stable")]
    known = ordered[["run_id", "images_seen"]].notna().all(axis=1)
    repeats = ordered.duplicated(["run_id", "images_seen"]) & known
    return frame.loc[ordered.index[~repeats].sort_values()].reset_index(drop=True)


def with_setup(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the fields of `setup` that vary as columns of their own, e.g. `optimiser.weight_decay`.

    Raises:
        TableError: a set-up is no JSON object.
    """
    if "setup" not in frame or frame["setup"].isna().all():
        return frame
    setups = [_parsed(text, row) for row, text in enumerate(frame["setup"])]
    known = [setup for setup in setups if setup is not None]
    new: dict[str, list[Any]] = {}
    for name in sorted({key for setup in known for key in setup}):
        if name in frame or OWN_COLUMN.get(name) in frame:
            continue
        values = [None if setup is None else _plain(setup.get(name, DEFAULT)) for setup in setups]
        if len({value for value in values if value is not None}) > 1:
            new[name] = values
    return frame.assign(**{name: pd.Series(values, index=frame.index, dtype=object) for name, values in new.items()})


def _parsed(text: Any, row: int) -> dict[str, Any] | None:
    if text is None or (isinstance(text, float) and np.isnan(text)):
        return None
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise TableError(f"'setup' of row {row + 1} is no JSON object; collect the sweep again") from error
    return value


def _plain(value: Any) -> str | float | None:
    """A value that can be compared and shown."""
    if isinstance(value, bool | str):
        return str(value)
    return float(value) if isinstance(value, int | float) else json.dumps(value)
