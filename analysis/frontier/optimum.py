"""Compute-optimal size and data: N*(C) = k C^a, by the three approaches of Hoffmann et al. 2022, with intervals.

The cost of training is read from the table, C = kappa N^(1+s) D, so that 6ND (s = 0, kappa = 6) and counted FLOPs
(attention, head and patches included; kappa holds the tokens per image) go through the same algebra; so do the three
meanings of N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.result import Fit, Interval, interval
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.table.names import no_column
from aimscale.analysis.table.points import complete, resolve_columns
from aimscale.analysis.words import Flag, flag_words


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


def cost_of(num_params: Array, samples: Array, flops: Array) -> Cost:
    """Fit kappa and s to a table's N, D and C."""
    per_sample = np.log(flops / (num_params * samples))
    if np.ptp(np.log(num_params)) == 0 or np.ptp(per_sample) < 1e-9:
        s, intercept = 0.0, float(np.mean(per_sample))
    else:
        s, intercept = (float(v) for v in np.polyfit(np.log(num_params), per_sample, 1))
    return Cost(kappa=float(np.exp(intercept)), s=s)


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
    bias: float | None = None
    """Error of the exponent that the approach itself makes on this design, simulated; its interval allows for it."""
    law: Fit | None = field(default=None, repr=False)
    """The (N, D) law of approach 3, or the loss-against-C law along the optima of approaches 1 and 2."""

    def at(self, flops: Any) -> pd.DataFrame:
        """Optimum at budgets: C, N, N_lo, N_hi, D, D_lo, D_hi, loss, loss_lo, loss_hi, beyond_range.

        `beyond_range` is the factor above the largest C used (1 within).
        """
        c = np.atleast_1d(np.asarray(flops, float))
        n = np.exp(self.log_k + self.exponent * np.log(c))
        tails = [50 * (1 - self.exponent_interval.confidence), 50 * (1 + self.exponent_interval.confidence)]
        draws = self.draws[np.isfinite(self.draws).all(axis=1)]
        n_draws = np.exp(draws[:, :1] + draws[:, 1:] * np.log(c))
        n_lo, n_hi = np.percentile(n_draws, tails, axis=0) if len(draws) else np.full((2, len(c)), np.nan)
        out = {"C": c, "N": n, "N_lo": n_lo, "N_hi": n_hi, "D": self.cost.samples(c, n)}
        out |= {"D_lo": self.cost.samples(c, n_hi), "D_hi": self.cost.samples(c, n_lo)}
        if self.law is not None:
            x = {"N": n, "D": out["D"]} if self.approach == 3 else {"C": c}
            predicted = self.law.predict(x)
            out |= {"loss": predicted["value"], "loss_lo": predicted["ci_lo"], "loss_hi": predicted["ci_hi"]}
        return pd.DataFrame({**out, "beyond_range": np.maximum(1.0, c / self.range[1])})

    def headline(self) -> str:
        """The exponent with its interval."""
        return f"Approach {self.approach}: N*(C) ~ C^{self.exponent:.3f} {self.exponent_interval.words()}"

    def summary(self) -> str:
        """The exponent as prose, and the optimum at the largest budget and at ten times it."""
        optima = self.at([self.range[1], 10 * self.range[1]])
        return f"{self.sentence()}\n\n{optima.to_string(index=False, float_format=lambda v: f'{v:.4g}')}"

    def sentence(self) -> str:
        """The exponent with its interval, method, range and refusals."""
        i = self.exponent_interval
        interval = f"{i.words()} ({i.confidence:.0%}, {i.method})" if i.is_known else f"({i.method})"
        text = (
            f"Approach {self.approach} ({self.method}): N*(C) ~ C^{self.exponent:.3f} {interval}, "
            f"C from {self.range[0]:.3g} to {self.range[1]:.3g} FLOPs."
        )
        if self.bias is not None:
            text += (
                f" By itself this approach errs by {self.bias:+.3f} on this design; the interval, and that of N*, is "
                f"about the exponent less that, {self.exponent - self.bias:.3f}."
            )
        return f"{text} Refused: {'; '.join(flag_words(self.refusals))}." if self.refusals else text

    @property
    def table(self) -> pd.DataFrame:
        """One row: approach, exponent, low, high, bias, method, refused."""
        i = self.exponent_interval
        row = {"approach": self.approach, "exponent": self.exponent, "low": i.low, "high": i.high}
        bias = np.nan if self.bias is None else self.bias
        return pd.DataFrame([{**row, "bias": bias, "method": self.method, "refused": len(self.refusals)}])

    def exponent_words(self) -> str:
        """The exponent with its interval, which is about the exponent less the approach's own bias where it has one."""
        interval = self.exponent_interval.words(".2f")
        if self.bias is None or abs(self.bias) < 0.005:
            return f"{self.exponent:.2f} {interval}"
        return f"{self.exponent:.2f} (less its own bias {self.exponent - self.bias:.2f} {interval})"


