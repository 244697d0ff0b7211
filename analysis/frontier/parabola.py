"""A parabola in ln N through the points of one compute budget, for one table or for many simulated ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aimscale.analysis.laws.base import Array


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The points of one budget, as a function of the table's losses."""

    flops: float
    num_params: Array
    """N of each point (m,)."""
    rows: Array
    """Rows of the table (m,), where they stand at this budget."""
    blend: Array | None = None
    """Where sizes are interpolated: ln loss of each as a blend (m, n) of all rows'."""

    def losses(self, log_losses: Array) -> Array:
        """Losses (num, m) of tables (num, n)."""
        return np.exp(log_losses[:, self.rows] if self.blend is None else log_losses @ self.blend.T)


WINDOW = 8.0
"""Only points within this factor of the best measured N enter a parabola: far from its minimum an iso-FLOP curve is
none, and its skew would move the vertex."""
FEW_SIZES = "fewer than 4 sizes, which a parabola with an error needs"


def vertex(num_params: Array, loss: Array) -> tuple[float, float] | str:
    """(ln N*, loss*) of a parabola in ln N, or the reason why there is none."""
    if len(np.unique(num_params)) < 4:
        return FEW_SIZES
    best = num_params[np.argmin(loss)]
    if best in (num_params.min(), num_params.max()):
        edge = "smallest" if best == num_params.min() else "largest"
        return f"the {edge} size has the lowest loss, so the minimum is not interior"
    close = near(num_params, best)
    x = np.log(num_params[close])
    if len(np.unique(x)) < 4:
        return f"{len(np.unique(x))} sizes within a factor {WINDOW:g} of the best, a parabola with an error needs 4"
    top, value, convex = (each[0] for each in parabolas(x, loss[None, close]))
    if not convex:
        return "the parabola is not convex"
    if not x.min() < top < x.max():
        return "the vertex of the parabola lies outside the measured sizes"
    return float(top), float(value)


def tops_of(budget: Budget, log_losses: Array) -> Array:
    """ln N* (num,) of the parabolas through one budget of tables (num, n); NaN where there is none."""
    losses, n = budget.losses(log_losses), budget.num_params
    best = np.argmin(losses, axis=1)
    out = np.full(len(losses), np.nan)
    for i in np.unique(best):
        if n[i] in (n.min(), n.max()):
            continue
        close, rows = near(n, n[i]), best == i
        x = np.log(n[close])
        if len(np.unique(x)) < 4:
            continue
        top, _, convex = parabolas(x, losses[np.ix_(rows, close)])
        out[rows] = np.where(convex & (top > x.min()) & (top < x.max()), top, np.nan)
    return out


def near(num_params: Array, best: float) -> Array:
    """Which sizes (m,) enter the parabola."""
    return np.abs(np.log(num_params / best)) <= np.log(WINDOW)


def parabolas(x: Array, losses: Array) -> tuple[Array, Array, Array]:
    """Vertex, its loss and convexity (num,) of least-squares parabolas through losses (num, m) at x (m,)."""
    centre = x.mean()
    c2, c1, c0 = np.linalg.pinv(np.vander(x - centre, 3)) @ losses.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return -c1 / (2 * c2) + centre, c0 - c1 * c1 / (4 * c2), c2 > 0
