"""Parts that every figure shares: axis labels, series, ticks, markers with errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from aimscale.analysis.plots.style import MAX_SERIES, PAPER, RASTERISE_ABOVE, human, power_of_ten
from aimscale.analysis.table.names import LETTERS
from aimscale.analysis.table.schema import KNOWN

AXIS_LABELS = {
    "params_total": "N: parameters (trunk, patch embedding, pixel head)",
    "params_trunk": "N: trunk parameters",
    "params_head": "N: pixel-head parameters",
    "images_seen": "D: training images seen",
    "unique_images": "U: different training images",
    "flops_train": "C: training compute (FLOP)",
    "flops_6nd": "C: training compute, 6 × N × tokens (FLOP)",
    "flops_executed": "C: training compute, executed (FLOP)",
    "val_loss": "validation loss",
    "train_loss": "training loss",
    "top1": "top-1 accuracy",
}
"""Axis labels of the results table's columns."""
FOREIGN_LABELS = {
    "params_total": "N: parameters",
    "images_seen": "D: samples seen",
    "unique_images": "U: unique samples",
}
"""The same for tables of others, which may count other things under our names."""


def below(num: int) -> dict[str, Any]:
    """Options of a legend of `num` entries below the axes, where it hides no point."""
    columns = num if num <= 5 else -(-num // 2)
    return {"loc": "upper center", "bbox_to_anchor": (0.5, -0.19), "ncols": columns, "columnspacing": 1.2}


def axis_label(column: str, loss_unit: str = "", names: Mapping[str, str] | None = None) -> str:
    """Label of a column: theirs in a foreign table, ours with its unit from the schema, else the name as it is.

    Args:
        loss_unit: `table.loss_unit`; empty for a table that is not ours, whose columns get neutral words.
        names: our column -> its name in the file, of a foreign table.
    """
    if names and column in names:
        letter = LETTERS.get(column, "L")
        return plain(names[column]) if letter in ("L", names[column]) else f"{letter}: {plain(names[column])}"
    if column in ("val_loss", "train_loss") and loss_unit:
        return f"{AXIS_LABELS[column]} ({loss_unit})"
    if not loss_unit and column in FOREIGN_LABELS:
        return FOREIGN_LABELS[column]
    if column in AXIS_LABELS:
        return AXIS_LABELS[column]
    unit = KNOWN[column].unit if column in KNOWN else ""
    return f"{column} ({unit})" if unit else plain(column)


def short(column: str, names: Mapping[str, str] | None = None) -> str:
    """A legend heading: the letter and a word or two."""
    known = {"params_total": "N, parameters", "params_trunk": "N, trunk", "images_seen": "D, seen"}
    return plain(names[column]) if names and column in names else known.get(column, column)


def groups(data: pd.DataFrame, by: str) -> list[tuple[float | None, pd.DataFrame]]:
    """Rows by value of a column; more than eight values are put into eight classes by their logarithm."""
    values = np.sort(data[by].unique())
    if len(values) <= MAX_SERIES:
        return [(float(value), data[data[by] == value]) for value in values]
    edges = np.geomspace(values[0], values[-1], MAX_SERIES + 1)
    classes = np.clip(np.digitize(data[by], edges[1:-1]), 0, MAX_SERIES - 1)
    return [
        (float(np.exp(np.log(data[by][classes == k]).mean())), data[classes == k])
        for k in range(MAX_SERIES)
        if (classes == k).any()
    ]


def few_values(values: pd.Series, gap: float = 0.09) -> list[float] | None:
    """The values themselves as ticks, if they are few and at least `gap` of the axis apart."""
    distinct = np.sort(values.unique())
    if not 2 <= len(distinct) <= 6 or np.min(np.diff(np.log(distinct))) < gap * np.log(distinct[-1] / distinct[0]):
        return None
    return [float(value) for value in distinct]


def tick_label(column: str) -> Callable[[float], str]:
    """FLOPs as powers of ten, counts as people say them."""
    return power_of_ten if column.startswith("flops") or column == "C" else human


def scatter(
    ax: Axes, x: Any, y: Any, *, color: str, marker: str, label: str | None = None, size: float = 34, **options: Any
) -> None:
    """Markers with a thin edge; above `RASTERISE_ABOVE` points small, faint and stored as an image."""
    many = len(x) > RASTERISE_ABOVE
    options = {"zorder": 3, "alpha": 0.25 if many else 1.0} | options
    ax.scatter(
        x, y, s=6 if many else size, color=color, marker=marker, label=label,
        edgecolors="none" if many else PAPER, linewidths=0.6, rasterized=many, **options,
    )  # fmt: skip


def error_bars(ax: Axes, x: pd.Series, y: pd.Series, se: pd.Series | None, colour: str) -> None:
    """95 % bars from standard errors by index, where there are any and not too many points."""
    if se is None or len(x) > RASTERISE_ABOVE:
        return
    half = 1.96 * se.reindex(x.index)
    if half.notna().any():
        ax.errorbar(x, y, yerr=half.fillna(0), fmt="none", ecolor=colour, elinewidth=1, capsize=2, zorder=2)


def plain(text: object, longest: int = 32) -> str:
    """A name that matplotlib draws as it is, without reading dollar signs as mathematics; long ones are cut."""
    name = str(text)
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")