def points_of(df: pd.DataFrame, *, y: str, columns: Mapping[str, str] | None) -> pd.DataFrame:
    """N, D, C and loss of the finished rows with positive values, under these names (index kept).

    Raises:
        AnalysisError: a column is missing or no row is left.
    """
    names = {v: columns[v] for v in ("N", "D", "C") if columns and v in columns}
    law = CHINCHILLA
    found = resolve_columns(law, df, {k: v for k, v in names.items() if k in law.variables})
    c = names.get("C", "C" if "C" in df.columns else "flops_train")
    for name in (c, y):
        if name not in df.columns:
            raise no_column(df, name)
    used = complete(df)
    out = used[[found["N"], found["D"], c, y]].apply(pd.to_numeric, errors="coerce").astype(float)
    out.columns = pd.Index(["N", "D", "C", "loss"])
    for extra in ("size", "run_id", "seed"):
        if extra in df.columns:
            out[extra] = used[extra]
    out = out[(np.isfinite(out[["N", "D", "C", "loss"]]) & (out[["N", "D", "C", "loss"]] > 0)).all(axis=1)]
    if out.empty:
        raise AnalysisError("No row of the table has positive N, D, C and loss, so there is no frontier to draw.")
    return out


def parametric_frontier(fit: Fit, df: pd.DataFrame, *, columns: Mapping[str, str] | None = None) -> Frontier:
    """Approach 3: the minimum of E + A N^-alpha + B D^-beta on C = kappa N^(1+s) D, in closed form.

    Raises:
        AnalysisError: the fit is of another law, or its exponents are not identified.
    """
    if fit.law.name != "chinchilla":
        raise AnalysisError(f"Approach 3 needs the law {CHINCHILLA.formula}, not {fit.law.formula}.")
    if "a" in fit.not_identified:
        raise AnalysisError(
            "The exponents alpha and beta are not identified by this table, so approach 3 has no frontier."
        )
    points = points_of(df, y=fit.columns["y"], columns=columns or {k: fit.columns[k] for k in ("N", "D")})
    cost = cost_of(*(points[c].to_numpy() for c in ("N", "D", "C")))
    log_k, a = (float(v[0]) for v in optimum_of({k: np.array([v]) for k, v in fit.law_params.items()}, cost))
    draws = np.stack(optimum_of(fit.draws, cost), axis=1) if fit.draws else np.array([[log_k, a]])
    return Frontier(
        approach=3,
        method=f"minimum of {fit.law.formula} on C = {cost.kappa:.3g} N^{1 + cost.s:.3g} D",
        exponent=a,
        exponent_interval=replace(interval(draws[:, 1], fit.confidence), method=fit.interval_method),
        log_k=log_k,
        draws=draws,
        cost=cost,
        pairs=pd.DataFrame(columns=["C", "N", "D", "loss"]),
        refusals=(),
        range=(float(points["C"].min()), float(points["C"].max())),
        law=fit,
    )


def optimum_of(p: Mapping[str, Array], cost: Cost) -> tuple[Array, Array]:
    """(ln k, a) of N*(C): set to zero the derivative of A N^-alpha + B (C / kappa)^-beta N^((1+s) beta)."""
    grow = (1 + cost.s) * p["beta"]
    a = p["beta"] / (p["alpha"] + grow)
    with np.errstate(divide="ignore"):
        log_g = (np.log(p["alpha"] * p["A"]) - np.log(grow * p["B"])) / (p["alpha"] + grow)
    return log_g - a * np.log(cost.kappa), a
