"""Figure of a recipe's gain against compute."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.effects.recipes import Recipes
from aimscale.analysis.plots import parts
from aimscale.analysis.plots.style import MUTED, cycled, figure_of, new_figure, styled


@styled()
def plot_recipes(
    found: Recipes, ax: Axes | None = None, *, color: Any = None, labels: Mapping[str, str] | None = None
) -> Figure:
    """Draw the gain in compute with its interval, dotted beyond the table's own compute.

    Args:
        ax: where to draw; None makes a figure.
        color: colour of the gain.
        labels: words for the levels, and for C on its axis.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> plot_recipes(recipes(read_table("two.csv"), by="recipe")[0])
    """
    words = labels or {}
    level, baseline = (words.get(name, name) for name in (found.level, found.baseline))
    ax, color = ax or new_figure()[1][0], cycled(0) if color is None else color
    inside, columns = found.table[~found.table["beyond"]], ("C", "gain", "low", "high")
    beyond = found.table.iloc[len(inside) - 1 :]
    parts.draw(ax, inside, columns, "gain", color, label=f"{level} against {baseline}", linestyle="-")
    parts.draw(ax, beyond, columns, "gain, beyond", color, linestyle=":")
    ax.axhline(1, color=MUTED, linewidth=0.9)
    parts.log_axis(ax, "x", found.table["C"], "flops_train", partial(parts.axis_label, labels=labels))
    parts.log_axis(ax, "y", found.table[["low", "high"]], "gain", lambda _: "gain in compute (factor)")
    parts.legend([ax], "")
    return figure_of(ax)
