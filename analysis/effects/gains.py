"""Worth of a change in compute: how many times as much the worse setting needs to reach the loss of the better.

At one size, a monotone curve through the baseline's own budgets says at which compute it has the level's loss. No law
is assumed, so the level's losses must lie inside the baseline's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from aimscale.analysis.effects.result import Contrast, Contrasts, level_names, mean_over_pairs
from aimscale.analysis.words import Flag

ASKS_OTHERWISE = ("patch_order",)
"""Columns whose levels have losses that are subtracted with a caution, but are no ground for a gain."""
MIN_BUDGETS = 3
"""A curve through fewer of the baseline's budgets is not drawn."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A level's worth in compute, against the baseline, with the 95 % interval of the losses' reach."""

    level: str
    baseline: str
    factor: float
    """The level is worth this many times the compute (geometric mean over pairs of runs); below 1: it wastes some."""
    low: float
    high: float
    num_run_pairs: int
    reach: str
    """Pairs, sizes and budgets of the interval, in words."""

    def __str__(self) -> str:
        if np.isnan(self.high):
            return f"The worth of {self.level} in compute is not known from {self.num_run_pairs} pairs of runs."
        return (
            f"{self.level} is worth {self.factor:.2f} times the compute of {self.baseline} at the same size "
            f"[{self.low:.2f}, {self.high:.2f}], {self.reach}."
        )


def gains(found: Contrasts) -> tuple[Gain | Flag, ...]:
    """Tell what every level of a contrast is worth by its validation losses, or why that is not known."""
    asked = [c for c in found.contrasts if c.measure.column == "val_loss" and c.num_run_pairs > 1]
    if asked and found.by in ASKS_OTHERWISE:
        text = f"No worth in compute: losses at different {found.by} measure different tasks."
        return (Flag(kind="no_gain_asks", subject=found.by, text=text),)
    return tuple(each for each in (_gain(c, found) for c in asked) if each is not None)


def _gain(c: Contrast, found: Contrasts) -> Gain | Flag | None:
    """Read the gain off the baseline's own curves, or tell why there is none; None where it has no curves."""
    rows = found.rows.dropna(subset=["val_loss"])
    keys = [str(name) for name in c.pairs if name in rows]
    if "images_seen" not in keys:
        return None
    has_flops = "flops_train" in rows and rows["flops_train"].notna().all()
    rows = rows.assign(cost=rows["flops_train" if has_flops else "images_seen"])
    means = rows.groupby([level_names(rows[found.by]), *keys], dropna=False)[["val_loss", "cost"]].mean()
    base, level = (means.loc[name].reset_index() for name in (c.baseline, c.level))
    run_keys = [name for name in keys if name != "images_seen"]
    runs = c.pairs.drop_duplicates("run_pair")[[*run_keys, "run_pair"]]
    curves = dict([*runs.merge(base, on=run_keys).groupby("run_pair")])
    if min(map(len, curves.values())) < MIN_BUDGETS:
        return None
    needed = [_log_cost(curves[run], loss) for run, loss in c.pairs[["run_pair", "level_value"]].to_numpy()]
    log_gains = needed - np.log(c.pairs[keys].merge(level, on=keys)["cost"].to_numpy(float))
    if outside := int((~np.isfinite(log_gains)).sum()):
        text = (
            f"No worth of {c.level} in compute: {outside} of its {len(c.pairs)} losses lie outside those of "
            f"{c.baseline}, or the losses of {c.baseline} do not fall with every budget."
        )
        return Flag(kind="no_gain_outside", subject=c.level, number=outside, text=text)
    mean = mean_over_pairs(pd.Series(log_gains, c.pairs.index), c.pairs)
    factor, low, high = np.exp([mean.difference, mean.low, mean.high]).tolist()
    names = {"level": c.level, "baseline": c.baseline, "reach": c.scope}
    return Gain(**names, factor=factor, low=low, high=high, num_run_pairs=c.num_run_pairs)


def _log_cost(curve: pd.DataFrame, loss: float) -> float:
    """Return ln cost at which a curve reaches a loss; NaN outside it, or where it does not fall throughout."""
    log_loss, log_cost = np.log(curve.sort_values("cost", ascending=False)[["val_loss", "cost"]].to_numpy(float)).T
    if not np.all(np.diff(log_loss) > 0):
        return np.nan
    return float(PchipInterpolator(log_loss, log_cost, extrapolate=False)(np.log(loss)))
