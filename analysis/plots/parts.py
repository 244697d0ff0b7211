"""Parts that every figure shares: axis labels, series, points with intervals, lines, curves with bands, legends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.style import MARKERS, MAX_SERIES, PAPER, ShownFigure, figure_of, palette
from aimscale.analysis.table.design import told_apart
from aimscale.analysis.table.names import LETTERS
from aimscale.analysis.table.schema import described
from aimscale.analysis.table.select import spaced
from aimscale.analysis.words import human, power_of_ten

MAX_SHAPES = 300
"""Points from which a panel's markers are one picture inside an SVG: a shape each would make a page of megabytes."""
MAX_LINES = 100
"""Lines that join measurements in one panel at most; of more, evenly chosen ones."""


def axis_label(column: str, loss_unit: str = "", names: Mapping[str, str] | None = None) -> str:
    """Label a column: by its name in a foreign table, by our label in ours, else by the name as it is.

    Args:
        loss_unit: `table.loss_unit`; empty for a table that is not ours, whose columns get neutral words.
        names: our column -> its name in the file, of a foreign table.
    """
    if names and column in names:
        letter = LETTERS.get(column, "L")
        return plain(names[column]) if letter in ("L", names[column]) else f"{letter}: {plain(names[column])}"
    label = plain(described(column).axis_label, 60)
    if not loss_unit:  # others count other things under our names
        return label.replace(", pixel head included", "").replace("training images", "samples")
    return f"{label}\n({loss_unit})" if column in ("val_loss", "train_loss") else label


def percent_axis(ax: Axes, label: bool = True) -> None:
    """Write accuracies as per cent, which the axis says where there is room for it."""
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    ax.set_ylabel("top-1 accuracy (%)" if label else "")


def tick_label(column: str) -> Callable[[float], str]:
    """Choose how ticks are written: FLOPs as powers of ten, counts as people say them."""
    return power_of_ten if column.startswith("flops") or column == "C" else human


def series_of(data: pd.DataFrame, by: str) -> tuple[pd.Series, dict[str, float]]:
    """Name each row's series by the value of a column, and map the names in order to the values they stand for.

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


def record(ax: Axes, what: str, frame: pd.DataFrame) -> None:
    """Keep the numbers of what is drawn with the figure, which writes them beside it."""
    figure = figure_of(ax)
    if isinstance(figure, ShownFigure):
        figure.parts.append((ax, frame.assign(what=what)))


def _lineplot(ax: Axes, frame: pd.DataFrame, colours: Mapping[Any, Any], **look: Any) -> None:
    """Draw x and y of each series; the axes' labels and legend are made elsewhere."""
    hue = {"hue": frame["series"].to_numpy(), "hue_order": list(colours), "palette": dict(colours)}
    if look.keys() & {"markers", "dashes"}:
        hue |= {"style": hue["hue"], "style_order": hue["hue_order"]}
    place = {"x": frame["x"].to_numpy(), "y": frame["y"].to_numpy(), "ax": ax}
    sns.lineplot(**place, **hue, **{"estimator": None, "sort": False, "legend": False, **look})
    if look.get("legend") and (drawn := ax.get_legend()):
        drawn.remove()  # its entries stay, for a legend of several axes


def scatter(
    ax: Axes,
    points: pd.DataFrame,
    x: str,
    y: str,
    labels: pd.Series | None = None,
    *,
    ends: tuple[str, ...] = (),
    what: str = "measured",
    color: Any = None,
    **look: Any,
) -> None:
    """Draw markers and, where columns of their `ends` are given, bars of intervals: of each label (categorical) in its
    own colour and marker, or all in one colour."""
    points = points[[x, y, *ends]].set_axis(["x", "y", "low", "high"][: 2 + len(ends)], axis=1)
    points = points.assign(series="" if labels is None else labels).dropna(subset=["x", "y", "series"])
    record(ax, what, points)
    colours = palette([""] if labels is None else labels.cat.categories, color)
    is_many = len(points) > MAX_SHAPES
    for name, rows in points.groupby("series", observed=True) if ends else ():  # a broken line, not a path per bar
        bars = rows.assign(gap=np.nan)[["low", "high", "gap"]].to_numpy().ravel()
        line: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.55, "zorder": 2, "rasterized": is_many}
        ax.plot(np.repeat(rows["x"], 3), bars, color=colours[name], **line)
    look = {"markersize": 3.7, "markeredgecolor": PAPER, "markeredgewidth": 0.4, "zorder": 3, **look}
    legend = "full" if labels is not None and color is None else False
    look |= {"linestyle": "", "rasterized": is_many, "dashes": False, "legend": legend}
    _lineplot(ax, points, colours, **{"markers": MARKERS[: len(colours)], **look})


def curve(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str = "value",
    ends: tuple[str, str] = ("ci_lo", "ci_hi"),
    what: str = "law",
    *,
    color: Any = None,
    label: str = "",
    **look: Any,
) -> None:
    """Draw lines with bands: `x`, `y` and the band's ends in columns; a column `series` (categorical) makes several."""
    names = {x: "x", y: "y", ends[0]: "low", ends[1]: "high"}
    frame = frame.rename(columns=names)[[*names.values(), *(["series"] if "series" in frame else [])]]
    frame = frame if "series" in frame else frame.assign(series=label)
    record(ax, what, frame)
    colours = palette(frame["series"].unique(), color)
    look = {"zorder": 2, "legend": "full" if label else False, **look}
    _lineplot(ax, frame, colours, **(look if "linestyle" in look else {"dashes": True, **look}))
    for name, rows in frame.groupby("series", observed=True):
        ax.fill_between(rows["x"], rows["low"], rows["high"], color=colours[name], alpha=0.16, linewidth=0)


def lines(
    ax: Axes, rows: pd.DataFrame, x: str, y: str, by: str, labels: pd.Series, what: str = "mean", **look: Any
) -> None:
    """Draw a thin line through the means of each value of a column, in the colour of its label (categorical)."""
    rows = rows.assign(series=labels[rows.index]).dropna(subset=[y])
    values = rows[by].unique()
    rows = rows[rows[by].isin(values[spaced(len(values), MAX_LINES)])]
    means = rows.groupby([by, x, "series"], observed=True)[y].mean().reset_index().rename(columns={x: "x", y: "y"})
    look = {"linewidth": 0.9, "alpha": 0.8, "zorder": 1.5, **look}
    _lineplot(ax, means, palette(labels.cat.categories), units=means[by].to_numpy(), **look)
    record(ax, what, means[["x", "y", "series"]])


def legend(ax: Axes, title: str, columns: int = 4) -> None:
    """Put the legend of a scatter of series below the axes, where it hides no point, unless others share the figure."""
    figure = figure_of(ax)
    if isinstance(figure, ShownFigure) and len(figure.axes) == 1:
        for former in list(figure.legends):
            former.remove()
        shared_legend(figure, [ax], title, columns)
    elif ax.get_legend_handles_labels()[0]:
        ax.legend(title=title)


def shared_legend(
    figure: Figure, panels: Sequence[Axes], title: str, columns: int = 8, place: str = "outside lower center"
) -> None:
    """Put one legend below panels that have the same series."""
    found = {name: handle for ax in panels for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    if found:
        look: dict[str, Any] = {"columnspacing": 0.9, "handletextpad": 0.3, "title": title, "loc": place}
        figure.legend(list(found.values()), list(found), ncols=min(columns, len(found)), **look)


def plain(text: object, longest: int = 32) -> str:
    """Cut a long name, and keep matplotlib from reading dollar signs as mathematics."""
    name = str(text)
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")
