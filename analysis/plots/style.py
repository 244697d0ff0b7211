"""Style of figures and the parts that they share: labels, axes, series, points with intervals, curves with bands,
levels, legends; formats SVG, PDF and PNG for a paper, and SVG inside a page.

A figure has the width of a paper's column or of two. Colours are colour-blind safe and differ in lightness, so that
figures survive a grey printer; series differ in marker and line style too. What a user has set in `rcParams` stays.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike
from pandas.api.types import is_numeric_dtype

from aimscale.analysis.display import human, power_of_ten, told_apart
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.groups import spaced
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.schema import LETTERS, described, written_aside
from aimscale.analysis.table.select import task_level

SINGLE, DOUBLE = 3.3, 6.75
"""Widths of one column of a paper and of two, in inches."""
ON_SCREEN = 2.3
"""Factor by which a page shows a figure larger than paper does, at most."""
KINDS = ("svg", "pdf", "png")
"""Formats of a saved figure."""
INK, MUTED, PAPER = "#1b1f24", "#5b6470", "#ffffff"
ORDERED = ("#31135f", "#433e85", "#2f6a8e", "#21908c", "#3fa860", "#86a81c", "#b58d00", "#a4631a")
"""Colours of ordered series."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

_RC = {
    "axes.prop_cycle": cycler(color=["#0b62a8", "#c8590a", INK, "#21908c", "#86a81c", "#433e85"]),
    "axes.linewidth": 0.7,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.87",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "font.sans-serif": ["DejaVu Sans"],
    "pdf.fonttype": 42,
    "lines.linewidth": 1.1,
}
MAX_SHAPES = 300
"""Points from which a panel's markers are one picture inside an SVG: a shape each would make a page of megabytes."""
MAX_JOINED = 100
"""Lines that join measurements in one panel at most; of more, evenly chosen ones."""
SUBS = ((2.2, (1,)), (1.4, (1, 3)), (0.6, (1, 2, 5)))
"""Decades of a range from which an axis has ticks at these multiples of powers of ten: labels such as 3×10¹¹ have room
on the panels of a figure of two columns."""
LEVEL_REACH = 0.5
"""Distance from the points, in heights of the axis, up to which a level is drawn."""
LEGEND_SHARE = 0.95
"""Share of a figure's width that its legends may take, without margins."""


def _is_default(name: Any) -> bool:
    """Tell whether a parameter is matplotlib's own: neither a user nor an outer figure has set it."""
    return bool(mpl.rcParams[name] == mpl.rcParamsDefault[name])


@contextmanager
def styled() -> Iterator[None]:
    """Draw inside this: seaborn's theme at a paper's size, but for what the user has set, and no state left behind."""
    theme = {**sns.axes_style("whitegrid"), **sns.plotting_context("paper", font_scale=0.78), **_RC}
    with mpl.rc_context({name: value for name, value in theme.items() if _is_default(name)}):
        yield


class ShownFigure(Figure):
    """A figure that no global state keeps alive, and that a notebook shows when it is a cell's last value."""

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def new_figure(
    width: float = SINGLE, height: float = 2.5, num_rows: int = 1, num_columns: int = 1, **options: Any
) -> tuple[ShownFigure, list[Axes]]:
    """Make a figure and its axes, row by row; sizes in inches, options as for `Figure.subplots`.

    A figure of one panel has the size that the user has set.
    """
    is_own = num_rows * num_columns == 1 and not _is_default("figure.figsize")
    figure = ShownFigure(figsize=None if is_own else (width, height), layout="constrained")
    return figure, list(figure.subplots(num_rows, num_columns, squeeze=False, **options).ravel())


