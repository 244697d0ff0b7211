"""Points of a table that share errors: the one rule for fits, held-out tests, forecasts, correlations and plots."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.names import our_name

SIZE_COLUMNS = ("params_total", "N", "size")
"""Columns that tell a size, where the law itself has no N."""
VISIBLE = 0.5
"""A variance component of groups is estimated only if the fit leaves at least this share of some effect of theirs."""
MANY = 100
"""More groups than this leave plenty."""
SAME_COMPUTE = 0.1
"""Rows whose C differ by less than this fraction share a budget of compute (the rule of approach 2)."""
SAME_DATA = 1e-3
"""Rows whose D differ by less than this fraction share a budget of data: whole steps round it."""
LEAST_IN_BUDGETS = 0.5
"""Share of the points that must share a budget with another size for budgets to be groups."""


class Groups(dict[str, Array]):
    """Kind of group (sizes, the runs nested in them, and budgets) -> number of each point's group (n,); kinds whose
    groups are single points are left out."""

    unseen: tuple[str, ...] = ()
    """Kinds left out because the law leaves their shared errors invisible; intervals do not account for these."""
    few: tuple[str, ...] = ()
    """Kinds of so few groups that they hardly tell what their points share."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of groups of each kind."""
        return {name: int(codes.max()) + 1 for name, codes in self.items()}

    def clusterings(self, num_points: int) -> dict[str, Array]:
        """Return clusters of an error: sizes (else runs, else the points themselves), and budgets, which cross them."""
        largest = next((name for name in ("sizes", "runs") if name in self), "points")
        both = {largest: self.get(largest, np.arange(num_points)), "budgets": self.get("budgets")}
        return {name: codes for name, codes in both.items() if codes is not None}

    def with_one_more(self) -> Groups:
        """Append a point of a size, a budget and a run of its own."""
        return Groups({name: np.append(codes, codes.max() + 1) for name, codes in self.items()})

    def rows(self, keep: Array) -> Groups:
        """Select the groups of some of the points (mask), numbered anew."""
        return Groups({name: _codes(codes[keep]) for name, codes in self.items()})


def indicators(codes: Array) -> csr_array:
    """Return the indicators (n, groups) of the points' groups (n,)."""
    return csr_array((np.ones(len(codes)), (np.arange(len(codes)), codes)))


def basis_of(columns: Array, least: float = 0.0) -> Array:
    """Return an orthonormal basis (n, rank) of columns (n, m), but for directions of less than `least`."""
    size = np.linalg.norm(columns, axis=0) if not least else 1.0
    left, singular, _ = np.linalg.svd(columns / np.where(size > 0, size, 1.0), full_matrices=False)
    return left[:, singular > max(least, 1e-10 * singular.max())]


def numbers_of_values(values: Array) -> Array:
    """Encode the different values of a variable (n,) as integers."""
    return _codes(np.round(np.log(np.maximum(values, 1e-300)), 9))


def groups_of(rows: pd.DataFrame, x: Mapping[str, Array]) -> Groups:
    """Find sizes, budgets and runs of the points (n,) of a fit: its variables and the table's rows.

    A size is a value of N (of the law, else of the table). A budget is a value of D, or of C in a design of equal
    compute. A run is a `run_id`; without one, a size and a seed; rows of a size without either are one run.
    """
    sizes = _sizes(rows, x)
    runs = _runs(rows, sizes)
    if runs is not None and sizes is not None:
        if _num_pairs(runs, sizes) > runs.max() + 1:  # a run of several sizes
            sizes = None
        elif runs.max() == sizes.max():
            runs = None
    found = {"sizes": sizes, "budgets": None if sizes is None else _budgets(rows, x, sizes), "runs": runs}
    return Groups({k: codes for k, codes in found.items() if codes is not None and 0 < codes.max() < len(codes) - 1})


def visible_groups(groups: Groups, jacobian: Array) -> Groups:
    """Select the groups whose spread the law leaves visible: one that bends through three sizes leaves next to nothing
    of the errors that sizes share, and of four one direction, which hardly tells them."""
    seen, known = Groups(), jacobian
    for name, codes in groups.items():
        num_visible = MANY
        if codes.max() <= MANY:
            effects, basis = indicators(codes).toarray() / np.sqrt(np.bincount(codes)), basis_of(known)
            left = np.linalg.svd(effects - basis @ (basis.T @ effects), compute_uv=False)
            num_visible = int(np.sum(left >= VISIBLE))
            known = np.column_stack([known, effects]) if num_visible else known
        if num_visible:
            seen[name] = codes
        seen.unseen += (name,) * (num_visible == 0)
        seen.few += (name,) * (num_visible == 1)
    return seen


def _sizes(rows: pd.DataFrame, x: Mapping[str, Array]) -> Array | None:
    if "N" in x:
        return numbers_of_values(x["N"])
    name = next((c for c in SIZE_COLUMNS if c in rows and rows[c].notna().all()), None)
    return None if name is None else _codes(rows[name].astype(str))


def _runs(rows: pd.DataFrame, sizes: Array | None) -> Array | None:
    if "run_id" in rows and rows["run_id"].notna().all():
        return _codes(rows["run_id"].astype(str))
    if "seed" in rows and sizes is not None and rows["seed"].notna().all():
        return rows.groupby([sizes, rows["seed"].astype(str)]).ngroup().to_numpy()
    return None


def _budgets(rows: pd.DataFrame, x: Mapping[str, Array], sizes: Array) -> Array | None:
    """Find the budgets that most points share with another size: equal D, else equal C."""
    for variable, num_sizes in (("D", 2), ("C", 3)):  # two random runs are of nearly equal compute soon, three are not
        values = _scale(variable, rows, x)
        if values is None or not np.all(values > 0):
            continue
        codes = chained(np.log(values), SAME_DATA if variable == "D" else np.log1p(SAME_COMPUTE) / 2)
        of_several = pd.Series(sizes).groupby(codes).nunique().to_numpy() >= num_sizes
        if (
            of_several[codes].mean() >= LEAST_IN_BUDGETS
            and of_several.sum() > 1
            and _num_pairs(codes, sizes) > sizes.max() + 1
        ):
            return codes
    return None


def _scale(variable: str, rows: pd.DataFrame, x: Mapping[str, Array]) -> Array | None:
    """Take a variable from the law's, else from the table; C of a table that does not count it is N D."""
    if variable in x:
        return np.asarray(x[variable], float)
    if (name := our_name(rows, variable)) in rows:
        return pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
    return x["N"] * x["D"] if variable == "C" and {"N", "D"} <= set(x) else None


def chained(values: Array, gap: float) -> Array:
    """Group values (n,) whose sorted neighbours lie within a gap."""
    order = np.argsort(values, kind="stable")
    codes = np.empty(len(values), int)
    codes[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > gap)])
    return codes


def _num_pairs(a: Array, b: Array) -> int:
    return len(pd.MultiIndex.from_arrays([a, b]).unique())


def _codes(labels: Array) -> Array:
    return np.unique(labels, return_inverse=True)[1]
