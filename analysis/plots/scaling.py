"""Scaling figures: measurements, the fitted law with its interval, loss against accuracy, compute-optimal frontiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from aimscale.analysis.plots.parts import (
    axis_label,
    curve,
    error_bars,
    few_values,
    legend,
    plain,
    scatter,
    series_of,
    short,
    tick_label,
)
from aimscale.analysis.plots.style import (
    ACCENT,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SECOND,
    figure_of,
    log_axis,
    new_figure,
    power_of_ten,
    styled,
)
from aimscale.analysis.table.names import names_of
from aimscale.analysis.table.read import loss_unit

if TYPE_CHECKING:
    from aimscale.analysis.accuracy.correlation import Correlation
    from aimscale.analysis.fitting.result import Fit
    from aimscale.analysis.frontier.approaches import Approaches


def plot_fit(
    fit: Fit, ax: Axes | None = None, *, x: str | None = None, background: pd.DataFrame | None = None
) -> Figure:
    """Measurements, the fitted law and its confidence band against one variable.

    A law of two variables gives one line for each of up to eight values of the other one.

    Args:
        ax: where to draw; None makes a figure.
        x: the law's variable on the horizontal axis; None takes the first.
        background: further points, columns `x` and `y`, that were not fitted.
    """
    with styled():
        ax = ax or new_figure()[1][0]
        x = x or fit.law.variables[0]
        other, data = next((v for v in fit.law.variables if v != x), None), fit.data
        more = pd.DataFrame(columns=["x", "y"]) if background is None else background
        if len(more):
            scatter(ax, more["x"], more["y"], color=MUTED, alpha=0.45, size=14, zorder=1)
        if other is None:
            curve(ax, _curve_of(fit, x, data), x, color=ACCENT)
            scatter(ax, data[x], data["y"], color=ACCENT)
        else:
            labels, values = series_of(data, other)
            drawn = [_curve_of(fit, x, data[labels == name], {other: value}) for name, value in values.items()]
            series = pd.Categorical(np.repeat(list(values), NUM_GRID), list(values))
            curve(ax, pd.concat(drawn, ignore_index=True).assign(series=series), x)
            scatter(ax, data[x], data["y"], labels)
            legend(ax, short(fit.columns[other], fit.names))
        if x != "L":  # a link from loss to accuracy reads best on plain axes
            ticks = few_values(data[x]) if background is None else None
            log_axis(ax, "x", [*data[x], *more["x"]], ticks, tick_label(fit.columns[x]))
            log_axis(ax, "y", [*data["y"], *data["fitted"], *more["y"]])
        ax.set_xlabel(axis_label(fit.columns[x], fit.loss_unit, fit.names))
        ax.set_ylabel(axis_label(fit.columns["y"], fit.loss_unit, fit.names))
    return figure_of(ax)


NUM_GRID = 40
"""Points of a drawn curve."""


def _curve_of(fit: Fit, x: str, data: pd.DataFrame, fixed: Mapping[str, float] | None = None) -> pd.DataFrame:
    """The law over the range of some points, at fixed values of its other variables."""
    low, high = float(data[x].min()), float(data[x].max())
    if low == high:
        low, high = fit.ranges[x]
    grid = pd.DataFrame({x: np.geomspace(low, high, NUM_GRID), **(fixed or {})})
    return pd.concat([grid, fit.predict(grid)], axis=1)


def plot_points(
    frame: pd.DataFrame, x: str, y: str = "val_loss", by: str | None = None, ax: Axes | None = None
) -> Figure:
    """Measurements alone: what is shown when no law can be fitted."""
    with styled():
        ax = ax or new_figure()[1][0]
        look: dict[str, Any] = {"labels": series_of(frame, by)[0]} if by else {"color": ACCENT}
        scatter(ax, frame[x], frame[y], **look)
        log_axis(ax, "x", frame[x], few_values(frame[x]), tick_label(x))
        log_axis(ax, "y", frame[y])
        ax.set_xlabel(axis_label(x, loss_unit(frame), names_of(frame)))
        ax.set_ylabel(axis_label(y, loss_unit(frame), names_of(frame)))
        if by:
            legend(ax, short(by, names_of(frame)))
    return figure_of(ax)


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
        probes = probes[probes["val_loss"].notna() & probes["top1"].notna()]
        tasks = list(dict.fromkeys(probes["task"]))
        columns = max(1, min(3, len(tasks)))
        rows = max(1, -(-len(tasks) // columns))
        figure, panels = new_figure(max(5.4, 3.3 * columns), 3.3 * rows + 0.5, rows, columns)
        by = next((n for n in ("params_total", "images_seen") if n in probes and probes[n].notna().any()), None)
        labels = series_of(probes, by)[0] if by else None
        for ax, task in zip(panels, tasks, strict=False):
            mine = probes[probes["task"] == task]
            ends = np.array([mine["top1"] - mine["top1_lo95"], mine["top1_hi95"] - mine["top1"]]).clip(min=0)
            error_bars(ax, mine["val_loss"], mine["top1"], ends)
            look: dict[str, Any] = {"color": ACCENT} if labels is None else {"labels": labels[mine.index]}
            scatter(ax, mine["val_loss"], mine["top1"], **look)
            if links and task in links:
                grid = pd.DataFrame({"L": np.linspace(*links[task].ranges["L"], NUM_GRID)})
                curve(ax, pd.concat([grid, links[task].predict(grid)], axis=1), "L", color=MUTED, linewidth=1.4)
            _accuracy_panel(ax, task, mine, correlations.get(task, ()))
        for ax in panels[len(tasks) :]:
            ax.set_visible(False)
        _shared_legend(figure, panels, short(by) if by else "", 4 if columns == 1 else 8)
    return figure


def _shared_legend(figure: Figure, panels: Sequence[Axes], title: str, columns: int) -> None:
    """One legend below all panels, which have the same series, in place of theirs; more columns would be cut off."""
    made = panels[0].get_legend()
    if made is not None:
        names = [text.get_text() for text in made.get_texts()]
        wide = min(columns, len(names))
        figure.legend(
            [each for each in made.legend_handles if each is not None],
            names,
            title=title,
            loc="outside lower center",
            ncols=wide,
        )
    for ax in panels:
        if (own := ax.get_legend()) is not None:
            own.remove()


def _accuracy_panel(ax: Axes, task: str, rows: pd.DataFrame, correlations: Sequence[Correlation]) -> None:
    ax.set_title(plain(task))
    ax.set_xlabel(axis_label("val_loss", loss_unit(rows)))
    ax.set_ylabel("top-1 accuracy (%)")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
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


def plot_approaches(found: Approaches) -> Figure:
    """N*(C) of all approaches: their optima and lines with intervals, dotted beyond the budgets used."""
    with styled():
        figure, (ax,) = new_figure()
        for number, frontier in enumerate(found.frontiers):
            colour, (low, high) = (ACCENT, SECOND, INK)[number % 3], frontier.range
            for start, end, style in ((low, high, ("-", "--", "-.")[number % 3]), (high, 10 * high, ":")):
                label = f"approach {frontier.approach}: exponent {frontier.exponent_words()}" if end == high else None
                drawn = frontier.at(np.geomspace(start, end, 12))
                curve(ax, drawn, "C", "N", ("N_lo", "N_hi"), color=colour, linestyle=style, label=label)
            if len(frontier.pairs) <= NUM_GRID:
                scatter(ax, frontier.pairs["C"], frontier.pairs["N"], color=colour, marker=MARKERS[number], size=26)
        xy = np.concatenate([np.asarray(line.get_xydata(), float) for line in ax.lines])
        log_axis(ax, "x", xy[:, 0], None, power_of_ten)
        log_axis(ax, "y", xy[:, 1])
        ax.set_xlabel(axis_label("flops_train"))
        ax.set_ylabel("N*: compute-optimal parameters")
        ax.legend(loc="upper left", handlelength=2.2)
    return figure
