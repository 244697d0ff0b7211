"""The frontier by one approach: N*(C) = k C^a with intervals, and the optimum at any amount of compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import half_width
from aimscale.analysis.fitting.inference import CONFIDENCE
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.laws.base import Array
from aimscale.analysis.optimum.cost import Cost
from aimscale.analysis.words import Flag, power_of_ten, refusal_words


class NoFrontier(AnalysisError):
    """An approach that a table does not allow."""

    def __init__(self, *flags: Flag) -> None:
        super().__init__(why_not(flags))
        self.flags = flags
        """The reason first, then the amounts of compute that were refused."""


def why_not(flags: Sequence[Flag]) -> str:
    """Say why an approach was not possible."""
    return f"{flags[0]}; {refusal_words(flags[1:])}" if flags[1:] else str(flags[0])


def student_interval(value: float, error: float, degrees: float, method: str = "") -> Interval:
    """Return the 95 % interval of a value with a standard error."""
    half = float(half_width(error, degrees, CONFIDENCE))
    return Interval(low=value - half, high=value + half, method=method)


Optimum = Callable[[Array], tuple[Array, Array, Array]]
"""Budgets (m,) -> ln N* (m,), its standard errors (m,) and their degrees of freedom (m,)."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Frontier(Result):
    """N*(C) = k C^a by one approach."""

    approach: int
    """1 envelope of the sizes' losses, 2 iso-FLOP parabolas, 3 parametric law."""
    method: str
    """Method in words."""
    exponent: float
    """a, of N*(C)."""
    exponent_interval: Interval
    optimum: Optimum = field(repr=False)
    """ln N* at amounts of compute, with its errors."""
    cost: Cost
    pairs: pd.DataFrame
    """The optima that the line goes through: C, N, D, loss (approaches 1 and 2)."""
    refusals: tuple[Flag, ...]
    """Budgets left out and why; their number is C."""
    range: tuple[float, float]
    """Smallest and largest C used."""
    law: Fit | None = field(default=None, repr=False)
    """The law of approach 3."""
    flags: tuple[Flag, ...] = ()
    """Errors that the interval does not count."""

    def at(self, flops: Any) -> pd.DataFrame:
        """Return the optimum at budgets.

        Returns:
            Columns C, N, N_lo, N_hi, D, D_lo, D_hi, of approach 3 loss, loss_lo, loss_hi, and beyond_range, the factor
            above the largest C used (1 within).
        """
        c = np.atleast_1d(np.asarray(flops, float))
        log_n, errors, degrees = self.optimum(c)
        half = half_width(errors, degrees, CONFIDENCE)
        n, n_lo, n_hi = np.exp([log_n, log_n - half, log_n + half])
        d, d_lo, d_hi = (self.cost.samples(c, each) for each in (n, n_hi, n_lo))
        out = {"C": c, "N": n, "N_lo": n_lo, "N_hi": n_hi, "D": d, "D_lo": d_lo, "D_hi": d_hi}
        if self.law is not None:
            predicted = self.law.predict({"N": n, "D": d, "U": d, "C": c})
            out |= {"loss": predicted["value"], "loss_lo": predicted["ci_lo"], "loss_hi": predicted["ci_hi"]}
        return pd.DataFrame({**out, "beyond_range": np.maximum(1.0, c / self.range[1])})

    def headline(self) -> str:
        """Say the exponent with its interval."""
        return f"Approach {self.approach}: N*(C) ~ C^{self.exponent:.3f} {self.exponent_interval.words()}"

    def facts(self) -> list[tuple[str, str]]:
        """List what the interval does not count, how it and the exponent were found, and what was left out."""
        left = f"; left out: {refusal_words(self.refusals)}" if self.refusals else ""
        found = f"{self.method}; interval: {self.exponent_interval.method}{left}"
        return [*(("with care", str(flag)) for flag in self.flags), (f"approach {self.approach}", found)]

    def cells(self) -> list[dict[str, str]]:
        """Write one row: the exponent with its interval, the range of C."""
        low, high = (power_of_ten(c, 3) for c in self.range)
        row = {"approach": str(self.approach), "N* ~ C^a": f"{self.exponent:.3f}"}
        return [{**row, "95 % interval": self.exponent_interval.words(), "C (FLOP)": f"{low} to {high}"}]

    @property
    def table(self) -> pd.DataFrame:
        """One row: approach, exponent, low, high, method, refused."""
        i = self.exponent_interval
        row = {"approach": self.approach, "exponent": self.exponent, "low": i.low, "high": i.high}
        return pd.DataFrame([{**row, "method": self.method, "refused": len(self.refusals)}])

    def exponent_words(self) -> str:
        """Write the exponent with its interval."""
        return f"{self.exponent:.2f} {self.exponent_interval.words('.2f')}"
