"""Scaling figures: measurements with errors, the fitted law with its interval, residuals, loss against accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import (
    axis_label,
    below,
    error_bars,
    few_values,
    groups,
    plain,
    scatter,
    short,
    tick_label,
)
from aimscale.analysis.plots.style import (
    ACCENT,
    INK,
    LINES,
    MARKERS,
    MUTED,
    PAPER,
    SECOND,
    figure_of,
    human,
    log_axis,
    new_figure,
    ordered_colours,
    styled,
)
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.read import loss_unit

if TYPE_CHECKING:
    from aimscale.analysis.accuracy.correlation import Correlation
    from aimscale.analysis.fitting.result import Fit


def plot_fit(
    fit: Fit,
    ax: Axes | None = None,
    *,
    x: str | None = None,
    se: pd.Series | None = None,
    background: pd.DataFrame | None = None,
) -> Figure:
    """Measurements, the fitted law and its confidence band against one variable.

    A law of two variables gives one line for each of up to eight values of the other one.

    Args:
        ax: where to draw; None makes a figure.
        x: the law's variable on the horizontal axis; None takes the first.
        se: standard errors of the measurements, by the table's index; drawn as 95 % bars.
        background: further points, columns `x` and `y`, that were not fitted.
    """
    with styled():
        if ax is None:
            ax = new_figure()[1][0]
        x = x or fit.law.variables[0]
        others = [v for v in fit.law.variables if v != x]
        data = fit.data
        if background is not None and len(background):
            scatter(ax, background["x"], background["y"], color=MUTED, marker="o", alpha=0.45, size=14, zorder=1)
        series = groups(data, others[0]) if others else [(None, data)]
        colours = ordered_colours(len(series)) if others else [ACCENT]
        for i, (value, group) in enumerate(series):
            label = human(value) if value is not None else "measured"
            fixed = {others[0]: value} if value is not None else {}
            _law_line(ax, fit, x, fixed, group, colours[i], LINES[i])
            error_bars(ax, group[x], group["y"], se, colours[i])
            scatter(ax, group[x], group["y"], color=colours[i], marker=MARKERS[i], label=label)
        span = [*data[x], *([] if background is None else background["x"])]
        ticks = few_values(data[x]) if background is None else None
        bars = 1.96 * se.reindex(data.index).fillna(0) if se is not None else 0 * data["y"]
        other = [] if background is None else [*background["y"]]
        if x != "L":  # a link from loss to accuracy reads best on plain axes
            log_axis(ax, "x", span, ticks, tick_label(fit.columns[x]))
            log_axis(ax, "y", [*(data["y"] - bars), *(data["y"] + bars), *data["fitted"], *other])
        ax.set_xlabel(axis_label(fit.columns[x], fit.loss_unit, fit.names))
        ax.set_ylabel(axis_label(fit.columns["y"], fit.loss_unit, fit.names))
        if others:
            handles = [
                mpl.lines.Line2D([], [], color=c, marker=m, linestyle=line, label=human(value))
                for c, m, line, (value, _) in zip(colours, MARKERS, LINES, series, strict=False)
                if value is not None
            ]
            title = short(fit.columns[others[0]], fit.names)
            ax.legend(handles=handles, title=title, handlelength=2.2, **below(len(handles)))
    return figure_of(ax)


def _law_line(
    ax: Axes, fit: Fit, x: str, fixed: Mapping[str, float], group: pd.DataFrame, colour: str, line: Any
) -> None:
    low, high = float(group[x].min()), float(group[x].max())
    if low == high:
        low, high = fit.ranges[x]
    grid = np.geomspace(low, high, 80)
    curve = fit.predict({x: grid} | {name: np.full(80, value) for name, value in fixed.items()})
    ax.plot(grid, curve["value"], color=colour, linestyle=line, zorder=2)
    if curve["ci_lo"].notna().any():
        ax.fill_between(grid, curve["ci_lo"], curve["ci_hi"], color=colour, alpha=0.16, linewidth=0, zorder=1)


def plot_points(
    frame: pd.DataFrame, x: str, y: str = "val_loss", by: str | None = None, ax: Axes | None = None
) -> Figure:
    """Measurements alone: what is shown when no law can be fitted."""
    with styled():
        if ax is None:
            ax = new_figure()[1][0]
        series = groups(frame, by) if by else [(None, frame)]
        colours = ordered_colours(len(series)) if by else [ACCENT]
        for i, (value, group) in enumerate(series):
            label = human(value) if value is not None else None
            scatter(ax, group[x], group[y], color=colours[i], marker=MARKERS[i], label=label)
        log_axis(ax, "x", frame[x], few_values(frame[x]), tick_label(x))
        log_axis(ax, "y", frame[y])
        ax.set_xlabel(axis_label(x, loss_unit(frame), names_of(frame)))
        ax.set_ylabel(axis_label(y, loss_unit(frame), names_of(frame)))
        if by:
            ax.legend(title=short(by, names_of(frame)))
    return figure_of(ax)


def plot_residuals(fit: Fit) -> Figure:
    """Residuals against every variable of the law; a pattern here means the form is wrong."""
    with styled():
        variables = list(fit.law.variables)
        figure, axes = new_figure(3.5 * len(variables) if len(variables) > 1 else 5.4, 3.5, num_columns=len(variables))
        residual = fit.data["residual"]
        shown = 100 * np.expm1(residual) if fit.objective.log else residual
        for ax, x in zip(axes, variables, strict=True):
            others = [v for v in variables if v != x]
            series = groups(fit.data, others[0]) if others else [(None, fit.data)]
            colours = ordered_colours(len(series)) if others else [ACCENT]
            ax.axhline(0, color=MUTED, linewidth=1)
            for i, (value, group) in enumerate(series):
                label = human(value) if value is not None else None
                scatter(ax, group[x], shown[group.index], color=colours[i], marker=MARKERS[i], label=label, size=26)
            log_axis(ax, "x", fit.data[x], few_values(fit.data[x], 0.16), tick_label(fit.columns[x]))
            label = axis_label(fit.columns[x], fit.loss_unit, fit.names)
            ax.set_xlabel(label if fit.columns[x] in fit.names else label.split(" (")[0])  # ours explain themselves
            if others:
                ax.legend(title=short(fit.columns[others[0]], fit.names), handletextpad=0.1, **below(len(series)))
        axes[0].set_ylabel("measured / fitted − 1 (%)" if fit.objective.log else "measured − fitted")
        for ax in axes[1:]:
            ax.set_ylim(axes[0].get_ylim())
    return figure


def plot_loss_accuracy(
    probes: pd.DataFrame, correlations: Mapping[str, Sequence[Correlation]], links: Mapping[str, Fit] | None = None
) -> Figure:
    """Frozen-feature accuracy against validation loss, a panel per task of one probe kind.

    Args:
        probes: rows of `probe_frame`: val_loss, task, top1, top1_lo95, top1_hi95, chance, and params_total or size.
        correlations: task -> its correlation coefficients, written into the panel.
        links: task -> fitted link from loss to accuracy, drawn with its confidence band.
    """
    with styled():
        tasks = list(dict.fromkeys(probes["task"]))
        columns = min(3, len(tasks))
        rows = -(-len(tasks) // columns)
        figure, panels = new_figure(max(5.4, 3.3 * columns), 3.3 * rows + 0.5, rows, columns)
        by = next(
            (name for name in ("params_total", "images_seen") if name in probes and probes[name].notna().any()), None
        )
        series = groups(probes, by) if by else [(None, probes)]
        colours = ordered_colours(len(series)) if by else [ACCENT]
        for ax, task in zip(panels, tasks, strict=False):
            for i, (value, group) in enumerate(series):
                label = human(value) if value is not None else None
                _accuracy_points(ax, group[group["task"] == task], colours[i], MARKERS[i], label)
            if links and task in links:
                _link_curve(ax, links[task])
            _accuracy_panel(ax, task, probes[probes["task"] == task], correlations.get(task, ()))
        for ax in panels[len(tasks) :]:
            ax.set_visible(False)
        if by:
            handles, labels = panels[0].get_legend_handles_labels()
            wide = min(4 if columns == 1 else 8, len(labels))  # more would be cut off at the figure's edges
            figure.legend(handles, labels, title=short(by), loc="outside lower center", ncols=wide)
    return figure


def _accuracy_points(ax: Axes, rows: pd.DataFrame, colour: str, marker: str, label: str | None) -> None:
    rows = rows[rows["val_loss"].notna() & rows["top1"].notna()]
    low, high = rows["top1"] - rows["top1_lo95"], rows["top1_hi95"] - rows["top1"]
    if len(rows) and low.notna().any():
        bars = np.array([low.clip(lower=0).fillna(0), high.clip(lower=0).fillna(0)])
        ax.errorbar(rows["val_loss"], rows["top1"], yerr=bars, fmt="none", ecolor=colour, elinewidth=0.9, alpha=0.6)
    scatter(ax, rows["val_loss"], rows["top1"], color=colour, marker=marker, label=label)


def _link_curve(ax: Axes, link: Fit) -> None:
    grid = np.linspace(*link.ranges["L"], 80)
    curve = link.predict({"L": grid})
    ax.plot(grid, curve["value"], color=MUTED, linewidth=1.4, zorder=1)
    ax.fill_between(grid, curve["ci_lo"], curve["ci_hi"], color=MUTED, alpha=0.15, linewidth=0, zorder=0)


def _accuracy_panel(ax: Axes, task: str, rows: pd.DataFrame, correlations: Sequence[Correlation]) -> None:
    ax.set_title(plain(task))
    ax.set_xlabel(axis_label("val_loss", loss_unit(rows)))
    ax.set_ylabel("top-1 accuracy (%)")
    ax.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{100 * value:g}"))
    chance = rows["chance"].dropna()
    low, high = ax.get_ylim()
    if len(chance) and chance.iloc[0] > low - 0.5 * (high - low):  # the axis starts where the data are
        ax.axhline(chance.iloc[0], color=MUTED, linewidth=1, linestyle=":")
        ax.annotate("chance", (0.99, chance.iloc[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                    color=MUTED, fontsize=8)  # fmt: skip
    words = {"pearson": "Pearson r", "spearman": "Spearman ρ", "kendall": "Kendall τ"}
    lines = [
        f"{words.get(c.method, c.method)} = {c.value:.2f} [{c.low:.2f}, {c.high:.2f}]".replace("-", "−")
        for c in correlations
        if c.partial_on is None and c.within is None
    ]
    low, high = ax.get_ylim()
    ax.set_ylim(max(0.0, low - (0.05 + 0.07 * len(lines)) * (high - low)), None)  # room for the words below the points
    ax.text(
        0.03, 0.03, "\n".join(lines), transform=ax.transAxes, ha="left", va="bottom", fontsize=7.5, color=INK, bbox=BOX
    )


BOX = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
"""Behind text inside a plot."""


def plot_beside_published(ours: pd.DataFrame, published: pd.DataFrame, count: str = "params_total") -> Figure:
    """Our models and AIM's on one pair of logarithmic axes, each family with the slope of its own line.

    Args:
        ours: one row per size, columns `count` and val_loss.
        published: `baselines.published_frame()`.
    """
    with styled():
        figure, (ax,) = new_figure()
        for frame, colour, marker, name in (
            (ours, ACCENT, "o", "this table"),
            (published, SECOND, "D", "AIM, published"),
        ):
            n, loss = frame[count].to_numpy(float), frame["val_loss"].to_numpy(float)
            label = name
            if len(frame) > 1 and np.ptp(np.log(n)) > 0:
                slope, intercept = np.polyfit(np.log(n), np.log(loss), 1)
                grid = np.geomspace(n.min(), n.max(), 50)
                ax.plot(grid, np.exp(intercept) * grid**slope, color=colour, linestyle="-" if marker == "o" else "--")
                label = f"{name}: straight line has slope {slope:.4f}".replace("-", "−")
            scatter(ax, n, loss, color=colour, marker=marker, label=label)
        log_axis(ax, "x", [*ours[count], *published[count]])
        log_axis(ax, "y", [*ours["val_loss"], *published["val_loss"]])
        ax.set_xlabel(axis_label(count, loss_unit(ours)))
        ax.set_ylabel(axis_label("val_loss", loss_unit(ours)))
        ax.legend(loc="best")
    return figure
