"""What speaks against a fitted law.

More scatter than replicates have, patterns in residuals, a size or a budget that lies off the law fitted without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.fitting.errors import Components, components_of
from aimscale.analysis.fitting.groups import Groups, groups_of, with_spread
from aimscale.analysis.fitting.optimise import minimise
from aimscale.analysis.fitting.problem import Problem
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.design import held_equal
from aimscale.analysis.table.points import Observations
from aimscale.analysis.words import Flag

ALARM = 0.01
"""A test is told of at this probability or less."""
MIN_GROUPS, MAX_GROUPS = 5, 30
"""Fewer values of a variable leave too little to tell by, and of more each alone hardly matters."""
MOST_POINTS = 400
"""Points that the test of the form looks at: of larger tables those of evenly spaced cells."""
HARDLY = 1e-3
"""A pattern of which the law leaves less than this share is one that the law can follow."""
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
    return (
        *_form(problem, problem.linearised(vector), residual, groups, errors, points, rows),
        *_odd_groups(problem, vector, points, rows),
    )


def _form(
    problem: Problem,
    jacobian: Array,
    residual: Array,
    groups: Groups,
    errors: Components,
    points: Observations,
    rows: pd.DataFrame,
) -> Iterator[Flag]:
    """Lack of fit against replicates, else patterns."""
    cells = _replicates(points, rows)
    keep = _whole_cells(cells)
    weights, shared = problem.weights[keep], groups.rows(keep)
    root, codes = np.sqrt(weights), np.unique(cells[keep], return_inverse=True)[1]
    scaled, law, num = residual[keep] * root, jacobian[keep] * root[:, None], int(codes.max()) + 1
    kind, subject = "scatter", ""
    if law.shape[1] < num < len(codes):
        wider = np.eye(num)[codes] * root[:, None]
        # what all points of a size share is no noise of replicates but lack of fit: the null is without it
        errors = replace(errors, size=0.0)
    else:
        names, wider = _patterns(law, root, {v: values[keep] for v, values in points.x.items()})
        if not names or len(keep) <= law.shape[1] + len(names):
            return
        kind, subject = "pattern", names[int(np.argmax(np.abs(scaled @ wider)))]
    above, below = _beyond(law, wider)
    f, p, excess = ratio_test(scaled, above, below, errors.covariance(weights, shared))
    if p <= ALARM:
        size = 100 * excess / float(np.sqrt(np.sum(weights)))
        yield Flag(kind=kind, subject=subject, number=size, p=p, more=(f, above.shape[1], below.shape[1]))


def _replicates(points: Observations, rows: pd.DataFrame) -> Array:
    """Cell of each point (n,): rows of a cell agree in the law's variables and in every setting but the seed."""
    scales = {f"x {v}": np.round(np.log(values + 1e-300), 9) for v, values in points.x.items()}
    both = pd.DataFrame(scales, index=rows.index).join(rows[held_equal(rows, ("seed", *points.columns.values()))])
    return both.groupby(list(both), dropna=False).ngroup().to_numpy()


def _whole_cells(cells: Array) -> Array:
    """Indices of all points, or of a large table those of evenly spaced cells."""
    num, most = int(cells.max()) + 1, MOST_POINTS / len(cells)
    chosen = np.arange(num) if most >= 1 else np.linspace(0, num - 1, max(1, int(num * most))).astype(int)
    return np.flatnonzero(np.isin(cells, chosen))


def ratio_test(scaled: Array, above: Array, below: Array, covariance: Array) -> tuple[float, float, float]:
    """F-test of residuals (n,) along orthonormal bases (n, a) and (n, b), of normal errors of a covariance (n, n).

    The ratio of mean squares exceeds F where a quadratic form of the errors is positive: a sum of chi-squared
    variables, weighted by the form's eigenvalues. Of independent errors this is Fisher's F.

    Returns:
        F, its probability, and the root of the sum of squares above that the mean square below does not explain.
    """
    squares = [float(np.sum((scaled @ basis) ** 2)) for basis in (above, below)]
    degrees = above.shape[1], below.shape[1]
    noise = max(squares[1] / degrees[1], 1e-300)
    f = squares[0] / degrees[0] / noise
    basis, form = np.column_stack([above, below]), np.repeat([1 / degrees[0], -f / degrees[1]], degrees)
    values, axes = np.linalg.eigh(basis.T @ covariance @ basis)
    root = axes * np.sqrt(np.maximum(values, 0.0))
    p = positive_probability(np.linalg.eigvalsh(root.T @ (form[:, None] * root)))
    return f, p, float(np.sqrt(max(0.0, squares[0] - degrees[0] * noise)))


def positive_probability(weights: Array) -> float:
    """Probability that a sum of weights (m,) times chi-squared variables of one degree is positive.

    Imhof's integral (1961) over the logarithm of its variable, by the trapezoidal rule: known to 1e-10.
    """
    u, step = np.exp(np.arange(-38, 38, 0.04)), 0.04
    lines = weights[:, None] / max(float(np.abs(weights).max()), 1e-300) * u
    angle, decay = 0.5 * np.arctan(lines).sum(axis=0), np.exp(-0.25 * np.log1p(lines**2).sum(axis=0))
    return float(np.clip(0.5 + step / np.pi * np.sum(np.sin(angle) * decay), 1e-10, 1.0))


