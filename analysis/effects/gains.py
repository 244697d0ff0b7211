"""What a change is worth in compute: how many times as much the worse setting needs to reach the loss of the better.

Two answers. At one size: a monotone curve through the baseline's own budgets says at which compute it has the level's
loss; no law is assumed, and the level must lie inside them. Along the compute-optimal frontier of a law
E + A N^-alpha + B D^-beta: the loss above E falls as C^-a with a = alpha beta / (alpha + beta), so two losses at the
same scale are (L - E)^(1/a) apart in compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator
from scipy.stats import norm
from scipy.stats import t as student

from aimscale.analysis.display import plain_types
from aimscale.analysis.effects.compared import Contrast, Contrasts
from aimscale.analysis.effects.contrasts import level_name
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.table.design import with_size
from aimscale.analysis.table.points import complete, usable_rows

MIN_VALID = 0.9
"""A law of which more draws than the rest of this put E above a measured loss says nothing about gains."""

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
    """Lower end of its interval, over pairs of runs and the law's E and exponent."""
    high: float
    growth: float
    """Factor by which `factor` changes when N grows tenfold; NaN where sizes do not vary."""
    growth_low: float
    growth_high: float
    num_run_pairs: int
    confidence: float
    at_one_size: bool = False
    """Read off the baseline's own budgets at the same size, not along the compute-optimal frontier of a law."""

    def sentence(self) -> str:
        """Worth with its interval, and whether it grows with size."""
        how = " at the same size" if self.at_one_size else ""
        if not self.high / self.low < UNKNOWN:
            return f"What {self.level} is worth in compute{how} cannot be told from {self.num_run_pairs} pairs of runs."
        text = (
            f"{self.level} is worth {self.factor:.2f} times the compute of {self.baseline}{how} "
            f"[{self.low:.2f}, {self.high:.2f}] over {self.num_run_pairs} pairs of runs"
        )
        if not np.isfinite(self.growth_low):
            return f"{text}; whether that changes with size cannot be told."
        moves = (
            f"({self.growth:.2f} times for ten times the parameters [{self.growth_low:.2f}, {self.growth_high:.2f}])"
        )
        if self.growth_low > 1:
            return f"{text}, and that grows with size {moves}."
        if self.growth_high < 1:
            return f"{text}, and that shrinks with size {moves}."
        return f"{text}; that is not shown to change with size {moves}."

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return plain_types(vars(self) | {"sentence": self.sentence()})


def with_gains(found: Contrasts, frame: pd.DataFrame, *, resamples: int = 300) -> Contrasts:
    """The contrasts with the compute-equivalent gains of every level in the validation loss, at one size and by a law.

    The law is fitted to the baseline's rows; where it cannot be, or says nothing about gains, that is left out by name.
    """
    losses = [each for each in found.contrasts if each.measure.column == "val_loss" and each.num_run_pairs > 1]
    if not losses or found.by not in frame.columns or "params_total" not in frame.columns:
        return found
    if found.by in ASKS_OTHERWISE:
        why = f"Compute-equivalent gains are left out: losses at other {found.by} differ in what is asked."
        return replace(found, left_out=(*found.left_out, why))
    frame = with_size(frame)
    rows = complete(frame)
    rows = rows[rows[found.by].map(level_name, na_action="ignore") == found.baseline]
    left_out = list(found.left_out)
    sizes = {str(k): float(v) for k, v in frame.groupby("size")["params_total"].median().items()}
    gains: list[Gain] = []
    for each in losses:
        own = gain_at_one_size(each, frame, found.by, sizes)
        if isinstance(own, Gain):
            gains.append(own)
        elif own:
            left_out.append(own)
    try:
        law = fit(CHINCHILLA, rows, resamples=resamples)
        gains += [gain_of(each, law, sizes) for each in losses]
    except AnalysisError as error:
        left_out.append(f"Compute-equivalent gains are left out: {error}")
    return replace(found, gains=tuple(gains), left_out=tuple(left_out))


def gain_of(contrast: Contrast, law: Fit, sizes: Mapping[str, float]) -> Gain:
    """The gain of one contrast by a law of the baseline.

    Args:
        law: Chinchilla's law fitted to the baseline's rows, with draws.
        sizes: size -> N, for the trend; empty for none.

    Raises:
        AnalysisError: the law leaves E above measured losses, or does not identify it.
    """
    pairs = contrast.pairs
    point = _log_gains(pairs, {name: np.array([v]) for name, v in law.law_params.items()})[0]
    draws = _log_gains(pairs, law.draws)
    valid = np.all(np.isfinite(draws), axis=1)
    if not np.all(np.isfinite(point)) or np.mean(valid) < MIN_VALID:
        raise AnalysisError(
            f"the limit E of the law of {contrast.baseline} reaches up to measured losses, so the compute between two "
            "losses is unknown; add larger sizes or more data."
        )
    return _gain(contrast, point, draws[valid], sizes)


