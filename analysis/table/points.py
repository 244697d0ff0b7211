"""From a table to the points of a fit: THE filter of rows, with a reason for every row left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.table.accuracies import named_like_accuracy
from aimscale.analysis.table.design import FOLLOWS, follows_scale, foreign_settings, held_equal, tuned_columns, varies
from aimscale.analysis.table.names import Exclusion, left_out_of, no_column, our_name, their_name
from aimscale.analysis.words import Flag, human


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Rows of a table that can be used, and the points that they are."""

    rows: pd.DataFrame
    numbers: pd.DataFrame
    """The columns that were asked for, as numbers, under the names that were asked; `y` of a fit is what is fitted."""
    columns: dict[str, str]
    """Name that was asked -> column of the table."""
    exclusions: tuple[Exclusion, ...]
    """Rows left out, here and when the table was read."""
    flags: tuple[Flag, ...]
    """Cautions about the best of tuned columns, where one was chosen."""
    num_rows: int
    """Rows of the table as it was given: what was chosen from it (--where) is no part of it any more."""

    @property
    def index(self) -> pd.Index:
        """Labels of the table's rows (n,)."""
        return self.rows.index

    @property
    def x(self) -> dict[str, Array]:
        """Variable -> values (n,)."""
        return {str(name): values.to_numpy() for name, values in self.numbers.items() if name != "y"}

    @property
    def y(self) -> Array:
        """Measurements (n,)."""
        return self.numbers["y"].to_numpy()


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows whose `status` is complete or `during` training, or that do not say (a foreign table)."""
    return frame[frame["status"].isna() | frame["status"].isin(("complete", "during"))] if "status" in frame else frame


def usable_rows(
    frame: pd.DataFrame,
    columns: Mapping[str, str] | str = "val_loss",
    *,
    signed: Collection[str] = (),
    may_be_zero: Collection[str] = (),
    best_by: str = "",
) -> Observations:
    """Find the complete rows with finite, positive numbers in some columns (name -> column, or one column), each once.

    Args:
        signed: names of those whose numbers may be negative.
        may_be_zero: names of those whose numbers may be zero.
        best_by: name of the loss that a law is fitted to: of rows that differ in tuned columns only, such as the
            learning rate (`tuned_columns`), the best are kept. Empty for all rows, as contrasts need them.
    """
    if not frame.index.is_unique:
        raise AnalysisError("The table's index holds a label twice; number its rows with df.reset_index(drop=True).")
    columns = {columns: columns} if isinstance(columns, str) else dict(columns)
    if absent := [name for name in columns.values() if name not in frame.columns]:
        raise no_column(frame, absent[0])
    values = frame[list(columns.values())].apply(pd.to_numeric, errors="coerce").astype(float)
    values = values.set_axis(list(columns), axis=1)
    keep, exclusions, flags = pd.Series(True, frame.index), list(left_out_of(frame)), tuple[Flag, ...]()

    def leave_out(kind: str, subject: str, text: str, out: Array | pd.Series) -> None:
        if number := int((keep & out).sum()):
            exclusions.append(Exclusion(kind=kind, subject=subject, number=number, text=text))
        keep[out] = False

    leave_out("status", "", "not complete (status)", ~frame.index.isin(complete(frame).index))
    for name, column in columns.items():
        called, number = their_name(frame, column), values[name]
        kind, what = ("not finite", "infinite") if name in signed else ("not positive", "non-positive")
        good = (number > 0) | (name in signed) | (number == 0) & (name in may_be_zero)
        leave_out(kind, called, f"with a missing or {what} {called}", ~(good & np.isfinite(number)))
    alike = frame[values.duplicated(keep=False) & values.notna().all(axis=1)]
    repeats = alike.astype(str).duplicated().reindex(frame.index, fill_value=False)  # as text: cells may be lists
    leave_out("repeat", "", "that repeat another row exactly", repeats)
    if best_by and (tuned := tuned_columns(frame[keep], used=columns.values())):
        y, rows = columns[best_by], frame[keep]
        best, flags = _best_settings(rows.assign(**{y: values[best_by]}), y, tuned, columns.values())
        subject = flags[0].subject if flags else ""
        others = (~best).reindex(frame.index, fill_value=False)
        leave_out("best of", subject, f"not the best {subject} of their cell", others)
    found = {"rows": frame[keep], "numbers": values[keep], "columns": columns, "num_rows": len(frame), "flags": flags}
    return Observations(**found, exclusions=tuple(exclusions))


def _best_settings(
    rows: pd.DataFrame, y: str, tuned: Sequence[str], used: Iterable[str]
) -> tuple[pd.Series, tuple[Flag, ...]]:
    """Find the rows at the setting of the best mean `y` in every cell; flags tell where that is a choice.

    Rows of a cell are held equal, but for seeds, names of runs, and what follows from the tuned columns.
    """
    free = {"seed", "L", "val_loss", y, *tuned, *(other for name in tuned for other in FOLLOWS.get(name, ()))}
    runs = [name for name in foreign_settings(rows, free) if follows_scale(rows, name)]
    cell = sorted({*held_equal(rows, {*free, *runs}), *used} - {y})
    cells = rows.groupby(cell, dropna=False).ngroup() if cell else pd.Series(0, rows.index)
    settings = rows.groupby([cells, *(rows[name] for name in tuned)], dropna=False).ngroup()
    losses = (-rows[y] if named_like_accuracy(y) else rows[y]).groupby(settings).mean()
    keep = settings.isin(losses.groupby(cells.groupby(settings).first()).idxmin())
    several = pd.DataFrame({name: rows.groupby(cells)[name].agg(varies) for name in tuned})
    names = [name for name in tuned if several[name].any()]
    names = [name for i, name in enumerate(names) if not any(name in FOLLOWS.get(each, ()) for each in names[:i])]
    if not names:
        return keep, ()
    num, what = int(several.any(axis=1).sum()), ", ".join(their_name(rows, name) for name in names)
    text = f"Of several {what} the best of each of {num} cells is kept; the lowest of noisy losses is too low by part "
    flags = [Flag(kind="tuned", subject=what, number=num, text=f"{text}of their noise.")]
    for name in names:
        tried = pd.to_numeric(rows[name], errors="coerce").groupby(cells)
        best, what = tried.obj[keep].groupby(cells).first(), their_name(rows, name)
        for end, extreme in (("smallest", tried.min()), ("largest", tried.max())):
            if num := int((several[name] & (best == extreme)).sum()):
                where = f"{num} of {several[name].sum()} cells"
                text = f"The best {what} is the {end} that was tried in {where}, so a better one may lie beyond."
                flags.append(Flag(kind="tuned_edge", subject=what, number=num, text=text))
    return keep, tuple(flags)


def resolve_columns(law: Law, df: pd.DataFrame, columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Find the column of each variable: named by the caller, of the variable's own name, or the results table's."""
    found = {v: (columns or {}).get(v) or our_name(df, v) for v in law.variables}
    for variable, name in found.items():
        if name not in df.columns:
            of_one = f" (say of what the law is: {law.name}:N)" if variable == "x" else ""
            raise no_column(df, name, f" for {variable} of {law.formula}{of_one}")
    return found


