"""Training curves: what was measured between budgets, and the budgets that branch off."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from aimscale.analysis.plots import parts
from aimscale.analysis.plots.style import DOUBLE, SINGLE, new_figure, styled
from aimscale.analysis.table.read import probe_frame

DECAY_SHARE = 0.2
"""Share of a budget that is decay where the set-up of a run does not say: the default of `schedule.decay_fraction`."""


@styled()
def plot_curves(curves: pd.DataFrame, budgets: pd.DataFrame, probes: pd.DataFrame | None = None) -> Figure:
    """Draw validation loss against images seen, a line per run in the colour of its size; accuracies beside it.

    Budgets are markers, joined to where their decay branched off.

    Args:
        curves: points during training: run_id, images_seen, val_loss, params_total.
        budgets: rows of budgets of the same runs, with the same columns and setup.
        probes: `probe_frame` of the curves, of one kind of probe: a further panel per task.

    Returns:
        A matplotlib figure; `save` writes it.

    Example:
        >>> plot_curves(read_tables("curves.parquet"), read_table("results.parquet"))
    """
    probes = probe_frame(curves[:0]) if probes is None else probes
    x, words = "images_seen", parts.labels_of(budgets)
    both = pd.concat([curves, budgets], ignore_index=True)
    both["series"], _ = parts.series_of(both, "params_total")
    series_of_run = both.drop_duplicates("run_id").set_index("run_id")["series"]
    curves, budgets = both[: len(curves)].dropna(subset=["val_loss"]).sort_values(x), both[len(curves) :]
    tasks = list(dict.fromkeys(probes["task"]))[:2]
    figure, panels = new_figure(DOUBLE if tasks else SINGLE, 2.7, 1, 1 + len(tasks))
    parts.draw_means(panels[0], curves, x, "val_loss", "run_id", "during training")
    ends = [end for _, row in budgets.dropna(subset=["val_loss"]).iterrows() for end in _decay(row, curves)]
    decays = pd.DataFrame(ends, columns=["run_id", "budget", x, "val_loss"]).join(series_of_run, on="run_id")
    parts.draw_means(panels[0], decays, x, "val_loss", "budget", "decay", linestyle=(0, (2, 1.5)))
    parts.draw_points(panels[0], budgets, (x, "val_loss"), "budget")
    parts.log_axis(panels[0], "y", both["val_loss"], "val_loss", words)
    for ax, task in zip(panels[1:], tasks, strict=True):
        rows = probes[probes["task"] == task].join(series_of_run, on="run_id")
        parts.draw_means(ax, rows, x, "top1", "run_id", "during training")
        ax.set_title(parts.plain(task))
        parts.percent_axis(ax)
    for ax in panels:
        parts.log_axis(ax, "x", both[x], x, words)
    parts.legend(panels, words("params_total"), 8 if tasks else 4)
    return figure


def _decay(budget: pd.Series, curves: pd.DataFrame) -> list[tuple[Any, ...]]:
    """Give both ends of a budget's decay: run, budget, images, loss; none where nothing was measured so early."""
    trunk = curves[curves["run_id"] == budget["run_id"]]
    setup = json.loads(budget["setup"]) if isinstance(budget.get("setup"), str) else {}
    start = (1 - float(setup.get("schedule.decay_fraction", DECAY_SHARE))) * budget["images_seen"]
    if budget.get("schedule") == "cosine" or not trunk["images_seen"].min() <= start:
        return []
    loss = np.exp(np.interp(np.log(start), np.log(trunk["images_seen"]), np.log(trunk["val_loss"])))
    ends = (start, loss), (budget["images_seen"], budget["val_loss"])
    return [(budget["run_id"], budget.name, *end) for end in ends]