def _beyond(law: Array, wider: Array) -> tuple[Array, Array]:
    """Orthonormal bases of what columns (n, m) span beyond those of the law (n, k), and of what is left of both."""
    known = _basis(law)
    unit = wider / np.linalg.norm(wider, axis=0)
    above = _basis(unit - known @ (known.T @ unit), least=1e-6)
    return above, np.linalg.qr(np.column_stack([known, above]), mode="complete")[0][
        :, known.shape[1] + above.shape[1] :
    ]


def _basis(columns: Array, least: float = 0.0) -> Array:
    """Orthonormal basis (n, rank) of columns (n, m), but for directions of less than `least`."""
    size = np.linalg.norm(columns, axis=0) if not least else 1.0
    left, singular, _ = np.linalg.svd(columns / np.where(size > 0, size, 1.0), full_matrices=False)
    return left[:, singular > max(least, 1e-10 * singular.max())]


def _patterns(law: Array, root: Array, x: Mapping[str, Array]) -> tuple[list[str], Array]:
    """Squares and products of the variables' logarithms that the law leaves: names, and unit columns (n, q).

    Args:
        law: its derivatives (n, k) times the roots (n,) of the weights.
    """
    plain = {f"ln {name}": np.log(v) for name, v in x.items() if np.all(v > 0) and np.ptp(v) > 0}
    logs = {name: (v - v.mean()) / v.std() for name, v in plain.items()}
    pairs = itertools.combinations_with_replacement(logs, 2)
    named = {f"{a} x {b}" if a != b else f"{a} squared": logs[a] * logs[b] for a, b in pairs}
    columns, known = np.array(list(named.values())).reshape(len(named), len(root)).T * root[:, None], _basis(law)
    left = columns - known @ (known.T @ columns)
    size = np.linalg.norm(left, axis=0)
    kept = size > HARDLY * np.linalg.norm(root)
    return [name for name, keep in zip(named, kept, strict=True) if keep], left[:, kept] / size[kept]


def _odd_groups(problem: Problem, vector: Array, points: Observations, rows: pd.DataFrame) -> Iterator[Flag]:
    """The size that lies farthest off the law fitted without it, if any does, and likewise the value of any other
    variable: its neighbours may suffer from it."""
    shared = groups_of(rows, points.x)
    for v, values in points.x.items():
        codes = np.unique(np.round(np.log(np.maximum(values, 1e-300)), 9), return_inverse=True)[1]
        first = np.unique(codes, return_index=True)[1]
        left = problem.num_points - np.bincount(codes).max()
        if not MIN_GROUPS <= len(first) <= MAX_GROUPS or len(first) == len(codes) or left <= problem.movable.sum() + 1:
            continue
        off, deviations, threshold = _left_out(problem, vector, shared, codes).T
        odd = np.where(np.abs(deviations) > threshold, np.abs(deviations), 0.0)
        if not odd.any():
            continue
        worst = int(np.argmax(odd))
        by, name = v, f"= {values[first[worst]]:.3g}"
        if v == "N" and "size" in rows:
            by, name = "size", str(rows["size"].iloc[first[worst]])
        yield Flag(kind="off", subject=name, number=100 * float(off[worst]), more=(by, float(odd[worst])))


def _left_out(problem: Problem, vector: Array, shared: Groups, codes: Array) -> Array:
    """Leave each group out (groups, 3): its mean residual of T(y) from the law without it, the same in standard
    deviations, and how many of these only one sound table in twenty has anywhere.

    Args:
        vector: the optimum (k,).
        shared: points that share errors.
        codes: number of each point's group (n,).
    """
    num = int(codes.max()) + 1
    masks = codes != np.arange(num)[:, None]
    vectors, _ = minimise(problem, np.repeat(vector[None], num, axis=0), masks * problem.weights)
    found = []
    for keep, moved in zip(masks, vectors, strict=True):
        residual, jacobian, root = problem.residual(moved), problem.linearised(moved), np.sqrt(problem.weights * keep)
        share = problem.weights * ~keep / np.sum(problem.weights[~keep])
        # the group's mean less the law without it, as a sum over all points' errors
        gap = share - (share @ jacobian) @ np.linalg.pinv(jacobian * root[:, None], rcond=1e-9) * root
        left, unseen = with_spread(shared.rows(keep), jacobian[keep])
        near = np.clip(residual[keep], -problem.objective.delta, problem.objective.delta)
        spread = components_of(jacobian[keep], near, problem.weights[keep], left)
        sd, off = np.sqrt(float(spread.variance_of(gap[None], problem.weights, shared)[0])), float(share @ residual)
        usual = float(student.ppf(1 - FAMILY_ALARM / 2 / num, max(1, num - 3)))
        found.append((off, off / max(sd, 1e-300), BLIND_THRESHOLD if unseen else usual))
    return np.array(found)
