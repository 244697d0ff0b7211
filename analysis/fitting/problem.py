"""A law, its data and its objective, in the coordinates in which the optimiser works."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from aimscale.analysis.fitting.objectives import Objective
from aimscale.analysis.laws.base import Array, Columns, Law

COMPLEX_STEP = 1e-30
"""Imaginary part by which a parameter is moved for its derivative; no difference is taken, so nothing cancels."""


@dataclass(frozen=True)
class Problem:
    """A law, its data and its objective, in the coordinates of the optimiser.

    A linear coefficient is multiplied by its basis function at the geometric mean of the data (so that A and alpha are
    nearly independent), a non-linear parameter marked `log` is replaced by its logarithm.
    """

    law: Law
    x: Columns
    """Variables (n + 1,); the last entry is the reference point."""
    y: Array
    """Measurements (n,)."""
    weights: Array
    """Weight of each measurement (n,)."""
    objective: Objective
    lower: Array
    """Bounds (k,) in the optimiser's coordinates."""
    upper: Array
    referenced: Array
    """Which linear coefficients are scaled by the reference point (p,): not those held by a finite, non-zero bound."""

    @property
    def num_linear(self) -> int:
        """p, the linear parameters; they come first."""
        return len(self.law.linear)

    @property
    def num_points(self) -> int:
        """n."""
        return int(self.y.shape[-1])

    def at_points(self, index: Array) -> Problem:
        """Select some of the points."""
        x = Columns({v: self.x[v][np.append(index, self.num_points)] for v in self.law.variables})
        return replace(self, x=x, y=self.y[index], weights=self.weights[index])

    @property
    def movable(self) -> Array:
        """Which parameters are not fixed (k,)."""
        return self.upper > self.lower

    def nonlinear(self, vector: Array) -> dict[str, Array]:
        """Non-linear parameters (batch, 1) of the optimiser's vectors (batch, k)."""
        columns = vector[:, self.num_linear :, None]
        return {p.name: np.exp(columns[:, j]) if p.log else columns[:, j] for j, p in enumerate(self.law.nonlinear)}

    def basis(self, vector: Array) -> list[Array]:
        """Basis functions (batch, n) of vectors, real or complex, each over its size at the reference point."""
        out = []
        for part, is_scaled in zip(self.law.basis(self.x, self.nonlinear(vector)), self.referenced, strict=True):
            g = np.broadcast_to(part, (len(vector), self.num_points + 1))
            ref = g[:, -1:] * np.sign(g[:, -1:].real) if is_scaled else np.ones((1, 1))
            out.append(g[:, :-1] / np.where(ref == 0, 1.0, ref))
        return out

    def predict(self, vector: Array) -> Array:
        """Law's values (batch, n)."""
        return sum(vector[:, j, None] * part for j, part in enumerate(self.basis(vector)))

    def predict_and_jacobian(self, vector: Array) -> tuple[Array, Array]:
        """Law's values (n,) at a vector (k,) and their derivatives (k, n), by the complex step: exact to rounding."""
        p, q = self.num_linear, len(vector) - self.num_linear
        moved = np.repeat(vector[None].astype(complex), q + 1, axis=0)
        moved[np.arange(1, q + 1), np.arange(p, p + q)] += 1j * COMPLEX_STEP
        parts = self.basis(moved)
        values = sum(vector[j] * part for j, part in enumerate(parts))
        slopes = values[1:].imag / COMPLEX_STEP
        return values[0].real, np.concatenate([np.array([part[0].real for part in parts]), slopes])

    def params_of(self, vector: Array) -> dict[str, Array]:
        """Parameters by name (batch,), in the formula's own units, of the optimiser's vectors (batch, k)."""
        t = self.nonlinear(vector)
        parts = self.law.basis(self.x, t)
        out = {}
        for j, p in enumerate(self.law.linear):
            ref = np.broadcast_to(parts[j], (len(vector), self.num_points + 1))[:, -1] if self.referenced[j] else 1.0
            out[p.name] = vector[:, j] / np.abs(ref)
        return out | {name: value[:, 0] for name, value in t.items()}

    def residual(self, vector: Array) -> Array:
        """Residuals (n,) of T(y) at a vector (k,)."""
        transform = self.objective.transform
        return transform(self.y) - transform(self.predict(vector[None])[0])

    def linearised(self, vector: Array) -> Array:
        """Derivatives (n, free) of T(law) by the movable parameters at a vector (k,)."""
        value, jacobian = self.predict_and_jacobian(vector)
        slope = jacobian / value if self.objective.log else jacobian
        return slope.T[:, self.movable]

    def totals(self, value: Array) -> Array:
        """Objective (batch,) of the law's values (batch, n), infinite outside T's domain."""
        with np.errstate(invalid="ignore", divide="ignore"):
            r = self.objective.transform(self.y) - self.objective.transform(value)
            total = np.sum(self.weights * self.objective.loss(r), axis=-1)
        return np.where(np.isfinite(total), total, np.inf)


def make_problem(
    law: Law,
    x: dict[str, Array],
    y: Array,
    objective: Objective,
    *,
    weights: Array | None = None,
    fixed: dict[str, float] | None = None,
    bounds: dict[str, tuple[float, float]] | None = None,
) -> Problem:
    """Put a law, data (n,) and restrictions on parameters into the optimiser's coordinates."""
    reference = {
        name: float(np.exp(np.mean(np.log(v)))) if np.all(v > 0) else float(np.mean(v)) for name, v in x.items()
    }
    columns = Columns({name: np.append(np.asarray(v, float), reference[name]) for name, v in x.items()})
    limits = []
    for p in law.parameters:
        low, high = p.limits(columns)
        low, high = (bounds or {}).get(p.name, (low, high))
        low, high = ((fixed or {})[p.name],) * 2 if p.name in (fixed or {}) else (low, high)
        limits.append((np.log(low), np.log(high)) if p.log else (low, high))
    lower, upper = np.array(limits, float).reshape(-1, 2).T
    p_linear = len(law.linear)
    plain = [(lo in (0.0, -np.inf)) and (hi in (0.0, np.inf)) and lo < hi for lo, hi in limits[:p_linear]]
    return Problem(
        law=law,
        x=columns,
        y=np.asarray(y, float),
        weights=np.ones(len(y)) if weights is None else np.asarray(weights, float),
        objective=objective,
        lower=lower,
        upper=upper,
        referenced=np.array(plain, bool),
    )
