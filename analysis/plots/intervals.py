"""Dots with intervals: what a change does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import plain, record, shared_legend
from aimscale.analysis.plots.style import MARKERS, MUTED, PAPER, new_figure, palette, styled

if TYPE_CHECKING:
    from aimscale.analysis.effects.result import Contrast, Contrasts


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
        _contrast_panel(ax, group, looks)
        unit = "points of accuracy" if group[0].measure.is_accuracy else "%"
        better = "left" if group[0].measure.lower_is_better else "right"
        ax.set_xlabel(f"against {plain(found.baseline)}, {unit} ({better} is better)")
    for level, (colour, marker) in looks.items():
        axes[0].plot([], [], color=colour, marker=marker, label=plain(level))
    shared_legend(figure, axes[:1], plain(found.by), 5)
    return figure


def _contrast_panel(ax: Axes, group: list[Contrast], looks: dict[str, tuple[str, str]]) -> None:
    """Draw the measures of one unit."""
    measures, levels = list(dict.fromkeys(each.measure for each in group)), list(looks)
    for each in group:
        place = (levels.index(each.level) - (len(levels) - 1) / 2) * 0.7 / len(levels)
        y = measures.index(each.measure) + place
        colour, marker = looks[each.level]
        scale = 100.0 if each.measure.is_accuracy else 100 / each.baseline_mean
        pairs = each.pairs.groupby("run_pair").mean(numeric_only=True)
        single = pairs["difference"] * (100.0 if each.measure.is_accuracy else 100 / pairs["baseline_value"])
        ax.scatter(single, np.full(len(single), y), s=22, color=colour, marker="|", linewidths=1, alpha=0.55, zorder=1)
        x, low, high = scale * each.difference, scale * each.low, scale * each.high
        ax.hlines(y, low, high, color=colour, linewidth=1.8, zorder=2)
        look: dict[str, Any] = {"facecolors": colour if each.is_significant else PAPER, "edgecolors": colour}
        ax.scatter(x, y, s=36, marker=marker, zorder=3, **look)
        drawn = pd.DataFrame({"series": [each.level], "x": [x], "y": y, "low": low, "high": high})
        record(ax, each.measure.title, drawn)
    ax.axvline(0, color=MUTED, linewidth=1)
    ax.set_yticks(range(len(measures)), [plain(measure.title, 60) for measure in measures])
    ax.set_ylim(len(measures) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
