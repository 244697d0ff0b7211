"""Learning curves: one loss against one scale, extrapolated.

`extrapolate` is the default. M1 to M4 of Alabdulmohsin et al. 2022 are here as their authors released them, so that
a new extrapolator can be compared with the numbers in print; M2's released code stops in the local minimum of its
objective that lies nearest to the smallest observed loss, which is not the global one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.heldout import errors
from aimscale.analysis.fitting.objectives import LOG_LSQ
from aimscale.analysis.fitting.result import AsJson, Fit
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import power, sigmoidal

MARGIN = 1e-3
"""How far below the smallest observed loss the released M2 starts its limit."""

Curve = Callable[[Array], Array]


def m1(x: Array, y: Array) -> Curve:
    """M1, y = b x^-c: least squares on logarithms."""
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    return lambda z: np.exp(level + slope * np.log(z))


def m2(x: Array, y: Array) -> Curve:
    """M2, y = e_inf + b x^-c, as released: residuals of log(y - e_inf), descending from e_inf = min(y) - 1e-3."""
    log_x = np.log(x)
    basis, _ = np.linalg.qr(np.stack([np.ones_like(log_x), log_x], axis=1))

    def objective(limits: Array) -> Array:
        logs = np.log(y - np.atleast_1d(limits)[:, None])
        return np.sum((logs - (logs @ basis) @ basis.T) ** 2, axis=1)

    limits = np.linspace(max(0.0, y.min() - MARGIN), 0.0, 4001)
    values = objective(limits)
    rising = np.flatnonzero(np.diff(values) >= 0)
    stop = int(rising[0]) if len(rising) else len(limits) - 1
    low, high = limits[min(stop + 1, len(limits) - 1)], limits[max(stop - 1, 0)]
    for _ in range(60):  # golden-section search around the first local minimum
        inner = low + np.array([0.381966, 0.618034]) * (high - low)
        left, right = objective(inner)
        low, high = (low, inner[1]) if left < right else (inner[0], high)
    limit = 0.0 if stop == len(limits) - 1 else (low + high) / 2
    slope, level = np.polyfit(log_x, np.log(y - limit), 1)
    return lambda z: limit + np.exp(level + slope * np.log(z))


def m3(x: Array, y: Array) -> Curve:
    """M3, y = b (1/x + g)^c, as released: (b, c) by regression and g from a grid that solves each point, in turns."""
    log_y, gamma, beta, c = np.log(y), 0.0, 1.0, 0.5
    for _ in range(10_000):
        before = beta
        slope, level = np.polyfit(np.log(1 / x + gamma), log_y, 1)
        beta, c = float(np.exp(level)), max(0.0, float(slope))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            grid = (y / beta) ** (1 / c if c else np.inf) - 1 / x
        grid = np.append(grid[np.isfinite(grid) & (grid >= 0)], gamma)
        sums = np.sum((log_y - np.log(beta) - c * np.log(1 / x + grid[:, None])) ** 2, axis=1)
        gamma = float(grid[np.argmin(sums)]) if sums.min() < sums[-1] else gamma
        if abs(beta - before) < 1e-10:
            break
    return lambda z: beta * (1 / z + gamma) ** c


def m4(x: Array, y: Array) -> Curve:
    """M4, (y - e_inf) / (e_0 - y)^a = b x^-c, as released (about 2 s a curve).

    In turns: ln b, c and a by non-negative least squares with log(1 - y) as the third column, then 1000 small gradient
    steps (later 100 damped Newton steps) in e_inf and e_0 on the mean square, kept at MARGIN from the data.
    """
    log_x, n = np.log(x), len(x)
    lowest, highest = float(y.min()) - MARGIN, float(y.max()) + MARGIN
    e_inf, e_0, beta = lowest, 1.0, 1.0
    design = np.stack([np.ones(n), -log_x, np.log(np.maximum(e_0 - y, 1e-12))], axis=1)
    a = c = 0.0
    for turn in range(10_000):
        before = beta
        (level, c, a), _ = nnls(design, np.log(y - e_inf))
        beta, line = float(np.exp(level)), level - c * log_x
        for _ in range(1000 if turn < 100 else 100):
            below, above = y - e_inf, e_0 - y
            r = np.log(below) - a * np.log(above) - line
            down, up = -np.sum(r / below) / n, -a * np.sum(r / above) / n
            if turn < 100:
                e_inf, e_0 = e_inf - 1e-8 * down, e_0 - 1e-8 * up
            else:
                curve_down = np.sum((1 - r) / below**2) / n
                curve_up = a * np.sum((a + r) / above**2) / n
                e_inf -= 0.1 * down / curve_down if abs(curve_down) > 1e-5 else 0.0
                e_0 -= 0.1 * up / curve_up if abs(curve_up) > 1e-5 else 0.0
            e_inf, e_0 = min(max(e_inf, 0.0), lowest), max(e_0, highest)
        if abs(beta - before) < 1e-10 and turn > 101:
            break

    def predict(z: Array) -> Array:
        excess = beta * np.asarray(z, float) ** -c
        if a < 1e-5:
            return e_inf + excess
        steps = np.linspace(0, e_0 - e_inf, 10_000)  # the released code's precision
        gap = np.abs(steps - excess[:, None] * (e_0 - e_inf - steps) ** a)
        return steps[np.argmin(gap, axis=1)] + e_inf

    return predict


RELEASED: dict[str, Callable[[Array, Array], Curve]] = {"M1": m1, "M2": m2, "M3": m3, "M4": m4}
"""Estimators as released, name -> function of x and y."""


@dataclass(frozen=True, kw_only=True)
class Extrapolation(AsJson):
    """The default forecast of a single curve."""

    fits: tuple[Fit, ...]
    """The power law with offset and M4, fitted to the curve."""
    variable: str
    """Name of x."""
    table: pd.DataFrame = field(repr=False)
    """The points used: x, y."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"variable": self.variable, "num_points": len(self.table), "fits": [f.to_dict() for f in self.fits]}

    def predict(self, x: Array) -> pd.DataFrame:
        """value, ci_lo, ci_hi, pi_lo, pi_hi, disagreement (ratio of the two laws), beyond_range at x.

        value is the geometric mean of the two laws; the intervals are the hulls of theirs.
        """
        parts = [f.predict({self.variable: np.asarray(x, float)}) for f in self.fits]
        values = np.array([p["value"] for p in parts])
        out = {"value": np.exp(np.mean(np.log(values), axis=0))}
        for name in ("ci_lo", "pi_lo"):
            out[name] = np.min([p[name] for p in parts], axis=0)
        for name in ("ci_hi", "pi_hi"):
            out[name] = np.max([p[name] for p in parts], axis=0)
        out["disagreement"] = values.max(axis=0) / values.min(axis=0)
        return pd.DataFrame({**out, "beyond_range": parts[0]["beyond_range"]})


