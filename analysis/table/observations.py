"""From a table to the points of a fit: which columns, which rows, and a named reason for every row left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.table.schema import CANONICAL, column_names, our_name, their_name

NOT_CHOSEN = "not_chosen"
"""Key of a frame's `attrs`: (reason, number of rows) of what `--where` left out, so that a fit can say so."""


def is_complete(frame: pd.DataFrame) -> pd.Series:
    """Which rows (n,) count: those whose `status` is complete, or that do not say (a foreign table)."""
    if "status" not in frame.columns:
        return pd.Series(True, index=frame.index)
    return frame["status"].isna() | (frame["status"] == "complete")


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """Rows that a fit left out, and why."""

    reason: str
    rows: tuple[object, ...]
    """Index labels of the rows; None for those that the table lost before (`--where`)."""

    def __str__(self) -> str:
        return f"{len(self.rows)} row{'s' if len(self.rows) != 1 else ''} {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Observations:
    """The points of a fit."""

    x: dict[str, Array]
    """Variable -> values (n,)."""
    y: Array
    """Measurements (n,)."""
    weights: Array
    """Weights (n,)."""
    index: pd.Index
    """Labels of the table's rows (n,)."""
    columns: dict[str, str]
    """Variable (and 'y') -> column of the table."""
    called: dict[str, str]
    """Variable (and 'y') -> what the table's file calls that column."""
    exclusions: tuple[Exclusion, ...]
    num_rows: int
    """Rows of the table."""


def resolve_columns(law: Law, df: pd.DataFrame, columns: Mapping[str, str] | None) -> dict[str, str]:
    """Column of each variable: named by the caller, of the variable's own name, or the results table's.

    Raises:
        AnalysisError: a column is missing.
    """
    found = {}
    for variable in law.variables:
        named = (columns or {}).get(variable)
        name = named or our_name(df, variable)
        if name not in df.columns:
            choices = [named] if named else list(dict.fromkeys([variable, CANONICAL.get(variable, variable)]))
            of_one = f" with --law {law.name}:N, or" if variable == "x" else ""
            raise AnalysisError(
                f"The table has no column {' or '.join(map(repr, choices))} for {variable} of {law.formula}; name "
                f"yours{of_one} with --columns {variable}=THEIRS (its columns: {column_names(df)})."
            )
        found[variable] = name
    return found


def observe(
    law: Law,
    df: pd.DataFrame,
    *,
    y: str,
    columns: Mapping[str, str] | None = None,
    weights: str | Array | None = None,
    positive_y: bool = True,
    num_free: int | None = None,
    zero_allowed: bool = False,
) -> Observations:
    """Collect the points of a fit.

    Rows with a missing, infinite or (for logarithms) non-positive value, exact duplicates, and rows whose `status` says
    that they are not complete are left out and named.

    Raises:
        AnalysisError: missing column, too few points for the parameters, or a variable that takes one value only.
    """
    if not df.index.is_unique:
        raise AnalysisError("The table's index holds a label twice; number its rows with df.reset_index(drop=True).")
    names = resolve_columns(law, df, columns)
    if y not in df.columns:
        raise AnalysisError(
            f"The table has no column {y!r} to fit; name yours with --columns L=THEIRS or --y (its columns: "
            f"{column_names(df)})."
        )
    columns_of = {**names, "y": y}
    called = {v: their_name(df, name) for v, name in columns_of.items()}
    used = df[[*names.values(), y]].apply(pd.to_numeric, errors="coerce").astype(float)
    used.columns = pd.Index([*names, "y"])
    w = _weights(df, weights)
    bad_variable = {v: ~(np.isfinite(used[v]) & ((used[v] > 0) | ((used[v] == 0) & zero_allowed))) for v in names}
    is_text = {v: df[name].notna() & used[v].isna() for v, name in columns_of.items()}
    reasons = [
        ("not complete (status)", ~is_complete(df)),
        *(
            (f"whose {called[v]} is no number, such as {df[name][is_text[v]].iloc[0]!r}", is_text[v])
            for v, name in columns_of.items()
            if is_text[v].any()
        ),
        *((f"with a missing or non-positive {called[v]}", bad) for v, bad in bad_variable.items()),
        (f"with a missing or infinite {called['y']}", ~np.isfinite(used["y"])),
        (f"with a non-positive {called['y']}, which has no logarithm", (used["y"] <= 0) & positive_y),
        ("with a missing or non-positive weight", pd.Series(~(np.isfinite(w) & (w > 0)), df.index)),
        ("that repeat another row exactly", _repeats(df, used)),
    ]
    keep = np.ones(len(df), bool)
    not_chosen = df.attrs.get(NOT_CHOSEN, ())
    exclusions = [Exclusion(reason=reason, rows=(None,) * number) for reason, number in not_chosen if number]
    for reason, bad in reasons:
        out = keep & bad.to_numpy(bool)
        keep &= ~out
        if out.any():
            exclusions.append(Exclusion(reason=reason, rows=tuple(df.index[out])))
    points = used[keep]
    free = len(law.parameters) if num_free is None else num_free
    if len(points) <= free:
        raise AnalysisError(
            f"{law.formula} has {free} free parameters but the table has {len(points)} usable of {len(df)} points"
            f"{_why(exclusions)}; give at least {free + 1} or fix a parameter."
        )
    _refuse_constants(law, points, called)
    _refuse_mixed_units(df.loc[points.index], points, called, num_variables=len(law.variables))
    return Observations(
        x={v: points[v].to_numpy() for v in law.variables},
        y=points["y"].to_numpy(),
        weights=w[keep],
        index=points.index,
        called=called,
        columns={**names, "y": y, **({"weight": weights} if isinstance(weights, str) else {})},
        exclusions=tuple(exclusions),
        num_rows=len(df) + sum(number for _, number in not_chosen),
    )


