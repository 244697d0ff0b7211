"""From a table to the points of a fit: THE filter of rows, with a reason for every row left out, and the one data set
of fits, forecasts, frontiers and rates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, option
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws import CHINCHILLA, Array, Law
from aimscale.analysis.table.columns import named_like_accuracy
from aimscale.analysis.table.groups import Cost, Groups, cost_of
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.schema import FOLLOWS, Exclusion, varies


@dataclass(frozen=True, kw_only=True)
class KnownErrors:
    """Errors by independent causes that were found before a fit and that its residuals need not show, as tuning's."""

    loadings: Array
    """Errors (n, m) of ln y of every measurement, or (k, m) of every parameter, by causes of one standard deviation."""
    degrees: float
    """Degrees of freedom of their variances."""

    def of_contrasts(self, contrasts: Array) -> tuple[Array, Array]:
        """Return standard errors and degrees of freedom (m,) of contrasts (m, n)."""
        errors = np.linalg.norm(contrasts @ self.loadings, axis=1)
        return errors, np.full(len(errors), self.degrees)


def with_known_errors(runs: Runs, y: str, errors: KnownErrors) -> Runs:
    """Write known errors of y beside the rows (n,), in a column of lists that goes where the rows go."""
    cells = np.column_stack([np.full(len(runs), errors.degrees), errors.loadings]).tolist()
    return runs.assign(**{error_column(y): pd.Series(cells, runs.index, dtype=object)})


def error_column(y: str) -> str:
    """Name the column that known errors of a column stand in."""
    return f"{y}_known_errors"


@dataclass(frozen=True, kw_only=True)
class Points:
    """Rows of a table that can be used, as numbers."""

    rows: Runs
    numbers: pd.DataFrame
    """The columns that were asked for, as numbers, under the names that were asked; `y` is what is fitted."""
    columns: dict[str, str]
    """Name that was asked -> column of the table."""
    exclusions: tuple[Exclusion, ...]
    """Rows left out, here and when the table was read."""
    flags: tuple[Flag, ...] = ()
    """Cautions about the best of tuned columns, where one was chosen, and about words of `status`."""
    num_rows: int
    """Rows of the table as it was given: what was chosen from it (--where) is no part of it any more."""
    variables: tuple[str, ...] = ()
    """Names of the numbers that laws are fitted in; none: all but y."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def index(self) -> pd.Index:
        """Labels of the table's rows (n,)."""
        return self.numbers.index

    @cached_property
    def x(self) -> dict[str, Array]:
        """Variable -> values (n,)."""
        names = self.variables or [str(name) for name in self.numbers if name != "y"]
        return {name: self.numbers[name].to_numpy() for name in names}

    @property
    def y(self) -> Array:
        """Measurements (n,)."""
        return self.numbers["y"].to_numpy()

    @cached_property
    def groups(self) -> Groups:
        """Sizes, budgets and runs that points share."""
        return self.rows.shared_groups(self.x)

    @cached_property
    def known(self) -> KnownErrors | None:
        """Errors of y that were found before; None where there are none."""
        y = self.columns["y"]
        if (name := error_column(y)) not in self.rows or not len(self):
            return None
        cells = [each if isinstance(each, list) else [] for each in self.rows[name]]
        if len({*map(len, cells)}) > 1 or not cells[0]:
            parts = f"The {y} of these rows was corrected in parts"
            raise AnalysisError(f"{parts}; join the tables first, then correct them.")
        numbers = np.array(cells, float)
        return KnownErrors(loadings=numbers[:, 1:], degrees=float(numbers[:, 0].min()))

    @cached_property
    def compute(self) -> Array:
        """Training FLOPs (n,), or the product of the variables where the table has none."""
        return self.numbers["C"].to_numpy() if "C" in self.numbers else np.prod([*self.x.values()], axis=0)

    @cached_property
    def cost(self) -> Cost | None:
        """Compute as a function of N and D; None where the table lacks one of them."""
        return cost_of(self.numbers) if {"N", "D", "C"} <= {*self.numbers} else None

    def span(self, name: str) -> tuple[float, float]:
        """Return the smallest and the largest of some numbers."""
        return float(self.numbers[name].min()), float(self.numbers[name].max())

    def take(self, keep: Array) -> Points:
        """Select some of the points (mask); they stay in the groups that all points show."""
        rows = self.rows.with_rows(self.rows.frame[keep])
        part = replace(self, rows=rows, numbers=self.numbers[keep])
        vars(part)["groups"] = self.groups.rows(keep)
        return part

    def of(self, variables: Sequence[str], y: str = "y") -> Points:
        """Return the same points, in the same groups, for a law of some of the variables, and of another column's y."""
        values = self.numbers["y"] if y == "y" else pd.to_numeric(self.rows[y], errors="coerce")
        columns = {**self.columns, **({} if y == "y" else {"y": y})}
        part = replace(self, numbers=self.numbers.assign(y=values), columns=columns, variables=tuple(variables))
        vars(part)["groups"] = self.groups
        return part


