"""A table measured again through its own design, to see how far an approach errs on it: by noise, and by its own bias.

The joint law is fitted with its errors of sizes, runs and points, and simulated (a parametric bootstrap): what an
approach finds on a simulated table, less the fitted law's optimum, is its error. The errors count everything that the
design does to an approach: few budgets, interpolated rows, grids off the centre, alpha other than beta.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.groups import Groups, groups_of
from aimscale.analysis.fitting.result import Interval, interval
from aimscale.analysis.frontier.optimum import Cost, optimum_of
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
        law = fit(CHINCHILLA, points, y="loss", resamples=num_tables, seed=seed)
    except AnalysisError:
        return None
    if law.errors is None or {"a", "alpha", "beta"} & law.not_identified:
        return None
    x = {v: points[v].to_numpy(float) for v in ("N", "D")}
    shared = groups_of(points, x)
    groups = Groups(**{name: codes for name, codes in shared.named.items() if name in law.groups.named})
    errors = law.errors.simulate(np.ones(len(points)), groups, num_tables, np.random.default_rng([seed, 3]))
    params = {name: np.array([value]) for name, value in law.law_params.items()}
    optimum = np.stack(optimum_of(params, cost), axis=1)
    return Simulated(
        log_losses=np.log(law.law.value(x, law.law_params)) + errors, optima=np.repeat(optimum, num_tables, 0)
    )


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
    return replace(interval(draws[:, 1], 0.95), method=method)


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
