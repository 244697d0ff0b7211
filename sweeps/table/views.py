"""Layout of tables, key-value lines and progress: rich on a terminal, plain in a log."""

from __future__ import annotations

import functools
import operator
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aimscale.aim.errors import printable
from aimscale.analysis.table.schema import MFU
from aimscale.sweeps.plan.costs import CostCard
from aimscale.sweeps.table.status import ENDED_STATES, RunStatus, SweepStatus

LOG_WIDTH = 1000
REFRESH_S = 2.0
MAX_DATA_WAIT = 0.3
"""Share of time spent waiting for images, 0..1, above which a run gets a notice."""

STATE_STYLES = {
    "finished": "green",
    "queued": "blue",
    "not started": "dim",
    **dict.fromkeys(("running", "starting"), "cyan"),
    **dict.fromkeys(("dead", "unfinished", "cancelled", "waits", "warn"), "yellow"),
    **dict.fromkeys(("failed", "diverged", "damaged", "fail"), "bold red"),
}
"""Colours of run states and of other words that open a line."""


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


@dataclass(frozen=True, kw_only=True)
class KeyValue:
    """Line of a key and a value."""

    key: str
    """Key; blank where the line above continues."""
    value: str
    level: str = ""
    """Word of `STATE_STYLES` before the key, which calls attention to the line."""


def key_value_text(lines: Sequence[KeyValue], width: int) -> Text:
    """Align keys and values in two columns; values wider than the terminal break between words."""
    widest, level = (max(len(getattr(line, name)) for line in lines) for name in ("key", "level"))
    indent = widest + 2 + (level + 2 if level else 0)
    text = Text()
    for i, line in enumerate(lines):
        if level:
            text.append(f"{line.level:<{level}}  ", style=STATE_STYLES[line.level])
        text.append(f"{line.key:<{widest}}  ", style="" if level else "bold")
        parts = textwrap.wrap(line.value, max(width - indent, 30), break_long_words=False, break_on_hyphens=False)
        text.append(f"\n{' ' * indent}".join(parts) + ("\n" if i + 1 < len(lines) else ""))
    return text


def print_key_values(lines: Sequence[KeyValue]) -> None:
    """Print lines that call attention first, then the others."""
    console = new_console()
    for part in ([line for line in lines if line.level], [line for line in lines if not line.level]):
        if part:
            console.print(key_value_text(part, console.width), highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Column:
    """Column of a table that drops its least important columns on a narrow terminal."""

    header: str
    cell: Callable[[Any], Any]
    """Function from a row to its text, plain or rich."""
    drop_order: int = 0
    """Order in which columns are dropped, highest first; 0 is always shown."""
    align_right: bool = True


def fitted_table(columns: Sequence[Column], rows: Sequence[Any], width: int) -> Table:
    """Make a table no wider than `width`, without empty columns and those that do not fit."""
    cells = {column.header: [column.cell(row) for row in rows] for column in columns}
    sizes = {header: 2 + max(cell_len(str(cell)) for cell in [header, *texts]) for header, texts in cells.items()}
    shown = [column for column in columns if any(map(str, cells[column.header]))]
    while sum(sizes[column.header] for column in shown) > width and any(column.drop_order for column in shown):
        shown.remove(max(shown, key=lambda column: column.drop_order))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in shown:
        table.add_column(column.header, justify="right" if column.align_right else "left", no_wrap=True)
    for i in range(len(rows)):
        table.add_row(*(cells[column.header][i] for column in shown))
    return table


def axis_columns(rows: Sequence[CostCard] | Sequence[RunStatus]) -> list[Column]:
    """Make a column for every axis with more than one value, except the size."""
    cells = [row.cell for row in rows]
    axes = [key for key in cells[0] if key != "size" and len({str(cell[key]) for cell in cells}) > 1]
    return [Column(header=axis.split(".")[-1], cell=functools.partial(_axis_value, axis)) for axis in axes]


def _axis_value(axis: str, row: CostCard | RunStatus) -> str:
    value = row.cell[axis]
    if value is None:
        return "all" if axis == "unique_images" else "none"
    return format_number(value) if type(value) is int and value >= 10_000 else str(value)


def new_console() -> Console:
    """Make a console as wide as the terminal; in a log file, lines have any width."""
    # isatty, since rich takes any file for a terminal if a variable such as FORCE_COLOR is set.
    return Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH, force_terminal=False)


