"""Dots with intervals: what a change does, and how losses and accuracies go together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.accuracy.correlation import Correlations
from aimscale.analysis.effects.result import Contrasts
from aimscale.analysis.plots.parts import legend, plain, record
from aimscale.analysis.plots.style import MARKERS, MUTED, PAPER, cycled, figure_of, new_figure, palette, styled


@styled()
def plot_contrasts(found: Contrasts, *, labels: Mapping[str, str] | None = None) -> Figure:
    """Draw differences from a baseline with intervals: a row per measure, a marker per level.

    Losses are drawn as per cent of the baseline, accuracies in points, each unit on its own axes. A marker is filled
    where its interval excludes zero.

    Args:
        labels: words for the column, its levels, and measures by their name, such as `val_loss`.
    """
    words, drawn = labels or {}, []
    for each in found.contrasts:
        m, scale = each.measure, 100 / (1 if each.measure.is_accuracy else each.baseline_mean)
        unit = "points of accuracy" if m.is_accuracy else "%"
        unit += f" ({'left' if m.lower_is_better else 'right'} is better)"
        names = {"what": words.get(m.name, m.title), "series": words.get(each.level, each.level), "unit": unit}
        ends = {"x": scale * each.difference, "low": scale * each.low, "high": scale * each.high}
        drawn.append({**names, **ends, "is_filled": each.is_significant})
    rows = pd.DataFrame(drawn)
    colours = palette(rows["series"].unique())
    groups = [(str(unit), group) for unit, group in rows.groupby("unit", sort=False)]
    heights = [0.45 + (0.16 + 0.17 * len(colours)) * group["what"].nunique() for _, group in groups]
    height = sum(heights) + 0.5 * len(groups) + 0.45
    figure, axes = new_figure(6.2, height, num_rows=len(groups), height_ratios=heights)
    for ax, (unit, group) in zip(axes, groups, strict=True):
        _draw_intervals(ax, group, colours)
        ax.set_xlabel(f"against {plain(words.get(found.baseline, found.baseline))}, {unit}")
    legend(axes, plain(words.get(found.by, found.by)), 5)
    return figure


@styled()
def plot_correlations(found: Correlations, ax: Axes | None = None) -> Figure:
    """Draw coefficients with intervals; a dot is filled where its interval excludes zero."""
    rows = pd.DataFrame(
        {"what": " ".join(filter(None, (c.task, c.kind, c.compared))), "series": c.method, "x": c.value}
        | {"low": c.low, "high": c.high, "is_filled": c.is_significant}
        for c in found
        if np.isfinite(c.value)
    )
    ax = ax or new_figure(6.2, 0.9 + 0.35 * rows["what"].nunique())[1][0]
    _draw_intervals(ax, rows, {"pearson": cycled(0), "spearman": cycled(1)})
    first = found.correlations[0]
    ax.set(xlim=(-1.05, 1.05), xlabel=f"correlation of {plain(first.x)} and {plain(first.y)}")
    legend([ax], "")
    return figure_of(ax)


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
        ax.errorbar(part["x"], y, xerr=reach, elinewidth=1.8, label=plain(series), **look)
        is_open = ~part["is_filled"].astype(bool)
        ax.plot(part["x"][is_open], y[is_open], markerfacecolor=PAPER, zorder=3, **look)
        record(ax, part["what"], part.assign(y=y))
    ax.set_yticks(range(len(names)), [plain(name, 60) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
