"""Parameters that the scales of a table can identify at all, however precise its losses: by law and design alone.

A function of D that is seen at two values of D shows one difference, which any exponent explains with its coefficient
and floor. So the parameters that can move without moving the law at any of the table's scales are not identified. They
are the null space of the law's Jacobian, at scales that are equal where they nearly are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from aimscale.analysis.fitting.objectives import LOG_LSQ
from aimscale.analysis.fitting.problem import make_problem
from aimscale.analysis.laws.base import Array, Law

SAME = 0.05
"""Values of a variable are one where they differ by less than this share of the smaller (or of the variable's range,
where that is narrower)."""
NULL = 1e-10
"""A direction of the parameters that moves the law by less than this share of the strongest one does not move it."""
STEP, MOVED = 1e-3, 1e-7
"""How far parameters are moved along such a direction, and the relative change by which one is seen to follow."""
PLACE = 0.35, 0.618
"""Non-linear parameters are set from this share of their range on, each by the golden ratio further within a third of
it: any generic interior point will do, but in the middle some laws are degenerate."""
MAX_CELLS = 400
"""Scales that are looked at: evenly spaced ones where there are more."""


def unidentified(law: Law, x: Mapping[str, Array], held: Collection[str] = ()) -> frozenset[str]:
    """Find the parameters, reported and derived ones included, that measurements at these scales cannot tell.

    Args:
        x: variable -> values (n,).
        held: parameters of the law that are kept at a value.
    """
    cells = np.unique([_rounded(np.asarray(x[v], float)) for v in law.variables], axis=1)
    num = cells.shape[1]
    cells = cells[:, np.linspace(0, num - 1, min(num, MAX_CELLS)).astype(int)]
    problem = make_problem(law, dict(zip(law.variables, cells, strict=True)), np.ones(cells.shape[1]), LOG_LSQ)
    vector, p = np.ones(len(problem.lower)), problem.num_linear
    share = PLACE[0] + np.mod(PLACE[1] * np.arange(len(vector) - p), 1.0) / 3
    vector[p:] = problem.lower[p:] + share * (problem.upper[p:] - problem.lower[p:])
    movable = np.array([name not in held for name in law.names])
    jacobian = problem.predict_and_jacobian(vector)[1][movable].T
    size = np.linalg.norm(jacobian, axis=0)
    size = np.where(size > 0, size, 1.0)
    _, singular, axes = np.linalg.svd(np.linalg.qr(jacobian / size, mode="r"))
    lost: set[str] = set()
    for direction in axes[int(np.sum(singular > NULL * singular[0])) :] / size:
        step = np.zeros(len(vector))
        step[movable] = STEP * direction / np.abs(direction).max()
        params = problem.params_of(np.stack([vector - step, vector + step]))
        for name, (low, high) in {**params, **law.reported(params)}.items():
            if not abs(high - low) <= MOVED * (abs(high) + abs(low)):
                lost.add(name)
    return frozenset(lost - set(held))


def num_values(values: Array) -> int:
    """Count the different values of a variable (n,); those within a few per cent are one."""
    return len(np.unique(_rounded(np.asarray(values, float))))


def _rounded(values: Array) -> Array:
    """Replace each value (n,) by the lowest of those that are the same as it."""
    order = np.unique(values)
    span, kept, i = order[-1] - order[0], [], 0
    while i < len(order):
        kept.append(order[i])
        i = int(np.searchsorted(order, order[i] + SAME * min(abs(order[i]), span), side="right"))
    return np.array(kept)[np.searchsorted(kept, values, side="right") - 1]
