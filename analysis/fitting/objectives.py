"""Objectives of a fit: squares or a Huber loss of residuals, of the loss itself or its logarithm, SUMMED over points.

A mean of residuals of 1e-3 makes unscaled quasi-Newton methods stop early (the mistake in Chinchilla's own fit).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array
from aimscale.analysis.words import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss function of residuals r = T(y) - T(prediction)."""

    name: str
    log: bool
    """T is the natural logarithm; otherwise the identity."""
    delta: float = np.inf
    """Half-width of the quadratic zone of the Huber loss; inf: squares."""
    multiple: float = 0.0
    """Delta in robust standard deviations of the residuals, which are found first; 0 takes `delta` itself."""

    @property
    def robust(self) -> bool:
        """True if large residuals count less than in least squares."""
        return bool(np.isfinite(self.delta))

    def transform(self, y: Array) -> Array:
        """Return T(y)."""
        return np.log(y) if self.log else y

    def inverse(self, z: Array) -> Array:
        """Return T^-1(z)."""
        return np.exp(z) if self.log else z

    def loss(self, r: Array) -> Array:
        """Return the loss of each residual: r^2/2 inside the zone, delta (|r| - delta/2) outside."""
        size = np.abs(r)
        inner = np.minimum(size, self.delta)
        return inner * (size - 0.5 * inner)


def huber_log(delta: float = 1e-3) -> Objective:
    """Make the Huber loss of log residuals, with the delta of Hoffmann et al. 2022 (whose code took the mean)."""
    return Objective(name="huber_log", log=True, delta=delta)


ROBUST = Objective(name="robust", log=True, multiple=2.0)
"""The default: least squares for all but outliers (99 % efficient on normal errors), whose pull is bounded."""
HUBER_LOG = huber_log()
LSQ = Objective(name="lsq", log=False)
LOG_LSQ = Objective(name="log_lsq", log=True)
OBJECTIVES = {each.name: each for each in (ROBUST, HUBER_LOG, LSQ, LOG_LSQ)}


def find_objective(name: str | Objective) -> Objective:
    """Find an objective by name, or return it; `huber_log:0.01` sets the width of its quadratic zone."""
    if isinstance(name, Objective):
        return name
    base, _, delta = name.partition(":")
    try:
        return huber_log(float(delta)) if base == "huber_log" and delta else OBJECTIVES[name]
    except (KeyError, ValueError):
        known = did_you_mean(base, OBJECTIVES, "the objectives are")
        raise AnalysisError(f"There is no objective named {name!r}; {known}") from None
