"""What a change is worth in compute: how many times as much the worse setting needs to reach the loss of the better.

At one size, a monotone curve through the baseline's own budgets says at which compute it has the level's loss. No law
is assumed, so the level's losses must lie inside the baseline's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from aimscale.analysis.effects.contrasts import Contrast, Contrasts, level_name
from aimscale.analysis.effects.paired import mean_over_pairs
from aimscale.analysis.words import Flag, scope

ASKS_OTHERWISE = ("patch_order",)
"""Columns whose levels have losses that are subtracted with a caution, but are no ground for a gain."""
MIN_BUDGETS = 3
"""A curve through fewer of the baseline's budgets is not drawn."""
UNKNOWN = 100.0
"""An interval whose ends are this factor apart is not printed."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A level's worth in compute, against the baseline."""

    level: str
    baseline: str
    factor: float
    """The level is worth this many times the compute (geometric mean over pairs of runs); below 1: it wastes some."""
    low: float
    """Lower end of its interval, which reaches as far as that of the losses."""
    high: float
    num_run_pairs: int
    reach: str
    """What the interval is over, in words."""

    def __str__(self) -> str:
        if not self.high / self.low < UNKNOWN:
            return f"The worth of {self.level} in compute is not known from {self.num_run_pairs} pairs of runs."
        return (
            f"{self.level} is worth {self.factor:.2f} times the compute of {self.baseline} at the same size "
            f"[{self.low:.2f}, {self.high:.2f}], {self.reach}."
        )


def gains(found: Contrasts) -> tuple[Gain | Flag, ...]:
    """Tell what every level of a contrast is worth by its validation losses, or why that is not known."""
    asked = [c for c in found.contrasts if c.measure.column == "val_loss" and c.num_run_pairs > 1]
    return tuple(each for each in (_gain(c, found) for c in asked) if each is not None)


def _gain(contrast: Contrast, found: Contrasts) -> Gain | Flag | None:
    """Read the gain off the baseline's own curves, or tell why there is none; None where it has no curves."""
    if found.by in ASKS_OTHERWISE:
        return Flag(kind="no_gain_asks", subject=found.by)
    pairs, own = contrast.pairs, ("run_pair", "baseline_value", "level_value", "difference")
    keys = [name for name in pairs.columns if name not in own]
    if "images_seen" not in keys:
        return None
    base, level = (_costs(found, name, keys) for name in (contrast.baseline, contrast.level))
    run_keys = [name for name in keys if name != "images_seen"]
    runs = pairs.drop_duplicates("run_pair")[[*run_keys, "run_pair"]].merge(base, on=run_keys)
    curves = {run: curve.set_index("cost")["val_loss"] for run, curve in runs.groupby("run_pair")}
    if min(map(len, curves.values())) < MIN_BUDGETS:
        return None
    needed = [_log_cost(curves[run], loss) for run, loss in zip(pairs["run_pair"], pairs["level_value"], strict=True)]
    log_gains = np.array(needed) - np.log(pairs[keys].merge(level, on=keys)["cost"].to_numpy(float))
    if outside := int((~np.isfinite(log_gains)).sum()):
        more = (contrast.baseline, len(pairs))
        return Flag(kind="no_gain_outside", subject=contrast.level, number=outside, more=more)
    groups = pairs.assign(gain=log_gains).groupby("run_pair")
    mean = mean_over_pairs(groups["gain"].mean(), groups["size"].first() if "size" in pairs else None)
    factor, low, high = np.exp([mean.value, mean.value - mean.half, mean.value + mean.half]).tolist()
    return Gain(
        level=contrast.level,
        baseline=contrast.baseline,
        factor=factor,
        low=low,
        high=high,
        num_run_pairs=contrast.num_run_pairs,
        reach=scope(contrast),
    )


def _costs(found: Contrasts, level: str, keys: list[str]) -> pd.DataFrame:
    """Return a level's mean loss and compute, or images seen, where no compute is counted."""
    rows = found.rows.dropna(subset=["val_loss"])
    has_flops = "flops_train" in rows and bool(rows["flops_train"].notna().all())
    rows = rows.assign(cost=rows["flops_train" if has_flops else "images_seen"])
    mine = rows[rows[found.by].map(level_name, na_action="ignore") == level]
    return mine.groupby(keys, dropna=False)[["val_loss", "cost"]].mean().reset_index()


def _log_cost(losses: pd.Series, loss: float) -> float:
    """Return ln cost at which a curve reaches a loss; NaN outside it, or where it does not fall throughout."""
    losses = losses.sort_index(ascending=False)
    if not np.all(np.diff(losses) > 0):
        return np.nan
    log_loss, log_cost = np.log(losses.to_numpy(float)), np.log(losses.index.to_numpy(float))
    return float(PchipInterpolator(log_loss, log_cost, extrapolate=False)(np.log(loss)))