def status_table(status: SweepStatus, width: int, bar: Table | None = None) -> Group:
    """Lay out `aimscale status`: notices, runs, and a summary of the sweep or else the given progress bar."""

    def column(
        header: str, value: Callable[[RunStatus], Any], text: Callable[[Any], str], drop_order: int = 0
    ) -> Column:
        """Make a column that is blank where a run has no value yet."""
        return Column(
            header=header, cell=lambda line: text(found) if (found := value(line)) else "", drop_order=drop_order
        )

    columns = [
        Column(header="run", cell=lambda line: line.run_id, align_right=False),
        *axis_columns(status.runs),
        Column(header="state", cell=_state, align_right=False),
        Column(header="done", cell=lambda line: "" if line.state == "not started" else f"{100 * line.progress:.0f} %"),
        column("images", lambda line: line.status.images_seen, format_number, 5),
        column("train loss", lambda line: line.status.loss, "{:.4f}".format, 4),
        column("val loss", lambda line: line.val_loss, "{:.4f}".format, 1),
        column("images/s", lambda line: line.status.images_per_s, format_number, 3),
        *(column(f"MFU {name}", operator.attrgetter(f"status.{field}"), _percent, 4) for field, name in MFU.items()),
        Column(header="evaluated", cell=_evaluated, drop_order=2),
        column("ETA", lambda line: line.eta_s, format_duration, 2),
        Column(header="on", cell=lambda line: line.place, align_right=False, drop_order=6),
        column("beat", _since_heartbeat, format_duration, 7),
    ]
    flags = [KeyValue(level="failed", key="jobs", value=why) for why in status.failed_jobs]
    flags += [KeyValue(level=level, key=run, value=why) for level, why, run in _notices(status.runs)]
    table = fitted_table(columns, status.runs, width)
    below = bar or key_value_text(status_summary(status), width)
    return Group(*([key_value_text(flags, width)] if flags else ()), table, below)


def _state(line: RunStatus) -> Text:
    phase = f" ({line.status.phase})" if line.state == "running" and line.status.phase else ""
    return Text(line.state + phase, style=STATE_STYLES[line.state])


def _percent(share: float) -> str:
    """Format a utilisation in per cent; mark a value above 100 %, which is impossible."""
    return f"{100 * share:.0f} %{' (!)' if share > 1 else ''}"


def _evaluated(line: RunStatus) -> str:
    return f"{line.evaluated} of {line.to_evaluate}" if line.to_evaluate and line.state != "not started" else ""


def _since_heartbeat(line: RunStatus) -> float | None:
    return max(0.0, time.time() - line.status.heartbeat) if line.state == "running" and line.status.heartbeat else None


def _is_data_bound(line: RunStatus) -> bool:
    """Return whether a run waits for images rather than for its device."""
    trains = line.state == "running" and line.status.phase in ("train", "decay")
    return trains and (line.status.data_wait or 0.0) > MAX_DATA_WAIT


def _notices(lines: Iterable[RunStatus]) -> list[tuple[str, str, str]]:
    """Return (level, message, run id or number of runs) for runs that need attention, equal messages once."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if _is_data_bound(line):
            share = f"for images {100 * (line.status.data_wait or 0.0):.0f} % of the time"
            why = ("waits", f"{share}: raise runtime.num_workers or pack smaller images")
        elif line.state in ("finished", "not started", "running", "starting"):
            continue
        else:
            reason = ": ".join(part for part in (line.status.reason_class, line.status.reason) if part)
            why = (line.state, printable(reason).replace("\n", " "))
        found.setdefault(why, []).append(line.run_id)
    return [(*why, runs[0] if len(runs) == 1 else f"{len(runs)} runs") for why, runs in found.items()]


def status_summary(status: SweepStatus) -> list[KeyValue]:
    """Summarise the sweep in key-value lines."""
    facts = [("runs", f"{len(status.runs)}: {_counts(status)}"), ("done", _progress_text(status))]
    if status.eta_s is not None:
        basis = "" if status.eta_is_measured else " by the plan; nothing is measured yet"
        facts.append(("left", f"about {format_duration(status.eta_s)}{basis}"))
    facts.append(("spent", f"{status.device_hours:.3g} of {status.device_hours_planned:.3g} planned device-hours"))
    if status.unplanned:
        facts.append(("unplanned", f"{len(status.unplanned)} run directories of an earlier sweep file"))
    return [KeyValue(key=key, value=value) for key, value in facts]


def _counts(status: SweepStatus) -> str:
    return ", ".join(f"{num} {state}" for state, num in sorted(status.counts.items(), key=lambda item: -item[1]))


def _progress_text(status: SweepStatus) -> str:
    """Describe the share of work done, the share in failed or cancelled runs, and the current images/s."""
    pace = sum(line.status.images_per_s or 0.0 for line in status.runs if line.state == "running")
    given_up = f", {100 * status.given_up:.0f} % given up" if status.given_up else ""
    return f"{100 * status.progress:.0f} % of the FLOPs{given_up}" + (
        f", {format_number(pace)} images/s" if pace else ""
    )


def progress_line(status: SweepStatus) -> str:
    """Format the progress of a sweep as one line of a log."""
    left = f", about {format_duration(status.eta_s)} left" if status.eta_s is not None else ""
    return f"{_progress_text(status)}{left}; {_counts(status)}"


def progress_bar(status: SweepStatus, width: int) -> Table:
    """Make a progress bar of one line, which leaves room for the terminal's `^C`."""
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.width = width - len("^C ")
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    over, left = sum(status.counts.get(state, 0) for state in ENDED_STATES), format_duration(status.eta_s)
    words = f"{_progress_text(status)}, {left} left, {over} of {len(status.runs)} runs over"
    grid.add_row(ProgressBar(total=(1.0 - status.given_up) or 1.0, completed=status.progress), words)
    return grid


def watch(get_status: Callable[[], SweepStatus]) -> None:
    """Show the status repeatedly until Ctrl-C."""
    console = Console()
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                live.update(status_table(get_status(), console.width), refresh=True)
                time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
