"""Figures of laws and frontiers: iso-FLOP parabolas, the (N, D) surface, bootstrap clouds, forecast against actual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from aimscale.analysis.plots.parts import axis_label, below, plain, scatter
from aimscale.analysis.plots.style import (
    ACCENT,
    INK,
    LINES,
    MARKERS,
    MAX_SERIES,
    MUTED,
    PAPER,
    SECOND,
    figure_of,
    log_axis,
    new_figure,
    ordered_colours,
    power_of_ten,
    styled,
)

if TYPE_CHECKING:
    from aimscale.analysis.fitting.result import Fit
    from aimscale.analysis.frontier.approaches import Approaches
    from aimscale.analysis.frontier.optimum import Frontier


def plot_frontier(frontier: Frontier, ax: Axes | None = None, *, colour: str = ACCENT, number: int = 0) -> Figure:
    """N*(C) of one approach: its optima and its line with the interval, dashed beyond the budgets used.

    Args:
        ax: where to draw; None makes a figure. Several approaches can share one.
        number: 0-based place among several, which picks marker and line style.
    """
    with styled():
        if ax is None:
            ax = new_figure()[1][0]
        low, high = frontier.range
        label = f"approach {frontier.approach}: exponent {frontier.exponent_words()}"
        for start, end, style, alpha in ((low, high, LINES[number], 0.18), (high, 10 * high, (0, (1, 2)), 0.08)):
            line = frontier.at(np.geomspace(start, end, 60))
            ax.plot(line["C"], line["N"], color=colour, linestyle=style, label=label if end == high else None)
            ax.fill_between(line["C"], line["N_lo"], line["N_hi"], color=colour, alpha=alpha, linewidth=0)
        if len(frontier.pairs) <= 40:
            scatter(ax, frontier.pairs["C"], frontier.pairs["N"], color=colour, marker=MARKERS[number], size=26)
        lines = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
        log_axis(
            ax, "x", np.concatenate([np.asarray(line.get_xdata(), float) for line in ax.lines]), None, power_of_ten
        )
        log_axis(ax, "y", lines)
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
        points: (C, frame with columns N and loss), as `frontier.isoflop.isoflop_points` gives them. Of more than eight
            budgets the accepted ones are drawn, then those of most sizes; one of fewer than three sizes never is.
        minima: columns C, N and loss of the accepted minima, drawn as crosses.
        loss_unit: `table.loss_unit`.
        names: our column -> its name in a foreign file.
    """
    with styled():
        figure, (ax,) = new_figure()
        picks = _drawn_budgets(points, minima)
        colours = ordered_colours(len(picks))
        shown: list[pd.DataFrame] = []
        for i, pick in enumerate(picks):
            flops, frame = points[pick]
            shown.append(frame)
            scatter(
                ax, frame["N"], frame["loss"], color=colours[i], marker=MARKERS[i], label=power_of_ten(flops), size=24
            )
            curve = np.polyfit(np.log(frame["N"]), frame["loss"], 2)
            grid = np.geomspace(frame["N"].min(), frame["N"].max(), 60)
            ax.plot(grid, np.polyval(curve, np.log(grid)), color=colours[i], linestyle=LINES[i], linewidth=1.3)
        every = pd.concat(shown)
        if minima is not None and len(minima):
            drawn = [points[pick][0] for pick in picks]
            minima = minima[[bool(np.isclose(c, drawn, rtol=1e-6).any()) for c in minima["C"]]]
            ax.plot(minima["N"], minima["loss"], color=INK, linewidth=0, marker="x", markersize=7, label="minimum")
        log_axis(ax, "x", every["N"])
        log_axis(ax, "y", every["loss"])
        ax.set_xlabel(axis_label("params_total", loss_unit, names))
        ax.set_ylabel(axis_label("val_loss", loss_unit, names))
        ax.legend(title="C, FLOP", **below(len(picks) + (minima is not None)))
    return figure


def _drawn_budgets(points: Sequence[tuple[float, pd.DataFrame]], minima: pd.DataFrame | None) -> list[int]:
    """Which budgets a figure has room for: accepted ones spread evenly, then those of most sizes, in order of C."""
    accepted = np.array([]) if minima is None else minima["C"].to_numpy(float)
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
        scatter(ax, fit.data["N"], fit.data["D"], color=ACCENT, marker="o", label="measured", size=22)
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
    """Bootstrap draws of two parameters, the fit, and the box of their intervals.

    Raises:
        KeyError: a parameter that the law does not report.
    """
    with styled():
        figure, (ax,) = new_figure(4.6, 4.0)
        draws = fit.reported_draws()
        scatter(ax, draws[x], draws[y], color=ACCENT, marker="o", size=10, alpha=0.3, label="draw")
        ax.plot(fit.params[x], fit.params[y], color=SECOND, marker="D", linewidth=0, markersize=8, label="fit")
        for name, line, limit in ((x, ax.axvline, ax.set_xlim), (y, ax.axhline, ax.set_ylim)):
            i = fit.intervals[name]
            for end in (i.low, i.high):
                line(end, color=MUTED, linestyle="--", linewidth=1)
            inside = np.nanpercentile(draws[name], [0.5, 99.5])
            margin = 0.1 * float(np.ptp(inside)) + 1e-12
            limit(max(inside[0] - margin, float(np.nanmin(draws[name])) - 0.1 * margin), inside[1] + margin)
        names = {"alpha": "α", "beta": "β"}
        ax.set_xlabel(f"{names.get(x, x)} (exponent of N)" if x == "alpha" else names.get(x, x))
        ax.set_ylabel(f"{names.get(y, y)} (exponent of D)" if y == "beta" else names.get(y, y))
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
        colours: list[Any] = ordered_colours(len(tests)) if len(tests) > 2 else [ACCENT, SECOND]
        ends: list[float] = []
        for i, (label, rows) in enumerate(tests.items()):
            bars = np.abs(rows[["pi_lo", "pi_hi"]].to_numpy(float).T - rows["predicted"].to_numpy(float))
            if np.isfinite(bars).all():
                ax.errorbar(rows["measured"], rows["predicted"], yerr=bars, fmt="none", ecolor=colours[i], elinewidth=1)
            scatter(ax, rows["measured"], rows["predicted"], color=colours[i], marker=MARKERS[i], label=plain(label))
            ends += [*rows["measured"], *rows["predicted"]]
        low, high = min(ends), max(ends)
        pad = 0.08 * (high - low) + 1e-12
        ax.plot([low - pad, high + pad], [low - pad, high + pad], color=MUTED, linewidth=1)
        ax.set_xlim(low - pad, high + pad)
        ax.set_ylim(low - pad, high + pad)
        ax.set_xlabel(f"measured: {unit}")
        ax.set_ylabel(f"forecast: {unit}")
        ax.legend(title="left out of the fit", **below(min(2, len(tests))))
    return figure
