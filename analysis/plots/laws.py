"""Figures of laws and frontiers: iso-FLOP parabolas, the (N, D) surface, bootstrap clouds, forecast against actual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import axis_label, curve, legend, scatter
from aimscale.analysis.plots.style import (
    ACCENT,
    INK,
    MARKERS,
    MAX_SERIES,
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


def plot_isoflop(
    points: Sequence[tuple[float, pd.DataFrame]],
    minima: pd.DataFrame | None = None,
    *,
    loss_unit: str = "",
    names: Mapping[str, str] | None = None,
) -> Figure:
    """Iso-FLOP parabolas: loss against N at equal compute, a parabola in ln N through each.

    Args:
        points: (C, frame with columns N and loss), as `frontier.measured.isoflop_points` gives them. Of more than eight
            budgets the accepted ones are drawn, then those of most sizes; one of fewer than three sizes never is.
        minima: columns C, N and loss of the accepted minima, drawn as crosses.
        loss_unit: `table.loss_unit`.
        names: our column -> its name in a foreign file.
    """
    with styled():
        figure, (ax,) = new_figure()
        accepted = pd.DataFrame(columns=["C", "N", "loss"]) if minima is None else minima
        is_accepted = [bool(np.isclose(flops, accepted["C"].to_numpy(float), rtol=1e-6).any()) for flops, _ in points]
        order = sorted(range(len(points)), key=lambda i: (not is_accepted[i], -points[i][1]["N"].nunique()))
        drawn = [points[i] for i in sorted(order[:MAX_SERIES]) if points[i][1]["N"].nunique() > 2]
        budgets = [power_of_ten(flops) for flops, _ in drawn]
        every = pd.concat([frame.assign(budget=flops) for flops, frame in drawn], ignore_index=True)
        labels = pd.Series(pd.Categorical(every["budget"].map(power_of_ten), budgets), name="series")
        curves = []
        for budget, (_, frame) in zip(budgets, drawn, strict=True):
            grid = np.geomspace(frame["N"].min(), frame["N"].max(), 40)
            parabola = np.polyval(np.polyfit(np.log(frame["N"]), frame["loss"], 2), np.log(grid))
            curves.append(pd.DataFrame({"N": grid, "value": parabola, "series": budget}))
        lines = pd.concat(curves, ignore_index=True)
        curve(
            ax,
            lines.assign(series=pd.Categorical(lines["series"], budgets)),
            "N",
            ends=("value", "value"),
            linewidth=1.3,
        )
        scatter(ax, every["N"], every["loss"], labels, size=24)
        legend(ax, "C, FLOP")
        crosses = accepted[[bool(np.isclose(c, every["budget"], rtol=1e-6).any()) for c in accepted["C"]]]
        if len(crosses):
            ax.plot(crosses["N"], crosses["loss"], color=INK, linewidth=0, marker="x", markersize=7)
        log_axis(ax, "x", every["N"])
        log_axis(ax, "y", every["loss"])
        ax.set_xlabel(axis_label("params_total", loss_unit, names))
        ax.set_ylabel(axis_label("val_loss", loss_unit, names))
    return figure
