"""Tuned columns, such as the learning rate: a law is fitted to the best setting of every cell, not to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from aimscale.analysis.table.accuracies import named_like_accuracy
from aimscale.analysis.table.design import FOLLOWS, follows_scale, foreign_settings, held_equal, varies
from aimscale.analysis.table.names import their_name
from aimscale.analysis.words import Flag


def cell_columns(rows: pd.DataFrame, y: str, tuned: Sequence[str]) -> list[str]:
    """List the columns in which rows of a cell agree: all that is held equal, but for the seed, over which losses of a
    setting are averaged, for what follows from the tuned columns, and for names of runs."""
    free = {"seed", "L", "val_loss", y, *tuned, *(other for name in tuned for other in FOLLOWS.get(name, ()))}
    names = [name for name in foreign_settings(rows, free) if follows_scale(rows, name)]
    return held_equal(rows, {*free, *names})


def best_settings(
    rows: pd.DataFrame, y: str, tuned: Sequence[str], cell: Sequence[str]
) -> tuple[pd.Series, tuple[Flag, ...]]:
    """Find the rows at the best setting of every cell: that of the lowest mean loss, or of the highest mean accuracy.

    Args:
        y: column of the loss, or of an accuracy.
        tuned: columns that make a setting.
        cell: columns that make a cell.

    Returns:
        Which rows to keep, and flags where that is a choice: the lowest of several losses is too low by part of
        their noise, and an optimum at the edge of what was tried may lie beyond it.
    """
    cells = rows.groupby(list(cell), dropna=False).ngroup() if cell else pd.Series(0, rows.index)
    settings = rows.groupby([cells, *(rows[name] for name in tuned)], dropna=False).ngroup()
    losses = (-rows[y] if named_like_accuracy(y) else rows[y]).groupby(settings).mean()
    keep = settings.isin(losses.groupby(cells.groupby(settings).first()).idxmin())
    several = {name: rows.groupby(cells)[name].agg(varies) for name in tuned}
    names = [name for name in tuned if several[name].any()]
    names = [name for name in names if not any(name in FOLLOWS.get(each, ()) for each in names[: names.index(name)])]
    if not names:
        return keep, ()
    num_cells = int(pd.concat(several, axis=1).any(axis=1).sum())
    flags = [Flag(kind="tuned", subject=", ".join(their_name(rows, name) for name in names), number=num_cells)]
    for name in names:
        values = pd.to_numeric(rows[name], errors="coerce")
        best, tried = values[keep].groupby(cells[keep]).first(), values.groupby(cells)
        for end, extreme in (("smallest", tried.min()), ("largest", tried.max())):
            if number := int((several[name] & (best == extreme)).sum()):
                more = (end, int(several[name].sum()))
                flags.append(Flag(kind="tuned_edge", subject=their_name(rows, name), number=number, more=more))
    return keep, tuple(flags)
