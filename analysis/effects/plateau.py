"""First plateaus: at its smallest budgets a model's loss may stand still before it falls, and follows no power law."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aimscale.analysis.table.points import complete
from aimscale.analysis.words import Flag, some

STEEPER, LEAST_HEIGHT = 1.5, 0.03
"""A plateau ends where the loss falls so many times as steeply in log-log as before, and so much (in ln loss) above the
straight line between its neighbours: budgets that scatter by 1 % do not."""

PLATEAU_STEPS = 700
"""Steps of the first plateau at the rate of the recipe `small`. In steps at that rate, CIFAR-10's runs had left it at
880, Fashion-MNIST's at 540 and not at 270, the demo's hardly at 630."""


def first_budget_past_plateau(rows: pd.DataFrame) -> float | None:
    """Return the images from which a table of our sweeps lies past the first plateau, or None where all of it does."""
    if not {"run_id", "images_seen", "batch_size"} <= set(rows):
        return None
    needed = PLATEAU_STEPS * rows["batch_size"].astype(float)
    short = rows["images_seen"] < needed
    return float(needed[short].max()) if short.any() else None


def plateau_flags(rows: pd.DataFrame, y: str = "val_loss") -> tuple[Flag, ...]:
    """Flag sizes whose loss falls less from their first to their second budget than to their third.

    A power law with a floor flattens with data, so such a loss has not followed one from the first budget on.
    """
    if not {"size", "images_seen", y} <= {*rows}:
        return ()
    rows, ends = complete(rows), dict[str, float]()
    for size, curve in rows[rows[y] > 0].groupby("size"):
        losses = curve.groupby("images_seen")[y].mean().iloc[:3]
        at, logs = np.log(losses.index.to_numpy(float)), np.log(losses.to_numpy(float))
        if len(losses) < 3:
            continue
        before, after = -np.diff(logs) / np.diff(at)
        height = logs[1] - np.interp(at[1], at[[0, 2]], logs[[0, 2]])
        if after > STEEPER * before and height > LEAST_HEIGHT:
            ends[str(size)] = float(losses.index[1])
    if not ends:
        return ()
    number, sizes = int((rows["images_seen"] <= rows["size"].map(str).map(ends)).sum()), some([*ends])
    where = f"{number} rows of {sizes} lie in the first plateau of their size, up to {max(ends.values()):,.0f} images"
    text = f"{where}, where losses follow no power law."
    return (Flag(kind="in_plateau", subject=sizes, number=number, text=text),)
