"""From a table to the points of a fit: THE filter of rows, with a reason for every row left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.table.design import tuned_columns
from aimscale.analysis.table.names import Exclusion, left_out_of, no_column, our_name, their_name
from aimscale.analysis.table.tuned import best_settings, cell_columns
from aimscale.analysis.words import Flag, human


@dataclass(frozen=True, kw_only=True)
class Usable:
    """Rows of a table that can be used."""

    rows: pd.DataFrame
    """All columns of these rows."""
    numbers: pd.DataFrame
    """The columns that were asked for, as numbers, under the names that were asked."""
    exclusions: tuple[Exclusion, ...]
    """What was left out, here and when the table was read."""
    flags: tuple[Flag, ...]
    """Cautions about the best of tuned columns, where one was chosen."""


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows that count: those whose `status` is complete, or that do not say (a foreign table).

    Points during training count, too; they stand in a table of their own, `curves.parquet`.
    """
    if "status" not in frame.columns:
        return frame
    return frame[frame["status"].isna() | frame["status"].isin(("complete", "during"))]


REPEATS_FROM = 1.01
"""Passes over a pool above which images repeat; up to there a pool is seen once, but for the last batch."""


def most_passes(rows: pd.DataFrame) -> float:
    """Count the most passes over its pool that a row made, D / U; NaN where no row tells."""
    names = ("images_seen", "unique_images")
    return float((rows[names[0]] / rows[names[1]]).max()) if {*names} <= {*rows} else np.nan


def passes_flags(rows: pd.DataFrame, what: str, at: Mapping[str, float]) -> tuple[Flag, ...]:
    """Flag a scale that sees its pool more often than any of the rows that a law was fitted to.

    Args:
        what: what is at the scale, for the sentence.
        at: the scale. Without a U the pool is the largest that rows of several D share: where each D has a pool of its
            own, so would a larger one.
    """
    most = most_passes(rows)
    if np.isnan(most) or "D" not in at:
        return ()
    budgets = rows.groupby("unique_images")["images_seen"].nunique()
    pool = at.get("U", budgets.index[budgets > 1].max())
    if not at["D"] > max(most, REPEATS_FROM) * pool:
        return ()
    return (Flag(kind="passes", subject=what, number=at["D"] / pool, more=(most, human(pool))),)


def usable_rows(
    frame: pd.DataFrame,
    columns: Mapping[str, str] | str = "val_loss",
    *,
    signed: Collection[str] = (),
    may_be_zero: Collection[str] = (),
    best_by: str = "",
    tuned: Sequence[str] = (),
) -> Usable:
    """Find the complete rows with finite, positive numbers in some columns, each once.

    Args:
        columns: name -> column of the table, or one column.
        signed: names of those whose numbers may be negative.
        may_be_zero: names of those whose numbers may be zero.
        best_by: name of the loss that a law is fitted to: of rows that differ in tuned columns only, such as the
            learning rate, the best are kept. Empty for all rows, as contrasts need them.
        tuned: the tuned columns; default: those of `tuned_columns`.

    Raises:
        AnalysisError: the index holds a label twice.
    """
    if not frame.index.is_unique:
        raise AnalysisError("The table's index holds a label twice; number its rows with df.reset_index(drop=True).")
    columns = {columns: columns} if isinstance(columns, str) else columns
    if absent := [name for name in columns.values() if name not in frame.columns]:
        raise no_column(frame, absent[0])
    values = frame[list(columns.values())].apply(pd.to_numeric, errors="coerce").astype(float)
    values.columns = pd.Index(list(columns))
    unfinished = pd.Series(~frame.index.isin(complete(frame).index), frame.index)
    bad: list[tuple[str, str, pd.Series]] = [("status", "", unfinished)]
    for name, column in columns.items():
        called, number = their_name(frame, column), values[name]
        if name in signed:
            bad.append(("not finite", called, ~np.isfinite(number)))
        else:
            good = np.isfinite(number) & ((number > 0) | ((number == 0) & (name in may_be_zero)))
            bad.append(("not positive", called, ~good))
    bad.append(("repeat", "", _repeats(frame, values)))
    keep, exclusions = pd.Series(True, index=frame.index), list(left_out_of(frame))
    for kind, subject, out in bad:
        if number := int((keep & out).sum()):
            exclusions.append(Exclusion(kind=kind, subject=subject, number=number))
        keep &= ~out
    flags: tuple[Flag, ...] = ()
    if best_by and (tuned := tuned or tuned_columns(frame[keep], used=columns.values())):
        y = columns[best_by]
        cell = dict.fromkeys([*cell_columns(frame[keep], y, tuned), *columns.values()])
        rows = frame[keep].assign(**{y: values.loc[keep, best_by]})
        best, flags = best_settings(rows, y, tuned, [name for name in cell if name != y])
        if number := int((~best).sum()):
            exclusions.append(Exclusion(kind="best of", subject=flags[0].subject, number=number))
        keep &= best.reindex(frame.index, fill_value=False)
    return Usable(rows=frame[keep], numbers=values[keep], exclusions=tuple(exclusions), flags=flags)