def usable_rows(
    runs: Runs,
    columns: Mapping[str, str] | str = "val_loss",
    *,
    signed: Collection[str] = (),
    may_be_zero: Collection[str] = (),
    best_by: str = "",
) -> Points:
    """Find the complete rows with finite, positive numbers in some columns (name -> column, or one column), each once.

    Args:
        signed: names of those whose numbers may be negative.
        may_be_zero: names of those whose numbers may be zero.
        best_by: name of the loss that a law is fitted to: of rows that differ in tuned columns only, such as the
            learning rate (`Runs.tuned_columns`), the best are kept. Empty for all rows, as contrasts need them.
    """
    columns = {columns: columns} if isinstance(columns, str) else dict(columns)
    if absent := [name for name in columns.values() if name not in runs]:
        raise runs.no_column(absent[0])
    values, keep = runs.numbers(columns), pd.Series(True, runs.index)
    exclusions, flags = list(runs.exclusions), list[Flag]()

    def leave_out(kind: str, subject: str, text: str, out: Array | pd.Series) -> None:
        if number := int((keep & out).sum()):
            exclusions.append(Exclusion(kind=kind, subject=subject, number=number, text=text))
        keep[out] = False

    for word, number in runs.unknown_statuses().items():
        unknown = f"{number} rows with status {word!r:.40} are kept, which no tool is known to write"
        text = f"{unknown}; if these runs are not done, leave them out by {option('where', f'status!={word:.40}')}."
        flags.append(Flag(kind="status", subject=str(word), number=int(number), text=text))
    leave_out("status", "", "not complete (status)", ~runs.index.isin(runs.complete().index))
    for name, column in columns.items():
        called, number = runs.called(column), values[name]
        kind, what = ("not finite", "infinite") if name in signed else ("not positive", "non-positive")
        good = (number > 0) | (name in signed) | (number == 0) & (name in may_be_zero)
        leave_out(kind, called, f"with a missing or {what} {called}", ~(good & np.isfinite(number)))
    alike = runs.frame[values.duplicated(keep=False) & values.notna().all(axis=1)]
    repeats = alike.astype(str).duplicated().reindex(runs.index, fill_value=False)  # as text: cells may be lists
    leave_out("repeat", "", "that repeat another row exactly", repeats)
    if best_by and (tuned := runs[keep].tuned_columns(used=columns.values())):
        y = columns[best_by]
        best, choices = _best_settings(runs[keep].assign(**{y: values[best_by]}), y, tuned, columns.values())
        subject = choices[0].subject if choices else ""
        flags += choices
        others = (~best).reindex(runs.index, fill_value=False)
        leave_out("best of", subject, f"not the best {subject} of their cell", others)
    left_out = tuple(exclusions)
    return Points(
        rows=runs[keep],
        numbers=values[keep],
        columns=columns,
        exclusions=left_out,
        flags=tuple(flags),
        num_rows=len(runs),
    )


