"""Scaling figures: measurements and the fitted law with its interval, frontiers, forecasts, gains, best rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.effects.recipes import Recipes
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.held_out import HeldOut
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.forecast import Forecast
from aimscale.analysis.forecasts.forecaster import Forecaster
from aimscale.analysis.forecasts.trajectory import Trajectory
from aimscale.analysis.optimum.approaches import Approaches
from aimscale.analysis.plots import style
from aimscale.analysis.plots.style import DOUBLE, INK, MARKERS, MUTED, cycled, figure_of, new_figure, styled
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.tuning.result import OPTIMUM, SETTING_WORDS, Rates

Labels = Mapping[str, str] | None
NUM_GRID = 40
"""Points of a drawn curve."""
CURVE, ONE_RUN = ("value", "ci_lo", "ci_hi"), ("value", "pi_lo", "pi_hi")
"""Columns of a prediction with the interval of the curve, and of one run."""


@styled()
def plot_fit(
    fit: Fit,
    ax: Axes | None = None,
    *,
    x: str | None = None,
    label: str = "",
    color: Any = None,
    labels: Labels = None,
    kind: str = "law",
    **look: Any,
) -> Figure:
    """Draw measurements, the fitted law and its confidence band against one variable.

    A law of two variables gives one line for each of up to eight values of the other one, each in a colour of its own.
    Under a label, in a colour, or on axes that hold something, the law has one colour, by default the cycle's next.

    Args:
        ax: where to draw; None makes a figure.
        x: the law's variable on the horizontal axis; None takes the first.
        label: name in the legend; by default the law's, where it has one colour.
        color: one colour for all.
        labels: variable or column -> words on its axis and above the legend.
        kind: "law", or "residuals" for what the law leaves of every measurement.
        look: options of the lines, such as `linewidth`.

    Raises:
        AnalysisError: the law has no variable `x`, or there is no such kind.
    """
    if kind not in ("law", "residuals"):
        raise AnalysisError(f"A fit draws kind='law' or kind='residuals', not {kind!r}.")
    seen = (ax.get_xlim(), ax.get_ylim()) if ax is not None and ax.has_data() else ()
    is_one = bool(label) or color is not None or bool(seen)
    ax = ax or new_figure()[1][0]
    x = x or fit.law.variables[0]
    if x not in fit.law.variables:
        named = ", ".join(fit.law.variables)
        raise AnalysisError(f"The law {fit.law.name!r} has no variable {x!r}; give x one of {named}.")
    if is_one:  # an empty line takes the colour and stands in the legend
        chosen = {} if color is None else {"color": color}
        color = ax.plot([], [], label=label or fit.law.name, **chosen)[0].get_color()
    data, other = fit.data, next((v for v in fit.law.variables if v != x), None)
    series, values = style.series_of(data, other)
    if kind == "residuals":
        return _residuals(fit, ax, x, data.assign(series=series), other, color, labels or {})
    drawn = pd.concat(
        curve_of(fit, x, data[series == name], **({other: value} if other else {})).assign(series=name)
        for name, value in values.items()
    )
    drawn = drawn.astype({"series": series.dtype})
    style.draw(ax, drawn, (x, *CURVE), color, **look)
    style.draw_points(ax, data.assign(series=series), (x, "y"), color)
    letters = {fit.columns.get(name, name): text for name, text in (labels or {}).items()}
    words = partial(style.axis_label, loss_unit=fit.loss_unit, names=fit.names, labels=letters)
    title = words(fit.columns[other]) if other and not is_one else ""
    if x != "L":
        x_seen, y_seen = seen or ((), ())
        y = (fit.columns["y"], [*data["y"], *data["fitted"], *y_seen])
        return style.finish(ax, (fit.columns[x], [*data[x], *x_seen]), y, words, title)
    # a link from loss to accuracy reads best on plain axes
    ax.set(xlabel=words(fit.columns["L"]).replace("\n", " "), ylabel=words(fit.columns["y"]))
    style.legend([ax], title)
    return figure_of(ax)


def _residuals(
    fit: Fit, ax: Axes, x: str, data: pd.DataFrame, other: str | None, color: Any, labels: Mapping[str, str]
) -> Figure:
    """Draw measurement / law - 1 in per cent against a variable, so that a misfit of one region shows."""
    percents = 100 * (data["y"] / data["fitted"] - 1)
    style.draw_points(ax, data.assign(percents=percents), (x, "percents"), color)
    ax.axhline(0, color=MUTED, linewidth=0.9, zorder=1)
    words = partial(style.axis_label, loss_unit="", names=fit.names, labels=labels)
    style.log_axis(ax, "x", data[x], fit.columns[x], words)
    ax.set(ylabel=f"{words(fit.columns['y'])}\nover the law (%)")
    style.legend([ax], words(fit.columns[other]) if other and color is None else "")
    return figure_of(ax)


def curve_of(fit: Fit, x: str, data: pd.DataFrame | None = None, **fixed: float) -> pd.DataFrame:
    """Predict the law over the range of some or all of its points, at fixed values of its other variables."""
    low, high = fit.ranges[x] if data is None or data[x].min() == data[x].max() else (data[x].min(), data[x].max())
    grid = pd.DataFrame({x: np.geomspace(low, high, NUM_GRID), **fixed})
    variables = list(grid)
    for name in fit.law.variables:  # a third variable, such as C, follows the two as it does in the table
        if name not in variables:
            design, at = (np.column_stack([np.ones(len(rows)), np.log(rows[variables])]) for rows in (fit.data, grid))
            grid[name] = np.exp(at @ np.linalg.lstsq(design, np.log(fit.data[name]), rcond=None)[0])
    return pd.concat([grid, fit.predict(grid)], axis=1)


@styled()
def plot_held_out(test: HeldOut, ax: Axes | None = None) -> Figure:
    """Draw predictions of the points that were held out, with their intervals, and those of a straight line, against
    what was measured; on the diagonal they agree."""
    ax, rows = ax or new_figure()[1][0], test.predictions
    ax.axline((rows["measured"].iloc[0],) * 2, slope=1, color=MUTED, linewidth=0.9)
    law = rows.assign(series="law", value=rows["predicted"])
    line = rows.assign(series="straight line in log-log", value=rows["naive"], pi_lo=np.nan, pi_hi=np.nan)
    style.draw_points(ax, pd.concat([law, line]), ("measured", "value", "pi_lo", "pi_hi"))
    ax.set(xlabel="measured", ylabel=f"predicted without the largest {test.variable}")
    style.legend([ax], "")
    return figure_of(ax)


@styled()
def plot_points(
    table: Table,
    x: str,
    y: str = "val_loss",
    by: str | None = None,
    ax: Axes | None = None,
    *,
    curves: pd.DataFrame | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Labels = None,
) -> Figure:
    """Draw measurements, with a line through those of each value of another column, or the curves of their runs.

    Args:
        x: the column on the horizontal axis, or its letter, such as N.
        by: the other column, such as the size's parameters.
        curves: points during training of the same runs, with the same columns and `run_id`: a line per run.
        labels: column or letter -> words on its axis and above the legend.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Raises:
        AnalysisError: the table has no such column.

    Example:
        >>> plot_points(read_table("results.parquet"), "flops_train", by="params_total")
    """
    runs = Runs(table, columns)
    x, y, by = runs.column(x), runs.column(y), by and runs.column(by)
    if absent := [name for name in (x, y, by) if name and name not in runs]:
        raise runs.no_column(absent[0])
    frame, ax, words = runs.frame, ax or new_figure()[1][0], style.labels_of(runs, labels)
    both = pd.concat([frame, curves], ignore_index=True)
    both = both.assign(is_during=np.arange(len(both)) >= len(frame)).dropna(subset=[x, y, *([by] if by else [])])
    both = both.assign(series=style.series_of(both, by)[0])
    rows = both[~both["is_during"]]
    if curves is not None:
        style.draw_means(ax, both[both["is_during"]].sort_values(x), x, y, "run_id")
    elif by:
        style.draw_means(ax, rows, x, y, by)
    style.draw_points(ax, rows, (x, y))
    return style.finish(ax, (x, both[x]), (y, both[y]), words, words(by) if by else "")


@styled()
def plot_trajectory(result: Trajectory, ax: Axes | None = None, *, measured: pd.DataFrame | None = None) -> Figure:
    """Draw the forecast of a run's losses during training with its 95 % interval, and the runs that it follows from.

    Args:
        ax: where to draw; None makes a figure.
        measured: points of runs of that size, as `trajectory` takes them, to draw beside the forecast.
    """
    ax, x, words = ax or new_figure()[1][0], "images_seen", style.labels_of(result.curves)
    during, budgets = (result.table[result.table["is_budget"] == each] for each in (False, True))
    smaller = result.curves[~result.curves["is_budget"]].sort_values(x)
    smaller = smaller.assign(series=style.series_of(smaller, "params_total")[0])
    columns, color = (x, "loss", "low", "high"), cycled(0)
    if len(during):
        style.draw_means(ax, smaller, x, "val_loss", "run_id", color=MUTED)
        style.draw(ax, during, columns, color, label="forecast, 95 % of one run")
    style.draw_points(ax, budgets, columns, color, markers=MARKERS[3:])
    if measured is not None:
        names = {False: "measured", True: "measured budget"}
        rows = measured.assign(series=measured["is_budget"].map(names)).sort_values(x)
        style.draw_points(ax, rows, (x, "val_loss"), INK)
    shown = pd.concat([during["low"], during["high"], budgets["low"], smaller["val_loss"]])
    return style.finish(ax, (x, result.table[x]), ("val_loss", shown), words)


@styled()
def plot_approaches(result: Approaches, ax: Axes | None = None, *, labels: Labels = None) -> Figure:
    """Draw N*(C) of all approaches: their optima and lines with intervals, dotted beyond the budgets used.

    Args:
        labels: words on the axes C and N.
    """
    ax, columns, drawn = ax or new_figure()[1][0], ("C", "N", "N_lo", "N_hi"), []
    for number, frontier in enumerate(result.frontiers):
        (low, high), color = frontier.range, cycled(number)
        label = f"approach {frontier.approach}: exponent {frontier.exponent_words()}"
        inside, beyond = (frontier.at(np.geomspace(*span, 12)) for span in ((low, high), (high, 10 * high)))
        style.draw(ax, inside, columns, color, label=label, linestyle=("-", "--", "-.")[number])
        style.draw(ax, beyond, columns, color, linestyle=":")
        drawn += [inside, beyond, frontier.pairs]
        if len(frontier.pairs):
            style.draw_points(ax, frontier.pairs, ("C", "N"), color, markers=MARKERS[number:])
    shown = pd.concat(drawn)
    words = partial(style.axis_label, labels={"N": "N*: compute-optimal\nparameters", **(labels or {})})
    return style.finish(ax, ("flops_train", shown["C"]), ("params_total", shown["N"]), words, columns=1)


@styled()
def plot_forecast(
    result: Forecast, ax: Axes | None = None, *, y: str | None = None, color: Any = None, labels: Labels = None
) -> Figure:
    """Draw the loss against compute: the table, the forecast from its largest run to the scales, with the bands of the
    curve and of one run, and the range of the single laws between dotted lines.

    Args:
        ax: where to draw; None makes a figure.
        y: quantity, such as TASK:KIND; None takes the loss.
        color: colour of the forecast.
        labels: words on the axes, by C and by the column of the loss.
    """
    ax, color = ax or new_figure()[1][0], cycled(0) if color is None else color
    y = y or next(iter(result.forecasters))
    by = result.forecasters[y]
    points = by.points
    measured = pd.DataFrame({"C": points.compute, "y": 1 - points.y if by.is_accuracy else points.y})
    largest = int(np.argmax(points.compute))
    stops = pd.DataFrame([{v: values[largest] for v, values in points.x.items()}, *result.scales])
    stops = stops[list(result.scales[0])].interpolate()
    steps = np.linspace(0, len(stops) - 1, NUM_GRID)
    at = {str(v): np.exp(np.interp(steps, np.arange(len(stops)), np.log(stops[v]))) for v in stops}
    path = by.predict(at).assign(C=_compute(by, at))
    ends = result.table[result.table["quantity"] == y]
    ends = ends.assign(C=_compute(by, {v: ends[v].to_numpy(float) for v in result.scales[0]}))
    style.draw_points(ax, measured, ("C", "y"), MUTED)
    style.draw(ax, path, ("C", *ONE_RUN), color, label="forecast")
    style.draw(ax, path, ("C", *CURVE), color)
    for end, label in (("rival_lo", "single laws"), ("rival_hi", "")):
        style.draw(ax, path, ("C", end), MUTED, label=label, linestyle=":")
    style.draw_points(ax, ends, ("C", *ONE_RUN), color, markers=MARKERS[3:])
    words = partial(style.axis_label, names=result.names, labels=labels)
    x, y_range = ("flops_train", [*measured["C"], *path["C"]]), [*measured["y"], *path["value"], *ends["pi_lo"]]
    if not by.is_accuracy:
        return style.finish(ax, x, (y, y_range), words)
    style.log_axis(ax, "x", x[1], x[0], words)
    style.percent_axis(ax)
    ax.set_title(y)
    style.legend([ax], "")
    return figure_of(ax)


def _compute(by: Forecaster, at: Mapping[str, Any]) -> Any:
    """Count compute at scales, as the points' own is counted."""
    place = by.place(at)
    return place["C"] if "C" in place else np.prod([place[v] for v in by.points.x], axis=0)


