"""Figure of a recipe's gain against compute."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.effects.recipes import Recipes
from aimscale.analysis.plots import parts
from aimscale.analysis.plots.style import MUTED, cycled, figure_of, new_figure, styled


@styled()
def plot_recipes(found: Recipes, ax: Axes | None = None, *, color: Any = None) -> Figure:
    """Draw the gain in compute with its interval, dotted beyond the table's own compute.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> plot_recipes(recipes(read_table("two.csv"), by="recipe")[0])
    """
    ax, color = ax or new_figure()[1][0], cycled(0) if color is None else color
    inside, columns = found.table[~found.table["beyond"]], ("C", "gain", "low", "high")
    beyond = found.table.iloc[len(inside) - 1 :]
    parts.draw(ax, inside, columns, "gain", color, label=f"{found.level} against {found.baseline}", linestyle="-")
    parts.draw(ax, beyond, columns, "gain, beyond", color, linestyle=":")
    ax.axhline(1, color=MUTED, linewidth=0.9)
    parts.log_axis(ax, "x", found.table["C"], "flops_train")
    parts.log_axis(ax, "y", found.table[["low", "high"]], "gain", lambda _: "gain in compute (factor)")
    parts.legend([ax], "")
    return figure_of(ax)
