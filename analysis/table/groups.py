"""Points of a table that share a size, a budget or a run, the one rule for everything; and what training costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from aimscale.analysis.display import human, option
from aimscale.analysis.laws import Array
from aimscale.analysis.table.schema import CANONICAL, missing_column

SIZE_COLUMNS = ("params_total", "N", "size")
"""Columns that tell a size, where the law itself has no N."""
VISIBLE = 0.5
"""A variance component of groups is estimated only if the fit leaves at least this share of some effect of theirs."""
MANY = 100
"""More groups than this leave plenty."""
APART, WIDEST, EXACT = 2.0, 0.2, 1e-3
"""Rows share a scale where scales spread by less than the gaps between them over `APART`, and their logarithms by less
than `WIDEST`: a grid's spacing, whatever it is, shows above rounding. Random values show nothing of the kind (in 1 % of
tables of 12 rows, in none of 35). Spreads below `EXACT` are rounding."""
MOST_SCALES = 500
"""More scales than this are looked for among equal values only."""
SAME_COMPUTE = 0.1
"""Rows whose C differ by less than this fraction share a budget of compute where no grid of budgets shows."""
LEAST_IN_BUDGETS = 0.5
"""Share of the points that must share a budget with another size for budgets to be groups."""
ISOFLOP_SHARE, ISOFLOP_SIZES = 0.75, 3
"""Share of a table's rows that budgets of so many sizes must hold in an iso-FLOP design."""


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
    basis, singular, _ = np.linalg.svd(columns / np.where(size > 0, size, 1.0), full_matrices=False)
    return basis[:, singular > max(least, 1e-10 * singular.max())]