def observe(
    law: Law,
    df: pd.DataFrame,
    *,
    y: str,
    columns: Mapping[str, str] | None = None,
    positive_y: bool = True,
    num_free: int | None = None,
    zero_allowed: bool = False,
) -> Observations:
    """Collect the points of a fit: the usable rows, more than parameters, of several values of every variable."""
    names = resolve_columns(law, df, columns)
    if y not in df.columns:
        raise no_column(df, y, " to fit")
    signed, may_be_zero = () if positive_y else ("y",), names if zero_allowed else ()
    found = usable_rows(df, {**names, "y": y}, signed=signed, may_be_zero=may_be_zero, best_by="y")
    free, num_points = len(law.parameters) if num_free is None else num_free, len(found.rows)
    if num_points <= free:
        why = f" (left out: {'; '.join(map(str, found.exclusions))})" if found.exclusions else ""
        raise AnalysisError(
            f"{law.formula} has {free} free parameters but the table has {num_points} usable of {len(df)} points"
            f"{why}; give at least {free + 1} or fix a parameter."
        )
    for v, name in found.columns.items():
        if not varies(found.numbers[v]):
            raise AnalysisError(
                f"{their_name(df, name)} takes the single value {found.numbers[v].iloc[0]:g} in all {num_points} "
                f"points, so {law.formula} cannot be fitted; vary it or choose another law."
            )
    return found


def with_compute(df: pd.DataFrame) -> pd.DataFrame:
    """Add a column C = 6 N D to a table that counts no FLOPs of its own."""
    c, n, d = (our_name(df, v) for v in "CND")
    if c in df or not {n, d} <= {*df}:
        return df
    numbers = df[[n, d]].apply(pd.to_numeric, errors="coerce").astype(float)  # products of integers overflow
    return df.assign(C=6 * numbers[n] * numbers[d])


REPEATS_FROM = 1.01
"""Passes over a pool above which images repeat; up to there a pool is seen once, but for the last batch."""


def most_passes(rows: pd.DataFrame) -> float:
    """Count the most passes over its pool that a row made, D / U; NaN where no row tells."""
    known = {"images_seen", "unique_images"} <= {*rows}
    return float((rows["images_seen"] / rows["unique_images"]).max()) if known else np.nan


def passes_flags(rows: pd.DataFrame, what: str, at: Mapping[str, float]) -> tuple[Flag, ...]:
    """Flag a scale, called `what`, that sees its pool (without a U the largest that rows of several D share) more often
    than any of the rows that a law was fitted to."""
    most = most_passes(rows)
    if np.isnan(most) or "D" not in at:
        return ()
    budgets = rows.groupby("unique_images")["images_seen"].nunique()
    pool = at.get("U", budgets.index[budgets > 1].max())
    passes = at["D"] / pool
    if not passes > max(most, REPEATS_FROM):
        return ()
    times, seen = human(passes), human(most)
    text = f"{what} means {times} passes over the pool of {human(pool)}, beyond the {seen} that were seen."
    return (Flag(kind="passes", subject=what, number=passes, text=text),)