def figure_of(ax: Axes) -> Figure:
    """Get the figure that holds the axes, of sub-figures the outermost."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def cycled(number: int) -> Any:
    """Get a colour of the cycle, as it is now."""
    colours = mpl.rcParams["axes.prop_cycle"].by_key().get("color", [INK])
    return colours[number % len(colours)]


def palette(names: Iterable[Any], color: Any = None) -> dict[Any, Any]:
    """Map the names of ordered series to colours, dark to light; a single one, or all, to one colour."""
    names = list(names)
    if color is not None or len(names) == 1:
        return dict.fromkeys(names, cycled(0) if color is None else color)
    picks = np.linspace(0, len(ORDERED) - 1, len(names)).round().astype(int)
    return {name: ORDERED[i] for name, i in zip(names, picks, strict=True)}


def inline_svg(figure: Figure, key: str, label: str) -> str:
    """Write the figure as an `<svg>` element for one page: real text, no background, ids unique by `key`."""
    text = _image(figure, "svg", fonttype="none", hashsalt=key, transparent=True).decode("utf-8")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    looks: dict[str, str] = {}  # thousands of markers share a few

    def named(match: re.Match[str]) -> str:
        return f'class="{looks.setdefault(match[1], f"{key}-look-{len(looks)}")}"'

    text = re.sub(r'(?<= )style="([^"]*)"', named, text)
    rules = "".join(f".{name} {{{look}}}" for look, name in looks.items())
    # a hundredth of a point is seen by nobody, unlike the digits of a text
    text = re.sub(r">[^<]+<|(\d\.\d\d)\d+", lambda found: found[1] or found[0], text)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    width = round(ON_SCREEN * 72 * figure.get_figwidth())
    attributes = f'{spaces} role="img" aria-label={quoteattr(label)} style="max-width: {width}px"'
    _, view_box, body = re.split(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', text)
    return f"<svg {view_box} {attributes}><style>{rules}</style>{body}"


def png_bytes(figure: Figure, dpi: int = 300) -> bytes:
    """Write the figure as PNG."""
    return _image(figure, "png", dpi=dpi)


def _image(
    figure: Figure, kind: str, fonttype: str = "path", hashsalt: str = "aimscale", dpi: int = 200, **options: Any
) -> bytes:
    """Write the figure without a date: the same figure gives the same bytes. Text of an SVG becomes outlines."""
    undated = {"svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": fonttype, "svg.hashsalt": hashsalt}):
        figure.savefig(buffer, format=kind, metadata=undated.get(kind), dpi=dpi, **options)
    return buffer.getvalue()


def save(figure: Figure, stem: str | Path, kinds: Sequence[str] = KINDS) -> list[Path]:
    """Write `stem`.svg, `stem`.pdf and `stem`.png at a paper's width.

    Args:
        figure: a figure of ours, or any other of matplotlib's.
        stem: path of the files without their suffix.
        kinds: formats to write, of svg, pdf and png.

    Returns:
        The paths.

    Raises:
        AnalysisError: the path names no file, or the folder cannot be written.

    Example:
        >>> save(fit(read_table("results.parquet"), "chinchilla").plot(), "law")
    """
    stem = Path(stem)
    if stem.name in ("", ".."):
        raise AnalysisError(f"'{stem}' names no figure; give a path such as figures/loss")
    stem = stem.with_suffix("") if stem.suffix[1:] in KINDS else stem
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path, kind in zip(paths, kinds, strict=True):
            content = png_bytes(figure) if kind == "png" else _image(figure, kind)
            with written_aside(path) as aside:
                aside.write_bytes(content)
    except OSError as error:
        message = f"cannot write {stem}: {error.strerror}; choose a folder that exists and is yours"
        raise AnalysisError(message) from error
    return paths


def plain(text: object, longest: int = 32) -> str:
    """Cut a long name, and keep matplotlib from reading dollar signs as mathematics."""
    name = str(text)
    return (name if len(name) <= longest else f"{name[: longest - 1]}…").replace("$", r"\$")


def axis_label(
    column: str, loss_unit: str = "", names: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None
) -> str:
    """Label a column (or its letter) as `labels` do, else by its name in the file if `names` has it, else by our label;
    without `loss_unit`, of a table that is not ours, in neutral words.
    """
    keys = (column, LETTERS.get(column, ""), (names or {}).get(column, ""))
    if named := [(labels or {})[key] for key in keys if key in (labels or {})]:
        return plain(named[0], 60)
    if names and column in names:
        letter = LETTERS.get(column, "L")
        name = re.sub(r"\s*\*\s*", " × ", names[column].replace("`", ""))  # it may be a formula
        return plain(name) if letter in ("L", name) else f"{letter}: {plain(name)}"
    label = plain(described(column).axis_label, 60)
    if not loss_unit:  # others count other things under our names
        return label.replace(", pixel head included", "").replace("training images", "samples")
    return f"{label}\n({loss_unit})" if column in ("val_loss", "train_loss") else label


def labels_of(table: Table, labels: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """Give `axis_label` of the columns of a table."""
    runs = Runs(table)
    return partial(axis_label, loss_unit=runs.loss_unit, names=runs.names, labels=labels)


def log_axis(ax: Axes, which: str, values: ArrayLike, column: str, label: Callable[[str], str] = axis_label) -> None:
    """Make an axis logarithmic over the range of positive values, with few ticks, and label it as a column's."""
    axis, values = ax.xaxis if which == "x" else ax.yaxis, np.asarray(values, float)
    ax.set(**{f"{which}scale": "log", f"{which}label": label(column)})
    if len(finite := values[(values > 1e-200) & (values < 1e200)]):
        low, high = finite.min(), finite.max()
        pad = (high / low) ** 0.06 if high > low else 1.5
        ax.set(**{f"{which}lim": (low / pad, high * pad)})
        subs = next((subs for decades, subs in SUBS if np.log10(high / low) > decades), None)
        few = MaxNLocator(4 if which == "x" else 7, steps=[1, 2, 5, 10])
        axis.set_major_locator(LogLocator(subs=subs, numticks=7) if subs else few)
    axis.set_minor_locator(NullLocator())
    write = power_of_ten if column == "C" or column.startswith("flops") else human
    axis.set_major_formatter(lambda value, _: write(value))


