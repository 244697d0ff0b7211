"""Figures of laws and frontiers: iso-FLOP parabolas, the (N, D) surface, bootstrap clouds, forecast against actual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from aimscale.analysis.plots.parts import axis_label, below, curve, error_bars, legend, plain, scatter
from aimscale.analysis.plots.style import (
    ACCENT,
    INK,
    MARKERS,
    MAX_SERIES,
    MUTED,
    PAPER,
    SECOND,
    figure_of,
    log_axis,
    new_figure,
    power_of_ten,
    styled,
)

if TYPE_CHECKING:
    from aimscale.analysis.fitting.result import Fit
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
        drawn = [points[i] for i in _drawn_budgets(points, accepted["C"].to_numpy(float))]
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


def _drawn_budgets(points: Sequence[tuple[float, pd.DataFrame]], accepted: np.ndarray) -> list[int]:
    """Which budgets a figure has room for: accepted ones spread evenly, then those of most sizes, in order of C."""
    sizes = [frame["N"].nunique() for _, frame in points]
    first = [i for i, (flops, _) in enumerate(points) if np.isclose(flops, accepted, rtol=1e-6).any()]
    if len(first) > MAX_SERIES:
        first = [first[i] for i in np.linspace(0, len(first) - 1, MAX_SERIES).round().astype(int)]
    rest = sorted((i for i in range(len(points)) if i not in first and sizes[i] > 2), key=lambda i: -sizes[i])
    return sorted([*first, *rest[: MAX_SERIES - len(first)]])


def plot_surface(fit: Fit, frontier: Frontier | None = None) -> Figure:
    """Contours of the fitted loss over N and D, the points it was fitted to, and the compute-optimal path."""
    with styled():
        figure, (ax,) = new_figure()
        spans = {v: (fit.ranges[v][0] / 1.5, fit.ranges[v][1] * 1.5) for v in ("N", "D")}
        n, d = (np.geomspace(*spans[v], 70) for v in ("N", "D"))
        grid_n, grid_d = np.meshgrid(n, d)
        loss = fit.law.value({"N": grid_n.ravel(), "D": grid_d.ravel()}, fit.law_params).reshape(grid_n.shape)
        levels = np.unique(np.quantile(loss, np.linspace(0.02, 0.98, 9)))
        contours = ax.contour(grid_n, grid_d, loss, levels=levels, colors=MUTED, linewidths=1)
        for text in ax.clabel(contours, fmt="%.3g", fontsize=8, colors=INK):
            text.set_path_effects([withStroke(linewidth=2, foreground=PAPER)])
        scatter(ax, fit.data["N"], fit.data["D"], color=ACCENT, label="measured", size=22)
        if frontier is not None:
            path = frontier.at(np.geomspace(frontier.range[0], 3 * frontier.range[1], 80))
            inside = path[path["N"].between(*spans["N"]) & path["D"].between(*spans["D"])]
            ax.plot(inside["N"], inside["D"], color=SECOND, linewidth=2.2, label="compute-optimal")
        log_axis(ax, "x", spans["N"])
        log_axis(ax, "y", spans["D"])
        ax.set_xlabel(axis_label(fit.columns["N"], fit.loss_unit, fit.names))
        ax.set_ylabel(axis_label(fit.columns["D"], fit.loss_unit, fit.names))
        ax.legend(**below(2))
    return figure


def plot_cloud(fit: Fit, x: str = "alpha", y: str = "beta") -> Figure:
    """Draws of two parameters, the fit, and the box of their intervals.

    Raises:
        KeyError: a parameter that the law does not report.
    """
    with styled():
        figure, (ax,) = new_figure(4.6, 4.0)
        draws = fit.reported_draws()
        scatter(ax, draws[x], draws[y], color=ACCENT, size=10, alpha=0.3, label="draw")
        ax.plot(fit.params[x], fit.params[y], color=SECOND, marker="D", linewidth=0, markersize=8, label="fit")
        for name, line, limit in ((x, ax.axvline, ax.set_xlim), (y, ax.axhline, ax.set_ylim)):
            for end in (fit.intervals[name].low, fit.intervals[name].high):
                line(end, color=MUTED, linestyle="--", linewidth=1)
            inside = np.nanpercentile(draws[name], [0.5, 99.5])
            limit(*(inside + 0.1 * float(np.ptp(inside)) * np.array([-1, 1]) + [-1e-12, 1e-12]))
        names = {"alpha": "α (exponent of N)", "beta": "β (exponent of D)"}
        ax.set_xlabel(names.get(x, x))
        ax.set_ylabel(names.get(y, y))
        ax.legend(**below(2))
    return figure


def plot_forecasts(tests: Mapping[str, pd.DataFrame], unit: str = "validation loss") -> Figure:
    """Forecast against what happened; on the diagonal a forecast was right.

    Args:
        tests: label -> rows with measured, predicted, pi_lo and pi_hi, e.g. `HeldOut.predictions`.
        unit: of both axes.
    """
    with styled():
        figure, (ax,) = new_figure(4.6, 4.3)
        rows = pd.concat([rows.assign(test=plain(label)) for label, rows in tests.items()], ignore_index=True)
        bars = [rows["predicted"] - rows["pi_lo"], rows["pi_hi"] - rows["predicted"]]
        error_bars(ax, rows["measured"], rows["predicted"], np.array(bars).clip(min=0))
        labels = pd.Series(pd.Categorical(rows["test"], [plain(label) for label in tests]), name="series")
        scatter(ax, rows["measured"], rows["predicted"], labels)
        legend(ax, "left out of the fit")
        both = rows[["measured", "predicted"]].to_numpy(float)
        pad = 0.08 * float(np.ptp(both)) + 1e-12
        ends = (both.min() - pad, both.max() + pad)
        ax.plot(ends, ends, color=MUTED, linewidth=1)
        ax.set(xlim=ends, ylim=ends, xlabel=f"measured: {unit}", ylabel=f"forecast: {unit}")
    return figure
