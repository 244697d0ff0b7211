"""Parts of the page: figures, and blocks of a result's sentences, facts and table, which sorts and
leaves as CSV."""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from aimscale.analysis.display import Result
from aimscale.analysis.plots.style import inline_svg
from aimscale.analysis.table.schema import described

MAX_ROWS = 100
"""Rows shown on the page; the CSV beside the table has all."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins so for a formula."""
SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "": 1.0}
"""Letters behind a number, as `words.human` writes them."""
PLAIN = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")


class PageFigure(NamedTuple):
    """A figure of the page and of a paper."""

    key: str
    """HTML id, and name of its files."""
    title: str
    caption: str
    figure: Figure

    @property
    def is_wide(self) -> bool:
        """Whether it takes two columns of a paper."""
        return self.figure.get_figwidth() > 5

    @property
    def svg(self) -> str:
        """Inline SVG."""
        return inline_svg(self.figure, self.key, f"{self.title}. {self.caption}")


class Block(NamedTuple):
    """A result on the page: sentences, facts and a table, any of which may be empty."""

    key: str
    """HTML id and file name of the download."""
    title: str
    note: str = ""
    """Line below the title: units, source, protocol."""
    lines: Sequence[str] = ()
    """Sentences; a table below some is closed."""
    facts: Sequence[tuple[str, str]] = ()
    """Keys and values above the table."""
    rows: Sequence[dict[str, str]] = ()
    """Cells by their head, at most `MAX_ROWS` rows, without columns that are blank."""
    numeric: Sequence[str] = ()
    """Heads of the columns of numbers, which stand to the right."""
    num_rows: int = 0
    """Rows of the whole table."""
    csv_uri: str = ""
    """The whole table as a data URI."""
    is_open: bool = True

    @property
    def csv_name(self) -> str:
        """File name of the download: of a table that is cut it is compressed."""
        return f"{self.key}.csv{'.gz' if self.num_rows > MAX_ROWS else ''}"


def result_block(
    key: str, title: str, found: Result, *, facts: Sequence[tuple[str, str]] | None = None, **parts: Any
) -> Block:
    """Lay out a result by its facts, or sentences where it has none, and its table."""
    facts = found.facts() if facts is None else facts
    lines = [] if facts else found.sentences() or [found.headline()]
    return table_block(key, title, found.table, found.cells(), facts=facts, lines=lines, **parts)


def table_block(
    key: str, title: str, frame: pd.DataFrame, cells: Sequence[dict[str, str]] | None = None, **parts: Any
) -> Block:
    """Lay out a data frame: `cells` if given, else its columns as the schema of the results table writes them."""
    if cells is None:
        frame = frame.dropna(axis="columns", how="all")
        columns = [described(str(name)) for name in frame]
        cells = [
            {c.heading: str(v) if isinstance(v, bool) else c.cell(v) for c, v in zip(columns, row, strict=True)}
            for row in frame.head(MAX_ROWS).astype(object).itertuples(index=False)
        ]
    heads = [head for head in (cells[0] if cells else ()) if any(row[head] not in ("", "–") for row in cells)]
    rows = [{head: row[head] or "–" for head in heads} for row in cells[:MAX_ROWS]]
    numeric = [h for h in heads if all(row[h] == "–" or isinstance(sort_key(row[h]), float) for row in rows)]
    return Block(key, title, rows=rows, numeric=numeric, num_rows=len(frame), csv_uri=csv_uri(frame), **parts)


def sort_key(text: str) -> float | str:
    """Return what a cell is sorted by: the number that it begins with, as `words` writes numbers, else its text; a
    missing one is empty."""
    plain = re.sub(r"(×?)10([⁻⁰¹²³⁴-⁹]+)", lambda m: f"{'' if m[1] else 1}e{m[2]}", text).translate(PLAIN)
    found = re.match(r"\[?([-+]?(?:\d[\d,]*)?\.?\d+(?:e-?\d+)?)([kMB]?)(?![\w.])", plain)
    return float(found[1].replace(",", "")) * SUFFIXES[found[2]] if found else text.strip("–")


def csv_uri(frame: pd.DataFrame) -> str:
    """Write a data frame as a `data:` URI of CSV, compressed beyond `MAX_ROWS` rows; cells that a spreadsheet would run
    as a formula are quoted with '."""
    texts = frame.select_dtypes(exclude="number")
    safe = texts.map(lambda v: f"'{v}" if isinstance(v, str) and v.startswith(FORMULA) else v)
    whole = frame.select_dtypes("float").convert_dtypes(convert_floating=False)
    content = frame.assign(**safe, **whole).to_csv(index=False, float_format="%.5g").encode()
    is_cut = len(frame) > MAX_ROWS
    mime, content = ("application/gzip", gzip.compress(content, mtime=0)) if is_cut else ("text/csv", content)
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def html_id(what: str, name: str) -> str:
    """Make the HTML id of what bears a name of the table's own."""
    return f"{what}-{''.join(c if c.isalnum() else '-' for c in name)}"
