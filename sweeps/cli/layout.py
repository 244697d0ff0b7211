"""Layout of tables and key-value lines: rich on a terminal, plain in a log."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aimscale.aim.errors import printable
from aimscale.sweeps.planning.run import Notice, group_notices
from aimscale.sweeps.state.run_state import State

LOG_WIDTH = 1000

STYLES = {"data-bound": "yellow", "warn": "yellow", "unstable": "bold red", "fail": "bold red"}
"""Colours of words that open a line and are no state."""


def style_of(word: str) -> str:
    """Return the colour of a run's state, or of another word that opens a line."""
    if word in STYLES:
        return STYLES[word]
    state = State(word)
    if state.active:
        return "cyan"
    styles = {State.FINISHED: "green", State.QUEUED: "blue", State.NOT_STARTED: "dim"}
    return styles.get(state, "bold red" if state.needs_person else "yellow")


def format_number(value: float | None) -> str:
    """Format a number with three digits and a metric prefix: 1.09B, 12.3k; `-` for None."""
    if value is None:
        return "-"
    value = float(f"{value:.3g}")  # 999.9 rounds to 1000 and gets the next prefix
    for size, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def format_duration(seconds: float | None) -> str:
    """Format a duration in its two largest units: 3d 4h, 2h 10m, 5m 12s; `-` for None."""
    if seconds is None:
        return "-"
    if 0 < seconds < 1:
        return "<1s"
    seconds = int(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit} {seconds % size // smaller}{small}"
    return f"{seconds}s"


def key_value_text(lines: Sequence[Notice], width: int) -> Text:
    """Align keys and values in two columns; values wider than the terminal break between words."""
    widest, level = (max(len(getattr(line, name)) for line in lines) for name in ("key", "level"))
    indent = widest + 2 + (level + 2 if level else 0)
    text = Text()
    for i, line in enumerate(lines):
        if level:
            text.append(f"{line.level:<{level}}  ", style=style_of(line.level))
        text.append(f"{line.key:<{widest}}  ", style="" if level else "bold")
        parts = textwrap.wrap(line.text, max(width - indent, 30), break_long_words=False, break_on_hyphens=False)
        text.append(f"\n{' ' * indent}".join(parts) + ("\n" if i + 1 < len(lines) else ""))
    return text


def print_key_values(lines: Sequence[Notice]) -> None:
    """Print lines, those that call attention after the others."""
    console = new_console()
    for part in ([line for line in lines if not line.level], [line for line in lines if line.level]):
        if part:
            console.print(key_value_text(part, console.width), highlight=False, soft_wrap=True)


def notice_lines(notices: Iterable[Notice]) -> list[Notice]:
    """Return a line for each notice, equal ones once, whose key is its run or the number of its runs."""
    return [
        replace(
            notice,
            key=notice.run_ids[0] if len(notice.run_ids) == 1 else f"{len(notice.run_ids)} runs",
            text=printable(notice.text).replace("\n", " "),
        )
        for notice in group_notices(notices)
    ]


@dataclass(frozen=True, kw_only=True)
class Column:
    """Column of a table that drops its least important columns on a narrow terminal."""

    header: str
    cell: Callable[[Any], Any]
    """Function from a row to its text, plain or rich."""
    drop_order: int = 0
    """Order in which columns are dropped, highest first; 0 is always shown."""
    align_right: bool = True
    legend: str = ""
    """Meaning of its signs, printed below the table."""


def fitted_table(columns: Sequence[Column], rows: Sequence[Any], width: int, max_columns: int = 100) -> Table:
    """Make a table no wider than `width`, without empty columns and those that do not fit; legends stand below it."""
    cells = {column.header: [column.cell(row) for row in rows] for column in columns}
    sizes = {header: 2 + max(cell_len(str(cell)) for cell in [header, *texts]) for header, texts in cells.items()}
    shown = [column for column in columns if any(map(str, cells[column.header]))]

    def is_too_wide() -> bool:
        return len(shown) > max_columns or sum(sizes[column.header] for column in shown) > width + 2

    while is_too_wide() and any(column.drop_order for column in shown):
        shown.remove(max(shown, key=lambda column: column.drop_order))
    legends = "\n".join(f"{column.header}: {column.legend}" for column in shown if column.legend)
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
        caption=legends or None,
        caption_justify="left",
        caption_style="dim",
    )
    for column in shown:
        table.add_column(column.header, justify="right" if column.align_right else "left", no_wrap=True)
    for i in range(len(rows)):
        table.add_row(*(cells[column.header][i] for column in shown))
    return table


def axis_columns(rows: Sequence[Any], cell_of: Callable[[Any], dict[str, Any]]) -> list[Column]:
    """Make a column for every axis with more than one value in the rows' cells, except the size."""
    cells = [cell_of(row) for row in rows]
    keys = dict.fromkeys(key for cell in cells for key in cell if key != "size")
    axes = [key for key in keys if len({str(cell.get(key, "")) for cell in cells}) > 1]
    return [Column(header=axis.split(".")[-1], cell=partial(_axis_value, cell_of, axis)) for axis in axes]


def _axis_value(cell_of: Callable[[Any], dict[str, Any]], axis: str, row: Any) -> str:
    value = cell_of(row).get(axis, "")
    if value is None:
        return "all" if axis == "unique_images" else "none"
    if isinstance(value, dict):  # a section, such as `init`: its values tell it
        return " ".join(map(str, value.values()))
    return format_number(value) if type(value) is int and value >= 10_000 else str(value)


def new_console() -> Console:
    """Make a console as wide as the terminal; in a log file, lines have any width."""
    # isatty, since rich takes any file for a terminal if a variable such as FORCE_COLOR is set.
    return Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH, force_terminal=False)
