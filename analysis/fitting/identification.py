"""Parameters that the scales of a table can identify at all, however precise its losses: by law and design alone.

A function of D that is seen at two values of D shows one difference, which any exponent explains. Parameters that can
move along the null space of the law's Jacobian are not identified.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from scipy.linalg import null_space

from aimscale.analysis.fitting.problem import LOG_LSQ, make_problem
from aimscale.analysis.laws.base import Array, Law

SAME_VALUE = 0.05
"""Values of a variable are one where they differ by less than this share of the smaller (or of the variable's range,
where that is narrower)."""
NULL_SLOPE = 1e-10
"""A direction of the parameters that moves the law by less than this share of the strongest one does not move it."""
PROBE_STEP, MOVED = 1e-3, 1e-7
"""Step along such a direction, and the relative change of a parameter that counts as following it."""
PLACES = 0.35, 0.65
"""Shares of their ranges, evenly between, that non-linear parameters are set to: any generic interior point will do."""


def unidentified(law: Law, x: Mapping[str, Array], held: Collection[str] = ()) -> frozenset[str]:
    """Find the parameters, reported and derived ones included, that measurements at scales (n,) cannot tell; those
    `held` at a value are known."""
    cells = np.unique([_rounded(np.asarray(x[v], float)) for v in law.variables], axis=1)
    problem = make_problem(law, dict(zip(law.variables, cells, strict=True)), np.ones(cells.shape[1]), LOG_LSQ)
    vector, p = np.ones(len(problem.lower)), problem.num_linear
    vector[p:] = problem.lower[p:] + np.linspace(*PLACES, len(vector) - p) * (problem.upper - problem.lower)[p:]
    movable = np.array([name not in held for name in law.names])
    jacobian = problem.predict_and_jacobian(vector)[1][movable].T
    size = np.linalg.norm(jacobian, axis=0)
    size = np.where(size > 0, size, 1.0)
    lost: set[str] = set()
    for direction in null_space(np.linalg.qr(jacobian / size, mode="r"), rcond=NULL_SLOPE).T / size:
        step = np.zeros(len(vector))
        step[movable] = PROBE_STEP * direction / np.abs(direction).max()
        params = problem.params_of(np.stack([vector - step, vector + step]))
        for name, (low, high) in law.quantities(params).items():
            if not abs(high - low) <= MOVED * (abs(high) + abs(low)):
                lost.add(name)
    return frozenset(lost - set(held))


def num_values(values: Array) -> int:
    """Count the different values of a variable (n,); those within a few per cent are one."""
    return len(np.unique(_rounded(np.asarray(values, float))))


def _rounded(values: Array) -> Array:
    """Replace each value (n,) by the lowest of those that are the same as it."""
    order = np.unique(values)
    kept, within = order[:1], SAME_VALUE * np.minimum(np.abs(order), np.ptp(order))
    while len(left := order[order > kept[-1] + within[np.searchsorted(order, kept[-1])]]):
        kept = np.append(kept, left[0])
    return kept[np.searchsorted(kept, values, side="right") - 1]
