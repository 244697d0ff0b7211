"""A table measured again through its own design, to see how far an approach errs on it: by noise, and by its own bias.

The joint law is fitted with its errors of sizes, runs and points. Every draw of its parameters is a truth, with the
optimum that it has; of the tables which that truth may give, one is simulated whose fit is the fit of the table at
hand: the fitted law, and what a fit leaves over of errors that took that truth to this fit. What an approach finds on
it, less the draw's optimum, is its error. The errors count everything that the design does to an approach: few budgets,
interpolated rows, grids off the centre, alpha other than beta. (Truths with errors of their own would count twice what
the approach and the fit have in common: a step from size to size, which lies where it lies, then errs by all that the
law may err.) What is left over is as large as on the table at hand, where it was seen: variances drawn anew for it, as
they are for the law's parameters, would count their uncertainty where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.bootstrap import interval
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Interval
from aimscale.analysis.frontier.optimum import Cost, optimum_of
from aimscale.analysis.inference.groups import by_scale, groups_of
from aimscale.analysis.inference.lackoffit import left_over
from aimscale.analysis.inference.mixed import Components, Mixed, simulated_errors
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA

MIN_USABLE = 0.5
"""Share of simulated tables on which an approach must work for its errors to be told from them."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Tables with the design of one that was measured."""

    log_losses: Array
    """ln loss (num_tables, n), in the order of the table's rows."""
    optima: Array
    """(ln k, a) of N*(C) behind every table (num_tables, 2)."""


def simulate(points: pd.DataFrame, cost: Cost, num_tables: int, seed: int) -> Simulated | None:
    """Tables like `points` (columns N, D, C, loss, maybe run_id); None where the joint law cannot be fitted to them."""
    try:
        law = fit(CHINCHILLA, points, y="loss", resamples=num_tables, seed=seed, intervals="mixed")
    except AnalysisError:
        return None
    if law.errors is None or {"a", "alpha", "beta"} & law.not_identified:
        return None
    x = {v: points[v].to_numpy(float) for v in ("N", "D")}
    groups = groups_of(points, x)
    groups = by_scale(groups, x) or groups if law.groups.departs else groups
    sizes = groups.sizes if law.groups.sizes is not None else None
    runs = groups.runs if law.groups.runs is not None else None
    fitted = np.log(law.law.value(x, law.law_params))
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = fitted - np.log(law.law.value(x, law.draws))
        log_losses = fitted + _left_over(law.log_slopes(points), moved, law.errors, sizes, runs, seed)
        optima = np.stack(optimum_of(law.draws, cost), axis=1)
    good = np.isfinite(log_losses).all(axis=1) & np.isfinite(optima).all(axis=1)
    return Simulated(log_losses=log_losses[good], optima=optima[good])


def _left_over(slopes: Array, moved: Array, errors: Mixed, sizes: Array | None, runs: Array | None, seed: int) -> Array:
    """What a fit leaves over (num, n) of errors that moved its law by `moved` (num, n) from the truth.

    Errors that sizes or runs share move the law and stay in the residuals at once, so the two are told together.

    Args:
        slopes: the linearised law (n, k).
        sizes: number of each point's size (n,), or None where sizes share nothing.
        runs: number of each point's run (n,), or None.
    """
    sd = errors.estimated
    size, run, point = (np.broadcast_to(each, len(moved)) for each in (sd.size, sd.run, sd.point))
    same = Components(size=size, run=run, point=point)
    simulated = simulated_errors(same, np.ones(len(slopes)), sizes, runs, np.random.default_rng([seed, 3]))
    basis, _ = np.linalg.qr(slopes)
    covered = sd.covariance_times(basis, sizes, runs)
    share = sd.total / np.maximum(errors.drawn.total, 1e-300)
    missing = share[:, None] * (moved @ basis) - simulated @ basis
    simulated += missing @ np.linalg.pinv(basis.T @ covered, hermitian=True) @ covered.T
    return left_over(slopes, np.ones(len(slopes)), simulated)


def corrected(line: tuple[float, float], found: Array, optima: Array) -> tuple[Array, float] | None:
    """Draws (num, 2) of the (ln k, a) behind an approach's line, and the bias of its exponent.

    Args:
        line: (ln k, a) that the approach found on the table.
        found: what it found on every simulated one (num_tables, 2), NaN where it found nothing.
        optima: what was true there (num_tables, 2).
    """
    usable = np.isfinite(found).all(axis=1)
    if usable.mean() < MIN_USABLE:
        return None
    errors = (found - optima)[usable]
    return np.asarray(line) - errors, float(np.median(errors[:, 1]))


def interval_of(draws: Array, method: str) -> Interval:
    """95 % percentile interval of the exponent."""
    low, high = interval(draws[:, 1], 0.95)
    return Interval(low=low, high=high, confidence=0.95, method=method)


def lines_through(log_c: Array, log_n: Array) -> Array:
    """(ln k, a) of least-squares lines (num, 2) through the finite of (num, m) optima at m budgets; NaN below two."""
    known = np.isfinite(log_n)
    count = known.sum(axis=1)
    y = np.where(known, log_n, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y = (known * log_c).sum(axis=1) / count, y.sum(axis=1) / count
        dx = np.where(known, log_c - mean_x[:, None], 0.0)
        spread = (dx**2).sum(axis=1)
        slope = np.where((count > 1) & (spread > 0), (dx * y).sum(axis=1) / spread, np.nan)
    return np.stack([mean_y - slope * mean_x, slope], axis=1)
