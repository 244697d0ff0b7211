"""What a fit minimises: a loss function of residuals, on the loss itself or on its logarithm, SUMMED over points.

A mean instead of a sum, or residuals of 1e-3 in an unscaled optimiser, make quasi-Newton methods stop early (the
mistake in Chinchilla's own fit); the optimiser here is a Newton method whose stopping rule is relative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.errors import AnalysisError
from analysis.laws import Array

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
    above: float = 1.0
    """Factor on residuals whose prediction lies above the measurement."""
    fits_scale: bool = False
    """A likelihood: the scale of the noise is fitted too, and the value is a negative log-likelihood."""

    @property
    def robust(self) -> bool:
        """True if large residuals count less than in least squares."""
        return bool(np.isfinite(self.delta))

    @property
    def power_of_residual(self) -> int:
        """2 if the sum grows like r^2, 1 if like |r|: turns a ratio of sums into a likelihood ratio."""
        return 1 if self.robust else 2

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


def huber_log(delta: float = 1e-3) -> Objective:
    """Huber loss on log residuals, summed (Hoffmann et al. 2022, with the sum that their code lacked)."""
    return Objective(
        name="huber_log", label=f"sum of Huber losses (delta {delta:g}) of log residuals", log=True, delta=delta
    )


HUBER_LOG = huber_log()
LSQ = Objective(name="lsq", label="sum of squares of residuals (halved)", log=False)
LOG_LSQ = Objective(name="log_lsq", label="sum of squares of log residuals (halved)", log=True)

OBJECTIVES: dict[str, Objective] = {o.name: o for o in (HUBER_LOG, LSQ, LOG_LSQ)}
"""Name -> objective, as `aimscale fit --objective` knows them."""


def find_objective(name: str | Objective) -> Objective:
    """An objective by name, or the object itself.

    Raises:
        AnalysisError: the name is unknown.
    """
    if isinstance(name, Objective):
        return name
    if name not in OBJECTIVES:
        raise AnalysisError(f"There is no objective named {name!r}; the objectives are {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]
