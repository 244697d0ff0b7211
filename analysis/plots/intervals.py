"""Dots with intervals: what a change does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import plain
from aimscale.analysis.plots.style import ACCENT, INK, MARKERS, MUTED, PAPER, new_figure, ordered_colours, styled

if TYPE_CHECKING:
    from aimscale.analysis.effects.contrasts import Contrast, Contrasts


def plot_contrasts(found: Contrasts) -> Figure:
    """Differences against the baseline with intervals: a row per measure, a marker per level; ticks are pairs of runs.

    Losses are drawn as per cent of the baseline, accuracies in points, each unit on its own axes. A marker is filled
    where its interval leaves zero out.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> table = read_table("results.parquet")
        >>> plot_contrasts(contrast(table, by="kind"))
    """
    with styled():
        levels = list(dict.fromkeys(each.level for each in found.contrasts))
        colours = dict(zip(levels, ordered_colours(len(levels)) if len(levels) > 1 else [ACCENT], strict=True))
        groups = [
            [each for each in found.contrasts if each.measure.is_accuracy == is_accuracy]
            for is_accuracy in (False, True)
        ]
        panels = [group for group in groups if group]
        heights = [0.45 + (0.16 + 0.17 * len(levels)) * len({each.measure for each in group}) for group in panels]
        height = sum(heights) + 0.5 * len(panels) + 0.45
        figure, axes = new_figure(6.2, height, num_rows=len(panels), height_ratios=heights)
        for ax, group in zip(axes, panels, strict=True):
            _contrast_panel(ax, group, found.baseline, levels, colours)
        handles = [
            mpl.lines.Line2D([], [], color=colours[level], marker=MARKERS[i % len(MARKERS)], label=plain(level))
            for i, level in enumerate(levels)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(levels)), title=plain(found.by))
        return figure


def _contrast_panel(
    ax: Axes, group: Sequence[Contrast], baseline: str, levels: Sequence[str], colours: dict[str, Any]
) -> None:
    is_accuracy = group[0].measure.is_accuracy
    measures = list(dict.fromkeys(each.measure for each in group))
    for each in group:
        scale = 100.0 if is_accuracy else 100 / each.baseline_mean
        number = levels.index(each.level)
        y = measures.index(each.measure) + (number - (len(levels) - 1) / 2) * 0.7 / len(levels)
        colour, marker = colours[each.level], MARKERS[number % len(MARKERS)]
        means = each.pairs.groupby("run_pair").mean(numeric_only=True)
        single = means["difference"] * (100.0 if is_accuracy else 100 / means["baseline_value"])
        ax.scatter(single, np.full(len(single), y), s=22, color=colour, marker="|", linewidths=1, alpha=0.55, zorder=1)
        if np.isfinite(each.low):
            ax.plot([scale * each.low, scale * each.high], [y, y], color=colour, linewidth=1.8, zorder=2)
        face = colour if each.is_significant else PAPER
        ax.scatter(scale * each.difference, y, s=36, facecolors=face, edgecolors=colour, marker=marker, zorder=3)
    ax.axvline(0, color=MUTED, linewidth=1)
    ax.set_yticks(range(len(measures)), [plain(measure.title, 60) for measure in measures])
    ax.set_ylim(len(measures) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(axis="y", visible=False)
    unit = "points of accuracy" if is_accuracy else "%"
    better = "left" if group[0].measure.lower_is_better else "right"
    ax.set_xlabel(f"against {plain(baseline)}, {unit} ({better} is better)")
