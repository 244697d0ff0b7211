"""The first plateau of a training curve: the loss stands still, then falls fast, and follows no power law until then.

On such a stretch a model does not yet use what it is trained to use. Small AIMs leave it at ten to fifty thousand
images, larger ones sooner, so that budgets inside it tell sizes apart by who has left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.design import DESIGN
from aimscale.analysis.table.points import complete
from aimscale.analysis.words import Flag, some

LEAST_HEIGHT = 0.03
"""Share of the loss by which the end of a plateau lies above a straight line in log-log past it."""
STEEPER = 2.0
"""The fall after a plateau is so many times as steep in log-log as the plateau, and as all that follows."""
LEAST_FACTOR = 1.3
"""Images grow by this factor at least on the plateau, in the fall and after it: the decay at a run's end is no fall."""
NOISE_SHARE = 5.0
"""A plateau is higher than so many times the root mean square of what losses do besides falling steadily."""
LEAST_POINTS, MOST_POINTS = 5, 40
"""Points that are needed, and that are looked at; of longer curves means over equal factors of images."""
SAME = ("size", "params_total", "batch_size", "lr_peak", *DESIGN, "setup")
"""Columns in which runs agree that leave the plateau at one place, but for chance."""


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Where a loss stands still, in training images."""

    start: float
    stop: float
    """Where it begins to fall fast."""
    settled: float
    """Where that fall is over: budgets below it follow no power law."""


def first_plateau(images_seen: Array, loss: Array) -> Plateau | None:
    """The plateau of one run's losses at one learning rate, such as those during training.

    What is convex over images, such as a power law or one that levels off at either end, has none.

    Args:
        images_seen: (n,), in any order; points that are not positive numbers are left out.
        loss: (n,).

    Returns:
        The highest plateau, above the chord in log-log that joins the curve before it and after it; None without one.
    """
    x, y = (np.asarray(each, float) for each in (images_seen, loss))
    good = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    if len(np.unique(x[good])) < LEAST_POINTS:
        return None
    log_x, raw = _thinned(np.log(x[good]), np.log(y[good]))
    neighbours = [raw, np.append(raw[:1], raw[:-1]), np.append(raw[1:], raw[-1:])]
    log_y = isotonic_regression(np.median(neighbours, axis=0), increasing=False).x
    noise = float(np.sqrt(np.mean((raw - log_y) ** 2)))
    images, losses = np.exp(log_x), np.exp(log_y)
    gap = log_x - log_x[:, None]
    wide = gap >= np.log(LEAST_FACTOR) - 1e-9
    slope = (log_y[:, None] - log_y) / np.where(wide, gap, np.inf)
    rate = (losses[:, None] - losses) / np.where(wide, images - images[:, None], np.inf)
    # [i, j, k]: from i to j the loss stands still, from j to k it falls
    found = wide[:, :, None] & (wide & wide[:, -1] & (slope > STEEPER * slope[:, -1]))
    found &= (slope > STEEPER * slope[:, :, None]) & (rate > rate[:, :, None])
    height = np.where(found, log_y[:, None] - log_y[:, None, None] + gap[:, :, None] * slope[:, None], -np.inf)
    i, j, k = np.unravel_index(int(np.argmax(height)), height.shape)
    if height[i, j, k] < max(LEAST_HEIGHT, NOISE_SHARE * noise):
        return None
    return Plateau(start=float(images[i]), stop=float(images[j]), settled=float(images[k]))


def _thinned(log_x: Array, log_y: Array) -> tuple[Array, Array]:
    """The points in order, those of one place as their mean, and means over equal factors of images where many."""
    edges = np.linspace(log_x.min(), log_x.max(), MOST_POINTS + 1)[1:-1]
    places, cell = np.unique(log_x, return_inverse=True)
    if len(places) > MOST_POINTS:
        cell = np.unique(np.searchsorted(edges, log_x), return_inverse=True)[1]
    count = np.bincount(cell)
    return np.bincount(cell, log_x) / count, np.bincount(cell, log_y) / count


def plateau_flags(rows: pd.DataFrame, curves: pd.DataFrame) -> tuple[Flag, ...]:
    """The rows of a table that lie inside the first plateau of their size: of any run of the same set-up.

    Args:
        rows: budgets, or points during training, complete or planned.
        curves: points during training, as `read_curves` gives them.
    """
    if curves.empty or not {"size", "images_seen"} <= set(rows):
        return ()
    names = [name for name in SAME if name in rows and curves[name].notna().any() and rows[name].notna().any()]
    ends: dict[str, float] = {}
    for _, points in curves.groupby("run_id"):
        found = first_plateau(points["images_seen"], points["val_loss"])
        key = _keys(points.iloc[:1], names).iloc[0]
        ends[key] = max(ends.get(key, 0.0), found.settled if found else 0.0)
    used = complete(rows)
    settled = _keys(used, names).map(ends)
    inside = used[(used["images_seen"] < settled) & (settled > 0)]
    if inside.empty:
        return ()
    sizes = inside["size"] if "size" in inside else inside["params_total"]
    return (
        Flag(kind="in_plateau", subject=some([*map(str, sizes.unique())]), number=len(inside), more=(settled.max(),)),
    )


def _keys(frame: pd.DataFrame, names: list[str]) -> pd.Series:
    """One word a row for its values in some columns."""
    return frame[names].astype(str).agg(" ".join, axis=1) if names else pd.Series("", index=frame.index)
