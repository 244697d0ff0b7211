"""Compute-optimal frontiers: one approach, or all on one pair of axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import axis_label, curve, scatter
from aimscale.analysis.plots.style import (
    ACCENT,
    INK,
    MARKERS,
    SECOND,
    figure_of,
    log_axis,
    new_figure,
    power_of_ten,
    styled,
)

if TYPE_CHECKING:
    from aimscale.analysis.frontier.approaches import Approaches
    from aimscale.analysis.frontier.optimum import Frontier


def plot_frontier(frontier: Frontier, ax: Axes | None = None, *, colour: str = ACCENT, number: int = 0) -> Figure:
    """N*(C) of one approach: its optima and its line with the interval, dotted beyond the budgets used.

    Args:
        ax: where to draw; None makes a figure. Several approaches can share one.
        number: 0-based place among several, which picks marker and line style.
    """
    with styled():
        ax = ax or new_figure()[1][0]
        low, high = frontier.range
        for start, end, style in ((low, high, ("-", "--", "-.")[number % 3]), (high, 10 * high, ":")):
            label = f"approach {frontier.approach}: exponent {frontier.exponent_words()}" if end == high else None
            drawn = frontier.at(np.geomspace(start, end, 30))
            curve(ax, drawn, "C", "N", ("N_lo", "N_hi"), color=colour, linestyle=style, label=label)
        if len(frontier.pairs) <= 40:
            scatter(ax, frontier.pairs["C"], frontier.pairs["N"], color=colour, marker=MARKERS[number], size=26)
        xy = np.concatenate([np.asarray(line.get_xydata(), float) for line in ax.lines])
        log_axis(ax, "x", xy[:, 0], None, power_of_ten)
        log_axis(ax, "y", xy[:, 1])
        ax.set_xlabel(axis_label("flops_train"))
        ax.set_ylabel("N*: compute-optimal parameters")
        ax.legend(loc="upper left", handlelength=2.2)
    return figure_of(ax)


def plot_approaches(found: Approaches) -> Figure:
    """All approaches on one pair of axes: where they agree and where they do not."""
    with styled():
        figure, (ax,) = new_figure()
        for number, frontier in enumerate(found.frontiers):
            plot_frontier(frontier, ax, colour=(ACCENT, SECOND, INK)[number % 3], number=number)
    return figure
