"""Parts of the page: figures, and blocks of sentences, facts and a table, which sorts and leaves as CSV."""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from aimscale.analysis.display import Result
from aimscale.analysis.plots.style import inline_svg
from aimscale.analysis.table.schema import frame_cells
from aimscale.analysis.words import SUFFIXES

MAX_ROWS = 100
"""Rows shown on the page; the CSV beside the table has all."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins so for a formula."""
PLAIN = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page and of a paper, drawn when it is asked for."""

    key: str
    """HTML id, and name of its files."""
    title: str
    caption: str
    draw: Callable[[], Figure]

    @cached_property
    def figure(self) -> Figure:
        """The drawing."""
        return self.draw()

    @property
    def is_wide(self) -> bool:
        """Whether it takes two columns of a paper."""
        return self.figure.get_figwidth() > 5

    @property
    def svg(self) -> str:
        """Inline SVG."""
        return inline_svg(self.figure, self.key, f"{self.title}. {self.caption}")


@dataclass(frozen=True)
class Block:
    """A result on the page: sentences, facts and a table, any of which may be empty."""

    key: str
    """HTML id and file name of the download."""
    title: str
    frame: pd.DataFrame | None = None
    """The whole table."""
    cells: Sequence[dict[str, str]] | None = None
    """Its rows as a reader sees them; None: as the schema of the results table writes them."""
    note: str = ""
    """Line below the title: units, source, protocol."""
    lines: Sequence[str] = ()
    """Sentences; a table below some is closed."""
    facts: Sequence[tuple[str, str]] = ()
    """Keys and values above the table."""
    is_open: bool = True

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """Cells by their head, at most `MAX_ROWS` rows, without columns that are blank."""
        if self.frame is None:
            return []
        cells = frame_cells(self.frame.head(MAX_ROWS)) if self.cells is None else self.cells[:MAX_ROWS]
        heads = [head for head in (cells[0] if cells else ()) if any(row[head] not in ("", "–") for row in cells)]
        return [{head: row[head] or "–" for head in heads} for row in cells]

    @cached_property
    def numeric(self) -> list[str]:
        """Heads of the columns of numbers, which stand to the right."""
        heads = self.rows[0] if self.rows else ()
        return [h for h in heads if all(row[h] == "–" or isinstance(sort_key(row[h]), float) for row in self.rows)]

    @property
    def csv_name(self) -> str:
        """File name of the download; of a table that is cut on the page it is compressed."""
        return f"{self.key}.csv{'.gz' if self.frame is not None and len(self.frame) > MAX_ROWS else ''}"

    @property
    def csv_uri(self) -> str:
        """The whole table as a `data:` URI; cells that a spreadsheet would run as a formula are quoted with '."""
        if self.frame is None:
            return ""
        texts = self.frame.select_dtypes(exclude="number")
        safe = texts.map(lambda v: f"'{v}" if isinstance(v, str) and v.startswith(FORMULA) else v)
        floats = self.frame.select_dtypes("float")
        is_whole = ((floats % 1 == 0) & (floats.abs() < 2**63)) | floats.isna()
        whole = floats.loc[:, is_whole.all()].astype("Int64")
        content = self.frame.assign(**safe, **whole).to_csv(index=False, float_format="%.5g").encode()
        mime = "text/csv"
        if self.csv_name.endswith(".gz"):
            mime, content = "application/gzip", gzip.compress(content, mtime=0)
        return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def result_block(
    key: str, title: str, found: Result, *, facts: Sequence[tuple[str, str]] | None = None, **parts: Any
) -> Block:
    """Lay out a result by its facts and its table."""
    return Block(key, title, found.table, found.cells(), facts=found.facts() if facts is None else facts, **parts)


def sort_key(text: str) -> float | str:
    """Return what a cell is sorted by: the number that it begins with, as `words` writes numbers, else its text; a
    missing one is empty."""
    plain = re.sub(r"(×?)10([⁻⁰¹²³⁴-⁹]+)", lambda m: f"{'' if m[1] else 1}e{m[2]}", text).translate(PLAIN)
    found = re.match(r"\[?([-+]?(?:\d[\d,]*)?\.?\d+(?:e-?\d+)?)([kMB]?)(?![\w.])", plain)
    return float(found[1].replace(",", "")) * SUFFIXES.get(found[2], 1.0) if found else text.strip("–")


def html_id(what: str, name: str) -> str:
    """Make the HTML id of what bears a name of the table's own."""
    return f"{what}-{''.join(c if c.isalnum() else '-' for c in name)}"
