"""What speaks against a fitted law.

More scatter than replicates have, patterns in residuals, a size or a budget that lies off the law fitted without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import f as fisher
from scipy.stats import t as student

from aimscale.analysis.fitting.errors import Components, components_of
from aimscale.analysis.fitting.groups import Groups, groups_of, with_spread
from aimscale.analysis.fitting.optimise import minimise
from aimscale.analysis.fitting.problem import Problem
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.points import Observations
from aimscale.analysis.words import Flag

ALARM = 0.01
"""A test is told of at this probability or less."""
MIN_GROUPS, MAX_GROUPS = 5, 30
"""Fewer values of a variable leave too little to tell by, and of more each alone hardly matters."""
SIMULATED, AT_ONCE = 999, 2_000_000
"""Tables simulated for a probability, whatever the number of draws of the intervals; of large tables fewer, so that so
many errors are held at once."""
FAMILY_ALARM = 0.05
"""Probability that any group of a sound table is named."""
BLIND_THRESHOLD = 6.0
"""Where too few sizes are left to know their spread, a group must lie this many standard deviations of points off."""


def lack_of_fit(
    problem: Problem,
    vector: Array,
    residual: Array,
    groups: Groups,
    errors: Components,
    points: Observations,
    rows: pd.DataFrame,
) -> tuple[Flag, ...]:
    """Flags against a fit; none where nothing speaks against it.

    Args:
        vector: the optimum (k,).
        residual: residuals (n,) whose least squares it is.
        groups: points that share errors the law leaves visible.
    """
    num = int(np.clip(AT_ONCE // problem.num_points, 99, SIMULATED))
    simulated = errors.simulate(problem.weights, groups, num, np.random.default_rng(5))
    return (
        *_form(problem, problem.linearised(vector), residual, points, groups, errors, simulated),
        *_odd_groups(problem, vector, points, rows),
    )


def _form(
    problem: Problem,
    jacobian: Array,
    residual: Array,
    points: Observations,
    groups: Groups,
    errors: Components,
    simulated: Array,
) -> Iterator[Flag]:
    """Lack of fit against replicates, else patterns."""
    logs = np.round(np.log(np.array([v + 1e-300 for v in points.x.values()])), 9)
    cells = np.unique(logs, axis=1, return_inverse=True)[1].ravel()
    own = None
    if groups.runs is not None:
        # what all points of a size share is no noise of replicates but lack of fit: the null is without it
        seeds = Groups(runs=groups.runs)
        own = replace(errors, size=0.0).simulate(problem.weights, seeds, len(simulated), np.random.default_rng(6))
    scaled, size = residual * np.sqrt(problem.weights), 100 * float(np.sqrt(np.mean(residual**2)))
    if cells.max() + 1 < len(cells) and cells.max() + 1 > jacobian.shape[1]:
        f, degrees, p = replicate_test(scaled, jacobian, problem.weights, cells, own)
        if p <= ALARM:
            yield Flag(kind="scatter", number=p, more=(f, *degrees, size))
        return
    names, columns = _patterns(jacobian, problem.weights, points)
    spare = len(residual) - jacobian.shape[1] - len(names)
    if not names or spare < 1:
        return
    basis, _ = np.linalg.qr(columns.T)

    def statistic(rows: Array) -> Array:
        explained = np.sum((rows @ basis) ** 2, axis=1)
        return explained / len(names) / np.maximum((np.sum(rows**2, axis=1) - explained) / spare, 1e-300)

    f = float(statistic(scaled[None])[0])
    p = _probability(statistic(left_over(jacobian, problem.weights, simulated)), f)
    if p <= ALARM:
        strongest = names[int(np.argmax(np.abs(columns @ scaled)))]
        yield Flag(kind="pattern", subject=strongest, number=p, more=(f, len(names), spare, size))


def _probability(simulated: Array, value: float) -> float:
    return float((1 + np.sum(simulated >= value)) / (1 + len(simulated)))


def left_over(jacobian: Array, weights: Array, errors: Array) -> Array:
    """Residuals (num, n), times the root of their weights, that the linearised law leaves of errors (num, n)."""
    root = np.sqrt(weights)
    basis, _ = np.linalg.qr(jacobian * root[:, None])
    scaled = errors * root
    return scaled - (scaled @ basis) @ basis.T


def replicate_test(
    scaled: Array, jacobian: Array, weights: Array, cells: Array, errors: Array | None = None
) -> tuple[float, tuple[int, int], float]:
    """F-test of the scatter of cells about the law against that of replicates within them: F, degrees of freedom, p.

    Args:
        scaled: residuals (n,) times the root of their weights.
        cells: number of each point's cell (n,); points of a cell differ by noise alone.
        errors: simulated errors (num, n) where replicates share those of runs; None takes the F-distribution.
    """
    num = int(cells.max()) + 1
    spare, root = (num - jacobian.shape[1], len(cells) - num), np.sqrt(weights)

    def statistic(rows: Array) -> Array:
        raw = rows / root
        means = np.array([np.bincount(cells, weights * row, num) for row in raw]) / np.bincount(cells, weights, num)
        pure = np.sum(weights * (raw - means[:, cells]) ** 2, axis=1)
        return (np.sum(rows**2, axis=1) - pure) / spare[0] / np.maximum(pure / spare[1], 1e-300)

    f = float(statistic(scaled[None])[0])
    if errors is None:
        return f, spare, float(fisher.sf(f, *spare))
    return f, spare, _probability(statistic(left_over(jacobian, weights, errors)), f)


def _patterns(jacobian: Array, weights: Array, points: Observations) -> tuple[list[str], Array]:
    """Squares and products of the variables' logarithms that the law leaves: names, and unit columns (q, n)."""
    plain = {f"ln {name}": np.log(v) for name, v in points.x.items() if np.all(v > 0) and np.ptp(v) > 0}
    logs = {name: (v - v.mean()) / v.std() for name, v in plain.items()}
    pairs = itertools.combinations_with_replacement(logs, 2)
    named = {f"{a} x {b}" if a != b else f"{a} squared": logs[a] * logs[b] for a, b in pairs}
    columns = left_over(jacobian, weights, np.array(list(named.values())).reshape(len(named), len(weights)))
    size = np.sqrt(np.sum(columns**2, axis=1))
    kept = size > 1e-3 * np.sqrt(np.sum(weights))
    return [name for name, keep in zip(named, kept, strict=True) if keep], columns[kept] / size[kept, None]


