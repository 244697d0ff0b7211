"""What the scales of a table can identify at all, however precise its losses: told from the law and the design alone.

A function of D that is seen at two values of D shows one difference, which any exponent explains with its coefficient
and floor. So the parameters that can move without moving the law at any of the table's scales are not identified. They
are the null space of the law's Jacobian, at scales that are equal where they nearly are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from aimscale.analysis.fitting.objectives import LOG_LSQ
from aimscale.analysis.fitting.problem import Problem, make_problem
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
    values, codes = zip(*(_values(np.asarray(x[v], float)) for v in law.variables), strict=True)
    cells = np.unique(np.stack(codes), axis=1)
    if cells.shape[1] > MAX_CELLS:
        cells = cells[:, np.linspace(0, cells.shape[1] - 1, MAX_CELLS).astype(int)]
    scales = {v: each[row] for v, each, row in zip(law.variables, values, cells, strict=True)}
    problem = make_problem(law, scales, np.ones(cells.shape[1]), LOG_LSQ)
    vector = _place(problem)
    movable = np.array([name not in held for name in law.names])
    jacobian = problem.predict_and_jacobian(vector)[1][movable].T
    size = np.linalg.norm(jacobian, axis=0)
    size = np.where(size > 0, size, 1.0)
    _, singular, axes = np.linalg.svd(np.linalg.qr(jacobian / size, mode="r"))
    rank = int(np.sum(singular > NULL * singular[0]))
    lost: set[str] = set()
    for direction in axes[rank:]:
        step = np.zeros(len(vector))
        step[movable] = STEP * direction / size / np.abs(direction / size).max()
        lost |= _moved(problem, vector, step)
    return frozenset(lost - set(held))


def num_values(values: Array) -> int:
    """Count the different values of a variable (n,); those within a few per cent are one."""
    return len(_values(np.asarray(values, float))[0])


def _values(values: Array) -> tuple[Array, Array]:
    """Return the different values (m,), and which of them each value is (n,)."""
    order = np.unique(values)
    span, kept, i = order[-1] - order[0], [], 0
    while i < len(order):
        kept.append(order[i])
        i = int(np.searchsorted(order, order[i] + SAME * min(abs(order[i]), span), side="right"))
    return np.array(kept), np.searchsorted(kept, values, side="right") - 1


def _place(problem: Problem) -> Array:
    """Choose a vector (k,) inside the bounds, every term of the law as strong as the others at the data's centre."""
    vector, start = np.ones(len(problem.lower)), problem.num_linear
    lower, upper = problem.lower[start:], problem.upper[start:]
    share = PLACE[0] + np.mod(PLACE[1] * np.arange(len(lower)), 1.0) / 3
    vector[start:] = lower + share * (upper - lower)
    return vector


def _moved(problem: Problem, vector: Array, step: Array) -> set[str]:
    """Name the parameters of the law, reported and derived ones too, that a step changes."""
    params = problem.params_of(np.stack([vector - step, vector + step]))
    out = set()
    for name, (low, high) in {**params, **problem.law.reported(params)}.items():
        if not abs(high - low) <= MOVED * (abs(high) + abs(low)):
            out.add(name)
    return out