def extrapolate(
    df: pd.DataFrame, *, x: str, y: str, tail_weight: float = 1.5, resamples: int = 0, level: float = 0.95
) -> Extrapolation:
    """Extrapolate one curve towards larger x.

    A power law with offset (M2) and M4 are fitted by least squares on logarithms to a global optimum, with weight
    (x / largest x)^tail_weight so that the end of the curve counts most, and averaged on the logarithm. Residuals of
    log y need no Jacobian, unlike the published ones of log(y - e_inf). Laws and weight were chosen on training points
    alone: of five laws, their averages and five weights, this one best predicted the upper half of the training range
    of the vision curves from the lower half, and the second quarter from the first.

    Args:
        df: one row a point; of several with the same x the last one counts.
        x: column of the scale.
        y: column of the loss or error, positive.
        tail_weight: power of x in the weights.
        resamples: bootstrap resamples for the intervals; 0 for none.
        level: level of the intervals.

    Raises:
        AnalysisError: missing columns or fewer than 6 different x.
    """
    for name in (x, y):
        if name not in df.columns:
            raise AnalysisError(f"The table has no column {name!r}; its columns are {', '.join(map(str, df.columns))}.")
    points = df[[x, y]].drop_duplicates(x, keep="last").sort_values(x)
    if len(points) < 6:
        raise AnalysisError(f"The curve has {len(points)} different {x}; extrapolating it needs at least 6.")
    weights = (points[x] / points[x].max()).to_numpy() ** tail_weight
    fits = tuple(
        fit(law, points, y=y, objective=LOG_LSQ, weights=weights, resamples=resamples, level=level)
        for law in (power(x), sigmoidal(x))
    )
    return Extrapolation(fits=fits, variable=x, table=points)


def score(predicted: Array, measured: Array) -> float:
    """Root mean square error of the logarithm, the benchmark's score."""
    return errors(np.asarray(predicted, float), np.asarray(measured, float))[1]
