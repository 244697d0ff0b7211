"""Training curves: what was measured between budgets, the budgets that branch off, and the first plateau."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aimscale.analysis.plots.parts import (
    axis_label,
    percent_axis,
    plain,
    record,
    scatter,
    series_of,
    shared_legend,
    short,
    tick_label,
)
from aimscale.analysis.plots.style import DOUBLE, MUTED, SINGLE, log_axis, new_figure, ordered_colours, styled
from aimscale.analysis.table.read import loss_unit, probe_frame
from aimscale.analysis.table.select import spaced

if TYPE_CHECKING:
    from aimscale.analysis.effects.plateau import Plateau

DECAY_SHARE = 0.2
"""Share of a budget that is decay where the set-up of a run does not say: the default of `schedule.decay_fraction`."""
MAX_RUNS = 40
"""Runs drawn at most; evenly of the others, in order of size."""


def plot_curves(
    curves: pd.DataFrame,
    budgets: pd.DataFrame,
    probes: pd.DataFrame | None = None,
    plateaus: Mapping[str, Plateau] | None = None,
) -> Figure:
    """Validation loss against images seen, a line per run in the colour of its size; accuracies beside it.

    Budgets are markers, joined to where their decay branched off; a first plateau is a broad band along its curve.

    Args:
        curves: points during training: run_id, images_seen, val_loss, params_total.
        budgets: rows of budgets of the same runs, with the same columns and setup.
        probes: `probe_frame` of the curves, of one kind of probe: a further panel per task.
        plateaus: run_id -> its first plateau.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> curves = read_tables("curves.parquet")
        >>> plot_curves(curves, read_table("results.parquet"))
    """
    probes, plateaus = probe_frame(curves[:0]) if probes is None else probes, plateaus or {}
    with styled():
        order = curves.groupby("run_id")["params_total"].first().sort_values(kind="stable").index
        order = order[spaced(len(order), MAX_RUNS)]
        curves, budgets, probes = (
            each[each["run_id"].isin(order)].sort_values("images_seen").reset_index(drop=True)
            for each in (curves, budgets, probes)
        )
        labels, values = series_of(pd.concat([curves, budgets], ignore_index=True), "params_total")
        colours = dict(zip(values, ordered_colours(len(values)), strict=True))
        names = dict(zip([*curves["run_id"], *budgets["run_id"]], labels, strict=True))
        tasks = list(dict.fromkeys(probes["task"]))[:2]
        figure, panels = new_figure(DOUBLE if tasks else SINGLE, 2.7, 1, 1 + len(tasks))
        for run, mine in ((str(run), mine) for run, mine in curves.groupby("run_id")):
            _line(panels[0], mine, "val_loss", str(names[run]), colours[names[run]])
            if run in plateaus:
                still = mine[mine["images_seen"].between(plateaus[run].start, plateaus[run].stop)]
                look: dict[str, Any] = {
                    "color": colours[names[run]],
                    "linewidth": 6.0,
                    "alpha": 0.25,
                    "solid_capstyle": "butt",
                }
                panels[0].plot(still["images_seen"], still["val_loss"], zorder=1, **look)
                record(panels[0], "first plateau", _points(still, "val_loss", str(names[run])))
        _branches(panels[0], curves, budgets, names, colours)
        scatter(panels[0], budgets["images_seen"], budgets["val_loss"], labels.iloc[len(curves) :], what="budget")
        log_axis(panels[0], "y", [*curves["val_loss"], *budgets["val_loss"]])
        panels[0].set_ylabel(axis_label("val_loss", loss_unit(budgets)))
        for ax, task in zip(panels[1:], tasks, strict=True):
            for run, mine in probes[probes["task"] == task].groupby("run_id"):
                _line(ax, mine, "top1", str(names[run]), colours[names[run]])
            ax.set_title(plain(task))
            percent_axis(ax)
        for ax in panels:
            log_axis(ax, "x", [*curves["images_seen"], *budgets["images_seen"]], None, tick_label("images_seen"))
            ax.set_xlabel(axis_label("images_seen", loss_unit(budgets)))
        if plateaus:
            look = {"color": MUTED, "linewidth": 5.0, "alpha": 0.25, "solid_capstyle": "butt"}
            panels[0].plot([], [], label=" first plateau", **look)
        shared_legend(figure, panels[:1], short("params_total"), 8 if tasks else 4)
    return figure


def _points(rows: pd.DataFrame, y: str, series: str) -> pd.DataFrame:
    return pd.DataFrame({"x": rows["images_seen"], "y": rows[y], "series": series})


def _line(ax: Axes, rows: pd.DataFrame, y: str, series: str, colour: str) -> None:
    """One run's curve."""
    rows = rows.dropna(subset=[y])
    ax.plot(rows["images_seen"], rows[y], color=colour, linewidth=0.9, zorder=2)
    record(ax, "during training", _points(rows, y, series))


def _branches(
    ax: Axes, curves: pd.DataFrame, budgets: pd.DataFrame, names: Mapping[str, str], colours: Mapping[str, str]
) -> None:
    """A broken line from each budget to where its decay left the trunk; none where nothing was measured so early."""
    for row in budgets.dropna(subset=["val_loss"]).to_dict("records"):
        trunk = curves[curves["run_id"] == row["run_id"]].dropna(subset=["val_loss"])
        setup = json.loads(row["setup"]) if isinstance(row.get("setup"), str) else {}
        start = (1 - float(setup.get("schedule.decay_fraction", DECAY_SHARE))) * row["images_seen"]
        if row.get("schedule") == "cosine" or trunk.empty or start < trunk["images_seen"].min():
            continue
        at = np.exp(np.interp(np.log(start), np.log(trunk["images_seen"]), np.log(trunk["val_loss"])))
        line = pd.DataFrame({"x": [start, row["images_seen"]], "y": [at, row["val_loss"]]})
        ax.plot(
            line["x"], line["y"], color=colours[names[row["run_id"]]], linewidth=0.8, linestyle=(0, (2, 1.5)), zorder=1
        )
        record(ax, "decay", line.assign(series=names[row["run_id"]]))
