"""Tables of the page: cells with a text to read, a value to sort by, and the same numbers as CSV."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

MAX_ROWS = 400
"""Rows shown on the page; the CSV beside the table has all."""
MAX_CSV_BYTES = 3_000_000
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins so for a formula."""
"""Larger CSV is not put into the page."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell."""

    text: str
    sort: float | str
    """What is sorted by; missing numbers sort last."""
    numeric: bool
    """Aligned right."""
    is_prose: bool = False
    """Our own words, whose formulas are set as such; names of others stay as they are."""


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """One table of the page."""

    key: str
    """HTML id and file name of the download."""
    title: str
    note: str
    """A line below the heading: units, source, protocol."""
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Cells, at most `MAX_ROWS` rows."""
    num_rows: int
    """Rows of the whole table."""
    csv_uri: str | None
    """The whole table as a data URI, or None when it is too large."""


Formatter = Callable[[Any], str]


def number(digits: int = 3) -> Formatter:
    """A plain number, e.g. a loss."""
    return lambda value: f"{value:.{digits}f}"


def percent(value: Any) -> str:
    """A fraction as per cent."""
    return f"{100 * value:.1f}"


def whole(value: Any) -> str:
    """An exact count."""
    return f"{value:,.0f}"


def text(value: Any) -> str:
    """A name as it is."""
    return str(value)


def prose(value: Any) -> str:
    """Our own words: method, note."""
    return str(value)


def spans(lows: Iterable[Any], highs: Iterable[Any], as_text: Formatter) -> list[str]:
    """Intervals in words, `low to high`."""
    return [f"{as_text(low)} to {as_text(high)}" for low, high in zip(lows, highs, strict=True)]


def page_table(
    key: str, title: str, note: str, frame: pd.DataFrame, columns: Sequence[tuple[str, str, Formatter]]
) -> PageTable:
    """Lay out a data frame.

    Args:
        columns: (column of the frame, heading, formatter); columns that the frame lacks or that are all missing
            are left out.
    """
    shown = [(name, head, form) for name, head, form in columns if name in frame and frame[name].notna().any()]
    rows = [
        tuple(_cell(value, form) for value, (_, _, form) in zip(values, shown, strict=True))
        for values in frame[[name for name, _, _ in shown]].head(MAX_ROWS).itertuples(index=False, name=None)
    ]
    return PageTable(
        key=key,
        title=title,
        note=note,
        headers=tuple(head for _, head, _ in shown),
        rows=tuple(rows),
        num_rows=len(frame),
        csv_uri=csv_uri(frame[[name for name, _, _ in shown]]),
    )


def _cell(value: Any, form: Formatter) -> Cell:
    if value is None or (isinstance(value, (float, np.floating)) and not np.isfinite(value)):
        return Cell(text="–", sort="", numeric=form not in (text, prose))
    if isinstance(value, str) or form in (text, prose):
        return Cell(text=str(value), sort=str(value), numeric=False, is_prose=form is prose)
    return Cell(text=form(value), sort=float(value), numeric=True)


def csv_uri(frame: pd.DataFrame) -> str | None:
    """A data frame as a `data:` URI of CSV; cells that a spreadsheet would run as a formula are quoted with '."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(frame.columns)
    for values in frame.itertuples(index=False, name=None):
        writer.writerow([f"'{v}" if isinstance(v, str) and v.startswith(FORMULA) else v for v in values])
    encoded = base64.b64encode(buffer.getvalue().encode()).decode()
    return f"data:text/csv;base64,{encoded}" if len(encoded) <= MAX_CSV_BYTES else None