@styled()
def plot_recipes(
    result: Recipes, ax: Axes | None = None, *, beside: Sequence[Recipes] = (), color: Any = None, labels: Labels = None
) -> Figure:
    """Draw the gain in compute with its interval, dotted beyond the table's own compute.

    Args:
        ax: where to draw; None makes a figure.
        beside: other recipes of the same comparison, drawn beside it.
        color: colour of the gain.
        labels: words for the levels, and for C on its axis.
    """
    words = labels or {}
    ax, columns = ax or new_figure()[1][0], ("C", "gain", "low", "high")
    for number, recipe in enumerate((result, *beside)):
        level, baseline = (words.get(name, name) for name in (recipe.level, recipe.baseline))
        inside, line_color = recipe.table[~recipe.table["beyond"]], color or cycled(number)
        beyond = recipe.table.iloc[len(inside) - 1 :]
        style.draw(ax, inside, columns, line_color, label=f"{level} against {baseline}", linestyle="-")
        style.draw(ax, beyond, columns, line_color, linestyle=":")
    ax.axhline(1, color=MUTED, linewidth=0.9)
    label = partial(style.axis_label, labels={"gain": "gain in compute (factor)", **words})
    tables = pd.concat([recipe.table for recipe in (result, *beside)])
    return style.finish(ax, ("flops_train", tables["C"]), ("gain", tables[["low", "high"]]), label)


