"""What an approach finds: N*(C) = k C^a with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.result import CONFIDENCE, TAILS, Fit, Interval
from aimscale.analysis.frontier.optimum import Cost
from aimscale.analysis.laws.base import Array
from aimscale.analysis.words import Flag, flag_words


class NoFrontier(AnalysisError):
    """An approach that a table does not allow."""

    def __init__(self, *flags: Flag) -> None:
        super().__init__("; ".join(flag_words(flags)))
        self.flags = flags
        """Why: the reason first, then the budgets that were refused."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Frontier(Result):
    """N*(C) = k C^a by one approach."""

    approach: int
    """1 envelope of training curves, 2 iso-FLOP parabolas, 3 parametric law."""
    method: str
    """How, in words."""
    exponent: float
    """a, of N*(C)."""
    exponent_interval: Interval
    log_k: float
    """ln k."""
    draws: Array = field(repr=False)
    """Draws (num_draws, 2) of (ln k, a)."""
    cost: Cost
    pairs: pd.DataFrame
    """The optima the line goes through: C, N, D, loss (approaches 1 and 2)."""
    refusals: tuple[Flag, ...]
    """Budgets left out and why; their number is C."""
    range: tuple[float, float]
    """Smallest and largest C used."""
    left_out: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Approach 2: exponents without some of its budgets, see `measured.without_budgets`."""
    curve: Callable[[Array], tuple[Array, Array]] | None = field(default=None, repr=False)
    """Approach 3 by a law whose N* is no power of C: budgets (m,) -> ln N* (m,) and draws of it (num_draws, m)."""
    law: Fit | None = field(default=None, repr=False)
    """The law of approach 3."""

    def at(self, flops: Any) -> pd.DataFrame:
        """Optimum at budgets: C, N, N_lo, N_hi, D, D_lo, D_hi, beyond_range, and by approach 3 loss, loss_lo, loss_hi.

        `beyond_range` is the factor above the largest C used (1 within).
        """
        c = np.atleast_1d(np.asarray(flops, float))
        log_n, log_draws = self.log_sizes(c)
        n, n_draws = np.exp(log_n), np.exp(log_draws)
        n_lo, n_hi = np.percentile(n_draws, TAILS, axis=0) if len(n_draws) else np.full((2, len(c)), np.nan)
        out = {"C": c, "N": n, "N_lo": n_lo, "N_hi": n_hi, "D": self.cost.samples(c, n)}
        out |= {"D_lo": self.cost.samples(c, n_hi), "D_hi": self.cost.samples(c, n_lo)}
        if self.law is not None:
            x = {"N": n, "D": out["D"], "U": out["D"], "C": c}
            predicted = self.law.predict(x)
            out |= {"loss": predicted["value"], "loss_lo": predicted["ci_lo"], "loss_hi": predicted["ci_hi"]}
        return pd.DataFrame({**out, "beyond_range": np.maximum(1.0, c / self.range[1])})

    def log_sizes(self, flops: Array) -> tuple[Array, Array]:
        """ln N* at budgets (m,) and its finite draws (num, m)."""
        if self.curve is not None:
            log_n, draws = self.curve(flops)
        else:
            log_n = self.log_k + self.exponent * np.log(flops)
            draws = self.draws[:, :1] + self.draws[:, 1:] * np.log(flops)
        return log_n, draws[np.isfinite(draws).all(axis=1)]

    def headline(self) -> str:
        """The exponent with its interval."""
        return f"Approach {self.approach}: N*(C) ~ C^{self.exponent:.3f} {self.exponent_interval.words()}"

    def sentence(self) -> str:
        """The exponent with its interval, method, range and refusals."""
        i = self.exponent_interval
        interval = f"{i.words()} ({CONFIDENCE:.0%}, {i.method})" if i.is_known else f"({i.method})"
        text = (
            f"Approach {self.approach} ({self.method}): N*(C) ~ C^{self.exponent:.3f} {interval}, "
            f"C from {self.range[0]:.3g} to {self.range[1]:.3g} FLOPs."
        )
        text = f"{text} {words}" if (words := self.moving_words()) else text
        return f"{text} Refused: {'; '.join(flag_words(self.refusals))}." if self.refusals else text

    def moving_words(self) -> str:
        """What the exponent is without its ends, and which budget moves it most; nothing where that is not known."""
        if self.left_out.empty:
            return ""
        rows = self.left_out.to_dict("records")
        ones = [row for row in rows if row["which"] == "one"]
        most = max(ones, key=lambda row: abs(row["exponent"] - self.exponent))
        one = f"{most['exponent']:.3f} without C = {most['budgets'][0]:.3g}, the budget that moves it most"
        ends = [f"{row['exponent']:.3f} without the {row['which']}" for row in rows if row["which"] != "one"]
        return f"The exponent is {', '.join([one, *ends])}."

    @property
    def moves(self) -> bool:
        """Whether leaving budgets out moves the exponent out of its interval."""
        i = self.exponent_interval
        return i.is_known and any(not i.low <= a <= i.high for a in self.left_out.get("exponent", ()))

    @property
    def table(self) -> pd.DataFrame:
        """One row: approach, exponent, low, high, method, refused."""
        i = self.exponent_interval
        row = {"approach": self.approach, "exponent": self.exponent, "low": i.low, "high": i.high}
        return pd.DataFrame([{**row, "method": self.method, "refused": len(self.refusals)}])

    def exponent_words(self) -> str:
        """The exponent with its interval."""
        return f"{self.exponent:.2f} {self.exponent_interval.words('.2f')}"
