"""Two routes to an unmeasured accuracy: straight from the scale, or by way of the loss; a backtest chooses."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.links import chance_level, forecast, link
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.next.backtest import MIN_HELD_OUT, SHARE

ERROR = "error_rate"
"""Column that the direct route fits: 1 - accuracy."""
ENDS = ("value", "ci_lo", "ci_hi", "pi_lo", "pi_hi")
CEILING = 0.999
"""An accuracy of one has no log error; the direct route takes it for this."""


def chosen_route(
    law: Law, probed: pd.DataFrame, place: pd.DataFrame, *, y: str, kind: str, resamples: int, loss_fit: Fit
) -> tuple[pd.DataFrame, str]:
    """The route that predicts the largest probed scales better, the loss's where none is shown to.

    Args:
        probed: rows of one task with N, D, the loss and `top1`.
        place: variables of the law at the scales to forecast.
        loss_fit: the law fitted to all rows.

    Returns:
        Its forecast (value, ci_lo, ci_hi, pi_lo, pi_hi, a row per scale) and a sentence on the choice.

    Raises:
        AnalysisError: no route can be fitted.
    """
    chance = chance_level(probed)
    two_step = _by_loss(loss_fit, probed, place, y, kind, chance, resamples)
    test = _largest(probed, loss_fit)
    if test is None:
        return two_step, "by way of the loss; too few scales to compare it with the direct route"
    try:
        below = fit(law, probed[~test], y=y, columns=_columns(loss_fit), resamples=2)
        truth = probed.loc[test, "top1"].to_numpy(float)
        steps = _by_loss(below, probed[~test], probed[test], y, kind, chance, 2)["value"].to_numpy()
        straight = _direct(probed[~test], probed[test], loss_fit, chance, 0)["value"].to_numpy()
        whole = _direct(probed, place, loss_fit, chance, resamples)
    except AnalysisError as error:
        return two_step, f"by way of the loss; the direct route could not be tried ({error})"
    misses = [np.abs(truth - each) for each in (steps, straight)]
    gap = misses[0] - misses[1]
    se = float(np.std(gap, ddof=1) / np.sqrt(len(gap)))
    told = f"largest {len(gap)} scales: by the loss {misses[0].mean():.3f} off, direct {misses[1].mean():.3f}"
    if gap.mean() > se:
        return whole, f"straight from the scale ({told}, difference {gap.mean():.3f} ± {se:.3f})"
    return two_step, f"by way of the loss ({told}, difference {gap.mean():.3f} ± {se:.3f})"


def signal_to_noise(probed: pd.DataFrame) -> float:
    """Spread of a task's mean accuracies over scales against that of seeds at one scale; NaN without repeated seeds.

    Below about 3 a task tells rungs apart by luck, and its forecasts are worth little.

    Args:
        probed: rows of one task with params_total, images_seen and `top1`.
    """
    cells = probed.dropna(subset=["top1"]).groupby(["params_total", "images_seen"])["top1"]
    spare = cells.count() - 1
    if spare.sum() < 1 or len(spare) < 2:
        return float("nan")
    noise = float(np.sqrt((cells.var(ddof=1).fillna(0.0) * spare).sum() / spare.sum()))
    return float(cells.mean().std(ddof=1)) / noise if noise > 0 else float("inf")


def _columns(law: Fit) -> dict[str, str]:
    return {v: name for v, name in law.columns.items() if v != "y"}


def _largest(probed: pd.DataFrame, law: Fit) -> Array | None:
    """Rows of largest N D to hold out (mask); None where the rest would be too few."""
    scale = probed[law.columns["N"]].to_numpy(float) * probed[law.columns["D"]].to_numpy(float)
    wanted = max(MIN_HELD_OUT, int(np.ceil(SHARE * len(scale))))
    if len(scale) < wanted + 2 * len(CHINCHILLA.parameters):
        return None
    test = scale >= np.sort(scale)[-wanted]
    return test if (~test).sum() >= 2 * len(CHINCHILLA.parameters) else None


def _by_loss(
    law: Fit, probed: pd.DataFrame, place: pd.DataFrame, y: str, kind: str, chance: float | None, resamples: int
) -> pd.DataFrame:
    second = link(probed, kind=kind, loss=y, accuracy="top1", chance=chance, resamples=resamples)
    table = forecast(law, second, place).table
    return _bounded(table.rename(columns={"accuracy": "value"}).reset_index(drop=True), chance)


def _direct(probed: pd.DataFrame, place: pd.DataFrame, law: Fit, chance: float | None, resamples: int) -> pd.DataFrame:
    """Chinchilla's form of the error rate: E + A N^-alpha + B D^-beta, as accuracies."""
    rows = probed.assign(**{ERROR: 1 - probed["top1"].clip(upper=CEILING)})
    names = {v: law.columns[v] for v in ("N", "D")}
    found = fit(CHINCHILLA, rows, y=ERROR, columns=names, resamples=resamples).predict(place)
    swapped = {"value": "value", "ci_lo": "ci_hi", "ci_hi": "ci_lo", "pi_lo": "pi_hi", "pi_hi": "pi_lo"}
    turned = {name: 1 - found[other].to_numpy(float) for name, other in swapped.items()}
    return _bounded(pd.DataFrame(turned), chance)


def _bounded(table: pd.DataFrame, chance: float | None) -> pd.DataFrame:
    """Accuracies within [chance, 1]; one measurement may fall below chance by its own scatter."""
    floor = 0.0 if chance is None else chance
    return pd.DataFrame({n: table[n].clip(lower=0.0 if n.startswith("pi") else floor, upper=1.0) for n in ENDS})
