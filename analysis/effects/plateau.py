"""The first plateau of a training curve: the loss stands still, then falls fast, and follows no power law until then.

On such a stretch a model does not yet use what it is trained to use. Small AIMs leave it at ten to fifty thousand
images, larger ones sooner, so that budgets inside it tell sizes apart by who has left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.design import DESIGN
from aimscale.analysis.table.points import complete
from aimscale.analysis.words import Flag, some

STEEPER = 1.5
"""The fall after a plateau is so many times as steep in log-log as the plateau, and as all that follows."""
LEAST_HEIGHT, NOISE = 0.03, 1.75
"""Share of the loss, and standard errors, by which a plateau's end lies above the chord around it. With these at most
4 % of sound curves have a plateau, whose losses scatter by up to 3 % or spike once by 5 %."""
AFTER = np.log2(1.3)
"""Octaves that follow the fall at least: the decay at a run's end is no fall."""
LEAST_POINTS = 5
"""Points that are needed; a plateau of two octaves is seen from two points an octave on."""
SAME = ("size", "params_total", "batch_size", "lr_peak", *DESIGN, "setup")
"""Columns in which runs agree that leave the plateau at one place, but for chance."""


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Stretch on which a loss stands still, in training images."""

    start: float
    """An octave before its end."""
    stop: float
    """Where the loss begins to fall fast."""
    settled: float
    """An octave later: budgets below it follow no power law."""


def first_plateau(images_seen: Array, loss: Array) -> Plateau | None:
    """Find the plateau of one run's losses at one learning rate, such as those during training.

    Two slopes decide: that of the octave (factor of 2 in images) after a point, and that of the octave before it.

    Args:
        images_seen: (n,), in any order; points that are not positive numbers are left out.
        loss: (n,).

    Returns:
        The highest plateau above the chord in log-log over both octaves; None without one.
    """
    x, y = (np.asarray(each, float) for each in (images_seen, loss))
    good = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    places, where = np.unique(np.log2(x[good]), return_inverse=True)
    if len(places) < LEAST_POINTS:
        return None
    raw = np.bincount(where, np.log(y[good])) / np.bincount(where)
    off = raw[1:-1] - [np.interp(at, places[[i, i + 2]], raw[[i, i + 2]]) for i, at in enumerate(places[1:-1])]
    noise = 1.4826 * np.median(np.abs(off)) / np.sqrt(1.5)  # of a point less the mean of two others
    raw[1:-1] -= np.maximum(off, 0.0)  # one loss above its neighbours is a spike
    cell = np.unique(np.floor(2 * (places - places[0]) + 1e-9), return_inverse=True)[1]
    count = np.bincount(cell)
    at, mean = np.bincount(cell, places) / count, np.bincount(cell, raw) / count
    (earlier, num_earlier), (later, num_later) = (
        [np.interp(at + octave, at, each) for each in (mean, count)] for octave in (-1, 1)
    )
    before, fall = earlier - mean, mean - later
    rest = (later - mean[-1]) / np.maximum(at[-1] - at - 1, 1e-9)
    seen = (at >= at[0] + 0.75) & (at + 1 <= at[-1] - AFTER)
    seen &= (fall > STEEPER * before) & (fall > STEEPER * rest)
    height = np.where(seen, (fall - before) / 2, -np.inf)
    found = int(np.argmax(height))
    error = noise * np.sqrt(1 / count + 0.25 / num_earlier + 0.25 / num_later)[found]
    if height[found] < max(LEAST_HEIGHT, NOISE * error):
        return None
    last = min(int(np.flatnonzero(cell == found)[-1]) + 1, len(places) - 1)  # the corner itself was cut as a spike
    stop = float(2 ** places[last])
    return Plateau(start=stop / 2, stop=stop, settled=2 * stop)


def plateau_flags(rows: pd.DataFrame, curves: pd.DataFrame) -> tuple[Flag, ...]:
    """Flag the rows of a table that lie inside the first plateau of their size: of any run of the same set-up.

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
    """Return one word a row for its values in some columns."""
    return frame[names].astype(str).agg(" ".join, axis=1) if names else pd.Series("", index=frame.index)
