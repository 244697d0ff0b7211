"""Parts that every figure shares: axis labels, series, ticks, markers with errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from aimscale.analysis.plots.style import (
    ACCENT,
    DASHES,
    MARKERS,
    MAX_SERIES,
    PAPER,
    ShownFigure,
    figure_of,
    ordered_colours,
)
from aimscale.analysis.table.design import told_apart
from aimscale.analysis.table.names import LETTERS
from aimscale.analysis.table.schema import KNOWN
from aimscale.analysis.table.select import spaced
from aimscale.analysis.words import human, power_of_ten

AXIS_LABELS = {
    "params_total": "N: parameters, pixel head included",
    "params_trunk": "N: backbone parameters",
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
        return f"{AXIS_LABELS[column]}\n({loss_unit})"
    if not loss_unit and column in FOREIGN_LABELS:
        return FOREIGN_LABELS[column]
    if column in AXIS_LABELS:
        return AXIS_LABELS[column]
    unit = KNOWN[column].unit if column in KNOWN else ""
    return f"{column} ({unit})" if unit else plain(column)


def short(column: str, names: Mapping[str, str] | None = None) -> str:
    """A legend heading: the letter and a word or two."""
    known = {"params_total": "N, parameters", "params_trunk": "N, backbone", "images_seen": "D, seen"}
    return plain(names[column]) if names and column in names else known.get(column, column)


def percent_axis(ax: Axes, label: bool = True) -> None:
    """Accuracies as per cent, which the axis says where there is room for it."""
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    if label:
        ax.set_ylabel("top-1 accuracy (%)")


def few_values(values: pd.Series) -> list[float] | None:
    """The values themselves as ticks, if they are few."""
    distinct = np.sort(values.dropna().unique())
    return [float(value) for value in distinct] if 2 <= len(distinct) <= 8 else None


def tick_label(column: str) -> Callable[[float], str]:
    """FLOPs as powers of ten, counts as people say them."""
    return power_of_ten if column.startswith("flops") or column == "C" else human


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


MAX_POINTS = 300
"""Points that one panel draws at most."""


def thinned(points: pd.DataFrame, most: int = MAX_POINTS) -> pd.DataFrame:
    """At most about `most` points, the same ones every time: the ends of every series in x and in y, and evenly of the
    others in order of series, x and y.

    Args:
        points: columns x, y and series.
    """
    if len(points) <= most:
        return points
    ordered = points.sort_values(["series", "x", "y"], kind="stable").reset_index(drop=True)
    groups = ordered.groupby("series", observed=True)
    ends = [getattr(groups[name], which)() for name in ("x", "y") for which in ("idxmin", "idxmax")]
    kept = {int(place) for each in ends for place in each.dropna()}
    kept |= {*spaced(len(ordered), max(1, most - len(kept))).tolist()}
    return ordered.loc[sorted(kept)]


def record(ax: Axes, what: str, frame: pd.DataFrame) -> None:
    """Keep the numbers of what is drawn with the figure, which writes them beside it."""
    figure = figure_of(ax)
    if isinstance(figure, ShownFigure):
        figure.parts.append((ax, frame.assign(what=what)))


def scatter(
    ax: Axes,
    x: Any,
    y: Any,
    labels: pd.Series | None = None,
    *,
    ends: tuple[Any, Any] | None = None,
    size: float = 14,
    color: str = ACCENT,
    marker: str = "o",
    what: str = "measured",
    most: int = MAX_POINTS,
) -> None:
    """Markers with a thin edge and, where `ends` are given, bars of their intervals; thinned where there are many.

    Args:
        labels: series of each point (categorical), drawn in a colour and a marker each.
        ends: lower and upper ends of the intervals.
        what: they are, in the numbers written beside the figure.
    """
    names = list(labels.cat.categories) if labels is not None else [""]
    points = pd.DataFrame({"x": np.asarray(x, float), "y": np.asarray(y, float)})
    points["series"] = pd.Categorical(labels if labels is not None else [""] * len(points), names)
    points[["low", "high"]] = np.column_stack(ends) if ends else np.nan
    points = points.dropna(subset=["x", "y", "series"])
    shown = thinned(points, most)
    record(ax, what, shown)
    if isinstance(figure := figure_of(ax), ShownFigure):
        figure.num_left_out += len(points) - len(shown)
    looks = (
        zip(names, ordered_colours(len(names)), MARKERS, strict=False) if labels is not None else [("", color, marker)]
    )
    for name, colour, each in looks:
        rows = shown[shown["series"] == name]
        if rows["low"].notna().any():  # one broken line for all bars: a page holds hundreds
            bars = np.column_stack([rows["low"], rows["high"], np.full(len(rows), np.nan)]).ravel()
            ax.plot(np.repeat(rows["x"], 3), bars, color=colour, linewidth=0.7, alpha=0.55, zorder=2, marker="")
        look: dict[str, Any] = {"color": colour, "marker": each, "markersize": size**0.5, "linestyle": "none"}
        look |= {"markeredgecolor": PAPER, "markeredgewidth": 0.4}
        ax.plot(rows["x"], rows["y"], zorder=3, label=name or None, **look)


def curve(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str = "value",
    ends: tuple[str, str] = ("ci_lo", "ci_hi"),
    what: str = "law",
    **options: Any,
) -> None:
    """Lines with bands: `x`, `y` and the ends of the band in columns; a column `series` (categorical) makes several."""
    parts = [rows for _, rows in frame.groupby("series", observed=True)] if "series" in frame else [frame]
    for rows, colour, dashes in zip(parts, ordered_colours(len(parts)), DASHES, strict=False):
        look = {"color": colour, "linestyle": dashes, "zorder": 2, **options}
        ax.plot(rows[x], rows[y], **look)
        ax.fill_between(rows[x], rows[ends[0]], rows[ends[1]], color=look["color"], alpha=0.16, linewidth=0)
        names = {x: "x", y: "y", ends[0]: "low", ends[1]: "high"}
        kept = rows[[name for name in (*names, "series") if name in rows]].rename(columns=names)
        record(ax, what, kept if "series" in kept else kept.assign(series=options.get("label", "")))


MAX_LINES = 24
"""Lines that join measurements in one panel at most."""


def joined(ax: Axes, rows: pd.DataFrame, x: str, y: str, by: str, labels: pd.Series) -> None:
    """A thin line through the measurements of each value of a column, seeds averaged, in the colour of its series."""
    colours = dict(zip(labels.cat.categories, ordered_colours(len(labels.cat.categories)), strict=True))
    means = rows.groupby([by, x])[y].mean().dropna().reset_index()
    names = dict(zip(rows[by], labels[rows.index], strict=True))
    values = means[by].unique()
    means = means[means[by].isin(values[spaced(len(values), MAX_LINES)])].assign(series=means[by].map(names))
    for name, lines in means.groupby("series", sort=False):  # one broken line for each series
        ends = lines.groupby(by)[x].idxmax()
        breaks = pd.DataFrame({by: lines.loc[ends, by]}, index=ends + 0.5)
        broken = pd.concat([lines, breaks]).sort_index()
        ax.plot(broken[x], broken[y], color=colours[name], linewidth=0.8, alpha=0.8, zorder=1.5)
    record(ax, "mean", means.rename(columns={x: "x", y: "y"})[["x", "y", "series"]])


def legend(ax: Axes, title: str, columns: int = 4) -> None:
    """The legend of a scatter of series: below the axes, where it hides no point, unless others share their figure."""
    figure = figure_of(ax)
    if isinstance(figure, ShownFigure) and len(figure.axes) == 1:
        shared_legend(figure, [ax], title, columns)
    elif ax.get_legend_handles_labels()[0]:
        ax.legend(title=title)


def shared_legend(
    figure: Figure, panels: Sequence[Axes], title: str, columns: int = 8, place: str = "outside lower center"
) -> None:
    """One legend below panels that have the same series."""
    found = {name: handle for ax in panels for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    if found:
        look: dict[str, Any] = {"columnspacing": 0.9, "handletextpad": 0.3, "title": title, "loc": place}
        figure.legend(list(found.values()), list(found), ncols=min(columns, len(found)), **look)


def plain(text: object, longest: int = 32) -> str:
    """A name that matplotlib draws as it is, without reading dollar signs as mathematics; long ones are cut."""
    name = str(text)
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")
