"""What an approach finds: N*(C) = k C^a with intervals, and the cost of training as a table has it.

The cost is C = kappa N^(1+s) D, so that 6ND (s = 0, kappa = 6) and counted FLOPs (attention, head and patches included;
kappa holds the tokens per image) go through the same algebra; so do the three meanings of N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.table.names import no_column
from aimscale.analysis.table.points import resolve_columns, usable_rows
from aimscale.analysis.words import Flag, power_of_ten, refusal_words


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Training FLOPs as C = kappa N^(1 + s) D."""

    kappa: float
    """FLOPs per parameter and sample at N = 1."""
    s: float
    """How much faster than N the FLOPs of a sample grow; 0 for 6ND."""

    def samples(self, flops: Array, num_params: Array) -> Array:
        """D that the budget buys at a size."""
        return flops / (self.kappa * num_params ** (1 + self.s))

    def flops(self, num_params: Array, samples: Array) -> Array:
        """C of training a size on so many samples."""
        return self.kappa * num_params ** (1 + self.s) * samples


def cost_of(num_params: Array, samples: Array, flops: Array) -> Cost:
    """Fit kappa and s to a table's N, D and C."""
    per_sample = np.log(flops / (num_params * samples))
    if np.ptp(np.log(num_params)) == 0 or np.ptp(per_sample) < 1e-9:
        s, intercept = 0.0, float(np.mean(per_sample))
    else:
        s, intercept = (float(v) for v in np.polyfit(np.log(num_params), per_sample, 1))
    return Cost(kappa=float(np.exp(intercept)), s=s)


def points_of(df: pd.DataFrame, y: str, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """N, D, C and loss of the usable rows, under these names, with what tells sizes and runs apart (index kept).

    Raises:
        AnalysisError: a column is missing or no row is left.
    """
    given = {v: name for v, name in (columns or {}).items() if v in ("N", "D")}
    found = resolve_columns(CHINCHILLA, df, given)
    found["C"] = (columns or {}).get("C", "C" if "C" in df.columns else "flops_train")
    for name in (found["C"], y):
        if name not in df.columns:
            raise no_column(df, name)
    used = usable_rows(df, {**found, "loss": y}, best_by="loss")
    if used.numbers.empty:
        raise AnalysisError("No row of the table has positive N, D, C and loss, so there is no frontier to draw.")
    return used.numbers.assign(**{name: used.rows[name] for name in ("size", "run_id", "seed") if name in df.columns})


class NoFrontier(AnalysisError):
    """An approach that a table does not allow."""

    def __init__(self, *flags: Flag) -> None:
        super().__init__(why_not(flags))
        self.flags = flags
        """Why: the reason first, then the amounts of compute that were refused."""


def why_not(flags: Sequence[Flag]) -> str:
    """Why an approach was not possible."""
    return f"{flags[0]}; {refusal_words(flags[1:])}" if flags[1:] else str(flags[0])


Optimum = Callable[[Array], tuple[Array, Array, Array]]
"""Budgets (m,) -> ln N* (m,), its standard errors (m,) and their degrees of freedom (m,)."""


def student_interval(value: float, error: float, degrees: float) -> Interval:
    """95 % interval of a value with a standard error."""
    half = float(half_width(error, degrees, CONFIDENCE))
    return Interval(low=value - half, high=value + half)


@dataclass(frozen=True, kw_only=True, repr=False)
class Frontier(Result):
    """N*(C) = k C^a by one approach."""

    approach: int
    """1 envelope of the sizes' losses, 2 iso-FLOP parabolas, 3 parametric law."""
    method: str
    """How, in words."""
    exponent: float
    """a, of N*(C)."""
    exponent_interval: Interval
    optimum: Optimum = field(repr=False)
    """ln N* at amounts of compute, with its errors."""
    cost: Cost
    pairs: pd.DataFrame
    """The optima the line goes through: C, N, D, loss (approaches 1 and 2)."""
    refusals: tuple[Flag, ...]
    """Budgets left out and why; their number is C."""
    range: tuple[float, float]
    """Smallest and largest C used."""
    law: Fit | None = field(default=None, repr=False)
    """The law of approach 3."""

    def at(self, flops: Any) -> pd.DataFrame:
        """Optimum at budgets: C, N, N_lo, N_hi, D, D_lo, D_hi, beyond_range, and by approach 3 loss, loss_lo, loss_hi.

        `beyond_range` is the factor above the largest C used (1 within).
        """
        c = np.atleast_1d(np.asarray(flops, float))
        log_n, errors, degrees = self.optimum(c)
        half = half_width(errors, degrees, CONFIDENCE)
        n, n_lo, n_hi = np.exp([log_n, log_n - half, log_n + half])
        out = {"C": c, "N": n, "N_lo": n_lo, "N_hi": n_hi, "D": self.cost.samples(c, n)}
        out |= {"D_lo": self.cost.samples(c, n_hi), "D_hi": self.cost.samples(c, n_lo)}
        if self.law is not None:
            x = {"N": n, "D": out["D"], "U": out["D"], "C": c}
            predicted = self.law.predict(x)
            out |= {"loss": predicted["value"], "loss_lo": predicted["ci_lo"], "loss_hi": predicted["ci_hi"]}
        return pd.DataFrame({**out, "beyond_range": np.maximum(1.0, c / self.range[1])})

    def headline(self) -> str:
        """The exponent with its interval."""
        return f"Approach {self.approach}: N*(C) ~ C^{self.exponent:.3f} {self.exponent_interval.words()}"

    def facts(self) -> list[tuple[str, str]]:
        """How the exponent and its interval were found, and what was left out."""
        left = f"; left out: {refusal_words(self.refusals)}" if self.refusals else ""
        return [(f"approach {self.approach}", f"{self.method}; interval: {self.exponent_interval.method}{left}")]

    def cells(self) -> list[dict[str, str]]:
        """One row: the exponent with its interval, the range of C."""
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
        """The exponent with its interval."""
        return f"{self.exponent:.2f} {self.exponent_interval.words('.2f')}"