def _weights(df: pd.DataFrame, weights: str | Array | None) -> Array:
    """One weight per row, from a column or as given."""
    if isinstance(weights, str):
        if weights not in df.columns:
            raise AnalysisError(f"The table has no column {weights!r} for the weights.")
        return pd.to_numeric(df[weights], errors="coerce").to_numpy(float)
    found = np.ones(len(df)) if weights is None else np.asarray(weights, float)
    if len(found) != len(df):
        raise AnalysisError(f"There are {len(found)} weights for {len(df)} rows; give one weight per row.")
    return found


def _refuse_constants(law: Law, points: pd.DataFrame, names: Mapping[str, str]) -> None:
    for v in law.variables:
        if points[v].nunique() < 2:
            raise AnalysisError(
                f"{names[v]} takes the single value {points[v].iloc[0]:g} in all {len(points)} points, so the part of "
                f"{law.formula} that depends on {v} cannot be fitted; vary {v} or choose a law without it."
            )
    if points["y"].nunique() < 2:
        raise AnalysisError(
            f"{names['y']} takes the single value {points['y'].iloc[0]:g} in all {len(points)} points, so no law can "
            "be fitted to it."
        )


GAP_OF_UNITS = 1e4
"""Neighbouring values of one variable further apart than this factor are taken for two units in one column."""
SPREAD_OF_FLOPS = 300.0
"""C / (N D) that varies by more than this factor over a table is taken for mixed units."""


def _refuse_mixed_units(df: pd.DataFrame, points: pd.DataFrame, names: dict[str, str], num_variables: int) -> None:
    """Refuse a column that holds counts and millions at once.

    Raises:
        AnalysisError: a variable jumps by more than GAP_OF_UNITS, or C / (N D) varies by more than SPREAD_OF_FLOPS.
    """
    for v in list(points.columns)[:num_variables]:
        values = np.unique(points[v].to_numpy())
        values = values[values > 0]
        if len(values) < 2:
            continue
        jump = int(np.argmax(values[1:] / values[:-1]))
        if values[jump + 1] / values[jump] > GAP_OF_UNITS:
            rows = ", ".join(map(str, points.index[points[v] <= values[jump]][:5]))
            raise AnalysisError(
                f"{names[v]} jumps from {values[jump]:g} to {values[jump + 1]:g}, so rows seem to mix units ({rows}"
                "... are the small ones); put all into one unit."
            )
    flops = next((c for c in ("C", CANONICAL["C"]) if c in df.columns), None)
    if flops is None or not {"N", "D"} <= set(points.columns):
        return
    ratio = pd.to_numeric(df[flops], errors="coerce") / (points["N"] * points["D"])
    ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
    if len(ratio) > 1 and ratio.max() / ratio.min() > SPREAD_OF_FLOPS:
        raise AnalysisError(
            f"{flops} / ({names['N']} x {names['D']}) varies from {ratio.min():.3g} (row {ratio.idxmin()}) to "
            f"{ratio.max():.3g} (row {ratio.idxmax()}), so rows seem to mix units; put all into one unit."
        )


def _repeats(df: pd.DataFrame, used: pd.DataFrame) -> pd.Series:
    """Rows equal to an earlier one in every column of the table, not in the used ones alone."""
    alike = used.duplicated(keep=False) & used.notna().all(axis=1)
    repeats = np.zeros(len(df), bool)
    repeats[alike.to_numpy()] = df[alike.to_numpy()].astype(str).duplicated()  # as text: cells may be lists
    return pd.Series(repeats, index=df.index)


def _why(exclusions: list[Exclusion]) -> str:
    return f" (left out: {'; '.join(map(str, exclusions))})" if exclusions else ""
