"""Figures of accuracy: against size, data and compute, against the loss, and beside the published models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from aimscale.analysis.accuracy.result import Correlation
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.plots import parts
from aimscale.analysis.plots.parts import axis_label, plain, record, shared_legend
from aimscale.analysis.plots.scaling import NUM_GRID
from aimscale.analysis.plots.style import DOUBLE, INK, MUTED, SINGLE, log_axis, new_figure, styled
from aimscale.analysis.published.comparison import CHOSEN, LAST, Comparison
from aimscale.analysis.published.published import published_frame, table6
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.read import loss_unit

SCALES = {"params_total": "images_seen", "images_seen": "params_total", "flops_train": "params_total"}
"""What accuracy is drawn against -> the column whose values make its lines."""
SIDES = {"images_seen": ("outside lower left", 4), "params_total": ("outside lower right", 6)}
"""Where the legend of a column's values stands if there are two, and how many of them stand in a row."""
REACH = 0.6
"""How far beyond the points, in their range, a level may lie to be drawn."""
LEVELS: dict[str, Any] = {"labelcolor": MUTED, "fontsize": "small", "handlelength": 1.6, "handletextpad": 0.4}
"""Look of their names."""


@styled()
def plot_accuracy(probes: pd.DataFrame, levels: pd.DataFrame | None = None) -> Figure:
    """Draw accuracy against N, D and C: a row of panels per task, intervals, a line per size (in N, per D).

    Args:
        probes: rows of `probe_frame`, of one kind of probe: task, top1, its interval, and params_total, images_seen,
            flops_train as far as they are known.
        levels: what to compare with, drawn as horizontal lines: task, name, top1. Those far off the points are named
            at the panel's edge.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> probes = probe_frame(read_table("results.parquet"))
        >>> plot_accuracy(probes[probes["kind"] == "linear"])
    """
    rows = probes[probes["top1"].notna()].reset_index(drop=True)
    tasks = list(dict.fromkeys(rows["task"]))
    scales = {x: by for x, by in SCALES.items() if x in rows and rows[x].notna().any()}
    width = DOUBLE if len(scales) > 1 else SINGLE
    figure, panels = new_figure(width, 1.75 * len(tasks) + 0.7, len(tasks), len(scales), sharey="row", sharex="col")
    grid = np.reshape(np.array(panels), (len(tasks), len(scales)))
    for column, (x, by) in zip(grid.T, scales.items(), strict=True):
        labels = parts.series_of(rows, by)[0] if by in rows and rows[by].notna().all() else None
        for ax, task in zip(column, tasks, strict=True):
            mine = rows[(rows["task"] == task) & rows[x].notna()]
            if labels is not None:
                parts.lines(ax, mine, x, "top1", by, labels)
            _scatter_accuracy(ax, mine, x, labels)
        log_axis(column[0], "x", rows[x], parts.tick_label(x))
        column[-1].set_xlabel(axis_label(x, loss_unit(rows), names_of(rows)).partition(",")[0])
    for by in dict.fromkeys(scales.values()):
        place, in_a_row = SIDES[by] if len(scales) > 1 else ("outside lower center", 4)
        mine = [ax for column, each in zip(grid.T, scales.values(), strict=True) if each == by for ax in column]
        shared_legend(figure, mine, axis_label(by, loss_unit(rows), names_of(rows)), in_a_row, place)
    for line, task in zip(grid, tasks, strict=True):
        line[0].set_title(plain(task))
        for ax in line:
            parts.percent_axis(ax, label=ax is line[0])
        _draw_levels(line, rows[rows["task"] == task], None if levels is None else levels[levels["task"] == task])
    return figure


def _scatter_accuracy(ax: Axes, rows: pd.DataFrame, x: str, labels: pd.Series | None) -> None:
    """Draw accuracies with their intervals."""
    own = None if labels is None else labels[rows.index]
    parts.scatter(ax, rows, x, "top1", own, ends=("top1_lo95", "top1_hi95"), markersize=3.3)


