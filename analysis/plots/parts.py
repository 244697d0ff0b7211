"""Parts that every figure shares: axis labels, series, ticks, markers with errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from aimscale.analysis.plots.style import (
    DASHES,
    MARKERS,
    MAX_SERIES,
    MUTED,
    PAPER,
    RASTERISE_ABOVE,
    human,
    ordered_colours,
    power_of_ten,
)
from aimscale.analysis.table.design import told_apart
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


def few_values(values: pd.Series) -> list[float] | None:
    """The values themselves as ticks, if they are few and far enough apart for their labels."""
    distinct = np.sort(values.unique())
    if not 2 <= len(distinct) <= 6 or np.min(np.diff(np.log(distinct))) < 0.09 * np.log(distinct[-1] / distinct[0]):
        return None
    return [float(value) for value in distinct]


def tick_label(column: str) -> Callable[[float], str]:
    """FLOPs as powers of ten, counts as people say them."""
    return power_of_ten if column.startswith("flops") or column == "C" else human


def below(num: int) -> dict[str, Any]:
    """Options of a legend of `num` entries below the axes, where it hides no point."""
    columns = num if num <= 5 else -(-num // 2)
    return {"loc": "upper center", "bbox_to_anchor": (0.5, -0.19), "ncols": columns, "columnspacing": 1.2}


def series_of(data: pd.DataFrame, by: str) -> tuple[pd.Series, dict[str, float]]:
    """Name of each row's series, by value of a column, and the value that each name stands for, in order.

    More than eight values are put into eight classes by their logarithm, called by their geometric mean.
    """
    distinct = np.sort(data[by].unique())
    place = np.searchsorted(distinct, data[by])
    if len(distinct) > MAX_SERIES:
        edges = np.geomspace(distinct[0], distinct[-1], MAX_SERIES + 1)
        member = np.digitize(data[by], edges[1:-1])
        kept, place = np.unique(member, return_inverse=True)
        distinct = np.array([np.exp(np.log(data.loc[member == k, by]).mean()) for k in kept])
    names = told_apart(distinct, human, 3)
    labels = pd.Series(pd.Categorical([names[i] for i in place], names), index=data.index, name="series")
    return labels, dict(zip(names, map(float, distinct), strict=True))


def scatter(ax: Axes, x: Any, y: Any, labels: pd.Series | None = None, *, size: float = 34, **options: Any) -> None:
    """Markers with a thin edge; above `RASTERISE_ABOVE` points small, faint and stored as an image.

    Args:
        labels: series of each point (categorical), drawn in a colour and a marker each.
    """
    many = len(x) > RASTERISE_ABOVE
    look: dict[str, Any] = {
        "s": 6 if many else size,
        "alpha": 0.25 if many else 1.0,
        "linewidth": 0 if many else 0.6,
        "zorder": 3,
    }
    look |= {"edgecolor": PAPER, "rasterized": many, "legend": labels is not None}
    if labels is not None:
        names = list(labels.cat.categories)
        look |= {"hue": labels, "hue_order": names, "palette": ordered_colours(len(names))}
        look |= {"style": labels, "style_order": names, "markers": list(MARKERS[: len(names)])}
    sns.scatterplot(x=np.asarray(x), y=np.asarray(y), ax=ax, **{**look, **options})


def curve(
    ax: Axes, frame: pd.DataFrame, x: str, y: str = "value", ends: tuple[str, str] = ("ci_lo", "ci_hi"), **options: Any
) -> None:
    """Lines with bands: `x`, `y` and the ends of the band in columns; a column `series` (categorical) makes several."""
    parts = [rows for _, rows in frame.groupby("series", observed=True)] if "series" in frame else [frame]
    for rows, colour, dashes in zip(parts, ordered_colours(len(parts)), DASHES, strict=False):
        look = {"color": colour, "linestyle": dashes, "zorder": 2, **options}
        ax.plot(rows[x], rows[y], **look)
        ax.fill_between(rows[x], rows[ends[0]], rows[ends[1]], color=look["color"], alpha=0.16, linewidth=0)


def legend(ax: Axes, title: str) -> None:
    """The legend of a scatter of series, below the axes."""
    made = ax.get_legend()
    if made is not None:
        sns.move_legend(ax, title=title, **below(len(made.get_texts())))


def error_bars(ax: Axes, x: pd.Series, y: pd.Series, half: Any) -> None:
    """Grey bars of half widths (n,) or (2, n), unless there are too many points."""
    if len(x) <= RASTERISE_ABOVE and np.isfinite(half).any():
        ax.errorbar(x, y, yerr=np.nan_to_num(half), fmt="none", ecolor=MUTED, elinewidth=0.9, alpha=0.7, zorder=2)


def plain(text: object, longest: int = 32) -> str:
    """A name that matplotlib draws as it is, without reading dollar signs as mathematics; long ones are cut."""
    name = str(text)
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")
