"""Figures of training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import below
from aimscale.analysis.plots.style import ACCENT, figure_of, new_figure, ordered_colours, styled

if TYPE_CHECKING:
    from aimscale.analysis.forecasts.collapse import Collapse


def plot_collapse(found: Collapse, ax: Axes | None = None) -> Figure:
    """Training curves over their ends, a line per rung; rungs that deviate are dashed and named."""
    with styled():
        if ax is None:
            _, (ax,) = new_figure()
        rungs = list(found.table["rung"])
        for rung, colour in zip(rungs, ordered_colours(len(rungs)), strict=True):
            curve = found.curves[found.curves["rung"] == rung]
            off = rung in found.deviating
            style = {"color": ACCENT, "linestyle": "--", "zorder": 3} if off else {"color": colour}
            ax.plot(curve["progress"], curve["value"], label=f"{rung}, deviates" if off else str(rung), **style)
        ax.set_xlabel("share of training")
        ax.set_ylabel("training loss / its end")
        ax.legend(**below(len(rungs)))
        return figure_of(ax)
