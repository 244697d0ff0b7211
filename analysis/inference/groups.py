"""Which points of a table share errors: the one rule for fits, held-out tests, forecasts, correlations and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.laws.base import Array

SIZE_COLUMNS = ("params_total", "N", "size")
"""Where a size is told from, where the law itself has no N."""
MIN_SPARE = 2
"""Degrees of freedom that groups must leave for their own spread to be told at all."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Numbers of the groups of every point."""

    sizes: Array | None
    """Size of each point (n,); None where no size has several points, or where runs are sizes."""
    runs: Array | None
    """Run of each point (n,), nested in sizes; None where every run has a single point or the table names no runs."""
    departs: bool = False
    """Whether `runs` numbers scales instead (equal variables of the law): what replicates share there is the law's own
    departure from the truth."""

    @property
    def words(self) -> str:
        """E.g. "errors of 5 sizes, 15 runs and points"."""
        named = [(self.sizes, "sizes"), (self.runs, "scales" if self.departs else "runs")]
        counted = [f"{len(np.unique(codes))} {word}" for codes, word in named if codes is not None]
        return f"errors of {', '.join(counted)} and points" if counted else "errors of points"


def groups_of(rows: pd.DataFrame, x: Mapping[str, Array]) -> Groups:
    """Sizes and runs of the points of a fit.

    A size is a value of N (of the law, else of the table). A run is a `run_id`; without one, a size and a seed; rows of
    a size without either are one run. Groups of a single point each say nothing, and runs that are sizes are told once.

    Args:
        rows: the table's rows of the fitted points (n,).
        x: the law's variables (n,).
    """
    sizes = _sizes(rows, x)
    runs = _runs(rows, sizes)
    if runs is not None and sizes is not None and not _nested(runs, sizes):
        sizes = None
    if runs is not None and sizes is not None and runs.max() == sizes.max():
        runs = None
    return Groups(sizes=_shared(sizes), runs=_shared(runs))


def by_scale(groups: Groups, x: Mapping[str, Array]) -> Groups | None:
    """The same sizes with scales in place of runs; None where no scale has replicates or they are nested in no size."""
    scales = _codes_of_rows(np.round(np.log(np.maximum(np.stack(list(x.values()), axis=1), 1e-300)), 9))
    if _shared(scales) is None or (groups.sizes is not None and not _nested(scales, groups.sizes)):
        return None
    if groups.sizes is not None and scales.max() == groups.sizes.max():
        return None
    return Groups(sizes=groups.sizes, runs=scales, departs=True)


def with_spread(groups: Groups, jacobian: Array) -> tuple[Groups, tuple[str, ...]]:
    """The groups whose spread the law leaves visible, and the words "sizes" or "runs" for those it does not.

    A law that bends through three sizes leaves nothing of them over: errors that sizes share cannot be seen then.
    """
    sizes, runs = groups.sizes, groups.runs
    lost: list[str] = []
    if sizes is not None and _spare(sizes, jacobian) < MIN_SPARE:
        sizes, lost = None, [*lost, "sizes"]
    if runs is not None:
        known = jacobian if sizes is None else np.column_stack([jacobian, _indicators(sizes)])
        if _spare(runs, known) < MIN_SPARE:
            runs, lost = None, [*lost, "runs"]
    return Groups(sizes=sizes, runs=runs, departs=groups.departs), tuple(lost)


def _sizes(rows: pd.DataFrame, x: Mapping[str, Array]) -> Array | None:
    if "N" in x:
        return _codes(np.round(np.log(x["N"]), 9))
    name = next((c for c in SIZE_COLUMNS if c in rows and rows[c].notna().all()), None)
    return None if name is None else _codes(rows[name].astype(str).to_numpy())


def _runs(rows: pd.DataFrame, sizes: Array | None) -> Array | None:
    if "run_id" in rows and rows["run_id"].notna().all():
        return _codes(rows["run_id"].astype(str).to_numpy())
    if "seed" in rows and sizes is not None and rows["seed"].notna().all():
        return _codes(sizes.astype(str).astype(object) + " " + rows["seed"].astype(str).to_numpy())
    return None


def _codes(labels: Array) -> Array:
    return np.unique(labels, return_inverse=True)[1]


def _codes_of_rows(rows: Array) -> Array:
    return np.unique(rows, axis=0, return_inverse=True)[1].ravel()


def _nested(inner: Array, outer: Array) -> bool:
    pairs = np.unique(np.stack([inner, outer]), axis=1)
    return pairs.shape[1] == inner.max() + 1


def _shared(codes: Array | None) -> Array | None:
    """None where there is one group, or none with two points."""
    if codes is None or codes.max() == 0 or codes.max() + 1 == len(codes):
        return None
    return codes


def _indicators(codes: Array) -> Array:
    return (codes[:, None] == np.arange(codes.max() + 1)).astype(float)


def _spare(codes: Array, known: Array) -> int:
    """Degrees of freedom between groups that the known columns leave."""
    if codes.max() > 500:  # plenty, and a rank of thousands of columns takes long
        return MIN_SPARE
    scale = np.sqrt(np.sum(known**2, axis=0)) + 1e-300
    both = np.column_stack([known / scale, _indicators(codes)])
    return int(np.linalg.matrix_rank(both, tol=1e-7) - np.linalg.matrix_rank(known / scale, tol=1e-7))
