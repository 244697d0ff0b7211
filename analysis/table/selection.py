"""Which rows of a table are used: conditions (`--where`) and the best of what was tuned (`--best-of`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from aimscale.analysis.table.design import DESIGN, MEASURED_ON, foreign_settings, setup_columns
from aimscale.analysis.table.observations import NOT_CHOSEN, is_complete
from aimscale.analysis.table.schema import CANONICAL, TableError, column_names, our_name

_CONDITION = re.compile(r"(?P<name>[^=<>!]+?)\s*(?P<sign><=|>=|!=|=|<|>)\s*(?P<value>.+)")


def select(frame: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Rows that meet every condition `column SIGN value`, SIGN one of = != <= >= < >; `a|b` after = or != is a choice.

    Letters of laws stand for their columns (`N>=1e6`).

    Raises:
        TableError: a malformed condition, an unknown column, a comparison with words, or no row left.
    """
    for text in conditions:
        found = _CONDITION.fullmatch(text.strip())
        if found is None:
            raise TableError(f"--where needs a condition such as prefix=paired or D>=8000, not '{text}'")
        name, sign, value = found["name"].strip(), found["sign"], found["value"].strip()
        name = our_name(frame, name)
        if name not in frame:
            raise TableError(f"--where {text}: the table has no column '{name}' (columns: {column_names(frame)})")
        meets = _meets(frame[name], sign, value, text)
        kept = frame[meets]
        if kept.empty:
            values = ", ".join(map(str, pd.unique(frame[name].dropna())[:8]))
            raise TableError(f"--where {text}: no row is left; {name} takes {values}")
        left_out = (*frame.attrs.get(NOT_CHOSEN, ()), (f"not chosen by --where {text.strip()}", int((~meets).sum())))
        frame = kept
        frame.attrs[NOT_CHOSEN] = left_out
    return frame.reset_index(drop=True) if conditions else frame


def best_of(frame: pd.DataFrame, names: Sequence[str], y: str = "val_loss") -> pd.DataFrame:
    """Of rows that differ in some tuned columns, the one with the lowest loss.

    A cell is what agrees in N, D, U, seed, design and set-up, and in every foreign setting (`foreign_settings`).

    Returns:
        The best rows, in order. `attrs` tells how many were left out, and in how many cells the best value is the
        smallest or the largest that was tried: a better one may lie beyond.

    Raises:
        TableError: no such column, or no two rows of a cell differ in them.
    """
    tuned, y = [our_name(frame, name) for name in names], our_name(frame, y)
    for name in (*tuned, y):
        if name not in frame:
            raise TableError(f"--best-of: the table has no column '{name}' (columns: {column_names(frame)})")
    rows = frame[is_complete(frame) & (pd.to_numeric(frame[y], errors="coerce") > 0)]
    cells = rows.groupby(_cell_columns(rows, {y, *tuned}), dropna=False, sort=False).ngroup()
    kept = rows.loc[np.sort(rows.groupby(cells)[y].idxmin().to_numpy())]
    if len(kept) == len(rows):
        raise TableError(f"--best-of {', '.join(names)}: no two rows differ in nothing else, so there is no choice")
    out = kept.reset_index(drop=True)
    reason = f"not the best {', '.join(names)} of their cell{_at_ends(rows, kept, cells, tuned[0])}"
    out.attrs[NOT_CHOSEN] = (*frame.attrs.get(NOT_CHOSEN, ()), (reason, len(frame) - len(kept)))
    return out


def _cell_columns(rows: pd.DataFrame, not_these: set[str]) -> list[str]:
    scale = (*CANONICAL, *CANONICAL.values(), "size", "seed", *DESIGN, *MEASURED_ON, *setup_columns(rows))
    skip = {"L", "val_loss", "C", "flops_train", *not_these}
    known = dict.fromkeys([*scale, *foreign_settings(rows, not_these)])
    names = [name for name in known if name in rows and name not in skip]
    if not names:
        raise TableError("--best-of: the table has no N, D or other column that would tell its cells apart")
    return names


def _at_ends(rows: pd.DataFrame, kept: pd.DataFrame, cells: pd.Series, name: str) -> str:
    """How many cells are best at an end of the range that was tried, in words."""
    if not pd.api.types.is_numeric_dtype(rows[name]):
        return ""
    tried = rows.groupby(cells)[name].agg(["min", "max"])
    best = kept[name].set_axis(cells[kept.index]).reindex(tried.index)
    choice = tried["min"] < tried["max"]
    ends = choice & ((best == tried["min"]) | (best == tried["max"]))
    return f" (in {int(ends.sum())} of {int(choice.sum())} cells the best one lies at an end of what was tried)"


def _meets(values: pd.Series, sign: str, value: str, text: str) -> np.ndarray:
    if sign in ("=", "!="):
        wanted = [part.strip() for part in value.split("|")]
        equal = np.logical_or.reduce([_equals(values, part) for part in wanted])
        return ~equal if sign == "!=" else equal
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(float)
    try:
        limit = float(value)
    except ValueError:
        raise TableError(f"--where {text}: '{value}' is no number to compare with") from None
    if np.isnan(numbers).all():
        raise TableError(f"--where {text}: the column holds no numbers")
    with np.errstate(invalid="ignore"):
        return {"<=": numbers <= limit, ">=": numbers >= limit, "<": numbers < limit, ">": numbers > limit}[sign]


def _equals(values: pd.Series, wanted: str) -> np.ndarray:
    same = values.astype(str).to_numpy() == wanted
    try:
        return same | (pd.to_numeric(values, errors="coerce").to_numpy(float) == float(wanted))
    except ValueError:
        return same
