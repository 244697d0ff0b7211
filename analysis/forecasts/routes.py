"""Two routes to an unmeasured accuracy: straight from the scale, or by way of the loss; a backtest chooses."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.links import chance_level, forecast, link
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.holdout import largest
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Law
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.words import Flag

ERROR = "error_rate"
"""Column that the direct route fits: 1 - accuracy."""
ENDS = ("value", "ci_lo", "ci_hi", "pi_lo", "pi_hi")
CEILING = 0.999
"""An accuracy of one has no log error; the direct route takes it for this."""


MIN_TRAIN = 2 * len(CHINCHILLA.parameters)
"""Rows that must be left to fit the direct route to, for the two to be compared."""


def chosen_route(
    law: Law, probed: pd.DataFrame, place: pd.DataFrame, *, y: str, kind: str, resamples: int, loss_fit: Fit
) -> tuple[pd.DataFrame, Flag]:
    """The route that predicts the largest probed scales better, the loss's where none is shown to.

    Args:
        probed: rows of one task with N, D, the loss and `top1`.
        place: variables of the law at the scales to forecast.
        loss_fit: the law fitted to all rows.

    Returns:
        Its forecast (value, ci_lo, ci_hi, pi_lo, pi_hi, a row per scale) and why it was chosen.

    Raises:
        AnalysisError: no route can be fitted.
    """
    chance = chance_level(probed)
    two_step = _by_loss(loss_fit, probed, place, y, kind, chance, resamples)
    columns = {v: name for v, name in loss_fit.columns.items() if v in law.variables}
    try:
        test = largest(probed[loss_fit.columns["N"]].to_numpy(float) * probed[loss_fit.columns["D"]].to_numpy(float))
        if (~test).sum() < MIN_TRAIN:
            raise AnalysisError(f"{(~test).sum()} smaller scales are too few.")
        below = fit(law, probed[~test], y=y, columns=columns, resamples=2)
        steps = _by_loss(below, probed[~test], probed[test], y, kind, chance, 2)["value"].to_numpy()
        straight = _direct(probed[~test], probed[test], loss_fit, chance, 0)["value"].to_numpy()
        whole = _direct(probed, place, loss_fit, chance, resamples)
    except AnalysisError as error:
        return two_step, Flag(kind="one_route", subject=str(error))
    misses = [np.abs(probed.loc[test, "top1"].to_numpy(float) - each) for each in (steps, straight)]
    gap = misses[0] - misses[1]
    se = float(np.std(gap, ddof=1) / np.sqrt(len(gap)))
    told = (len(gap), float(misses[0].mean()), float(misses[1].mean()), se)
    is_direct = gap.mean() > se
    return (whole if is_direct else two_step), Flag(
        kind="route",
        subject="straight from the scale" if is_direct else "by way of the loss",
        number=gap.mean(),
        more=told,
    )


def signal_to_noise(probed: pd.DataFrame) -> float:
    """Spread of a task's mean accuracies over scales against that of seeds at one scale; NaN without repeated seeds.

    Below about 3 a task tells rungs apart by luck, and its forecasts are worth little.

    Args:
        probed: rows of one task with params_total, images_seen and `top1`.
    """
    if not {"params_total", "images_seen"} <= set(probed.columns):
        return float("nan")
    cells = probed.dropna(subset=["top1"]).groupby(["params_total", "images_seen"])["top1"]
    spare = cells.count() - 1
    if spare.sum() < 1 or len(spare) < 2:
        return float("nan")
    noise = float(np.sqrt((cells.var(ddof=1).fillna(0.0) * spare).sum() / spare.sum()))
    return float(cells.mean().std(ddof=1)) / noise if noise > 0 else float("inf")


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
