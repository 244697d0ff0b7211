"""A law, its data and its objective, in the coordinates in which the optimiser works."""

from __future__ import annotations

from collections.abc import Mapping
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
    """Linear coefficients that are scaled by the reference point (p,): not those held by a finite, non-zero bound."""

    @property
    def num_linear(self) -> int:
        """Number p of linear parameters; they come first."""
        return len(self.law.linear)

    @property
    def num_points(self) -> int:
        """Number n of measurements."""
        return len(self.y)

    @property
    def movable(self) -> Array:
        """True for parameters (k,) that are not fixed."""
        return self.upper > self.lower

    def at_points(self, index: Array) -> Problem:
        """Select some of the points."""
        x = Columns({v: self.x[v][np.append(index, self.num_points)] for v in self.law.variables})
        return replace(self, x=x, y=self.y[index], weights=self.weights[index])

    def _parts(self, vector: Array) -> list[Array]:
        """Return the law's basis functions (batch, n + 1) of vectors, real or complex."""
        shape = len(vector), self.num_points + 1
        return [np.broadcast_to(part, shape) for part in self.law.basis(self.x, self._nonlinear(vector))]

    def _nonlinear(self, vector: Array) -> dict[str, Array]:
        """Return non-linear parameters (batch, 1) of vectors (batch, k), and the law's constants."""
        columns = vector[:, self.num_linear :, None]
        values = {p.name: np.exp(columns[:, j]) if p.log else columns[:, j] for j, p in enumerate(self.law.nonlinear)}
        return {**values, **self.law.constants}

    def basis(self, vector: Array) -> list[Array]:
        """Return basis functions (batch, n) of vectors, real or complex, each over its size at the reference point."""
        out = []
        for g, is_scaled in zip(self._parts(vector), self.referenced, strict=True):
            ref = g[:, -1:] * np.sign(g[:, -1:].real) if is_scaled else np.ones((1, 1))
            out.append(g[:, :-1] / np.where(ref == 0, 1.0, ref))
        return out

    def predict(self, vector: Array) -> Array:
        """Return the law's values (batch, n)."""
        return sum(vector[:, j, None] * part for j, part in enumerate(self.basis(vector)))

    def predict_and_jacobian(self, vector: Array) -> tuple[Array, Array]:
        """Return the law's values (n,) at a vector (k,) and derivatives (k, n), by the complex step: exact."""
        p, q = self.num_linear, len(vector) - self.num_linear
        moved = np.repeat(vector[None].astype(complex), q + 1, axis=0)
        moved[np.arange(1, q + 1), np.arange(p, p + q)] += 1j * COMPLEX_STEP
        parts = self.basis(moved)
        values = sum(vector[j] * part for j, part in enumerate(parts))
        slopes = values[1:].imag / COMPLEX_STEP
        return values[0].real, np.concatenate([np.array([part[0].real for part in parts]), slopes])

    def params_of(self, vector: Array) -> dict[str, Array]:
        """Return parameters by name (batch,), in the formula's own units, of the optimiser's vectors (batch, k)."""
        sizes = [np.abs(g[:, -1]) if s else 1.0 for g, s in zip(self._parts(vector), self.referenced, strict=True)]
        out = {p.name: vector[:, j] / sizes[j] for j, p in enumerate(self.law.linear)}
        t = self._nonlinear(vector)
        return out | {p.name: t[p.name][:, 0] for p in self.law.nonlinear}

    def residual(self, vector: Array) -> Array:
        """Return residuals (n,) of T(y) at a vector (k,)."""
        transform = self.objective.transform
        return transform(self.y) - transform(self.predict(vector[None])[0])

    def linearised(self, vector: Array) -> Array:
        """Return derivatives (n, free) of T(law) by the movable parameters at a vector (k,)."""
        value, jacobian = self.predict_and_jacobian(vector)
        slope = jacobian / value if self.objective.log else jacobian
        return slope.T[:, self.movable]

    def totals(self, value: Array) -> Array:
        """Return the objective (batch,) of the law's values (batch, n), infinite outside T's domain."""
        with np.errstate(invalid="ignore", divide="ignore"):
            r = self.objective.transform(self.y) - self.objective.transform(value)
            total = np.sum(self.weights * self.objective.loss(r), axis=-1)
        return np.where(np.isfinite(total), total, np.inf)


def make_problem(
    law: Law,
    x: Mapping[str, Array],
    y: Array,
    objective: Objective,
    *,
    weights: Array | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
) -> Problem:
    """Put a law, data (n,) and restrictions on parameters into the optimiser's coordinates."""
    columns = Columns()
    for name, values in x.items():
        v = np.asarray(values, float)
        columns[name] = np.append(v, np.exp(np.mean(np.log(v))) if np.all(v > 0) else np.mean(v))
    given = {**(bounds or {}), **{name: (value, value) for name, value in (fixed or {}).items()}}
    limits = [given.get(p.name, p.limits(columns)) for p in law.parameters]
    plain = [low in (0.0, -np.inf) and high in (0.0, np.inf) and low < high for low, high in limits]
    scaled = [np.log(ends) if p.log else ends for p, ends in zip(law.parameters, limits, strict=True)]
    lower, upper = np.array(scaled, float).reshape(-1, 2).T
    return Problem(
        law=law,
        x=columns,
        y=np.asarray(y, float),
        weights=np.ones(len(y)) if weights is None else np.asarray(weights, float),
        objective=objective,
        lower=lower,
        upper=upper,
        referenced=np.array(plain[: len(law.linear)], bool),
    )
