"""Dots with intervals: what a change does, and how losses and accuracies go together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.accuracy.result import Correlations
from aimscale.analysis.effects.result import Contrast, Contrasts
from aimscale.analysis.plots.parts import plain, record, shared_legend
from aimscale.analysis.plots.style import MARKERS, MUTED, PAPER, cycled, figure_of, new_figure, palette, styled


@styled()
def plot_contrasts(found: Contrasts) -> Figure:
    """Draw differences from a baseline with intervals: a row per measure, a marker per level, a tick per pair of runs.

    Losses are drawn as per cent of the baseline, accuracies in points, each unit on its own axes. A marker is filled
    where its interval leaves zero out.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> table = read_table("results.parquet")
        >>> plot_contrasts(contrast(table, by="kind"))
    """
    levels = list(dict.fromkeys(each.level for each in found.contrasts))
    looks = dict(zip(levels, zip(palette(levels).values(), MARKERS * len(levels), strict=False), strict=True))
    groups = [[each for each in found.contrasts if each.measure.is_accuracy == kind] for kind in (False, True)]
    groups = [group for group in groups if group]
    heights = [0.45 + (0.16 + 0.17 * len(levels)) * len({each.measure for each in group}) for group in groups]
    height = sum(heights) + 0.5 * len(groups) + 0.45
    figure, axes = new_figure(6.2, height, num_rows=len(groups), height_ratios=heights)
    for ax, group in zip(axes, groups, strict=True):
        measures = list(dict.fromkeys(each.measure for each in group))
        for each in group:
            place = (levels.index(each.level) - (len(levels) - 1) / 2) * 0.7 / len(levels)
            _contrast(ax, each, measures.index(each.measure) + place, *looks[each.level])
        _rows(ax, [plain(measure.title, 60) for measure in measures])
        unit = "points of accuracy" if group[0].measure.is_accuracy else "%"
        better = "left" if group[0].measure.lower_is_better else "right"
        ax.set_xlabel(f"against {plain(found.baseline)}, {unit} ({better} is better)")
    for level, (color, marker) in looks.items():
        axes[0].plot([], [], color=color, marker=marker, label=plain(level))
    shared_legend(figure, axes[:1], plain(found.by), 5)
    return figure


def _contrast(ax: Axes, each: Contrast, y: float, color: Any, marker: str) -> None:
    """Draw one level in one measure, and a tick for each of its pairs of runs."""
    scale = 100.0 if each.measure.is_accuracy else 100 / each.baseline_mean
    pairs = each.pairs.groupby("run_pair").mean(numeric_only=True)
    single = pairs["difference"] * (100.0 if each.measure.is_accuracy else 100 / pairs["baseline_value"])
    ax.scatter(single, np.full(len(single), y), s=22, color=color, marker="|", linewidths=1, alpha=0.55, zorder=1)
    ends = {"x": scale * each.difference, "low": scale * each.low, "high": scale * each.high}
    _interval(ax, each.measure.title, each.level, y, ends, color, marker, each.is_significant)


def _interval(
    ax: Axes, what: str, series: str, y: float, ends: dict[str, float], color: Any, marker: str, is_filled: bool
) -> None:
    """Draw a dot with its interval, filled or not."""
    ax.hlines(y, ends["low"], ends["high"], color=color, linewidth=1.8, zorder=2)
    look = {"facecolor": color if is_filled else PAPER, "edgecolor": color, "marker": marker, "legend": False}
    sns.scatterplot(x=[ends["x"]], y=[y], s=36, linewidth=1, zorder=3, ax=ax, **look)
    record(ax, what, pd.DataFrame([{"series": series, "y": y, **ends}]))


def _rows(ax: Axes, names: list[str]) -> None:
    """Name the rows, and mark zero."""
    ax.axvline(0, color=MUTED, linewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


@styled()
def plot_correlations(found: Correlations, ax: Axes | None = None) -> Figure:
    """Draw coefficients with intervals, a row each; a dot is filled where its interval leaves zero out.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> plot_correlations(correlate(read_table("results.parquet")))
    """
    known = [each for each in found if np.isfinite(each.value)]
    ax = ax or new_figure(6.2, 0.7 + 0.22 * len(known))[1][0]
    names = []
    for y, each in enumerate(known):
        methods = list(dict.fromkeys(c.method for c in known))
        color, marker = (options[methods.index(each.method)] for options in ([cycled(0), cycled(1)], MARKERS))
        names.append(plain(" ".join(filter(None, (each.task, each.kind, each.compared, each.method))), 60))
        ends = {"x": each.value, "low": each.low, "high": each.high}
        _interval(ax, each.compared, each.method, y, ends, color, marker, each.is_significant)
    _rows(ax, names)
    ax.set(xlim=(-1.05, 1.05), xlabel=f"correlation of {plain(found.correlations[0].x)} and {plain(known[0].y)}")
    return figure_of(ax)
