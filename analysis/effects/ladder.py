"""Short ladders of two recipes: a few rungs that grow in N and in D, too few for a law of each.

Both recipes follow one law of compute, of which the second one counts as `gain` times as much as it has:

    L = E + A (gain C)^-a,    gain = 1 for the baseline

so a ladder of four rungs has four parameters for eight losses, and the gain in compute is one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from aimscale.analysis.distributions import t_above, t_below, t_quantile
from aimscale.analysis.effects.result import POWER
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE, half_width
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import Columns, Law, Parameter, Params, Terms, coefficient, exponent
from aimscale.analysis.table.groups import shared_budgets

MOST_RUNGS, GROWS = 5, 0.5
"""Rungs of a recipe up to which a ladder is short, and correlation of ln N and of ln D with ln C from which it is one:
rungs at the best size of their budget do not move in one line."""
LADDER_LAWS = ("power_offset:C", "power:C")
"""Laws of a short ladder: with an irreducible loss E, or without one."""
LARGEST_GAIN = 1000.0
MOST_SEEDS = 30
MIN_TREND = 4
"""Rungs that both recipes share, from which a change of the gain with compute is tested."""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Gain of a recipe by one law of both."""

    law: Fit
    log_gain: float
    error: float
    """Standard error of the logarithm of the gain."""
    degrees: float

    @property
    def half(self) -> float:
        """Half of the width of the interval of the logarithm."""
        return float(half_width(np.array(self.error), np.array(self.degrees)))

    @property
    def probability(self) -> float:
        """Probability that the recipe is better, that its gain is above 1."""
        return float(t_below(self.log_gain / self.error, self.degrees))

    def measured(self, points: pd.DataFrame) -> pd.Series:
        """Return the logarithms of the gains that losses at about equal C show, by the slope of the law there."""
        rungs = points.assign(C=shared_budgets(points), y=np.log(points["y"]))
        losses = rungs.pivot_table("y", "C", "G").dropna()
        flops, step, estimate = losses.index.to_numpy(float), 1e-3, self.law.estimate
        sides = [{"C": flops * np.exp(move), "G": np.ones_like(flops)} for move in (-step, step)]
        low, high = (estimate.law_at(each)(estimate.params) for each in sides)
        return (losses[2.0] - losses[1.0]) / ((high - low) / (2 * step))

    @staticmethod
    def trend(measured: pd.Series) -> tuple[float, float]:
        """Return the change of a gain (its logarithms by compute) for each factor ten of compute, as a factor, with the
        probability of such a change of one gain; (NaN, 1) for fewer than four rungs."""
        logs, num = np.log10(measured.index.to_numpy(float)), len(measured)
        if num < MIN_TREND:
            return float("nan"), 1.0
        design = np.column_stack([np.ones(num), logs - logs.mean()])
        slope = design[:, 1] @ measured.to_numpy() / (design[:, 1] @ design[:, 1])
        residual = measured.to_numpy() - measured.mean() - slope * design[:, 1]
        error = np.sqrt(residual @ residual / (num - 2) / (design[:, 1] @ design[:, 1]))
        return float(np.exp(slope)), float(2 * t_above(abs(slope) / max(error, 1e-12), num - 2))

    def seeds(self) -> int | None:
        """Count the further seeds of both recipes at every rung that would tell the gain from 1; None for more than
        `MOST_SEEDS`."""
        runs = self.law.num_points
        for seeds in range(1, MOST_SEEDS + 1):
            needed = t_quantile([0.5 + CONFIDENCE / 2, POWER], self.degrees + runs * seeds).sum()
            if needed * self.error / np.sqrt(1 + seeds) < abs(self.log_gain):
                return seeds
        return None


def is_short(points: pd.DataFrame) -> bool:
    """Tell whether the recipes (G = 1, 2) of points with N, D and C are a short ladder: each rung has a compute of its
    own, and N and D grow with it."""
    rungs = points.groupby("G")[["N", "D"]].apply(lambda rows: len(rows.drop_duplicates()))
    budgets = shared_budgets(points).groupby(points["G"]).nunique()
    if rungs.max() > MOST_RUNGS or not rungs.equals(budgets):
        return False
    n, d, c = np.log(points[["N", "D", "C"]].to_numpy(float)).T
    return bool(min(np.corrcoef(n, c)[0, 1], np.corrcoef(d, c)[0, 1]) >= GROWS)


def ladder_law(name: str) -> Law:
    """Make the law of two recipes, of C and of G, which is 1 for the baseline and 2 for the other one.

    Raises:
        AnalysisError: the name is none of `LADDER_LAWS`.
    """
    if name not in LADDER_LAWS:
        raise AnalysisError(f"Recipes are compared by one of {', '.join(LADDER_LAWS)}, not by {name!r}.")
    offset = name.startswith("power_offset")
    gain = Parameter(name="gain", bounds=(1 / LARGEST_GAIN, LARGEST_GAIN), log=True)
    return Law(
        name="two_recipes",
        formula=f"L = {'E + ' * offset}A (gain C)^-a",
        variables=("C", "G"),
        linear=(*[coefficient("E")] * offset, coefficient("A")),
        nonlinear=(exponent("a"), gain),
        basis=partial(_two_recipes, offset=offset),
        constants={"C0": 1.0},
        source="a law of compute (M2 of Alabdulmohsin et al. 2022) that two recipes share but for a gain",
    )


def _two_recipes(x: Columns, t: Params, *, offset: bool) -> Terms:
    logs = x.log("C") - np.log(t["C0"]) + (x["G"] - 1.0) * np.log(t["gain"])
    return *[1.0] * offset, np.exp(-t["a"] * logs)


def fit_ladder(points: pd.DataFrame, law: str = LADDER_LAWS[0], fixed: Mapping[str, float] | None = None) -> Ladder:
    """Fit the law of both recipes to C, G (1, 2) and y.

    Args:
        fixed: parameters that are held at a value, such as E.
    """
    result = fit(points[["C", "G", "y"]], ladder_law(law), y="y", fixed=fixed, is_tested=False)
    value, error, degrees = result.estimate.error_of(lambda params: np.log(params["gain"])[..., None])
    return Ladder(law=result, log_gain=float(value[0]), error=float(error[0]), degrees=float(degrees[0]))