def finish(
    ax: Axes,
    x: tuple[str, ArrayLike],
    y: tuple[str, ArrayLike],
    label: Callable[[str], str] = axis_label,
    title: str = "",
    **look: Any,
) -> Figure:
    """Make both axes logarithmic over the values of a column each, add the legend, and return the figure."""
    for which, (column, values) in (("x", x), ("y", y)):
        log_axis(ax, which, values, column, label)
    legend([ax], title, **look)
    return figure_of(ax)


def percent_axis(ax: Axes, label: bool = True) -> None:
    """Write accuracies as per cent, which the axis says where there is room for it."""
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    ax.set_ylabel("top-1 accuracy (%)" if label else "")


def series_of(data: pd.DataFrame, by: str | None) -> tuple[pd.Series, dict[str, float]]:
    """Name each row's series by the value of a column, and map the names in order to the values they stand for.

    More than eight values are put into eight classes by their logarithm, called by their ends, which stand for their
    geometric means. Without a column there is one series without a name.
    """
    values = data[by] if by else pd.Series(0.0, data.index)
    if not is_numeric_dtype(values):
        names = list(dict.fromkeys(values.map(str)))
        return pd.Series(pd.Categorical(values.map(str), names), data.index), dict(zip(names, count(0.0), strict=False))
    means = values
    if values.nunique() > len(MARKERS):
        log = np.log(values)
        means = np.exp(log.groupby(pd.cut(log, len(MARKERS), labels=False)).transform("mean"))
    ends = values.groupby(means).agg(["min", "max"])
    lows, highs = (told_apart(ends[name].to_numpy(), human, 3) for name in ends)
    names = [low if low == high else f"{low}–{high}" for low, high in zip(lows, highs, strict=True)] if by else [""]
    series = pd.Series(pd.Categorical(means, ends.index), data.index)
    return series.cat.rename_categories(names), dict(zip(names, map(float, ends.index), strict=True))


def draw(ax: Axes, rows: pd.DataFrame, columns: Sequence[str], color: Any = None, **look: Any) -> None:
    """Draw columns: x, y, and both ends of an interval if given. A column `series` makes several lines with bands, or
    points with bars where `markers` are given, in their own colours or in one. A legend is made later.
    """
    markers, label = look.pop("markers", ()), look.pop("label", "")
    names = [*["x", "y", "low", "high"][: len(columns)], "series"]
    rows = rows if "series" in rows else rows.assign(series=label)
    rows = rows[[*columns, "series"]].set_axis(names, axis=1).dropna(subset=["x", "y", "series"])
    x, y, series = (rows[name].to_numpy() for name in ("x", "y", "series"))
    levels = list(rows["series"].astype("category").cat.categories)
    colours, is_many = palette(levels, color), bool(markers) and len(rows) > MAX_SHAPES
    looks = {"hue": series, "hue_order": levels, "palette": colours, "style": series, "style_order": levels}
    looks |= {"markers": markers[: len(levels)] or False, "dashes": "linestyle" not in look, "rasterized": is_many}
    legend = "full" if label or (markers and color is None) else False
    sns.lineplot(x=x, y=y, ax=ax, estimator=None, sort=False, legend=legend, **{"zorder": 2, **looks, **look})
    if legend and (drawn := ax.get_legend()):
        drawn.remove()
    for name, part in rows.groupby("series", observed=True) if len(columns) > 2 else ():
        if markers:  # a broken line, not a path per bar
            bars = part.assign(gap=np.nan)[["low", "high", "gap"]].to_numpy().ravel()
            bar = {"color": colours[name], "linewidth": 0.7, "alpha": 0.55, "rasterized": is_many}
            ax.plot(np.repeat(part["x"], 3), bars, **bar)
        else:
            ax.fill_between(part["x"], part["low"], part["high"], color=colours[name], alpha=0.16, linewidth=0)