def planned_scales(values: Array) -> tuple[Array, float] | None:
    """Find the scales that positive values (n,) were planned at, two rows each on average, however they were rounded.

    Returns:
        The scale of every value, and how clear it is: the smallest gap between scales over the largest spread of one;
        None where the values show no scales.
    """
    logs = np.sort(np.log(values))
    gaps, best, clearest = np.diff(logs), None, APART
    cuts = np.append(np.sort(gaps)[::-1], 0.0)
    most = min(len(logs) // 2, MOST_SCALES)
    for k in np.flatnonzero(cuts[: max(most - 1, 0)] > APART * np.maximum(cuts[1:most], EXACT)):
        ends = np.flatnonzero(gaps > cuts[k + 1])
        spread = np.max(logs[np.append(ends, len(logs) - 1)] - logs[np.append(0, ends + 1)])
        clear = cuts[k] / max(spread, EXACT)
        if spread <= WIDEST and clear > clearest:
            best, clearest = float(cuts[k + 1]), float(clear)
    return None if best is None else (chained(np.log(values), best), clearest)


def scales_of(values: Array) -> Array:
    """Find the scales of a variable (n,): the planned ones where they show, else its different values."""
    is_positive = len(values) > 0 and bool(np.all(np.isfinite(values) & (values > 0)))
    planned = planned_scales(values) if is_positive else None
    return _codes(np.round(np.log(np.maximum(values, 1e-300)), 9)) if planned is None else planned[0]


def budgets_of_compute(values: Array, sizes: Array) -> tuple[Array, float]:
    """Find the budgets of compute (n,) and how clear they are: planned ones where most points share one with other
    sizes, else chains within half of `SAME_COMPUTE`. In a grid of sizes and data, the scales of C are its cells."""
    planned = planned_scales(values)
    if planned is not None and _of_several(planned[0], sizes)[planned[0]].mean() >= LEAST_IN_BUDGETS:
        return planned
    return chained(np.log(values), np.log1p(SAME_COMPUTE) / 2), 1.0


def _of_several(codes: Array, sizes: Array, least: int = 3) -> Array:
    """Mark the groups that hold so many sizes; two random runs are of nearly equal compute soon, three are not."""
    return pd.Series(sizes).groupby(codes).nunique().to_numpy() >= least


def groups_of(rows: pd.DataFrame, x: Mapping[str, Array], told: Mapping[str, str | float] | None = None) -> Groups:
    """Find sizes, budgets and runs of the points (n,) of a fit: its variables and the table's rows.

    A size is a scale of N (of the law, else of the table). A budget is a scale of D, or of C in a design of equal
    compute (`planned_scales`). A run is a `run_id`; without one, a size and a seed; rows of a size without either are
    one run. What was told of sizes and budgets (`Runs.with_groups`) stands.
    """
    codes = codes_of(rows, x, told)
    return Groups({kind: each for kind, each in codes.items() if 0 < each.max() < len(each) - 1})


def codes_of(
    rows: pd.DataFrame, x: Mapping[str, Array], told: Mapping[str, str | float] | None = None
) -> dict[str, Array]:
    """Find the number of each row's size, budget and run, of those that show."""
    told = told or {}
    sizes = _told(rows, x, told["sizes"], "N") if "sizes" in told else _sizes(rows, x)
    runs = _runs(rows, sizes)
    if runs is not None and sizes is not None:
        if _num_pairs(runs, sizes) > runs.max() + 1:  # a run of several sizes
            sizes = None
        elif runs.max() == sizes.max():
            runs = None
    if "budgets" in told:
        budgets = _told(rows, x, told["budgets"], "D")
    else:
        budgets = None if sizes is None else _budgets(rows, x, sizes)
    codes = {"sizes": sizes, "budgets": budgets, "runs": runs}
    return {kind: each for kind, each in codes.items() if each is not None}


def visible_groups(groups: Groups, jacobian: Array) -> Groups:
    """Select the groups whose spread the law leaves visible: one that bends through three sizes leaves next to nothing
    of the errors that sizes share, and of four one direction, which hardly tells them."""
    seen, jacobian_so_far = Groups(), jacobian
    for name, codes in groups.items():
        num_visible = MANY
        if codes.max() <= MANY:
            effects, basis = indicators(codes).toarray() / np.sqrt(np.bincount(codes)), basis_of(jacobian_so_far)
            remaining = np.linalg.svd(effects - basis @ (basis.T @ effects), compute_uv=False)
            num_visible = int(np.sum(remaining >= VISIBLE))
            jacobian_so_far = np.column_stack([jacobian_so_far, effects]) if num_visible else jacobian_so_far
        if num_visible:
            seen[name] = codes
        seen.unseen += (name,) * (num_visible == 0)
        seen.few += (name,) * (num_visible == 1)
    return seen


def _told(rows: pd.DataFrame, x: Mapping[str, Array], rule: str | float, variable: str) -> Array:
    """Find the groups by a column, or by chains of a variable's values within a tolerance."""
    values = _scale(variable, rows, x)
    if isinstance(rule, str) and rule in rows:
        return _codes(rows[rule].astype(str))
    if isinstance(rule, str) or values is None:
        name = rule if isinstance(rule, str) else variable
        raise missing_column(name, rows.columns, f" for {option('groups')}")
    return chained(np.log(values), np.log1p(rule))


def _sizes(rows: pd.DataFrame, x: Mapping[str, Array]) -> Array | None:
    if (n := x.get("N")) is not None:
        return scales_of(n)
    name = next((c for c in SIZE_COLUMNS if c in rows and rows[c].notna().all()), None)
    if name is None:
        return None
    numbers = pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
    is_number = name != "size" and not np.isnan(numbers).any()
    return scales_of(numbers) if is_number else _codes(rows[name].astype(str))


def _runs(rows: pd.DataFrame, sizes: Array | None) -> Array | None:
    if "run_id" in rows and rows["run_id"].notna().all():
        return _codes(rows["run_id"].astype(str))
    if "seed" in rows and sizes is not None and rows["seed"].notna().all():
        return rows.groupby([sizes, rows["seed"].astype(str)]).ngroup().to_numpy()
    return None


def _budgets(rows: pd.DataFrame, x: Mapping[str, Array], sizes: Array) -> Array | None:
    """Find the budgets that most points share with another size: scales of D or of C, whichever are clearer."""
    best, clearest = None, 0.0
    for variable, num_sizes in (("D", 2), ("C", 3)):
        values = _scale(variable, rows, x)
        if values is None or not np.all(values > 0):
            continue
        if variable == "C":
            codes, clear = budgets_of_compute(values, sizes)
        else:
            codes, clear = planned_scales(values) or (scales_of(values), 1.0)
        of_several = _of_several(codes, sizes, num_sizes)
        is_shared = of_several[codes].mean() >= LEAST_IN_BUDGETS and of_several.sum() > 1
        if clear > clearest and is_shared and _num_pairs(codes, sizes) > sizes.max() + 1:
            best, clearest = codes, clear
    return best


def _scale(variable: str, rows: pd.DataFrame, x: Mapping[str, Array]) -> Array | None:
    """Take a variable from the law's, else from the table; C of a table that does not count it is N D."""
    if variable in x:
        return np.asarray(x[variable], float)
    if (name := next((n for n in (variable, CANONICAL[variable]) if n in rows), None)) is not None:
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


def spaced(num: int, most: int) -> np.ndarray:
    """Choose at most so many of the numbers below `num`, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(int))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Training FLOPs C = kappa N^(1 + s) D: 6ND, or as counted with attention and head (and images for D)."""

    kappa: float
    s: float

    def __str__(self) -> str:
        exponent = human(1 + self.s)
        return f"{human(self.kappa)} N{'' if exponent == '1' else f'^{exponent}'} D"

    def samples(self, flops: Array, num_params: Array) -> Array:
        """Return the D that a budget buys at a size."""
        return flops / (self.kappa * num_params ** (1 + self.s))

    def flops(self, num_params: Array, samples: Array) -> Array:
        """Return the C of training a size on so many samples."""
        return self.kappa * num_params ** (1 + self.s) * samples


def cost_of(points: pd.DataFrame) -> Cost:
    """Fit kappa and s to the N, D and C of points."""
    log_n, log_d, log_c = np.log(points[["N", "D", "C"]].to_numpy(float)).T
    per_sample = log_c - log_n - log_d
    is_flat = np.ptp(log_n) == 0 or np.ptp(per_sample) < 1e-9
    s, intercept = (0.0, per_sample.mean()) if is_flat else np.polyfit(log_n, per_sample, 1)
    return Cost(kappa=float(np.exp(intercept)), s=float(s))


def shared_budgets(points: pd.DataFrame) -> pd.Series:
    """Find the budget of every row, by the mean ln C of its rows."""
    c = points["C"].to_numpy(float)
    codes, _ = budgets_of_compute(c, scales_of(points["N"].to_numpy(float)))
    return np.exp(pd.Series(np.log(c), points.index).groupby(codes).transform("mean"))


def isoflop_budgets(points: pd.DataFrame) -> pd.Series | None:
    """Find the budget of every row where runs were planned by budgets of compute; None for any other design, such as a
    grid of sizes and data, where rows of equal C lie on the diagonals and D takes fewer values than C."""
    budgets = shared_budgets(points)
    num_sizes = points["N"].groupby(budgets).nunique()
    shared = num_sizes.index[num_sizes >= ISOFLOP_SIZES]
    num_d = scales_of(points["D"].to_numpy(float)).max() + 1
    is_planned = len(shared) > 1 and budgets.isin(shared).mean() >= ISOFLOP_SHARE and len(num_sizes) < num_d
    return budgets if is_planned else None
