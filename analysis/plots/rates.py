"""Figure of tuned settings: loss against the rate with parabolas and optima, and the law of the optima."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots import parts
from aimscale.analysis.plots.scaling import CURVE, curve_of
from aimscale.analysis.plots.style import DOUBLE, INK, new_figure, styled
from aimscale.analysis.tuning.result import OPTIMUM, SETTING_WORDS, Rates

NUM_GRID = 30
"""Points of a drawn parabola."""


@styled()
def plot_rates(found: Rates, *, setting: str = "lr", labels: Mapping[str, str] | None = None) -> Figure:
    """Draw the lowest loss at every value of a setting with the parabolas and optima of cells, and the optima with
    their law beside it.

    Args:
        setting: lr or batch.
        labels: words for N, D, the setting and the loss (`val_loss`).
    """
    law = found.laws.get(setting)
    _, axes = new_figure(DOUBLE, 2.8, num_columns=2) if law else new_figure()
    lowest = found.data.sort_values("y").drop_duplicates(["cell", setting]).sort_values(["cell", setting])
    lowest = lowest.assign(N=found.table["N"].to_numpy()[lowest["cell"]])
    lowest = lowest[lowest["cell"].isin(found.tuned)]
    lowest = lowest.assign(series=parts.series_of(lowest, "N")[0])
    parts.draw_points(axes[0], lowest, (setting, "y"), "lowest loss")
    curves = pd.concat([_parabola(found, setting, number) for number in range(len(found.tuned))])
    names = lowest.drop_duplicates("N").set_index("N")["series"]
    curves = curves.assign(series=curves["N"].map(names).astype(lowest["series"].dtype))
    look: dict[str, Any] = {"linewidth": 0.8, "units": curves["cell"].to_numpy(), "linestyle": "-"}
    parts.draw(axes[0], curves, (setting, "y"), "parabola", **look)
    optima = found.table.take(found.tuned).assign(y=np.exp(found.surface.lowest))
    optima = optima[optima["found"] == OPTIMUM]
    parts.draw_points(axes[0], optima.assign(series=""), (f"{setting}_best", "y"), "optimum", INK, markers=("X",))
    words = {setting: SETTING_WORDS[setting], "val_loss": found.columns["y"]}
    words |= ({setting: found.columns[setting]} if found.names else {}) | dict(labels or {})
    if law:
        _draw_law(found, setting, optima, axes[1], words)
    x, y = (setting, lowest[setting]), ("val_loss", lowest["y"])
    return parts.finish(axes[0], x, y, lambda name: words[name], words.get("N", "N"), place="lower center")


def _parabola(found: Rates, setting: str, number: int) -> pd.DataFrame:
    """Trace the parabola of one cell along a setting, the others at their best for it."""
    i, cell, surface = found.settings.index(setting), int(found.tuned[number]), found.surface
    row = found.table.iloc[cell]
    grid = np.linspace(np.log(row[f"{setting}_lowest"]), np.log(row[f"{setting}_highest"]), NUM_GRID)
    hessian = surface.curvatures(surface.scale[[number]])[0]
    own = 1 / np.linalg.inv(hessian)[i, i]  # curvature with the others at their best
    log_loss = surface.lowest[number] + own * (grid - surface.optima[number, i]) ** 2 / 2
    return pd.DataFrame({setting: np.exp(grid), "y": np.exp(log_loss), "N": row["N"], "cell": cell})


def _draw_law(found: Rates, setting: str, optima: pd.DataFrame, ax: Axes, words: Mapping[str, str]) -> None:
    """Draw the optima with their intervals, and the law, against D for each size, or against N."""
    law = found.laws[setting]
    x = "D" if "D" in law.params or "b" in law.params else "N"
    other = "N" if x == "D" and "a" in law.params else None
    labels, values = parts.series_of(optima, other)
    lines = pd.concat(
        curve_of(law, x, optima[labels == name], **({other: value} if other else {})).assign(series=name)
        for name, value in values.items()
    )
    parts.draw(ax, lines.astype({"series": labels.dtype}), (x, *CURVE), "law")
    columns = (x, *(f"{setting}_{end}" for end in ("best", "lo", "hi")))
    parts.draw_points(ax, optima.assign(series=labels), columns, "optimum")
    parts.log_axis(ax, "x", optima[x], "images_seen" if x == "D" else "params_total", lambda _: words.get(x, x))
    ends = optima[[f"{setting}_lo", f"{setting}_hi"]]
    parts.log_axis(ax, "y", ends, setting, lambda _: f"best {words[setting]}")