def _best_settings(runs: Runs, y: str, tuned: Sequence[str], used: Iterable[str]) -> tuple[pd.Series, tuple[Flag, ...]]:
    """Find the rows at the setting of the best mean `y` in every cell; flags tell where that is a choice.

    Rows of a cell are held equal, but for seeds, names of runs, and what follows from the tuned columns.
    """
    rows = runs.frame
    free = {"seed", "L", "val_loss", y, *tuned, *(other for name in tuned for other in FOLLOWS.get(name, ()))}
    run_names = [name for name in runs.settings(free) if runs.follows_scale(name)]
    cell = sorted({*runs.held_equal({*free, *run_names}), *used} - {y})
    cells = rows.groupby(cell, dropna=False).ngroup() if cell else pd.Series(0, rows.index)
    settings = rows.groupby([cells, *(rows[name] for name in tuned)], dropna=False).ngroup()
    losses = (-rows[y] if named_like_accuracy(y) else rows[y]).groupby(settings).mean()
    keep = settings.isin(losses.groupby(cells.groupby(settings).first()).idxmin())
    several = pd.DataFrame({name: rows.groupby(cells)[name].agg(varies) for name in tuned})
    names = [name for name in tuned if several[name].any()]
    names = [name for i, name in enumerate(names) if not any(name in FOLLOWS.get(each, ()) for each in names[:i])]
    if not names:
        return keep, ()
    num, what = int(several.any(axis=1).sum()), ", ".join(map(runs.called, names))
    text = f"Of several {what} the best of each of {num} cells is kept; the lowest of noisy losses is too low by part "
    flags = [Flag(kind="tuned", subject=what, number=num, text=f"{text}of their noise.")]
    for name in names:
        tried = pd.to_numeric(rows[name], errors="coerce").groupby(cells)
        best, what = tried.obj[keep].groupby(cells).first(), runs.called(name)
        for end, extreme in (("smallest", tried.min()), ("largest", tried.max())):
            if num := int((several[name] & (best == extreme)).sum()):
                cases = f"{num} of {several[name].sum()} cells"
                text = f"The best {what} is the {end} that was tried in {cases}, so a better one may lie beyond."
                flags.append(Flag(kind="tuned_edge", subject=what, number=num, text=text))
    return keep, tuple(flags)


def resolve_columns(law: Law, runs: Runs, columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Find the column of each variable: named by the caller, of the variable's own name, or the results table's."""
    names = {v: (columns or {}).get(v) or runs.column(v) for v in law.variables}
    for variable, name in names.items():
        if name not in runs:
            of_one = f" (say of what the law is: {law.name}:N)" if variable == "x" else ""
            raise runs.no_column(name, f" for {variable} of {law.formula}{of_one}")
    return names


def law_points(
    law: Law,
    runs: Runs,
    *,
    y: str,
    columns: Mapping[str, str] | None = None,
    positive_y: bool = True,
    num_free: int | None = None,
    zero_allowed: bool = False,
) -> Points:
    """Collect the points of a fit: the usable rows, more than parameters, of several values of every variable."""
    names = resolve_columns(law, runs, columns)
    if y not in runs:
        raise runs.no_column(y, " to fit")
    signed, may_be_zero = () if positive_y else ("y",), names if zero_allowed else ()
    points = usable_rows(runs, {**names, "y": y}, signed=signed, may_be_zero=may_be_zero, best_by="y")
    free, num_points = len(law.parameters) if num_free is None else num_free, len(points)
    if num_points <= free:
        left_out = f" (left out: {'; '.join(map(str, points.exclusions))})" if points.exclusions else ""
        raise AnalysisError(
            f"{law.formula} has {free} free parameters but the table has {num_points} usable of {len(runs)} points"
            f"{left_out}; give at least {free + 1} or fix a parameter."
        )
    for v, name in points.columns.items():
        if not varies(points.numbers[v]):
            raise AnalysisError(
                f"{runs.called(name)} takes the single value {points.numbers[v].iloc[0]:g} in all {num_points} "
                f"points, so {law.formula} cannot be fitted; vary it or choose another law."
            )
    return points


def compute_points(runs: Runs, y: str, columns: Mapping[str, str] | None = None) -> Points:
    """Collect the usable rows with N, D, C and y, which compute-optimal sizes follow from."""
    compute = (columns or {}).get("C", runs.column("C"))
    points = usable_rows(runs, {**resolve_columns(CHINCHILLA, runs, columns), "C": compute, "y": y}, best_by="y")
    if not len(points):
        raise AnalysisError("No row of the table has positive N, D, C and loss, so there is no frontier to draw.")
    return points