@styled()
def plot_rates(result: Rates, *, setting: str = "lr", labels: Mapping[str, str] | None = None) -> Figure:
    """Draw the lowest loss at every value of a setting with the parabolas and optima of cells, and the optima with
    their law beside it.

    Args:
        setting: lr or batch.
        labels: words for N, D, the setting and the loss (`val_loss`).
    """
    law = result.laws.get(setting)
    _, axes = new_figure(DOUBLE, 2.8, num_columns=2) if law else new_figure()
    lowest = result.points.numbers.sort_values("y").drop_duplicates(["cell", setting]).sort_values(["cell", setting])
    lowest = lowest.assign(N=result.table["N"].to_numpy()[lowest["cell"]])
    lowest = lowest[lowest["cell"].isin(result.tuned)]
    lowest = lowest.assign(series=style.series_of(lowest, "N")[0])
    style.draw_points(axes[0], lowest, (setting, "y"))
    curves = pd.concat([_parabola(result, setting, number) for number in range(len(result.tuned))])
    names = lowest.drop_duplicates("N").set_index("N")["series"]
    curves = curves.assign(series=curves["N"].map(names).astype(lowest["series"].dtype))
    look: dict[str, Any] = {"linewidth": 0.8, "units": curves["cell"].to_numpy(), "linestyle": "-"}
    style.draw(axes[0], curves, (setting, "y"), **look)
    optima = result.table.take(result.tuned).assign(y=np.exp(result.surface.lowest))
    optima = optima[optima["found"] == OPTIMUM]
    style.draw_points(axes[0], optima.assign(series=""), (f"{setting}_best", "y"), INK, markers=("X",))
    words = {setting: SETTING_WORDS[setting], "val_loss": result.columns["y"]}
    words |= ({setting: result.columns[setting]} if result.names else {}) | dict(labels or {})
    if law:
        _draw_law(result, setting, optima, axes[1], words)
    x, y = (setting, lowest[setting]), ("val_loss", lowest["y"])
    return style.finish(axes[0], x, y, lambda name: words[name], words.get("N", "N"), place="lower center")


