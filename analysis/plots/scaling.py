"""Scaling figures: measurements and the fitted law with its interval, curves of loss over compute, frontiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import axis_label, curve, legend, lines, scatter, series_of, tick_label
from aimscale.analysis.plots.style import ACCENT, INK, MARKERS, SECOND, figure_of, log_axis, new_figure, styled
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.read import loss_unit
from aimscale.analysis.words import power_of_ten

if TYPE_CHECKING:
    from aimscale.analysis.fitting.result import Fit
    from aimscale.analysis.optimum.approaches import Approaches


@styled()
def plot_fit(fit: Fit, ax: Axes | None = None, *, x: str | None = None) -> Figure:
    """Draw measurements, the fitted law and its confidence band against one variable.

    A law of two variables gives one line for each of up to eight values of the other one.

    Args:
        ax: where to draw; None makes a figure.
        x: the law's variable on the horizontal axis; None takes the first.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> table = read_table("results.parquet")
        >>> plot_fit(fit(table, "chinchilla"), x="N")
    """
    ax = ax or new_figure()[1][0]
    x = x or fit.law.variables[0]
    other, data = next((v for v in fit.law.variables if v != x), None), fit.data
    if other is None:
        curve(ax, _curve_of(fit, x, data), x, color=ACCENT)
        scatter(ax, data, x, "y")
    else:
        labels, values = series_of(data, other)
        drawn = [_curve_of(fit, x, data[labels == name], {other: value}) for name, value in values.items()]
        series = pd.Categorical(np.repeat(list(values), NUM_GRID), list(values))
        curve(ax, pd.concat(drawn, ignore_index=True).assign(series=series), x)
        scatter(ax, data, x, "y", labels)
        legend(ax, axis_label(fit.columns[other], fit.loss_unit, fit.names))
    if x != "L":  # a link from loss to accuracy reads best on plain axes
        log_axis(ax, "x", data[x], tick_label(fit.columns[x]))
        log_axis(ax, "y", [*data["y"], *data["fitted"]])
    ax.set_xlabel(axis_label(fit.columns[x], fit.loss_unit, fit.names).replace("\n", " "))
    ax.set_ylabel(axis_label(fit.columns["y"], fit.loss_unit, fit.names))
    return figure_of(ax)


NUM_GRID = 40
"""Points of a drawn curve."""


def _curve_of(fit: Fit, x: str, data: pd.DataFrame, fixed: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Predict the law over the range of some points, at fixed values of its other variables."""
    low, high = float(data[x].min()), float(data[x].max())
    if low == high:
        low, high = fit.ranges[x]
    grid = pd.DataFrame({x: np.geomspace(low, high, NUM_GRID), **(fixed or {})})
    known = list(grid)
    for name in fit.law.variables:  # a third variable, such as C, follows the two as it does in the table
        if name not in known:
            design, at = (np.column_stack([np.ones(len(rows)), np.log(rows[known])]) for rows in (fit.data, grid))
            grid[name] = np.exp(at @ np.linalg.lstsq(design, np.log(fit.data[name]), rcond=None)[0])
    return pd.concat([grid, fit.predict(grid)], axis=1)


@styled()
def plot_points(
    frame: pd.DataFrame,
    x: str,
    y: str = "val_loss",
    by: str | None = None,
    ax: Axes | None = None,
    *,
    envelope: Fit | None = None,
) -> Figure:
    """Draw measurements, with a line through those of each value of another column.

    Args:
        by: the other column, such as the size's parameters.
        envelope: a law of `x` alone to draw along the best of them.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> table = read_table("results.parquet")
        >>> plot_points(table, "flops_train", by="params_total")
    """
    ax = ax or new_figure()[1][0]
    unit, names = loss_unit(frame), names_of(frame)
    rows = frame.dropna(subset=[x, y, *([by] if by else [])]).reset_index(drop=True)
    labels = series_of(rows, by)[0] if by else None
    if labels is not None and by:
        lines(ax, rows, x, y, by, labels)
    if envelope is not None:
        v = envelope.law.variables[0]
        look: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1.3, "zorder": 2.5}
        drawn = _curve_of(envelope, v, envelope.data)
        curve(ax, drawn, v, what="law of the envelope", label="envelope", **look)
    scatter(ax, rows, x, y, labels)
    log_axis(ax, "x", rows[x], tick_label(x))
    log_axis(ax, "y", rows[y])
    ax.set(xlabel=axis_label(x, unit, names), ylabel=axis_label(y, unit, names))
    if by:
        legend(ax, axis_label(by, unit, names))
    return figure_of(ax)


@styled()
def plot_approaches(found: Approaches) -> Figure:
    """Draw N*(C) of all approaches: their optima and lines with intervals, dotted beyond the budgets used.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> table = read_table("results.parquet")
        >>> plot_approaches(frontier(table))
    """
    figure, (ax,) = new_figure()
    looks = zip((ACCENT, SECOND, INK), ("-", "--", "-."), MARKERS, strict=False)
    for frontier, (colour, dashes, marker) in zip(found.frontiers, looks, strict=False):
        name, (low, high) = f"approach {frontier.approach}", frontier.range
        label = f"{name}: exponent {frontier.exponent_words()}"
        inside, beyond = (frontier.at(np.geomspace(*ends, 12)) for ends in ((low, high), (high, 10 * high)))
        ends = ("N_lo", "N_hi")
        curve(ax, inside, "C", "N", ends, what=name, color=colour, linestyle=dashes, label=label)
        curve(ax, beyond, "C", "N", ends, what=f"{name}, beyond", color=colour, linestyle=":")
        if len(frontier.pairs) <= NUM_GRID:
            scatter(ax, frontier.pairs, "C", "N", color=colour, marker=marker, what=f"{name}, optima")
    xy = np.concatenate([np.asarray(line.get_xydata(), float) for line in ax.lines])
    log_axis(ax, "x", xy[:, 0], power_of_ten)
    log_axis(ax, "y", xy[:, 1])
    ax.set(xlabel=axis_label("flops_train"), ylabel="N*: compute-optimal\nparameters")
    legend(ax, "", columns=1)
    return figure