def _odd_groups(problem: Problem, vector: Array, points: Observations, rows: pd.DataFrame) -> Iterator[Flag]:
    """The size that lies off the law fitted without it, and likewise the value of any other variable."""
    shared = groups_of(rows, points.x)
    for v, values in points.x.items():
        codes = np.unique(np.round(np.log(np.maximum(values, 1e-300)), 9), return_inverse=True)[1]
        first = np.unique(codes, return_index=True)[1]
        left = problem.num_points - np.bincount(codes).max()
        if not MIN_GROUPS <= len(first) <= MAX_GROUPS or len(first) == len(codes) or left <= problem.movable.sum() + 1:
            continue
        by, names = v, [f"= {value:.3g}" for value in values[first]]
        if v == "N" and "size" in rows:
            by, names = "size", rows["size"].iloc[first].tolist()
        yield from _odd_group(_left_out(problem, vector, shared, codes, names, by))


def _left_out(
    problem: Problem, vector: Array, shared: Groups, codes: Array, names: Sequence[object], by: str
) -> pd.DataFrame:
    """Leave each group out: one row per group with `num_points`, every parameter without it, and how far it lies off.

    `off` is its mean residual of T(y) from the law without it, `deviations` the same in standard deviations, and
    `threshold` how many of these only one sound table in twenty has anywhere.

    Args:
        vector: the optimum (k,).
        shared: points that share errors.
        codes: number of each point's group (n,).
        names: of the groups.
    """
    masks = codes != np.arange(len(names))[:, None]
    vectors, _ = minimise(problem, np.repeat(vector[None], len(names), axis=0), masks * problem.weights)
    rows = []
    for keep, moved in zip(masks, vectors, strict=True):
        residual, jacobian, root = problem.residual(moved), problem.linearised(moved), np.sqrt(problem.weights * keep)
        share = problem.weights * ~keep / np.sum(problem.weights[~keep])
        # the group's mean less the law without it, as a sum over all points' errors
        gap = share - (share @ jacobian) @ np.linalg.pinv(jacobian * root[:, None], rcond=1e-9) * root
        left, unseen = with_spread(shared.rows(keep), jacobian[keep])
        near = np.clip(residual[keep], -problem.objective.delta, problem.objective.delta)
        spread = components_of(jacobian[keep], near, problem.weights[keep], left)
        sd = max(float(np.sqrt(spread.variance_of(gap, problem.weights, shared))), 1e-300)
        spare, off = max(1, len(names) - 3), float(share @ residual)
        threshold = BLIND_THRESHOLD if unseen else float(student.ppf(1 - FAMILY_ALARM / 2 / len(names), spare))
        rows.append({"num_points": int((~keep).sum()), "off": off, "deviations": off / sd, "threshold": threshold})
    table = pd.DataFrame(rows)
    table.insert(0, by, list(names))
    return table.assign(**problem.params_of(vectors))


def _odd_group(table: pd.DataFrame) -> tuple[Flag, ...]:
    """A flag for the group that lies farthest off, if any does: its neighbours may suffer from it."""
    far = table["deviations"].abs()
    if not (far > table["threshold"]).any():
        return ()
    worst = table.iloc[int(np.argmax(far.where(far > table["threshold"], 0.0)))]
    by = str(table.columns[0])
    more = (by, float(abs(worst["deviations"])))
    return (Flag(kind="off", subject=str(worst[by]), number=100 * float(worst["off"]), more=more),)
