"""What a fit minimises: a loss function of residuals, on the loss itself or on its logarithm, SUMMED over points.

A mean instead of a sum, or residuals of 1e-3 in an unscaled optimiser, make quasi-Newton methods stop early (the
mistake in Chinchilla's own fit); the optimiser here is a Newton method whose stopping rule is relative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array

LAD_DELTA = 1e-10
"""Width of the quadratic zone that stands in for the kink of |r| at 0, relative to the median |r|."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss function of residuals r = T(y) - T(prediction)."""

    name: str
    """As `--objective` takes it."""
    label: str
    """For sentences: what is minimised, in words."""
    log: bool
    """T is the natural logarithm; otherwise the identity."""
    delta: float = np.inf
    """Half-width of the quadratic zone of the Huber loss; inf: squares; 0: absolute values."""
    multiple: float = 0.0
    """Where positive: delta is this many robust standard deviations of the residuals, found before the fit."""
    above: float = 1.0
    """Factor on residuals whose prediction lies above the measurement."""
    likelihood: Literal["", "normal", "laplace", "huber"] = ""
    """A distribution of the residuals whose scale is fitted too; the value is then a negative log-likelihood."""

    @property
    def robust(self) -> bool:
        """True if large residuals count less than in least squares."""
        return bool(np.isfinite(self.delta))

    @property
    def power_of_residual(self) -> int:
        """2 if the sum grows like r^2, 1 if like |r|: turns a ratio of sums into a likelihood ratio."""
        return 1 if self.robust and not self.multiple else 2

    def with_scale(self, sd: float) -> Objective:
        """This objective with the quadratic zone that suits errors of a robust standard deviation."""
        delta = max(self.multiple * sd, SMALLEST_DELTA)
        label = f"sum of Huber losses of log residuals, squares up to {self.multiple:g} robust standard deviations"
        return replace(self, delta=delta, label=f"{label} (delta {delta:.3g})")

    def transform(self, y: Array) -> Array:
        """T(y)."""
        return np.log(y) if self.log else y

    def inverse(self, z: Array) -> Array:
        """T^-1(z)."""
        return np.exp(z) if self.log else z

    def side(self, r: Array) -> Array:
        """Factor of each residual from its sign."""
        return np.where(r < 0, self.above, 1.0) if self.above != 1.0 else 1.0

    def loss(self, r: Array, delta: Array | float | None = None) -> Array:
        """Loss of each residual; `delta` replaces the quadratic zone during continuation."""
        d = self.delta if delta is None else delta
        if np.ndim(d) == 0 and not np.isfinite(d):
            return self.side(r) * 0.5 * r * r
        size = np.abs(r)
        if np.ndim(d) == 0 and d == 0:
            return self.side(r) * size
        inner = np.minimum(size, d)
        return self.side(r) * inner * (size - 0.5 * inner)  # = r^2/2 inside, d (|r| - d/2) outside

    def total(self, r: Array, weights: Array) -> Array:
        """Objective of residuals (batch, n) under weights (n,) or (batch, n); of a likelihood: at its best scale."""
        if not self.likelihood:
            return np.sum(weights * self.loss(r), axis=-1)
        n = np.sum(np.broadcast_to(weights, r.shape), axis=-1)
        if self.likelihood == "normal":
            return 0.5 * n * (np.log(2 * np.pi * np.sum(weights * r * r, axis=-1) / n) + 1)
        if self.likelihood == "laplace":
            return n * (np.log(2 * np.sum(weights * np.abs(r), axis=-1) / n) + 1)
        scale = self.huber_scale(r, weights)
        z = r / scale[..., None]
        return n * np.log(scale * _huber_normaliser(HUBER_DELTA)) + np.sum(weights * HUBER.loss(z), axis=-1)

    def zone(self, r: Array, weights: Array) -> Array:
        """Final half-width of the quadratic zone (batch, 1) at residuals (batch, n); 0 for absolute values."""
        if self.likelihood == "huber":
            return HUBER_DELTA * self.huber_scale(r, weights)[..., None]
        return np.full((len(r), 1), self.delta)

    @staticmethod
    def huber_scale(r: Array, weights: Array) -> Array:
        """Scale (batch,) that maximises the Huber likelihood of residuals (batch, n), by fixed-point iteration."""
        n = np.sum(np.broadcast_to(weights, r.shape), axis=-1)
        scale = HUBER_DELTA * np.sum(weights * np.abs(r), axis=-1) / n
        for _ in range(20):
            pull = np.clip(r / scale[..., None], -HUBER_DELTA, HUBER_DELTA)
            scale = np.sum(weights * pull * r, axis=-1) / n
        return scale