def _draw_levels(panels: Sequence[Axes], rows: pd.DataFrame, levels: pd.DataFrame | None) -> None:
    """Draw chance and what else there is to compare with, named at the right; an arrow means beyond the axis."""
    known = pd.DataFrame({"name": ["chance"], "top1": rows["chance"].iloc[:1]} if "chance" in rows else {})
    known = pd.concat([known, pd.DataFrame(columns=["name", "top1"]) if levels is None else levels[["name", "top1"]]])
    values = rows[["top1", "top1_lo95", "top1_hi95"]].to_numpy(float)
    low, high = np.nanmin(values), np.nanmax(values)
    reach = REACH * max(high - low, 0.02)
    near = known.loc[known["top1"].between(low - reach, high + reach), "top1"]
    low, high = min([low, *near]), max([high, *near])
    for ax in panels:
        ax.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    handles = []
    known = known.dropna().sort_values("top1", ascending=False, kind="stable")
    for number, (name, value) in enumerate(known.itertuples(index=False, name=None)):
        is_near, text = low <= value <= high, f"{plain(name, 22)} {100 * value:.1f}"
        look: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": ("--", ":", "-.")[number % 3]}
        for ax in panels if is_near else ():
            ax.axhline(value, zorder=1, **look)
        record(
            panels[-1], "level" if is_near else "level, beyond the axis", pd.DataFrame({"series": [name], "y": value})
        )
        text = text if is_near else f"{'↑' if value > high else '↓'} {text}"
        handles.append(Line2D([], [], label=text, **look if is_near else {"linestyle": "none"}))
    if handles:
        panels[-1].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), **LEVELS)


@styled()
def plot_loss_accuracy(
    probes: pd.DataFrame,
    correlations: Mapping[str, Iterable[Correlation]] | None = None,
    links: Mapping[str, Fit] | None = None,
) -> Figure:
    """Draw accuracy against validation loss, a panel per task, one marker per size (or images seen).

    Args:
        probes: rows of `probe_frame`: val_loss, task, top1, top1_lo95, top1_hi95, chance, and params_total or size.
        correlations: task -> its correlation coefficients, written into the panel as `correlate` orders them.
        links: task -> fitted link from loss to accuracy, drawn with its confidence band.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> probes = probe_frame(read_table("results.parquet"))
        >>> plot_loss_accuracy(probes[probes["kind"] == "linear"])
    """
    probes = probes[probes["val_loss"].notna() & probes["top1"].notna()].reset_index(drop=True)
    tasks = list(dict.fromkeys(probes["task"]))
    figure, panels, columns = _task_panels(tasks, 2.1 if len(tasks) > 1 else 2.4)
    by = next((n for n in ("params_total", "images_seen") if n in probes and probes[n].notna().any()), None)
    labels = parts.series_of(probes, by)[0] if by else None
    for ax, task in zip(panels, tasks, strict=True):
        mine = probes[probes["task"] == task]
        _scatter_accuracy(ax, mine, "val_loss", labels)
        if links and task in links:
            grid = pd.DataFrame({"L": np.linspace(*links[task].ranges["L"], NUM_GRID)})
            drawn = pd.concat([grid, links[task].predict(grid)], axis=1)
            parts.curve(ax, drawn, "L", what="link", color=MUTED, zorder=2.5)
        _draw_chance(ax, mine["chance"].dropna())
        ax.set_xlabel(axis_label("val_loss", loss_unit(mine)).replace("\n", " "))
        lines = _correlation_lines((correlations or {}).get(task, ()))
        ax.set_title(plain(task), pad=5 + 7.5 * len(lines))
        ax.text(0, 1.02, "\n".join(lines), transform=ax.transAxes, va="bottom", fontsize="x-small", color=INK)
    title = axis_label(by, loss_unit(probes), names_of(probes)) if by else ""
    shared_legend(figure, panels, title, 4 if columns == 1 else 8)
    return figure


