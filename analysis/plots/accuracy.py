"""Figures of accuracy: against size, data and compute, against the loss, and beside the published models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import (
    MAX_POINTS,
    axis_label,
    curve,
    few_values,
    joined,
    percent_axis,
    plain,
    record,
    scatter,
    series_of,
    shared_legend,
    short,
    tick_label,
)
from aimscale.analysis.plots.scaling import NUM_GRID
from aimscale.analysis.plots.style import (
    ACCENT,
    DOUBLE,
    INK,
    MUTED,
    PAPER,
    SECOND,
    SINGLE,
    log_axis,
    new_figure,
    styled,
)
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.read import loss_unit

if TYPE_CHECKING:
    from aimscale.analysis.accuracy.result import Correlation
    from aimscale.analysis.fitting.result import Fit

SCALES = (("params_total", "images_seen"), ("images_seen", "params_total"), ("flops_train", "params_total"))
"""What accuracy is drawn against, and the column whose values make its lines."""
REACH = 0.6
"""How far beyond the points, in their range, a level may lie to be drawn."""
LEVEL_DASHES: tuple[Any, ...] = (":", "--", "-.", (0, (1, 2)), (0, (6, 2)), (0, (3, 1, 1, 1, 1, 1)))


def plot_accuracy(probes: pd.DataFrame, levels: pd.DataFrame | None = None) -> Figure:
    """Accuracy against N, D and C: a row of panels per task, points with intervals, a line per size (in N, per D).

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
    with styled():
        rows = probes[probes["top1"].notna()].reset_index(drop=True)
        tasks = list(dict.fromkeys(rows["task"]))
        scales = [(x, by) for x, by in SCALES if x in rows and rows[x].notna().any()]
        width = DOUBLE if len(scales) > 1 else SINGLE
        figure, panels = new_figure(width, 1.75 * len(tasks) + 0.7, len(tasks), len(scales), sharey="row", sharex="col")
        places = {x: panels[k :: len(scales)] for k, (x, _) in enumerate(scales)}
        most = max(60, MAX_POINTS * 3 // len(panels))
        for x, by in scales:
            series = by if by in rows and rows[by].notna().all() else None
            labels = series_of(rows, series)[0] if series else None
            for ax, task in zip(places[x], tasks, strict=True):
                _against_scale(ax, rows[rows["task"] == task], x, series, labels, most)
            log_axis(places[x][0], "x", rows[x], None if x == "flops_train" else few_values(rows[x]), tick_label(x))
            places[x][-1].set_xlabel(axis_label(x, loss_unit(rows), names_of(rows)))
        for number, task in enumerate(tasks):
            line = panels[number * len(scales) : (number + 1) * len(scales)]
            mine = rows[rows["task"] == task]
            _level_lines(line, mine, None if levels is None else levels[levels["task"] == task])
            for ax in line:
                percent_axis(ax, label=ax is line[0])
                ax.set_title(plain(task) if ax is line[0] else "")
        _legends(figure, scales, places, rows)
    return figure


def _against_scale(ax: Axes, rows: pd.DataFrame, x: str, by: str | None, labels: pd.Series | None, most: int) -> None:
    """Points with intervals and their lines."""
    if labels is not None and by is not None:
        joined(ax, rows.dropna(subset=[x]), x, "top1", by, labels)
    ends = (rows["top1_lo95"], rows["top1_hi95"])
    scatter(ax, rows[x], rows["top1"], None if labels is None else labels[rows.index], ends=ends, size=11, most=most)


def _legends(
    figure: Figure, scales: Sequence[tuple[str, str]], places: Mapping[str, list[Axes]], rows: pd.DataFrame
) -> None:
    """What the colours are: in the panel of N images seen, in the others sizes."""
    sides = {"images_seen": "outside lower left", "params_total": "outside lower right"}
    for column in dict.fromkeys(by for _, by in scales):
        panels = [ax for x, by in scales if by == column for ax in places[x]]
        place = sides[column] if len(dict(scales)) > 1 else "outside lower center"
        shared_legend(figure, panels, short(column, names_of(rows)), 4 if column == "images_seen" else 6, place)


def _level_lines(panels: Sequence[Axes], rows: pd.DataFrame, levels: pd.DataFrame | None) -> None:
    """Chance and what else there is to compare with, named at the right; what lies far off is named at the edge."""
    known = pd.DataFrame(columns=["name", "top1"]) if levels is None else levels[["name", "top1"]]
    chance = rows["chance"].dropna() if "chance" in rows else rows["top1"][:0]
    if len(chance):
        known = pd.concat([pd.DataFrame({"name": ["chance"], "top1": chance.iloc[:1]}), known], ignore_index=True)
    values = rows[["top1", "top1_lo95", "top1_hi95"]].to_numpy(float)
    low, high = np.nanmin(values), np.nanmax(values)
    reach = REACH * max(high - low, 0.02)
    near = known[known["top1"].between(low - reach, high + reach)]
    low, high = (float(f([each, *near["top1"]])) for f, each in ((min, low), (max, high)))
    for ax in panels:
        ax.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        for (name, value), dashes in zip(near.itertuples(index=False, name=None), LEVEL_DASHES * 9, strict=False):
            ax.axhline(value, color=MUTED, linewidth=0.9, linestyle=dashes, zorder=1)
            record(ax, "level", pd.DataFrame({"series": [name], "y": [value]}))
    low, high = panels[-1].get_ylim()
    far = {name: value for name, value in known.itertuples(index=False, name=None) if not low <= value <= high}
    texts = [(f"{plain(name, 22)} {100 * value:.1f}", (value - low) / (high - low)) for name, value in known.to_numpy()]
    arrows = {True: "↑ ", False: "↓ "}
    marked = [(arrows[place > 1] + text if not 0 <= place <= 1 else text, place) for text, place in texts]
    for (text, _), at in zip(marked, spread([place for _, place in marked], 0.11), strict=True):
        panels[-1].annotate(text, (1.02, at), xycoords="axes fraction", va="center", fontsize=6, color=MUTED)
    for name, value in far.items():
        record(panels[-1], "level, beyond the axis", pd.DataFrame({"series": [name], "y": [value]}))


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1, moved as little as it takes to lie `gap` apart, in their order."""
    order = np.argsort(places, kind="stable")
    moved = np.clip(np.asarray(places, float)[order], 0, 1)
    floor, ceiling = -np.inf, 1.0
    for k in range(len(moved)):
        moved[k] = max(moved[k], floor)
        floor = moved[k] + gap
    for k in reversed(range(len(moved))):
        moved[k] = min(moved[k], ceiling)
        ceiling = moved[k] - gap
    return moved[np.argsort(order)].tolist()


def plot_loss_accuracy(
    probes: pd.DataFrame,
    correlations: Mapping[str, Iterable[Correlation]] | None = None,
    links: Mapping[str, Fit] | None = None,
) -> Figure:
    """Validation loss against probe accuracy, a panel per task, one marker per size (or images seen).

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
    with styled():
        probes = probes[probes["val_loss"].notna() & probes["top1"].notna()].reset_index(drop=True)
        tasks = list(dict.fromkeys(probes["task"]))
        figure, panels, columns = _task_panels(tasks, 2.1 if len(tasks) > 1 else 2.4)
        by = next((n for n in ("params_total", "images_seen") if n in probes and probes[n].notna().any()), None)
        labels = series_of(probes, by)[0] if by else None
        most = max(60, MAX_POINTS * 3 // max(1, len(tasks)))
        for ax, task in zip(panels, tasks, strict=True):
            mine = probes[probes["task"] == task]
            ends = (mine["top1_lo95"], mine["top1_hi95"])
            named = None if labels is None else labels[mine.index]
            scatter(ax, mine["val_loss"], mine["top1"], named, ends=ends, size=11, most=most)
            if links and task in links:
                grid = pd.DataFrame({"L": np.linspace(*links[task].ranges["L"], NUM_GRID)})
                drawn = pd.concat([grid, links[task].predict(grid)], axis=1)
                curve(ax, drawn, "L", what="link", color=MUTED, zorder=2.5)
            _loss_panel(ax, mine, (correlations or {}).get(task, ()))
        shared_legend(figure, panels, short(by) if by else "", 4 if columns == 1 else 8)
    return figure


def _task_panels(tasks: Sequence[str], height: float) -> tuple[Figure, list[Axes], int]:
    """A figure with a panel (of a height in inches) of accuracies per task, and how many stand in a row."""
    columns = max(1, min(3, len(tasks)))
    num_rows = max(1, -(-len(tasks) // columns))
    figure, panels = new_figure(SINGLE if columns == 1 else DOUBLE, height * num_rows + 0.5, num_rows, columns)
    for number, ax in enumerate(panels):
        percent_axis(ax, label=number % columns == 0)
        ax.set_visible(number < len(tasks))
    for ax, task in zip(panels, tasks, strict=False):
        ax.set_title(plain(task))
    return figure, panels[: len(tasks)], columns


def _loss_panel(ax: Axes, rows: pd.DataFrame, correlations: Iterable[Correlation]) -> None:
    ax.set_xlabel(axis_label("val_loss", loss_unit(rows)).replace("\n", " "))
    chance = rows["chance"].dropna()
    low, high = ax.get_ylim()
    if len(chance) and chance.iloc[0] > low - 0.5 * (high - low):  # the axis starts where the data are
        ax.axhline(chance.iloc[0], color=MUTED, linewidth=0.9, linestyle=":")
        record(ax, "level", pd.DataFrame({"series": ["chance"], "y": chance.iloc[:1]}))
        ax.annotate("chance", (0.99, chance.iloc[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                    color=MUTED, fontsize=6)  # fmt: skip
    words = {"pearson": "Pearson r", "spearman": "Spearman ρ"}
    told = [c for c in correlations if c.within is None and not np.isnan(c.value)]
    wheres = {True: "equal compute: ", False: "all rows: "} if any(c.partial_on for c in told) else {False: ""}
    lines = [
        f"{wheres[c.partial_on is not None]}{words[c.method]} = {c.value:.2f} [{c.low:.2f}, {c.high:.2f}]" for c in told
    ]
    lines = [line.replace("-", "−") for line in lines] + ["all at chance"] * any(c.chance is not None for c in told)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (0.02 + 0.055 * len(lines)) * (high - low))  # room for the words above the points
    text = "\n".join(lines)
    ax.text(0.98, 0.98, text, transform=ax.transAxes, ha="right", va="top", fontsize=5.5, color=INK, bbox=BOX)


BOX: dict[str, Any] = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
"""Behind text inside a plot."""


def plot_published(ours: pd.DataFrame, theirs: pd.DataFrame) -> Figure:
    """Attentive accuracy against backbone parameters on the tasks of the paper: these runs, the released AIMs, and the
    best frozen model of Table 6 as a line.

    Args:
        ours: `Comparison.tasks`: task, params_total, top1, top1_lo95, top1_hi95, best_frozen, best_frozen_top1.
        theirs: the released AIMs: task, params_total, top1.
    """
    with styled():
        tasks = list(dict.fromkeys(ours["task"]))
        figure, panels, columns = _task_panels(tasks, 2.0)
        for ax, task in zip(panels, tasks, strict=True):
            mine, aim = ours[ours["task"] == task], theirs[theirs["task"] == task].sort_values("params_total")
            scatter(ax, mine["params_total"], mine["top1"], ends=(mine["top1_lo95"], mine["top1_hi95"]), what="ours")
            scatter(ax, aim["params_total"], aim["top1"], color=SECOND, marker="s", what="AIM")
            ax.plot(aim["params_total"], aim["top1"], color=SECOND, linewidth=0.8, zorder=2)
            best = mine.iloc[0]
            ax.axhline(best["best_frozen_top1"], color=MUTED, linewidth=0.9, linestyle="--")
            record(ax, "level", pd.DataFrame({"series": [best["best_frozen"]], "y": [best["best_frozen_top1"]]}))
            log_axis(ax, "x", [*mine["params_total"], *aim["params_total"]])
            ax.set_xlabel("N: parameters")
        for name, colour, marker in (("this table", ACCENT, "o"), ("AIM, published", SECOND, "s")):
            panels[0].plot([], [], color=colour, marker=marker, markersize=3.7, linestyle="none", label=name)
        panels[0].plot([], [], color=MUTED, linestyle="--", label="best frozen model, published")
        shared_legend(figure, panels[:1], "", 2 if columns == 1 else 3)
    return figure
