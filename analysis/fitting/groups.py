"""Which points of a table share errors: the one rule for fits, held-out tests, forecasts, correlations and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.laws.base import Array

SIZE_COLUMNS = ("params_total", "N", "size")
"""Where a size is told from, where the law itself has no N."""
VISIBLE = 0.5
"""The spread of groups is seen where the law leaves at least this share of some errors that their points share."""
MANY = 100
"""More groups than this leave plenty."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Numbers of the groups of every point."""

    sizes: Array | None = None
    """Size of each point (n,); None where no size has several points."""
    runs: Array | None = None
    """Run of each point (n,), nested in sizes; None where every run has a single point, runs are sizes, or the table
    names no runs."""

    @property
    def named(self) -> dict[str, Array]:
        """Groupings by what they are of, the largest groups first."""
        return {k: v for k, v in (("sizes", self.sizes), ("runs", self.runs)) if v is not None}

    @property
    def counts(self) -> dict[str, int]:
        """How many groups of each kind there are."""
        return {name: int(codes.max()) + 1 for name, codes in self.named.items()}

    def clusters(self, num_points: int) -> Array:
        """The largest groups that share errors (n,): sizes, else runs, else the points themselves."""
        return next(iter(self.named.values()), np.arange(num_points))

    def with_one_more(self) -> Groups:
        """With a last point of a size and a run of its own."""
        return Groups(**{name: np.append(codes, codes.max() + 1) for name, codes in self.named.items()})

    def rows(self, keep: Array) -> Groups:
        """The groups of some of the points (mask), numbered anew."""
        return Groups(**{name: _codes(codes[keep]) for name, codes in self.named.items()})


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
    if runs is not None and sizes is not None:
        pairs = np.unique(np.stack([runs, sizes]), axis=1)
        if pairs.shape[1] > runs.max() + 1:  # a run of several sizes
            sizes = None
        elif runs.max() == sizes.max():
            runs = None
    return Groups(sizes=_shared(sizes), runs=_shared(runs))


def with_spread(groups: Groups, jacobian: Array) -> tuple[Groups, tuple[str, ...]]:
    """The groups whose spread the law leaves visible, and the names ("sizes", "runs") of those it does not.

    A law that bends through three sizes leaves next to nothing of them over (nothing but for the logarithm that is
    fitted): errors that sizes share cannot be seen then.
    """
    seen: dict[str, Array] = {}
    known, lost = jacobian, []
    for name, codes in groups.named.items():
        if codes.max() > MANY:
            seen[name] = codes
            continue
        indicators = np.eye(int(codes.max()) + 1)[codes] / np.sqrt(np.bincount(codes))
        scale = np.linalg.norm(known, axis=0)
        basis, singular, _ = np.linalg.svd(known / np.where(scale > 0, scale, 1.0), full_matrices=False)
        basis = basis[:, singular > 1e-9 * singular.max()]
        left = indicators - basis @ (basis.T @ indicators)
        if np.linalg.norm(left, 2) < VISIBLE:
            lost.append(name)
        else:
            seen[name], known = codes, np.column_stack([known, indicators])
    return Groups(**seen), tuple(lost)


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


def _shared(codes: Array | None) -> Array | None:
    """None where there is one group, or none with two points."""
    if codes is None or codes.max() == 0 or codes.max() + 1 == len(codes):
        return None
    return codes
