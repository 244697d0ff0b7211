"""Figures of accuracy, and dots with intervals of what a change does and of correlations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.correlation import Correlation, Correlations
from aimscale.analysis.effects.result import Contrasts
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.plots import style
from aimscale.analysis.plots.scaling import CURVE, curve_of
from aimscale.analysis.plots.style import DOUBLE, INK, MARKERS, MUTED, PAPER, SINGLE, new_figure, styled
from aimscale.analysis.published import CHOSEN, LAST, Comparison, published_frame, table6
from aimscale.analysis.table.runs import Runs, Table

LINES_OF = {"params_total": "images_seen", "images_seen": "params_total", "flops_train": "params_total"}
"""Column on the horizontal axis -> the column whose values make the lines."""
TOP1 = ("top1", "top1_lo95", "top1_hi95")


@styled()
def plot_accuracy(probes: Table, levels: pd.DataFrame | None = None) -> Figure:
    """Draw accuracy against N, D and C: a row of panels per task, intervals, a line per size (in N, per D).

    Args:
        probes: rows of `probe_frame`, of one kind of probe: task, top1, its interval, and params_total, images_seen,
            flops_train as far as they are known.
        levels: what to compare with, drawn as horizontal lines: task, name, top1. Those far off the points are named
            at the panel's edge.

    Example:
        >>> probes = probe_frame(read_table("results.parquet"))
        >>> plot_accuracy(probes[probes["kind"] == "knn"])
    """
    runs = Runs(probes)
    rows = runs.frame.dropna(subset=["top1"]).reset_index(drop=True)
    tasks, words = list(dict.fromkeys(rows["task"])), style.labels_of(runs)
    scales = {x: by for x, by in LINES_OF.items() if x in rows and rows[x].notna().any()}
    width = DOUBLE if len(scales) > 1 else SINGLE
    figure, panels = new_figure(width, 1.75 * len(tasks) + 0.7, len(tasks), len(scales), sharey="row", sharex="col")
    grid = np.reshape(np.array(panels), (len(tasks), len(scales)))
    for column, (x, by) in zip(grid.T, scales.items(), strict=True):
        is_split = by in rows and rows[by].notna().all()
        rows["series"], _ = style.series_of(rows, by if is_split else None)
        for ax, task in zip(column, tasks, strict=True):
            mine = rows[(rows["task"] == task) & rows[x].notna()]
            if is_split:
                style.draw_means(ax, mine, x, "top1", by)
            style.draw_points(ax, mine, (x, *TOP1))
        style.log_axis(column[-1], "x", rows[x], x, lambda column: words(column).partition(",")[0])
    sides = ("lower left", "lower right") if len(scales) > 1 else ("lower center",)
    for by, place in zip(dict.fromkeys(scales.values()), sides, strict=False):
        mine = [ax for column, each in zip(grid.T, scales.values(), strict=True) if each == by for ax in column]
        style.legend(mine, words(by), 6 if place == "lower right" else 4, place)
    for line, task in zip(grid, tasks, strict=True):
        for ax in line:
            style.percent_axis(ax, label=ax is line[0])
        style.name_task(line, rows[rows["task"] == task], task)
        if levels is not None:
            style.draw_levels(line, levels[levels["task"] == task], loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


@styled()
def plot_loss_accuracy(
    probes: Table,
    correlations: Mapping[str, Iterable[Correlation]] | None = None,
    links: Mapping[str, Fit] | None = None,
    levels: pd.DataFrame | None = None,
) -> Figure:
    """Draw accuracy against validation loss, a panel per task, one marker per size (or images seen).

    Args:
        probes: rows of `probe_frame`: val_loss, task, top1, top1_lo95, top1_hi95, chance, and params_total or size.
        correlations: task -> its correlation coefficients, written into the panel as `correlate` orders them.
        links: task -> fitted link from loss to accuracy, drawn with its confidence band where that is at most half
            as wide as the points reach, if that is over half of the curve.
        levels: what to compare with, as for `plot_accuracy`.

    Example:
        >>> probes = probe_frame(read_table("results.parquet"))
        >>> plot_loss_accuracy(probes[probes["kind"] == "knn"])
    """
    runs = Runs(probes)
    rows = runs.frame.dropna(subset=["val_loss", "top1"]).reset_index(drop=True)
    tasks, words = list(dict.fromkeys(rows["task"])), style.labels_of(runs)
    figure, panels = _task_panels(tasks, 2.1 if len(tasks) > 1 else 2.4)
    by = next((n for n in ("params_total", "images_seen") if n in rows and rows[n].notna().any()), None)
    rows["series"], _ = style.series_of(rows, by)
    for ax, task in zip(panels, tasks, strict=True):
        mine = rows[rows["task"] == task]
        style.draw_points(ax, mine, ("val_loss", *TOP1))
        if links and task in links:
            heights = ax.get_ylim()  # those of the points: where few tell, the band may reach from chance to 100 %
            curve, ends = curve_of(links[task], "L"), ["ci_lo", "ci_hi"]
            is_known = curve["ci_hi"] - curve["ci_lo"] <= np.ptp(mine["top1"]) / 2
            is_known &= is_known.mean() > 0.5
            style.draw(ax, curve.assign(**curve[ends].where(is_known)), ("L", *CURVE), MUTED)
            ax.set_ylim(heights)
        ax.set_xlabel(words("val_loss").replace("\n", " "))
        lines = _correlation_lines((correlations or {}).get(task, ()))
        style.name_task([ax], mine, task, pad=5 + 7.5 * len(lines))
        if levels is not None:
            style.draw_levels([ax], levels[levels["task"] == task], loc="upper right")
        ax.text(0, 1.02, "\n".join(lines), transform=ax.transAxes, va="bottom", fontsize="x-small", color=INK)
    style.legend(panels, words(by) if by else "", 4 if len(tasks) < 2 else 8)
    return figure


def _task_panels(tasks: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel of accuracies per task, of a height in inches."""
    columns = min(3, len(tasks)) or 1
    num_rows = -(-len(tasks) // columns) or 1
    figure, panels = new_figure(SINGLE if columns == 1 else DOUBLE, height * num_rows + 0.5, num_rows, columns)
    for number, ax in enumerate(panels):
        style.percent_axis(ax, label=number % columns == 0)
        ax.set_visible(number < len(tasks))
    return figure, panels[: len(tasks)]


def _correlation_lines(correlations: Iterable[Correlation]) -> list[str]:
    """Write each coefficient with its interval."""
    words = {"pearson": "Pearson r", "spearman": "Spearman ρ"}
    told = [c for c in correlations if c.within is None and not np.isnan(c.value)]
    lines = []
    for c in told:
        rows = "equal compute" if c.partial_on else "all rows"
        lines.append(f"{rows}: {words[c.method]} = {c.value:.2f} [{c.low:.2f}, {c.high:.2f}]".replace("-", "−"))
    return lines + ["all at chance"] * any(c.chance is not None for c in told)


@styled()
def plot_comparison(comparison: Comparison) -> Figure:
    """Draw attentive accuracy against parameters on the paper's tasks: these runs, the released AIMs on their last six
    blocks, and the best frozen model of Table 6 as a line.

    Raises:
        AnalysisError: no run was probed on a task of the paper by its protocol.
    """
    if comparison.tasks.empty or "params_total" not in comparison.tasks:
        raise AnalysisError("No run was probed on a task of the paper by its protocol, so nothing is drawn beside AIM.")
    blocks = LAST if (comparison.tasks["blocks"] == LAST).any() else comparison.tasks["blocks"].iloc[0]
    ours = comparison.tasks[comparison.tasks["blocks"] == blocks]
    names = [f"this table{ {CHOSEN: ', chosen blocks', LAST: ', last blocks'}.get(blocks, '') }", "AIM, published"]
    aim, tasks = published_frame()[["size", "params_total"]], list(dict.fromkeys(ours["task"]))
    figure, panels = _task_panels(tasks, 2.0)
    for ax, task in zip(panels, tasks, strict=True):
        mine = ours[ours["task"] == task]
        theirs = aim.assign(top1=table6().loc[aim["size"], task].to_numpy())
        rows = pd.concat([mine, theirs], keys=names, names=["series"]).reset_index("series")
        rows["series"] = pd.Categorical(rows["series"], names)
        style.draw_points(ax, rows, ("params_total", *TOP1))
        ax.axhline(
            mine["best_frozen_top1"].iloc[0],
            color=MUTED,
            linewidth=0.9,
            linestyle="--",
            label="best frozen model, published",
        )
        style.log_axis(ax, "x", rows["params_total"], "N: parameters")
        ax.set_title(style.plain(task))
    style.legend(panels, "", 2 if len(tasks) < 2 else 3)
    return figure


@styled()
def plot_contrasts(contrasts: Contrasts, *, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw differences from a baseline with intervals: a row per measure, a marker per level.

    Losses are drawn as per cent of the baseline, accuracies in points, each unit on its own axes. A marker is filled
    where its interval excludes zero.

    Args:
        labels: words for the column, its levels, and measures by their name, such as `val_loss`.
    """
    words, drawn = labels or {}, []
    for contrast in contrasts.contrasts:
        m, scale = contrast.measure, 100 / (1 if contrast.measure.is_accuracy else contrast.baseline_mean)
        unit = "points of accuracy" if m.is_accuracy else "%"
        unit += f" ({'left' if m.lower_is_better else 'right'} is better)"
        names = {"what": words.get(m.name, m.title), "series": words.get(contrast.level, contrast.level), "unit": unit}
        ends = {"x": scale * contrast.difference, "low": scale * contrast.low, "high": scale * contrast.high}
        drawn.append({**names, **ends, "is_filled": contrast.is_significant})
    rows = pd.DataFrame(drawn)
    colours = style.palette(rows["series"].unique())
    groups = [(str(unit), group) for unit, group in rows.groupby("unit", sort=False)]
    heights = [0.45 + (0.16 + 0.17 * len(colours)) * group["what"].nunique() for _, group in groups]
    height = sum(heights) + 0.5 * len(groups) + 0.45
    figure, axes = new_figure(6.2, height, num_rows=len(groups), height_ratios=heights)
    for ax, (unit, group) in zip(axes, groups, strict=True):
        _draw_intervals(ax, group, colours)
        ax.set_xlabel(f"against {style.plain(words.get(contrasts.baseline, contrasts.baseline))}, {unit}")
    style.legend(axes, style.plain(words.get(contrasts.by, contrasts.by)), 5)
    return figure


@styled()
def plot_correlations(
    correlations: Correlations, ax: Axes | None = None, *, labels: Mapping[str, str] | None = None
) -> Figure:
    """Draw coefficients with intervals; a dot is filled where its interval excludes zero.

    Args:
        labels: words for the two columns and for tasks by their name.
    """
    words = labels or {}
    rows = pd.DataFrame(
        {
            "what": " ".join(filter(None, (words.get(c.task, c.task), c.kind, c.compared))),
            "series": c.method,
            "x": c.value,
        }
        | {"low": c.low, "high": c.high, "is_filled": c.is_significant}
        for c in correlations
        if np.isfinite(c.value)
    )
    ax = ax or new_figure(6.2, 0.9 + 0.35 * rows["what"].nunique())[1][0]
    _draw_intervals(ax, rows, {"pearson": style.cycled(0), "spearman": style.cycled(1)})
    first = correlations.correlations[0]
    x, y = (style.plain(words.get(name, name)) for name in (first.x, first.y))
    ax.set(xlim=(-1.05, 1.05), xlabel=f"correlation of {x} and {y}")
    style.legend([ax], "")
    return style.figure_of(ax)


def _draw_intervals(ax: Axes, rows: pd.DataFrame, colours: Mapping[str, Any]) -> None:
    """Draw a dot with its interval for each of the rows (what, series, x, low, high, is_filled), beside each other what
    bears one name; name them, and mark zero."""
    names = list(rows["what"].unique())
    ax.axvline(0, color=MUTED, linewidth=1)
    for number, ((series, color), marker) in enumerate(zip(colours.items(), cycle(MARKERS))):
        part = rows[rows["series"] == series]
        y = part["what"].map(names.index) + (number - (len(colours) - 1) / 2) * 0.7 / len(colours)
        reach = np.abs(part[["low", "high"]].sub(part["x"], axis=0).to_numpy().T)
        look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 6, "linestyle": "none"}
        ax.errorbar(part["x"], y, xerr=reach, elinewidth=1.8, label=style.plain(series), **look)
        is_open = ~part["is_filled"].astype(bool)
        ax.plot(part["x"][is_open], y[is_open], markerfacecolor=PAPER, zorder=3, **look)
    ax.set_yticks(range(len(names)), [style.plain(name, 60) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