def _repeats(frame: pd.DataFrame, values: pd.DataFrame) -> pd.Series:
    """Find rows equal to an earlier one in every column of the table, not in the used ones alone."""
    alike = values.duplicated(keep=False) & values.notna().all(axis=1)
    if not alike.any():
        return pd.Series(False, index=frame.index)
    repeats = frame[alike].astype(str).duplicated()  # as text: cells may be lists
    return repeats.reindex(frame.index, fill_value=False)


@dataclass(frozen=True, kw_only=True)
class Observations:
    """The points of a fit."""

    x: dict[str, Array]
    """Variable -> values (n,)."""
    y: Array
    """Measurements (n,)."""
    index: pd.Index
    """Labels of the table's rows (n,)."""
    columns: dict[str, str]
    """Variable (and 'y') -> column of the table."""
    exclusions: tuple[Exclusion, ...]
    flags: tuple[Flag, ...]
    """Cautions about these rows, as `usable_rows` gives them."""
    num_rows: int
    """Rows of the table as it was given: what was chosen from it (--where, --best-of) is no part of it any more."""


def resolve_columns(law: Law, df: pd.DataFrame, columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """Find the column of each variable: named by the caller, of the variable's own name, or the results table's.

    Raises:
        AnalysisError: a column is missing.
    """
    found = {}
    for variable in law.variables:
        name = (columns or {}).get(variable) or our_name(df, variable)
        if name not in df.columns:
            of_one = f" (say of what the law is: {law.name}:N)" if variable == "x" else ""
            raise no_column(df, name, f" for {variable} of {law.formula}{of_one}")
        found[variable] = name
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
    """Collect the points of a fit: the usable rows, with the reasons for leaving the others out.

    Raises:
        AnalysisError: missing column, too few points for the parameters, or a variable that takes one value only.
    """
    names = resolve_columns(law, df, columns)
    if y not in df.columns:
        raise no_column(df, y, " to fit")
    columns_of = {**names, "y": y}
    signed, may_be_zero = () if positive_y else ("y",), names if zero_allowed else ()
    found = usable_rows(df, columns_of, signed=signed, may_be_zero=may_be_zero, best_by="y")
    points = found.numbers
    free = len(law.parameters) if num_free is None else num_free
    if len(points) <= free:
        why = f" (left out: {'; '.join(map(str, found.exclusions))})" if found.exclusions else ""
        raise AnalysisError(
            f"{law.formula} has {free} free parameters but the table has {len(points)} usable of {len(df)} points"
            f"{why}; give at least {free + 1} or fix a parameter."
        )
    for v, name in columns_of.items():
        if points[v].nunique() < 2:
            raise AnalysisError(
                f"{their_name(df, name)} takes the single value {points[v].iloc[0]:g} in all {len(points)} points, so "
                f"{law.formula} cannot be fitted; vary it or choose another law."
            )
    return Observations(
        x={v: points[v].to_numpy() for v in law.variables},
        y=points["y"].to_numpy(),
        index=points.index,
        columns=columns_of,
        exclusions=found.exclusions,
        flags=found.flags,
        num_rows=len(df),
    )


def with_compute(df: pd.DataFrame) -> pd.DataFrame:
    """Add a column C = 6 N D to a table that counts no FLOPs of its own."""
    c, n, d = (our_name(df, v) for v in ("C", "N", "D"))
    if c in df or n not in df or d not in df:
        return df
    size, seen = (pd.to_numeric(df[name], errors="coerce").astype(float) for name in (n, d))  # integers overflow
    return df.assign(C=6 * size * seen)
