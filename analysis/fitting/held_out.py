"""The test of a law on the largest scales, left out of its fit, and its words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd

from aimscale.analysis.display import Result, human, p_value, percent

EXPONENTS = ("alpha", "beta", "aN", "aD", "h")
"""Exponents of N and D in the joint laws: Chinchilla's and its kin, Kaplan's, and that of laws of D / N."""


@dataclass(frozen=True, kw_only=True, repr=False)
class HeldOut(Result):
    """Predictions for the largest scales by a fit to the smaller ones, beside what was measured."""

    variable: str
    """Scale that was held out: N, D, C or another column."""
    values: tuple[float, ...]
    """The held-out values of it."""
    num_train: int
    num_test: int
    mean_abs_relative_error: float
    """Mean of |prediction / measurement - 1|."""
    naive_mean_abs_relative_error: float
    """The same error of the naive baseline, a straight line in log-log."""
    mean_error: float
    """Mean of T(measurement) - T(prediction)."""
    mean_error_sd: float
    """Standard deviation of the mean error by noise, and by the errors of the parameters, if the law is true."""
    p: float
    """Probability of so large a mean error then."""
    not_identified: frozenset[str]
    """Parameters that the points which were left do not pin down: a law with such exponents was not tested."""
    is_blind: bool
    """True if the points that were left hardly tell what all points of one such scale share: intervals assume none."""
    is_chosen_here: bool = False
    """True if the law was chosen among several with the help of the runs that are held out."""
    predictions: pd.DataFrame = field(repr=False)
    """Rows: index of the table, variables, measured, predicted, pi_lo, pi_hi, inside, naive."""

    @property
    def is_test(self) -> bool:
        """True if the points that were left identify the exponents."""
        return not self.not_identified.intersection(EXPONENTS)

    @property
    def is_better(self) -> bool:
        """True if the law predicts better than the naive baseline."""
        return self.mean_abs_relative_error < self.naive_mean_abs_relative_error

    @property
    def num_far(self) -> int:
        """Held-out points at least twice as far from their prediction as the end of its interval on their side."""
        p = self.predictions
        end = p["pi_lo"].where(p["measured"] < p["predicted"], p["pi_hi"])
        return int(((p["measured"] - p["predicted"]) / (end - p["predicted"])).gt(2).sum())

    @property
    def table(self) -> pd.DataFrame:
        """`predictions`."""
        return self.predictions

    def sentence(self) -> str:
        """Write the error on the held-out scale beside the naive baseline."""
        return f"Held out {self.variable}: {self.words()}."

    headline = sentence

    def words(self) -> str:
        """Write the errors without naming the variable first."""
        law, line = (percent(e, 3) for e in (self.mean_abs_relative_error, self.naive_mean_abs_relative_error))
        compared, num = "better" if self.is_better else "no better", self.num_test
        unknown = f"; not identified without them: {', '.join(sorted(self.not_identified))}" * bool(self.not_identified)
        return (
            f"mean error {law} on {num} point{'s' * (num != 1)}, {compared} than a straight line in log-log ({line}); "
            f"on average {abs(self.mean_error) / max(self.mean_error_sd, 1e-300):.2g} standard deviations of noise off "
            f"({p_value(self.p)}); "
            f"{self.predictions['inside'].sum()} of {num} inside their prediction intervals; fitted to the "
            f"{self.num_train} below {self.variable} = {human(min(self.values))}{unknown}"
            f"{'; the law was chosen on all of these runs' * self.is_chosen_here}"
        )

    def caution(self) -> str:
        """Say what the held-out scale speaks against the law; empty where that is nothing."""
        v, law, line = self.variable, *map(percent, (self.mean_abs_relative_error, self.naive_mean_abs_relative_error))
        if not self.is_test:
            return f"The largest {v} hardly tests the law: without it, the exponents are not identified."
        if not self.is_better:
            return f"Fitted without the largest {v}, the law misses it by {law}, a straight line by {line}."
        # the points of one scale may all err alike; so the alarm is on 0 to 6 % of sound tables
        if 2 * self.num_far > self.num_test and not self.is_blind:
            points = f"{self.num_far} of {self.num_test} points of the largest {v}"
            return f"{points} lie more than twice as far off as their prediction intervals reach."
        return ""


def held_out_cautions(tests: Iterable[HeldOut]) -> list[str]:
    """Collect what held-out scales speak against a law."""
    return [caution for test in tests if (caution := test.caution())]
