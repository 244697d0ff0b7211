"""Dots with intervals: what a change does, and how losses and accuracies go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.accuracy.result import Correlations
from aimscale.analysis.effects.result import Contrasts
from aimscale.analysis.plots.parts import legend, plain, record
from aimscale.analysis.plots.style import MARKERS, MUTED, PAPER, cycled, figure_of, new_figure, palette, styled


@styled()
def plot_contrasts(found: Contrasts) -> Figure:
    """Draw differences from a baseline with intervals: a row per measure, a marker per level, a tick per pair of runs.

    Losses are drawn as per cent of the baseline, accuracies in points, each unit on its own axes. A marker is filled
    where its interval excludes zero.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> plot_contrasts(contrast(read_table("results.parquet"), by="kind"))
    """
    levels = list(dict.fromkeys(each.level for each in found.contrasts))
    looks = dict(zip(levels, zip(palette(levels).values(), MARKERS * len(levels), strict=False), strict=True))
    groups = [[each for each in found.contrasts if each.measure.is_accuracy == kind] for kind in (False, True)]
    groups = [group for group in groups if group]
    heights = [0.45 + (0.16 + 0.17 * len(levels)) * len({each.measure for each in group}) for group in groups]
    height = sum(heights) + 0.5 * len(groups) + 0.45
    figure, axes = new_figure(6.2, height, num_rows=len(groups), height_ratios=heights)
    for ax, group in zip(axes, groups, strict=True):
        measures, rows = list(dict.fromkeys(each.measure for each in group)), []
        for each in group:
            y = measures.index(each.measure) + (levels.index(each.level) - (len(levels) - 1) / 2) * 0.7 / len(levels)
            pairs = each.pairs.groupby("run_pair").mean(numeric_only=True)
            ticks = 100 * pairs["difference"] / (1 if each.measure.is_accuracy else pairs["baseline_value"])
            scale = 100 / (1 if each.measure.is_accuracy else each.baseline_mean)
            look: dict[str, Any] = {"marker": "|", "markersize": 5, "linestyle": "none", "alpha": 0.55, "zorder": 1}
            ax.plot(ticks, np.full(len(ticks), y), color=looks[each.level][0], **look)
            ends = (scale * value for value in (each.difference, each.low, each.high))
            rows.append((each.measure.title, each.level, y, *ends, each.is_significant))
        _draw_intervals(ax, rows, [measure.title for measure in measures], looks)
        unit = "points of accuracy" if group[0].measure.is_accuracy else "%"
        better = "left" if group[0].measure.lower_is_better else "right"
        ax.set_xlabel(f"against {plain(found.baseline)}, {unit} ({better} is better)")
    for level, (color, marker) in looks.items():
        axes[0].plot([], [], color=color, marker=marker, label=plain(level))
    legend(axes, plain(found.by), 5)
    return figure


def _draw_intervals(
    ax: Axes, rows: Sequence[tuple[Any, ...]], names: Sequence[str], looks: Mapping[str, tuple[Any, str]]
) -> None:
    """Draw a dot with its interval for each (what, series, y, x, low, high, is_filled); name the rows, mark zero."""
    ax.axvline(0, color=MUTED, linewidth=1)
    for what, series, y, x, low, high, is_filled in rows:
        color, marker = looks[series]
        ax.hlines(y, low, high, color=color, linewidth=1.8, zorder=2)
        ax.plot(x, y, marker, color=color, markersize=6, markerfacecolor=color if is_filled else PAPER, zorder=3)
        record(ax, what, pd.DataFrame([{"series": series, "x": x, "y": y, "low": low, "high": high}]))
    ax.set_yticks(range(len(names)), [plain(name, 60) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


@styled()
def plot_correlations(found: Correlations, ax: Axes | None = None) -> Figure:
    """Draw coefficients with intervals, a row each; a dot is filled where its interval excludes zero.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> plot_correlations(correlate(read_table("results.parquet")))
    """
    known = [each for each in found if np.isfinite(each.value)]
    ax = ax or new_figure(6.2, 0.7 + 0.22 * len(known))[1][0]
    names = [" ".join(filter(None, (each.task, each.kind, each.compared, each.method))) for each in known]
    looks = {"pearson": (cycled(0), MARKERS[0]), "spearman": (cycled(1), MARKERS[1])}
    rows = [(c.compared, c.method, y, c.value, c.low, c.high, c.is_significant) for y, c in enumerate(known)]
    _draw_intervals(ax, rows, names, looks)
    first = found.correlations[0]
    ax.set(xlim=(-1.05, 1.05), xlabel=f"correlation of {plain(first.x)} and {plain(first.y)}")
    return figure_of(ax)