def gain_at_one_size(contrast: Contrast, frame: pd.DataFrame, by: str, sizes: Mapping[str, float]) -> Gain | str:
    """The gain read off the baseline's own curves, or why there is none; an empty string where it has no curves."""
    pairs = contrast.pairs
    keys = [name for name in pairs.columns if name not in ("run_pair", "baseline_value", "level_value", "difference")]
    if "images_seen" not in keys:
        return ""
    rows = usable_rows(frame).rows
    has_flops = "flops_train" in rows and bool(rows["flops_train"].notna().all())
    rows = rows.assign(cost=rows["flops_train" if has_flops else "images_seen"])
    names = rows[by].map(level_name, na_action="ignore")
    base, level = (
        rows[names == each].groupby(keys, dropna=False)[["val_loss", "cost"]].mean().reset_index()
        for each in (contrast.baseline, contrast.level)
    )
    run_keys = [name for name in keys if name != "images_seen"]
    runs = pairs.drop_duplicates("run_pair")[[*run_keys, "run_pair"]]
    curves = {
        run: curve.set_index("cost")["val_loss"] for run, curve in runs.merge(base, on=run_keys).groupby("run_pair")
    }
    if min(map(len, curves.values())) < MIN_BUDGETS:
        return ""
    spent = pairs[keys].merge(level, on=keys)["cost"].to_numpy(float)
    needed = [_log_cost(curves[run], loss) for run, loss in zip(pairs["run_pair"], pairs["level_value"], strict=True)]
    point = np.array(needed) - np.log(spent)
    if outside := int((~np.isfinite(point)).sum()):
        return (
            f"What {contrast.level} is worth in compute at the same size is left out: {outside} of {len(point)} losses "
            f"lie outside those of the budgets of {contrast.baseline}, or these do not fall from budget to budget."
        )
    return replace(_gain(contrast, point, point[None], sizes), at_one_size=True)


def _log_cost(losses: pd.Series, loss: float) -> float:
    """ln cost at which a curve, by cost, reaches a loss; NaN outside it, or where it does not fall throughout."""
    losses = losses.sort_index(ascending=False)
    if not np.all(np.diff(losses) > 0):
        return np.nan
    log_cost = PchipInterpolator(
        np.log(losses.to_numpy(float)), np.log(losses.index.to_numpy(float)), extrapolate=False
    )
    return float(log_cost(np.log(loss)))


def _gain(contrast: Contrast, point: Array, draws: Array, sizes: Mapping[str, float]) -> Gain:
    """Mean and trend of the pairs' log gains, with what the law's draws add to their errors."""
    pairs = contrast.pairs
    log_n = np.log10(pairs["size"].astype(str).map(dict(sizes)).to_numpy(float)) if "size" in pairs and sizes else None
    runs = pairs["run_pair"].to_numpy()
    mean, mean_se, spare = _mean(point, runs)
    slope, slope_se, slope_spare = _slope(point, runs, log_n)
    law_sd = _spread(np.array([_mean(draw, runs)[0] for draw in draws]))
    slope_sd = _spread(np.array([_slope(draw, runs, log_n)[0] for draw in draws]))
    half = _half(mean_se, spare, law_sd, contrast.confidence)
    slope_half = _half(slope_se, slope_spare, slope_sd, contrast.confidence)
    return Gain(
        level=contrast.level,
        baseline=contrast.baseline,
        factor=float(np.exp(mean)),
        low=float(np.exp(mean - half)),
        high=float(np.exp(mean + half)),
        growth=float(np.exp(slope)),
        growth_low=float(np.exp(slope - slope_half)),
        growth_high=float(np.exp(slope + slope_half)),
        num_run_pairs=contrast.num_run_pairs,
        confidence=contrast.confidence,
    )


def _log_gains(pairs: pd.DataFrame, params: Mapping[str, Array]) -> Array:
    """ln of the compute that the level is worth (draws, pairs); NaN where E lies above a loss."""
    limit = np.asarray(params["E"])[:, None]
    exponent = 1 / (1 / np.asarray(params["alpha"]) + 1 / np.asarray(params["beta"]))
    base, level = (pairs[name].to_numpy(float)[None] - limit for name in ("baseline_value", "level_value"))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(base / level) / exponent[:, None]


def _by_run(values: Array, runs: Array) -> Array:
    """Means over the rows of each pair of runs."""
    return pd.Series(values).groupby(runs).mean().to_numpy()


def _mean(values: Array, runs: Array) -> tuple[float, float, int]:
    """Mean over pairs of runs, its standard error, degrees of freedom."""
    each = _by_run(values, runs)
    return float(each.mean()), float(np.std(each, ddof=1) / np.sqrt(len(each))), len(each) - 1


def _slope(values: Array, runs: Array, log_n: Array | None) -> tuple[float, float, int]:
    """Least-squares slope of the gain over log10 N, over pairs of runs; NaN where N does not vary or pairs are few."""
    if log_n is None:
        return np.nan, np.nan, 0
    y, x = _by_run(values, runs), _by_run(log_n, runs)
    spare = len(y) - 2
    if spare < 1 or np.ptp(x) < 1e-9:
        return np.nan, np.nan, 0
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    rest = y - y.mean() - slope * centred
    return slope, float(np.sqrt(rest @ rest / spare / (centred @ centred))), spare


def _spread(draws: Array) -> float:
    """Robust standard deviation of draws."""
    if not np.all(np.isfinite(draws)):
        return np.nan
    low, high = np.percentile(draws, [15.87, 84.13])
    return float(high - low) / 2


def _half(se: float, spare: int, law_sd: float, confidence: float) -> float:
    """Half width: Student's of the pairs and the normal one of the law, added in squares."""
    if spare < 1:
        return np.nan
    tail = 0.5 + confidence / 2
    return float(np.hypot(student.ppf(tail, spare) * se, norm.ppf(tail) * law_sd))
