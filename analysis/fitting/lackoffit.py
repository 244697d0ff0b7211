"""What speaks against a fitted law.

More scatter than replicates have, patterns in residuals, a size or a budget that lies off the law fitted without it.
All tests take the estimate's own components of variance for the null: what points of a size, a budget or a run share
is no misfit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.fitting.covariance import components_of, linear_design
from aimscale.analysis.fitting.groups import Groups, groups_of, visible_groups
from aimscale.analysis.fitting.inference import Estimate
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.design import experiment_columns, held_equal
from aimscale.analysis.table.names import their_name
from aimscale.analysis.table.points import Observations
from aimscale.analysis.words import Flag

ALARM = 0.01
"""A test is told of at this probability or less."""
MIN_GROUPS, MAX_GROUPS = 5, 30
"""Fewer values of a variable leave too little to tell by, and of more each alone hardly matters."""
MOST_POINTS = 400
"""Points that the test of the form looks at: of larger tables those of evenly spaced cells."""
HARDLY = 1e-3
"""Patterns that the law's own derivatives explain to 99.9 % are not tested."""
FAMILY_ALARM = 0.05
"""Probability that any group of any variable of a sound table is named (Bonferroni). In simulated tables whose sizes
share errors it is up to twice that: their spread is told by few."""
CURVE = 3
"""Degrees of freedom of groups that a law's curve in one variable takes: limit, coefficient, exponent."""
BLIND_THRESHOLD = 6.0
"""Where too few sizes are left to know their spread, a group must lie this many standard deviations of points off."""


def lack_of_fit(found: Estimate, points: Observations, rows: pd.DataFrame) -> tuple[Flag, ...]:
    """Collect flags against a fit; none where nothing speaks against it.

    Args:
        rows: the table's rows of the fitted points (n,).
    """
    return (*_form(found, points, rows), *_odd_groups(found, points, rows), *_experiments(found, rows))


def _form(found: Estimate, points: Observations, rows: pd.DataFrame) -> Iterator[Flag]:
    """Test for lack of fit against replicates, else for patterns."""
    cells = _replicates(points, rows)
    keep = _whole_cells(cells)
    root = np.sqrt(found.design.weights[keep])
    codes = np.unique(cells[keep], return_inverse=True)[1]
    scaled, law, num = found.residual[keep] * root, found.design.x[keep] * root[:, None], int(codes.max()) + 1
    kind, subject = "scatter", ""
    if law.shape[1] < num < len(codes):
        wider = np.eye(num)[codes] * root[:, None]
    else:
        names, wider = _patterns(law, root, {v: values[keep] for v, values in points.x.items()})
        if not names or len(keep) <= law.shape[1] + len(names):
            return
        kind, subject = "pattern", names[int(np.argmax(np.abs(scaled @ wider)))]
    above, below = _beyond(law, wider)
    covariance = found.components.covariance(found.groups.rows(keep), len(keep)) * root[:, None] * root
    f, p, excess = ratio_test(scaled, above, below, covariance)
    if p <= ALARM:
        size = 100 * excess / float(np.sqrt(np.sum(root**2)))
        yield Flag(kind=kind, subject=subject, number=size, p=p, more=(f, above.shape[1], below.shape[1]))


def _replicates(points: Observations, rows: pd.DataFrame) -> Array:
    """Number the cell of each point (n,): its rows agree in the law's variables and every setting but the seed."""
    scales = {f"x {v}": np.round(np.log(values + 1e-300), 9) for v, values in points.x.items()}
    both = pd.DataFrame(scales, index=rows.index).join(rows[held_equal(rows, ("seed", *points.columns.values()))])
    return both.groupby(list(both), dropna=False).ngroup().to_numpy()


def _whole_cells(cells: Array) -> Array:
    """Return the indices of all points, or of a large table those of evenly spaced cells."""
    num, most = int(cells.max()) + 1, MOST_POINTS / len(cells)
    chosen = np.arange(num) if most >= 1 else np.linspace(0, num - 1, max(1, int(num * most))).astype(int)
    return np.flatnonzero(np.isin(cells, chosen))


