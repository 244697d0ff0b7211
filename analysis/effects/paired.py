"""The error of a difference over pairs of runs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.fitting.covariance import Covariance, linear_design, sandwich
from aimscale.analysis.fitting.groups import groups_of
from aimscale.analysis.fitting.inference import CONFIDENCE

POWER = 0.8
"""Power of a minimum detectable effect."""
LEAST_SIZES = 3
"""Fewer sizes leave one degree of freedom or none to tell by how much sizes differ."""


class Mean(NamedTuple):
    """Mean of a difference over pairs of runs, with its 95 % interval; NaN where nothing tells its error."""

    value: float
    low: float
    high: float
    detectable: float
    """Minimum detectable effect: the true difference that would be significant in 80 % of repetitions."""
    degrees: float
    """Degrees of freedom of the interval."""
    num_budgets: int
    """Budgets whose shared errors the interval holds; 0 where it speaks of these budgets alone."""


def mean_over_pairs(values: pd.Series, pairs: pd.DataFrame) -> Mean:
    """Average differences over pairs of runs, with an error that holds as far as the pairs reach.

    A size or a budget may suit one level better. So from three sizes on the variance is the sum of those clustered by
    sizes and, from three budgets on, by budgets (`fitting.covariance`), and the interval covers others like them. Two
    sizes do not tell how much sizes differ: the error is then that of pairs about the mean of their size (Student's,
    pooled), for these sizes alone. One pair a size has none.

    Args:
        values: a difference per pair of rows.
        pairs: `run_pair`, and `size` and `images_seen` where they are known and not what is compared.
    """
    runs = values.groupby(pairs["run_pair"])
    y, n, num_budgets = runs.mean().to_numpy(float), runs.ngroups, 0
    sizes = pairs.groupby("run_pair")["size"].first().map(str) if "size" in pairs else pd.Series(["one"] * n)
    codes, names = pd.factorize(sizes)
    mean = float(y.mean())
    if len(names) >= LEAST_SIZES:
        clustered = {"sizes": sandwich(linear_design(np.ones((n, 1)), np.ones(n)), y - mean, codes)}
        budgets = groups_of(pairs, {}).get("budgets")
        num_budgets = 0 if budgets is None or budgets.max() + 1 < LEAST_SIZES else int(budgets.max()) + 1
        if budgets is not None and num_budgets:
            weights = 1 / runs.transform("size").to_numpy(float)
            design = linear_design(np.ones((len(pairs), 1)), weights)
            clustered["budgets"] = sandwich(design, values.to_numpy(float) - mean, budgets)
        (se,), (degrees,) = Covariance(by=clustered).of_contrasts(np.ones((1, 1)))
    else:
        degrees = n - len(names) or np.nan
        within = y - pd.Series(y).groupby(codes).transform("mean").to_numpy()
        se = np.sqrt(within @ within / degrees / n)
    half, more = se * student.ppf([0.5 + CONFIDENCE / 2, POWER], degrees)
    return Mean(mean, float(mean - half), float(mean + half), float(half + more), float(degrees), num_budgets)