def _parabola(result: Rates, setting: str, number: int) -> pd.DataFrame:
    """Trace the parabola of one cell along a setting, the others at their best for it."""
    i, cell, surface = result.settings.index(setting), int(result.tuned[number]), result.surface
    row = result.table.iloc[cell]
    grid = np.linspace(np.log(row[f"{setting}_lowest"]), np.log(row[f"{setting}_highest"]), NUM_GRID)
    hessian = surface.curvatures(surface.scale[[number]])[0]
    curvature = 1 / np.linalg.inv(hessian)[i, i]  # curvature with the others at their best
    log_loss = surface.lowest[number] + curvature * (grid - surface.optima[number, i]) ** 2 / 2
    return pd.DataFrame({setting: np.exp(grid), "y": np.exp(log_loss), "N": row["N"], "cell": cell})


def _draw_law(result: Rates, setting: str, optima: pd.DataFrame, ax: Axes, words: Mapping[str, str]) -> None:
    """Draw the optima with their intervals, and the law, against D for each size, or against N."""
    law = result.laws[setting]
    x = "D" if "D" in law.params or "b" in law.params else "N"
    other = "N" if x == "D" and "a" in law.params else None
    labels, values = style.series_of(optima, other)
    lines = pd.concat(
        curve_of(law, x, optima[labels == name], **({other: value} if other else {})).assign(series=name)
        for name, value in values.items()
    )
    style.draw(ax, lines.astype({"series": labels.dtype}), (x, *CURVE))
    columns = (x, *(f"{setting}_{end}" for end in ("best", "lo", "hi")))
    style.draw_points(ax, optima.assign(series=labels), columns)
    style.log_axis(ax, "x", optima[x], "images_seen" if x == "D" else "params_total", lambda _: words.get(x, x))
    ends = optima[[f"{setting}_lo", f"{setting}_hi"]]
    style.log_axis(ax, "y", ends, setting, lambda _: f"best {words[setting]}")
