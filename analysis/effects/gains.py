"""What a change is worth in compute: how many times as much the worse setting needs to reach the loss of the better.

At one size, a monotone curve through the baseline's own budgets says at which compute it has the level's loss. No law
is assumed, so the level's losses must lie inside the baseline's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from aimscale.analysis.display import Result
from aimscale.analysis.effects.contrasts import Contrast, Contrasts, level_name, mean_of
from aimscale.analysis.table.design import with_size
from aimscale.analysis.table.points import complete
from aimscale.analysis.words import Flag, flag_words

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
    """Lower end of its interval, over pairs of runs."""
    high: float
    num_run_pairs: int

    def sentence(self) -> str:
        """Worth with its interval."""
        if not self.high / self.low < UNKNOWN:
            return f"What {self.level} is worth in compute cannot be told from {self.num_run_pairs} pairs of runs."
        return (
            f"{self.level} is worth {self.factor:.2f} times the compute of {self.baseline} at the same size "
            f"[{self.low:.2f}, {self.high:.2f}] over {self.num_run_pairs} pairs of runs."
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Gains(Result):
    """What the levels of a column are worth."""

    gains: tuple[Gain, ...]
    flags: tuple[Flag, ...]
    """What has no gain, and why."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per level."""
        return pd.DataFrame([vars(each) for each in self.gains])

    def sentences(self) -> list[str]:
        """In words."""
        return [*(each.sentence() for each in self.gains), *flag_words(self.flags)]

    def headline(self) -> str:
        """In words."""
        return " ".join(self.sentences())


def gains(found: Contrasts, frame: pd.DataFrame) -> Gains:
    """Compute-equivalent gains of every level of a contrast in the validation loss."""
    frame = with_size(frame)
    worth, flags = [], []
    for each in found.contrasts:
        if each.measure.column == "val_loss" and each.num_run_pairs > 1 and found.by in frame.columns:
            one = gain_of(each, frame, found.by)
            if isinstance(one, Gain):
                worth.append(one)
            elif one is not None:
                flags.append(one)
    return Gains(gains=tuple(worth), flags=tuple(flags))


def gain_of(contrast: Contrast, frame: pd.DataFrame, by: str) -> Gain | Flag | None:
    """The gain read off the baseline's own curves, or why there is none; None where it has no curves.

    Args:
        contrast: one of the validation loss.
        frame: the table that it was made of, with sizes (`with_size`).
        by: the column that was compared.
    """
    if by in ASKS_OTHERWISE:
        return Flag(kind="no_gain_asks", subject=by)
    pairs = contrast.pairs
    keys = [name for name in pairs.columns if name not in ("run_pair", "baseline_value", "level_value", "difference")]
    if "images_seen" not in keys:
        return None
    rows = complete(frame).dropna(subset=["val_loss"])
    has_flops = "flops_train" in rows and bool(rows["flops_train"].notna().all())
    rows = rows.assign(cost=rows["flops_train" if has_flops else "images_seen"])
    names = rows[by].map(level_name, na_action="ignore")
    base, level = (
        rows[names == each].groupby(keys, dropna=False)[["val_loss", "cost"]].mean().reset_index()
        for each in (contrast.baseline, contrast.level)
    )
    run_keys = [name for name in keys if name != "images_seen"]
    runs = pairs.drop_duplicates("run_pair")[[*run_keys, "run_pair"]].merge(base, on=run_keys)
    curves = {run: curve.set_index("cost")["val_loss"] for run, curve in runs.groupby("run_pair")}
    if min(map(len, curves.values())) < MIN_BUDGETS:
        return None
    spent = pairs[keys].merge(level, on=keys)["cost"].to_numpy(float)
    needed = [_log_cost(curves[run], loss) for run, loss in zip(pairs["run_pair"], pairs["level_value"], strict=True)]
    log_gains = np.array(needed) - np.log(spent)
    if outside := int((~np.isfinite(log_gains)).sum()):
        return Flag(
            kind="no_gain_outside", subject=contrast.level, number=outside, more=(contrast.baseline, len(pairs))
        )
    table = pairs[["run_pair"]].assign(gain=log_gains, size=pairs.get("size", "one"))
    runs = table.groupby("run_pair").agg(gain=("gain", "mean"), size=("size", "first"))
    mean, half, *_ = mean_of(runs["gain"], runs["size"])
    factor, low, high = (float(np.exp(each)) for each in (mean, mean - half, mean + half))
    return Gain(
        level=contrast.level,
        baseline=contrast.baseline,
        factor=factor,
        low=low,
        high=high,
        num_run_pairs=contrast.num_run_pairs,
    )


def _log_cost(losses: pd.Series, loss: float) -> float:
    """ln cost at which a curve, by cost, reaches a loss; NaN outside it, or where it does not fall throughout."""
    losses = losses.sort_index(ascending=False)
    if not np.all(np.diff(losses) > 0):
        return np.nan
    log_cost = PchipInterpolator(
        np.log(losses.to_numpy(float)), np.log(losses.index.to_numpy(float)), extrapolate=False
    )
    return float(log_cost(np.log(loss)))
