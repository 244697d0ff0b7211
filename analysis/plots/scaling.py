"""Scaling figures: measurements and the fitted law with its interval, loss over compute, frontiers, forecasts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.forecast import Forecast
from aimscale.analysis.optimum.approaches import Approaches
from aimscale.analysis.plots.parts import axis_label, curve, legend, lines, percent_axis, scatter, series_of, tick_label
from aimscale.analysis.plots.style import INK, MUTED, cycled, figure_of, log_axis, new_figure, styled
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.read import loss_unit
from aimscale.analysis.words import power_of_ten

NUM_GRID = 40
"""Points of a drawn curve."""


@styled()
def plot_fit(
    fit: Fit, ax: Axes | None = None, *, x: str | None = None, label: str = "", color: Any = None, **look: Any
) -> Figure:
    """Draw measurements, the fitted law and its confidence band against one variable.

    A law of two variables gives one line for each of up to eight values of the other one, each in a colour of its own.
    Under a label, in a colour, or on axes that hold something, the law has one colour, by default the cycle's next.

    Args:
        ax: where to draw; None makes a figure.
        x: the law's variable on the horizontal axis; None takes the first.
        label: name in the legend; by default the law's, where it has one colour.
        color: one colour for all.
        look: options of the lines, such as `linewidth`.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> table = read_table("results.parquet")
        >>> plot_fit(fit(table, "chinchilla"), x="N")
    """
    is_one = bool(label) or color is not None or (ax is not None and ax.has_data())
    ax = ax or new_figure()[1][0]
    x = x or fit.law.variables[0]
    other, data = next((v for v in fit.law.variables if v != x), None), fit.data
    if is_one:  # an empty line takes the colour and stands in the legend
        own = {} if color is None else {"color": color}
        color = ax.plot([], [], label=label or fit.law.name, **own)[0].get_color()
    title = ""
    if other is None:
        curve(ax, _curve_of(fit, x, data), x, color=color, **look)
        scatter(ax, data, x, "y", color=color)
    else:
        labels, values = series_of(data, other)
        drawn = [_curve_of(fit, x, data[labels == name], {other: value}) for name, value in values.items()]
        series = pd.Categorical(np.repeat(list(values), NUM_GRID), list(values))
        curve(ax, pd.concat(drawn, ignore_index=True).assign(series=series), x, color=color, **look)
        scatter(ax, data, x, "y", labels, color=color)
        title = "" if is_one else axis_label(fit.columns[other], fit.loss_unit, fit.names)
    legend(ax, title)
    if x != "L":  # a link from loss to accuracy reads best on plain axes
        log_axis(ax, "x", data[x], tick_label(fit.columns[x]))
        log_axis(ax, "y", [*data["y"], *data["fitted"]])
    ax.set_xlabel(axis_label(fit.columns[x], fit.loss_unit, fit.names).replace("\n", " "))
    ax.set_ylabel(axis_label(fit.columns["y"], fit.loss_unit, fit.names))
    return figure_of(ax)


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
        curve(ax, _curve_of(envelope, v, envelope.data), v, what="law of the envelope", label="envelope", **look)
    scatter(ax, rows, x, y, labels)
    log_axis(ax, "x", rows[x], tick_label(x))
    log_axis(ax, "y", rows[y])
    ax.set(xlabel=axis_label(x, unit, names), ylabel=axis_label(y, unit, names))
    legend(ax, axis_label(by, unit, names) if by else "")
    return figure_of(ax)


@styled()
def plot_approaches(found: Approaches, ax: Axes | None = None) -> Figure:
    """Draw N*(C) of all approaches: their optima and lines with intervals, dotted beyond the budgets used.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> table = read_table("results.parquet")
        >>> plot_approaches(frontier(table))
    """
    ax, ends, drawn = ax or new_figure()[1][0], ("N_lo", "N_hi"), []
    for number, frontier in enumerate(found.frontiers):
        name, (low, high), color = f"approach {frontier.approach}", frontier.range, cycled(number)
        label = f"{name}: exponent {frontier.exponent_words()}"
        inside, beyond = (frontier.at(np.geomspace(*span, 12)) for span in ((low, high), (high, 10 * high)))
        curve(ax, inside, "C", "N", ends, name, color=color, label=label, linestyle=("-", "--", "-.")[number])
        curve(ax, beyond, "C", "N", ends, f"{name}, beyond", color=color, linestyle=":")
        drawn += [inside, beyond]
        if 0 < len(frontier.pairs) <= NUM_GRID:
            marks = {"what": f"{name}, optima", "color": color, "markers": ["os^"[number]]}
            scatter(ax, frontier.pairs, "C", "N", **marks)
            drawn.append(frontier.pairs)
    log_axis(ax, "x", pd.concat(drawn)["C"], power_of_ten)
    log_axis(ax, "y", pd.concat(drawn)["N"])
    ax.set(xlabel=axis_label("flops_train"), ylabel="N*: compute-optimal\nparameters")
    legend(ax, "", columns=1)
    return figure_of(ax)


@styled()
def plot_forecast(found: Forecast, ax: Axes | None = None, *, y: str | None = None, color: Any = None) -> Figure:
    """Draw the loss against compute: the table, the forecast from its largest run to the scales, with the bands of the
    curve and of one run, and the range of the single laws between dotted lines.

    Args:
        ax: where to draw; None makes a figure.
        y: quantity, such as TASK:KIND; None takes the loss.
        color: colour of the forecast.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> plot_forecast(forecast(read_table("results.parquet"), {"N": 7e9, "D": 2e9}))
    """
    ax, color = ax or new_figure()[1][0], cycled(0) if color is None else color
    y = y or next(iter(found.forecasters))
    by = found.forecasters[y]
    measured = pd.DataFrame({"C": by.points.compute, "y": 1 - by.points.y if by.points.is_accuracy else by.points.y})
    largest = int(np.argmax(by.points.compute))
    stops = pd.DataFrame([{v: values[largest] for v, values in by.points.x.items()}, *found.scales])
    stops = stops[list(found.scales[0])].interpolate()
    steps = np.linspace(0, len(stops) - 1, NUM_GRID)
    at = {str(v): np.exp(np.interp(steps, np.arange(len(stops)), np.log(stops[v]))) for v in stops}
    path = by.predict(at).assign(C=_compute(by, at))
    scatter(ax, measured, "C", "y", color=MUTED)
    curve(ax, path, "C", ends=("pi_lo", "pi_hi"), what="forecast of one run", color=color, label="forecast")
    curve(ax, path, "C", ends=("ci_lo", "ci_hi"), what="forecast", color=color, linestyle="-")
    for end in ("rival_lo", "rival_hi"):
        label = "single laws" if end == "rival_lo" else ""
        look = {"color": MUTED, "linestyle": ":", "label": label, "what": "single laws"}
        curve(ax, path.assign(low=np.nan, high=np.nan), "C", end, ("low", "high"), **look)
    ends = found.table[found.table["quantity"] == y]
    ends = ends.assign(C=_compute(by, {v: ends[v].to_numpy(float) for v in found.scales[0]}))
    scatter(ax, ends, "C", "value", ends=("pi_lo", "pi_hi"), what="forecast, 95 %", color=color, markers=["D"])
    log_axis(ax, "x", [*measured["C"], *path["C"]], power_of_ten)
    if by.points.is_accuracy:
        percent_axis(ax)
    else:
        log_axis(ax, "y", [*measured["y"], *path["value"], *ends["pi_lo"]])
        ax.set_ylabel(axis_label(y, "", found.names))
    ax.set(xlabel=axis_label("flops_train"), title=y if by.points.is_accuracy else "")
    legend(ax, "")
    return figure_of(ax)


def _compute(by: Any, at: Mapping[str, Any]) -> Any:
    """Count compute at scales, as the points' own is counted."""
    place = by.points.place(at)
    return place["C"] if "C" in place else np.prod([place[v] for v in by.points.x], axis=0)