HUBER_DELTA = 1e-3
"""Chinchilla's choice."""


def _huber_normaliser(delta: float) -> float:
    """Integral of exp(-Huber loss) over the real line."""
    inside = math.sqrt(2 * math.pi) * math.erf(delta / math.sqrt(2))
    return inside + 2 * math.exp(-0.5 * delta * delta) / delta


def huber_log(delta: float = HUBER_DELTA) -> Objective:
    """Huber loss on log residuals, summed (Hoffmann et al. 2022, with the sum that their code lacked)."""
    return Objective(
        name="huber_log", label=f"sum of Huber losses (delta {delta:g}) of log residuals", log=True, delta=delta
    )


SMALLEST_DELTA = 1e-9
"""Least width of a zone that is found from residuals: those of a table without noise are rounding errors."""
ROBUST = Objective(
    name="robust",
    label="sum of Huber losses of log residuals, squares up to 2 robust standard deviations",
    log=True,
    multiple=2.0,
)
"""The default: least squares for all but outliers (99 % efficient on normal errors), whose pull is bounded."""
HUBER_LOG = huber_log()
HUBER = Objective(name="huber", label="sum of Huber losses (delta 0.001) of residuals", log=False, delta=HUBER_DELTA)
LSQ = Objective(name="lsq", label="sum of squares of residuals (halved)", log=False)
LOG_LSQ = Objective(name="log_lsq", label="sum of squares of log residuals (halved)", log=True)
LAD = Objective(name="lad", label="sum of absolute residuals", log=False, delta=0.0)
LOG_LAD = Objective(name="log_lad", label="sum of absolute log residuals", log=True, delta=0.0)
ASYMMETRIC = Objective(
    name="asymmetric",
    label="sum of absolute residuals, ten times where the law lies above the measurement",
    log=False,
    delta=0.0,
    above=10.0,
)
NORMAL = Objective(
    name="normal", label="negative log-likelihood of normal residuals, scale fitted", log=False, likelihood="normal"
)
LOG_NORMAL = Objective(
    name="log_normal",
    label="negative log-likelihood of normal log residuals, scale fitted",
    log=True,
    likelihood="normal",
)
LOG_LAPLACE = Objective(
    name="log_laplace",
    label="negative log-likelihood of Laplace log residuals, scale fitted",
    log=True,
    delta=0.0,
    likelihood="laplace",
)
HUBER_LIKELIHOOD = Objective(
    name="huber_likelihood",
    label="negative log-likelihood of Huber log residuals (delta 0.001), scale fitted",
    log=True,
    delta=0.0,
    likelihood="huber",
)

OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        ROBUST,
        HUBER_LOG,
        HUBER,
        LSQ,
        LOG_LSQ,
        LAD,
        LOG_LAD,
        ASYMMETRIC,
        NORMAL,
        LOG_NORMAL,
        LOG_LAPLACE,
        HUBER_LIKELIHOOD,
    )
}
"""Name -> objective, as `aimscale fit --objective` knows them."""


def find_objective(name: str | Objective) -> Objective:
    """An objective by name, or the object itself; `huber_log:0.01` sets the width of its quadratic zone.

    Raises:
        AnalysisError: the name is unknown.
    """
    if isinstance(name, Objective):
        return name
    base, _, delta = name.partition(":")
    if base == "huber_log" and delta:
        try:
            return huber_log(float(delta))
        except ValueError:
            raise AnalysisError(f"The width {delta!r} of {name!r} is not a number.") from None
    if name not in OBJECTIVES:
        raise AnalysisError(f"There is no objective named {name!r}; the objectives are {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]
