"""Flags of a fit: bounds, identification, rival minima, outliers, variables that move together."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from aimscale.analysis.fitting.identification import num_values
from aimscale.analysis.fitting.inference import Estimate
from aimscale.analysis.fitting.problem import Problem
from aimscale.analysis.fitting.result import Interval
from aimscale.analysis.table.points import Observations
from aimscale.analysis.words import Flag

WIDE_FACTOR, WIDE_EXPONENT_FACTOR = 100.0, 10.0
"""An interval of a positive parameter (an exponent) whose ends differ by more than this factor does not identify it."""
WIDE_DERIVED = 0.5
"""A derived exponent (of N* or D*, between 0 and 1) that is not known to within this is not identified."""
SAME_VARIABLE = 0.999
"""Two variables whose logarithms correlate by more than this are one: 6 % of scatter about a proportion over 100x."""
OUTLIER_SCALES = 6.0
"""A residual beyond this many robust standard deviations is named: of 1000 normal errors none is, once in a million."""
UNKNOWN = ("reaches_bound", "factor")
"""Kinds of flags of a parameter that is not identified."""
WITHIN_NOISE = 2.0
"""Log-likelihood that a rival minimum may lose and still be hardly less likely than the best: two standard deviations
of one parameter."""


def diagnose(
    estimate: Estimate,
    params: Collection[str],
    intervals: Mapping[str, Interval],
    points: Observations,
    hidden: frozenset[str] = frozenset(),
) -> tuple[tuple[Flag, ...], frozenset[str]]:
    """Collect all flags of a fit, and the reported parameters (of `params`) that it does not identify.

    Args:
        intervals: of reported parameters and of the law's own.
        hidden: parameters that no losses at these scales could identify (`unidentified`).
    """
    problem = estimate.problem
    flags, lost = _of_parameters(estimate, intervals)
    flags, lost = [flag for flag in flags if flag.subject not in hidden], lost | hidden
    if names := [name for name in params if name in hidden]:
        counts = " and ".join(f"{num_values(values)} values of {v}" for v, values in points.x.items())
        flags.insert(0, Flag(kind="few_values", subject=", ".join(names), more=(counts,)))
    flags += _rivals(estimate) if not hidden else []
    for flag, unknown in _of_variables(problem, points):
        flags.append(flag)
        lost |= unknown
    flags += _outliers(estimate, points)
    flags += [Flag(kind="unseen", subject=name) for name in estimate.unseen]
    numbers = estimate.groups.counts
    flags += [Flag(kind="few_groups", subject=name, number=numbers[name]) for name in estimate.few]
    for name in problem.law.derived:
        if name in intervals and not intervals[name].high - intervals[name].low <= WIDE_DERIVED:
            lost.add(name)
    inner = set(problem.law.names) - set(params)  # the law's own coordinates, unknown to the reader
    return tuple(f for f in flags if f.subject not in inner), frozenset(lost & set(params))


def _rivals(estimate: Estimate) -> list[Flag]:
    """Flag another minimum that fits as well within the noise.

    The noise's scale is fitted too: n/2 ln(S/S0) of squares, n ln(S/S0) of absolute values.
    """
    if len(estimate.minima) < 2:
        return []
    problem = estimate.problem
    power = 1 if problem.objective.robust and not problem.objective.multiple else 2
    best, rival = (max(each.total, 1e-12) for each in estimate.minima[:2])
    gap = float(np.sum(problem.weights > 0) / power * np.log(rival / best))
    return [Flag(kind="rival", number=gap)] if gap < WITHIN_NOISE else []


def _of_parameters(estimate: Estimate, intervals: Mapping[str, Interval]) -> tuple[list[Flag], set[str]]:
    """Find at most one flag for each parameter (its interval reaches a bound or spans orders of magnitude; it lies on a
    bound), and the names of those that are not identified."""
    problem = estimate.problem
    flags, lost = list[Flag](), set[str]()
    for j in np.flatnonzero(problem.movable).tolist():
        p, is_linear = problem.law.parameters[j], j < problem.num_linear
        low, high = (float(np.exp(e[j]) if p.log else e[j]) for e in (problem.lower, problem.upper))
        found = [*_of_interval(p.name, intervals[p.name], low, high, is_linear)]
        near = 1e-6 * (high - low if np.isfinite(high - low) and not p.log else 1.0)
        if estimate.vector[j] - problem.lower[j] <= near:
            found.append(Flag(kind="lower_bound", subject=p.name, number=low))
        elif problem.upper[j] - estimate.vector[j] <= near:
            found.append(Flag(kind="upper_bound", subject=p.name, number=high))
        flags += found[:1]
        if is_linear and any(f.kind == "from_above" or (f.kind == "lower_bound" and f.number == 0) for f in found):
            lost |= _exponents_of(problem, j)  # what has no coefficient has no exponent
        if any(flag.kind in UNKNOWN or not is_linear for flag in found):
            lost.add(p.name)
    return flags, lost


def _of_interval(name: str, i: Interval, low: float, high: float, is_linear: bool) -> Iterator[Flag]:
    """Say what an interval says against a parameter of these bounds."""
    at_low = np.isfinite(low) and i.low <= low + 1e-6 * abs(low)
    at_high = np.isfinite(high) and i.high >= high * (1 - 1e-6)
    if not is_linear and (at_low or at_high):
        yield Flag(kind="reaches_bound", subject=name, number=low if at_low else high)
    elif is_linear and at_low and low == 0.0 and i.high > 0:
        yield Flag(kind="from_above", subject=name, number=i.high)
    elif i.low > 0 and i.high / i.low > (WIDE_FACTOR if is_linear else WIDE_EXPONENT_FACTOR):
        yield Flag(kind="factor", subject=name, number=i.high / i.low)


def _exponents_of(problem: Problem, j: int) -> set[str]:
    """Name the non-linear parameters that enter basis function j alone."""
    start, alone = problem.num_linear, set[str]()
    middle = np.concatenate([np.ones(start), (problem.lower + problem.upper)[start:] / 2])
    for q, p in enumerate(problem.law.nonlinear):
        moved = np.stack([middle, middle])
        moved[1, start + q] += 1e-3
        parts = problem.law.basis(problem.x, problem.nonlinear(moved))
        moving = {i for i, part in enumerate(parts) if np.ndim(part) and np.any(part[0] != part[1])}
        alone |= {p.name} if moving == {j} else set()
    return alone


def _of_variables(problem: Problem, points: Observations) -> Iterator[tuple[Flag, set[str]]]:
    """Find variables that hardly vary, or move together; with the parameters that are unknown for it."""
    for v, values in points.x.items():
        factor = float(values.max() / max(values.min(), 1e-300))
        if factor < 2:
            yield Flag(kind="narrow", subject=v, number=factor), set()
    for a, b in itertools.combinations(points.x, 2):
        r = float(np.corrcoef(np.log(points.x[a]), np.log(points.x[b]))[0, 1])
        if abs(r) > SAME_VARIABLE and len(points.x) == 2:
            # What is left to tell them apart is the law's own curvature, which noise imitates.
            unknown = set[str]().union(*(_exponents_of(problem, j) for j in range(problem.num_linear)))
            yield Flag(kind="one_variable", subject=f"{a} and {b}", number=r), unknown
        elif abs(r) > 0.98:
            yield Flag(kind="collinear", subject=f"{a} and {b}", number=r), set()


def _outliers(estimate: Estimate, points: Observations) -> Iterator[Flag]:
    r = estimate.problem.residual(estimate.vector)
    scale = max(1.4826 * float(np.median(np.abs(r - np.median(r)))), estimate.components.point)
    far = np.abs(r) > OUTLIER_SCALES * scale
    if scale > 0 and far.any():
        row = str(points.index[int(np.argmax(np.abs(r)))])
        yield Flag(kind="outliers", subject=row, number=float(far.sum()), more=(OUTLIER_SCALES,))
