"""A law of the loss as if every run had been tuned, with the uncertainty that tuning leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import half_width, satterthwaite
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.inference import CONFIDENCE
from aimscale.analysis.fitting.result import Fit, Interval
from aimscale.analysis.laws.base import Array, Law, Params
from aimscale.analysis.tuning.result import OPTIMUM, Rates
from aimscale.analysis.words import human


@dataclass(frozen=True, kw_only=True, repr=False)
class Corrected(Result):
    """One law of the loss twice: of the best rows as they are, and as if all were at their best settings."""

    measured: Fit
    tuned: Fit
    """Fit to corrected losses; its own intervals know nothing of the error of the correction."""
    intervals: dict[str, Interval]
    """Intervals of the parameters of `tuned` with the error of the correction."""
    losses: pd.DataFrame = field(repr=False)
    """A row per cell: N, D, loss, tuned_loss, and tuning_sd, the standard error of the correction of ln loss."""

    @property
    def table(self) -> pd.DataFrame:
        """A row per parameter: as measured with low and high, as if tuned with tuned_low and tuned_high."""
        rows = list[dict[str, object]]()
        for name, interval in self.intervals.items():
            own = self.measured.intervals[name]
            found = {"parameter": name, "measured": self.measured.params[name], "low": own.low, "high": own.high}
            ends = {"tuned_low": interval.low, "tuned_high": interval.high}
            rows.append(found | {"tuned": self.tuned.params[name]} | ends)
        return pd.DataFrame(rows)

    def headline(self) -> str:
        """Name the law."""
        return f"{self.tuned.law.formula}, as measured and as if every run were tuned"

    def cells(self) -> list[dict[str, str]]:
        """Write a row per parameter."""
        return [
            {
                "parameter": name,
                "measured": f"{human(self.measured.params[name], 4)} {self.measured.intervals[name].shown()}",
                "as if tuned": f"{human(self.tuned.params[name], 4)} {interval.shown()}",
            }
            for name, interval in self.intervals.items()
        ]


def corrected(found: Rates, law: str | Law = "chinchilla") -> Corrected:
    """Fit a law of the loss as if every size and budget had been trained at its best setting.

    A cell with an optimum of its own counts with the lowest loss of its parabola; others with their lowest loss less
    their regret by the law of rates, whose error is common to them.

    Returns:
        The law of the losses as they are, and as if tuned, with intervals that know the error of the correction.

    Raises:
        AnalysisError: cells whose best setting neither their own rates nor a law tells, or too few for the law.

    Example:
        >>> corrected(rates(read_table("tuned.csv"))).table
    """
    losses, covariance = _tuned_losses(found)
    if len(losses) < len(found.table):
        known = f"{len(losses)} of {len(found.table)}"
        raise AnalysisError(
            f"The best setting is known of {known} cells only, so their losses cannot be corrected; "
            "try more rates, or leave these sizes out."
        )
    names = {"N": "N", "D": "D"}
    measured = fit(losses, law, y="loss", columns=names, is_tested=False)
    tuned = fit(losses, law, y="tuned_loss", columns=names, is_tested=False)
    kept = losses.index.get_indexer(tuned.data.index)
    intervals = {
        name: _interval(tuned, name, covariance[np.ix_(kept, kept)], found)
        for name in tuned.intervals
        if name in measured.intervals
    }
    return Corrected(measured=measured, tuned=tuned, intervals=intervals, losses=losses)


def _tuned_losses(found: Rates) -> tuple[pd.DataFrame, Array]:
    """Correct the losses of cells, and return the covariance (n, n) of the corrections' errors."""
    table, surface = found.table, found.surface
    own, log_loss = (table["found"] == OPTIMUM).to_numpy().copy(), np.log(table["loss"].to_numpy())
    lowest, spread = surface.lowest()
    log_loss[own] = (lowest + spread / 2)[own[found.tuned]]  # a noisy minimum lies too low by half of its spread
    covariance = np.zeros((len(table), len(table)))
    if len(found.laws) == len(found.settings) and not own.all():
        gain, by_law = _gains_by_law(found, ~own)
        log_loss[~own] -= gain
        covariance[np.ix_(~own, ~own)] = by_law
        own[:] = True
    losses = table[["N", "D", "loss"]].assign(tuned_loss=np.exp(log_loss), tuning_sd=np.sqrt(np.diag(covariance)))
    return losses[own], covariance[np.ix_(own, own)]


def _gains_by_law(found: Rates, rows: Array) -> tuple[Array, Array]:
    """Return what ln loss gains at the best settings by the laws of rates (n,), and its covariance (n, n): the error of
    the law is common to the cells, the scatter about it is each cell's own."""
    at, settings = found.table[rows], found.settings
    hessian = found.surface.curvatures(found.scale[rows, : found.surface.scale.shape[1]], found.surface.coefficients)
    away = np.column_stack([np.log(at[f"{name}_used"] / at[f"{name}_best"]) for name in settings])
    pull = np.einsum("nij,nj->ni", hessian, away)
    gain = np.einsum("ni,ni->n", pull, away) / 2
    covariance = np.zeros((len(at), len(at)))
    for i, name in enumerate(settings):
        law = found.laws[name]
        gradient = law.estimate.gradient(law.estimate.law_at(law.variables(at)))
        error = gradient @ law.estimate.covariance.matrix @ gradient.T
        error += law.estimate.components.total**2 * np.eye(len(at))
        bias = hessian[:, i, i] * np.diag(error) / 2  # an optimum that errs looks further away than it is
        gain -= bias
        covariance += np.outer(pull[:, i], pull[:, i]) * error + np.diag(2 * bias**2)
    return gain, covariance


def _interval(tuned: Fit, name: str, covariance: Array, found: Rates) -> Interval:
    """Widen a parameter's interval by what the corrections' errors move it, on the scale on which it is symmetric."""
    own, value, estimate = tuned.intervals[name], tuned.params[name], tuned.estimate
    if not own.is_known:
        return own

    def quantity(params: Params) -> Array:
        return tuned.law.quantities({**params, **tuned.law.constants})[name]

    _, errors, degrees = estimate.error_of(quantity)
    moved = (estimate.gradient(quantity) @ estimate.design.inverse)[0]
    error = np.sqrt(np.maximum([moved @ covariance @ moved], 0.0))
    least = [
        law.estimate.error_of(law.estimate.law_at(law.variables(law.data)))[2].min() for law in found.laws.values()
    ]
    spare = satterthwaite(np.stack([errors, error]), np.stack([degrees, [min(least, default=np.inf)]]))
    wider = half_width(np.hypot(errors, error), spare, CONFIDENCE) / half_width(errors, degrees, CONFIDENCE)
    if own.low > 0:  # symmetric in its logarithm
        low, high = (float(value * (end / value) ** wider[0]) for end in (own.low, own.high))
    else:
        low, high = (float(value + wider[0] * (end - value)) for end in (own.low, own.high))
    return Interval(low, high)