def _experiments(found: Estimate, rows: pd.DataFrame) -> Iterator[Flag]:
    """Test whether rows that differ in a column which may tell experiments apart lie on one law."""
    names, root = experiment_columns(rows), np.sqrt(found.design.weights)
    law, scaled = found.design.x * root[:, None], found.residual * root
    covariance = found.components.covariance(found.groups, len(rows)) * root[:, None] * root
    for name in names:
        codes = pd.factorize(rows[name].map(str))[0]
        num = int(codes.max()) + 1
        if not 1 < num <= MAX_GROUPS or len(rows) <= law.shape[1] + num:
            continue
        above, below = _beyond(law, np.eye(num)[codes] * root[:, None])
        if not above.shape[1] or not below.shape[1]:
            continue
        _, p, _ = ratio_test(scaled, above, below, covariance)
        if p <= ALARM / len(names):
            means = np.bincount(codes, found.residual) / np.bincount(codes)
            yield Flag(kind="experiments", subject=their_name(rows, name), number=100 * float(np.ptp(means)), p=p)


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
    both = np.linalg.qr(np.column_stack([known, above]), mode="complete")[0]
    return above, both[:, known.shape[1] + above.shape[1] :]


def _basis(columns: Array, least: float = 0.0) -> Array:
    """Orthonormal basis (n, rank) of columns (n, m), but for directions of less than `least`."""
    size = np.linalg.norm(columns, axis=0) if not least else 1.0
    left, singular, _ = np.linalg.svd(columns / np.where(size > 0, size, 1.0), full_matrices=False)
    return left[:, singular > max(least, 1e-10 * singular.max())]


def _patterns(law: Array, root: Array, x: Mapping[str, Array]) -> tuple[list[str], Array]:
    """Find squares and products of the variables' logarithms that the law leaves: names, and unit columns (n, q).

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


def _odd_groups(found: Estimate, points: Observations, rows: pd.DataFrame) -> Iterator[Flag]:
    """Find the size that lies farthest off the law fitted without it, if any does, and likewise the value of any other
    variable: its neighbours may suffer from it."""
    for v, values in points.x.items():
        codes = np.unique(np.round(np.log(np.maximum(values, 1e-300)), 9), return_inverse=True)[1]
        first = np.unique(codes, return_index=True)[1]
        left = len(codes) - np.bincount(codes).max()
        enough = left > found.problem.movable.sum() + 1
        if not MIN_GROUPS <= len(first) <= MAX_GROUPS or len(first) == len(codes) or not enough:
            continue
        tests = np.array([_left_out(found, groups_of(rows, points.x), codes == k) for k in range(len(first))])
        off, deviations, is_blind = tests.T
        level = FAMILY_ALARM / len(points.x) / len(first)
        usual = float(student.ppf(1 - level / 2, max(1, len(first) - CURVE)))
        odd = np.where(np.abs(deviations) > np.where(is_blind, BLIND_THRESHOLD, usual), np.abs(deviations), 0.0)
        if not odd.any():
            continue
        worst = int(np.argmax(odd))
        by, name = v, f"= {values[first[worst]]:.3g}"
        if v == "N" and "size" in rows:
            by, name = "size", str(rows["size"].iloc[first[worst]])
        yield Flag(kind="off", subject=name, number=100 * float(off[worst]), more=(by, float(odd[worst])))


def _left_out(found: Estimate, shared: Groups, out: Array) -> tuple[float, float, bool]:
    """Compare a group of points (mask) with the law without them, by the linearised fit to the others.

    With G the inverse design of the others, the group's mean residual g'r less what the law's parameters moved is
    g'e_out - g'X_out G e_rest: a contrast of all errors, whose variance the others' components tell.

    Returns:
        The mean residual of T(y) from the law without the group, the same in standard deviations, and whether too few
        groups are left to tell what their points share.
    """
    jacobian, weights, keep = found.problem.linearised(found.vector), found.problem.weights, ~out
    share = np.where(out, weights, 0.0) / weights[out].sum()
    inverse = np.zeros((jacobian.shape[1], len(out)))
    rest = linear_design(jacobian[keep], weights[keep])
    inverse[:, keep] = rest.inverse
    moved = inverse @ found.residual
    gap = share - (share @ jacobian) @ inverse
    left, unseen, _ = visible_groups(shared.rows(keep), jacobian[keep])
    spread = components_of(rest, (found.residual - jacobian @ moved)[keep], left)
    sd = float(np.sqrt(spread.variance_of(gap[None], shared)[0]))
    off = float(share @ (found.problem.residual(found.vector) - jacobian @ moved))
    return off, off / max(sd, 1e-300), bool(unseen)