def _task_panels(tasks: Sequence[str], height: float) -> tuple[Figure, list[Axes], int]:
    """Make a figure with a panel (of a height in inches) of accuracies per task; say how many stand in a row."""
    columns = max(1, min(3, len(tasks)))
    num_rows = max(1, -(-len(tasks) // columns))
    figure, panels = new_figure(SINGLE if columns == 1 else DOUBLE, height * num_rows + 0.5, num_rows, columns)
    for number, ax in enumerate(panels):
        parts.percent_axis(ax, label=number % columns == 0)
        ax.set_visible(number < len(tasks))
    return figure, panels[: len(tasks)], columns


def _draw_chance(ax: Axes, chance: pd.Series) -> None:
    """Draw chance where it lies near the points, whose range the axis keeps."""
    low, high = ax.get_ylim()
    if len(chance) and chance.iloc[0] > low - 0.5 * (high - low):
        ax.axhline(chance.iloc[0], color=MUTED, linewidth=0.9, linestyle=":")
        record(ax, "level", pd.DataFrame({"series": ["chance"], "y": chance.iloc[:1]}))
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        ax.annotate("chance", (0.99, chance.iloc[0]), color=MUTED, fontsize="small", **place)


def _correlation_lines(correlations: Iterable[Correlation]) -> list[str]:
    """Write each coefficient with its interval."""
    words = {"pearson": "Pearson r", "spearman": "Spearman ρ"}
    told = [c for c in correlations if c.within is None and not np.isnan(c.value)]
    is_split = any(c.partial_on for c in told)
    lines = []
    for c in told:
        rows = ("equal compute: " if c.partial_on else "all rows: ") if is_split else ""
        lines.append(f"{rows}{words[c.method]} = {c.value:.2f} [{c.low:.2f}, {c.high:.2f}]".replace("-", "−"))
    return lines + ["all at chance"] * any(c.chance is not None for c in told)


@styled()
def plot_comparison(found: Comparison) -> Figure:
    """Draw attentive accuracy against parameters on the tasks of the paper: these runs, the released AIMs on their last
    six blocks, and the best frozen model of Table 6 as a line.

    Raises:
        AnalysisError: no run was probed on a task of the paper by its protocol.
    """
    if found.tasks.empty or "params_total" not in found.tasks:
        raise AnalysisError("No run was probed on a task of the paper by its protocol, so nothing is drawn beside AIM.")
    blocks = LAST if (found.tasks["blocks"] == LAST).any() else found.tasks["blocks"].iloc[0]
    ours = found.tasks[found.tasks["blocks"] == blocks]
    tasks, ends = list(dict.fromkeys(ours["task"])), ("top1_lo95", "top1_hi95")
    figure, panels, columns = _task_panels(tasks, 2.0)
    name = f"this table{ {CHOSEN: ', chosen blocks', LAST: ', last blocks'}.get(blocks, '') }"
    series = pd.CategoricalDtype([name, "AIM, published"])
    for ax, task in zip(panels, tasks, strict=True):
        mine, aim = ours[ours["task"] == task], published_frame()[["size", "params_total"]]
        aim = aim.assign(top1=table6().loc[aim["size"], task].to_numpy(), top1_lo95=np.nan, top1_hi95=np.nan)
        for rows, called, what in ((mine, name, "ours"), (aim, "AIM, published", "AIM")):
            labels = pd.Series(called, rows.index, dtype=series)
            parts.scatter(ax, rows, "params_total", "top1", labels, ends=ends, what=what)
        best, top1 = mine[["best_frozen", "best_frozen_top1"]].iloc[0]
        ax.axhline(top1, color=MUTED, linewidth=0.9, linestyle="--", label="best frozen model, published")
        record(ax, "level", pd.DataFrame({"series": [best], "y": top1}))
        log_axis(ax, "x", [*mine["params_total"], *aim["params_total"]])
        ax.set(title=plain(task), xlabel="N: parameters")
    shared_legend(figure, panels, "", 2 if columns == 1 else 3)
    return figure
