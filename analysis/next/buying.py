"""Which runs to buy next: those that leave the forecast of a target the least variance for their price.

A measurement is taken for law + departure + noise: the law linear in its parameters around its fit, the departure a
smooth field over the logarithms of the law's variables (no law is exact, and it errs alike at scales that lie close
together). So runs that pin the law's parameters down are worth something, and so are runs near the target; the price
decides. What a run is worth depends on what is bought beside it, so they are chosen one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import chi2

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array

Points = pd.DataFrame | Mapping[str, Array]
"""Variables of a law by name, one value a point."""
PRIOR_SD = 1.0
"""Prior standard deviation of every parameter on its own scale: factor e for coefficients and exponents."""
DEPARTURE_SD = 0.01
"""Least standard deviation of the departure, in log loss: what good laws miss by a decade beyond their data."""
DEPARTURE_TO_NOISE = 2.5
"""A law that scatters more departs more: by at least this multiple of the noise."""
DEPARTURE_RANGE = 2.5
"""Length scale of the departure in each logarithm: a factor of 12."""
PRICE_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Gains are divided by these powers of the price in turn, and the best of the baskets is kept: division by the price
itself fills a basket with the cheapest runs, division by 1 spends all on the first."""
DRAWS = 8
"""Bootstrap draws of the fit over which gains are averaged: a design for one poor first fit can be worthless."""


@dataclass(frozen=True, kw_only=True)
class Basket:
    """Runs to buy together."""

    rows: Array
    """Positions among the candidates, in the order of choice."""
    price: float
    """Their price together."""
    sd_before: float
    """Standard deviation of the log forecast at the target (root mean square over targets) before."""
    sd_after: float
    """The same once they are measured."""


def buy(law: Fit, candidates: Points, prices: Array, target: Points, *, budget: float) -> Basket:
    """Choose candidates within a budget that leave the forecast at the target the least variance.

    Args:
        law: a fit to what has been measured.
        candidates: variables of the law (num_candidates,) per run on offer.
        prices: price (num_candidates,), in any unit.
        budget: what may be spent, in the unit of the prices.

    Raises:
        AnalysisError: nothing on offer is within the budget, or a price is not positive.
    """
    prices = np.asarray(prices, float)
    if not np.all(prices > 0):
        raise AnalysisError("Every candidate needs a positive price.")
    if not np.any(prices <= budget):
        raise AnalysisError(f"The cheapest candidate costs {prices.min():.3g}, more than the budget of {budget:.3g}.")
    noise = noise_of(law)
    joint = np.stack([_posterior(each, candidates, target, noise) for each in _plausible(law)])
    baskets = [_fill(joint.copy(), prices, budget, noise, power) for power in PRICE_POWERS]
    return min(baskets, key=lambda basket: basket.sd_after)


def _fill(joint: Array, prices: Array, budget: float, noise: float, power: float) -> Basket:
    """Buy one run after another: the one with the largest gain / price^power that is affordable.

    joint is the covariance (draws, candidates + targets, candidates + targets) and is changed.
    """
    n = len(prices)
    before = _spread(joint, n)
    rows: list[int] = []
    left, unsold = budget, np.ones(n, bool)
    while np.any(affordable := unsold & (prices <= left)):
        variance = np.einsum("kii->ki", joint)
        share = np.sum(joint[:, :n, n:] ** 2, axis=2) / (variance[:, :n] + noise**2)
        gain = np.mean(share / variance[:, n:].sum(axis=1, keepdims=True), axis=0)
        best = int(np.argmax(np.where(affordable, gain / prices**power, -np.inf)))
        column = joint[:, :, best] / np.sqrt(joint[:, best, best] + noise**2)[:, None]
        joint -= column[:, :, None] * column[:, None, :]
        rows.append(best)
        unsold[best], left = False, left - prices[best]
    return Basket(rows=np.array(rows), price=float(prices[rows].sum()), sd_before=before, sd_after=_spread(joint, n))


def _spread(joint: Array, n: int) -> float:
    """Standard deviation at the targets: root mean square over them, median over draws."""
    return float(np.median(np.sqrt(np.mean(np.einsum("kii->ki", joint)[:, n:], axis=1))))


def _plausible(law: Fit) -> list[Fit]:
    """The fit and its bootstrap draws, as fits."""
    draws = [{name: float(values[k]) for name, values in law.draws.items()} for k in range(min(DRAWS, law.num_draws))]
    finite = [draw for draw in draws if np.all(np.isfinite(list(draw.values())))]
    return [law, *(replace(law, law_params=draw) for draw in finite)]


def _posterior(law: Fit, candidates: Points, target: Points, noise: float) -> Array:
    """Covariance of the log losses at candidates and targets, given the points that were fitted."""
    measured = {v: law.data[v].to_numpy(float) for v in law.law.variables}
    offered, wanted = law.variables(candidates), law.variables(target)
    x = {v: np.concatenate([measured[v], offered[v], wanted[v]]) for v in law.law.variables}
    slopes = law.log_slopes(x)
    places = np.stack([np.log(x[v]) for v in law.law.variables], axis=1) / DEPARTURE_RANGE
    distance = np.sum((places[:, None] - places[None]) ** 2, axis=2)
    departure = max(DEPARTURE_SD, DEPARTURE_TO_NOISE * noise)
    joint = PRIOR_SD**2 * slopes @ slopes.T + departure**2 * np.exp(-0.5 * distance)
    m = len(law.data)
    seen = joint[:m, :m] + noise**2 * np.eye(m)
    return joint[m:, m:] - joint[m:, :m] @ np.linalg.solve(seen, joint[:m, m:])


def noise_of(law: Fit) -> float:
    """Standard deviation of the log of a measurement: the upper end (90 %) of what the fit's residuals allow."""
    residuals = np.log(law.data["y"].to_numpy() / law.data["fitted"].to_numpy())
    spare = max(1, law.num_points - len(law.law.parameters))
    robust = 1.4826 * float(np.median(np.abs(residuals))) * np.sqrt(law.num_points / spare)
    return max(1e-4, robust * float(np.sqrt(spare / chi2.ppf(0.1, spare))))