draw_points = partial(
    draw, linestyle="", markers=MARKERS, markersize=3.7, markeredgecolor=PAPER, markeredgewidth=0.4, zorder=3
)


def draw_means(ax: Axes, rows: pd.DataFrame, x: str, y: str, by: str, **look: Any) -> None:
    """Draw a thin line through the means of each value of a column, in the colour of its series (categorical)."""
    rows = rows.dropna(subset=[y])
    values = rows[by].unique()
    rows = rows[rows[by].isin(values[spaced(len(values), MAX_JOINED)])]
    means = rows.groupby([by, x, "series"], observed=True)[y].mean().reset_index()
    means = means.astype({"series": rows["series"].dtype})
    look = {"linestyle": "-", "linewidth": 0.9, "alpha": 0.8, "zorder": 1.5, "units": means[by].to_numpy(), **look}
    draw(ax, means, (x, y), **look)


def name_task(panels: Sequence[Axes], rows: pd.DataFrame, task: str, **look: Any) -> None:
    """Title panels of one range by a task and its `chance`, which is a line where their axis reaches it."""
    chance = task_level(rows, "chance")
    named = "" if chance is None else f" (chance {100 * chance:.1f} %)"
    panels[0].set_title(f"{plain(task)}{named}", **look)
    low, high = panels[0].get_ylim()
    if chance is not None and low < chance < high:
        for ax in panels:
            ax.axhline(chance, color=MUTED, linewidth=0.9, linestyle="--", zorder=1)


def draw_levels(panels: Sequence[Axes], levels: pd.DataFrame, **place: Any) -> None:
    """Draw accuracies to compare with (name, top1) as lines across panels of one range, named in a legend; those far
    off the points are named with an arrow."""
    low, high = panels[0].get_ylim()
    reach, handles = LEVEL_REACH * (high - low), []
    levels = levels[["name", "top1"]].dropna().sort_values("top1", ascending=False, kind="stable")
    for number, (name, value) in enumerate(levels.itertuples(index=False, name=None)):
        arrow = "↓ " if value < low - reach else "↑ " if value > high + reach else ""
        style: Any = "none" if arrow else ("--", ":", "-.")[number % 3]
        look: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": style}
        for ax in () if arrow else panels:
            ax.axhline(value, zorder=1, **look)
        handles.append(Line2D([], [], label=f"{arrow}{plain(name, 30)} {100 * value:.1f}", **look))
    if handles:
        look = {"labelcolor": MUTED, "fontsize": "small", "handlelength": 1.6, "handletextpad": 0.4}
        panels[-1].legend(handles=handles, **look, **place)


def legend(axes: Sequence[Axes], title: str, columns: int = 4, place: str = "") -> None:
    """Put one legend of panels with the same series below their figure, where it hides no point, in as many columns as
    its width holds; inside single axes of a figure that has others or was made elsewhere."""
    figure = figure_of(axes[0])
    handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    is_whole = place or len(axes) > 1 or len(figure.axes) == 1
    if handles and is_whole and isinstance(figure, ShownFigure):
        if len(figure.axes) == 1:  # a second law replaces the legend of the first
            figure.legends.clear()
        look: dict[str, Any] = {"columnspacing": 0.9, "handletextpad": 0.3, "title": title}
        look["loc"] = f"outside {place or 'lower center'}"
        room = LEGEND_SHARE * figure.bbox.width - sum(beside.get_window_extent().width for beside in figure.legends)
        for num in range(min(columns, len(handles)), 0, -1):
            made = figure.legend(list(handles.values()), list(handles), ncols=num, **look)
            if made.get_window_extent().width <= room or num == 1:
                break
            made.remove()
    elif handles:
        axes[0].legend(title=title)
