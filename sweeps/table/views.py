"""How plans and statuses look: rich tables on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aimscale.analysis.table.schema import MFU
from aimscale.sweeps.plan.costs import CostCard, totals
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.table.status import RunStatus, SweepStatus

MAX_PLAN_ROWS = 200
LOG_WIDTH = 250

STYLE = {
    "finished": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "bold red",
    "diverged": "bold red",
    "damaged": "bold red",
    "dead": "yellow",
    "preempted": "yellow",
    "not started": "dim",
}


ROUNDS_UP = 0.9995
"""What three digits show as 1000 gets the next prefix."""


def number(value: float | None, unit: str = "") -> str:
    """Three digits with a metric prefix: 1.09B, 12.3k; `-` for none."""
    if value is None:
        return "-"
    for size, prefix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= ROUNDS_UP * size:
            return f"{value / size:.3g}{prefix}{unit}"
    return f"{value:.3g}{unit}"


def data_size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= ROUNDS_UP * size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float | None) -> str:
    """The two largest units: 3d 4h, 2h 10m, 5m 12s; `-` for none."""
    if seconds is None:
        return "-"
    seconds = int(seconds)
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit} {seconds % size // smaller}{small}"
    return f"{seconds}s"


def varying(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Axes that take more than one value, besides the size."""
    keys = [key for key in (cells[0] if cells else {}) if key != "size"]
    return [key for key in keys if len({str(cell[key]) for cell in cells}) > 1]


def axis_value(value: Any) -> str:
    """One axis value in a table."""
    if value is None:
        return "all"
    return number(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table that drops its least important columns on a narrow terminal."""

    header: str
    cells: list[Any]
    """Strings or rich texts."""
    rank: int = 0
    """0 is always shown; of the others the highest go first."""
    right: bool = True


def fitted_table(columns: list[Column], width: int) -> tuple[Table, list[str]]:
    """A table no wider than `width`, and the titles of the columns that did not fit."""

    def size(column: Column) -> int:
        return 2 + max(cell_len(str(cell)) for cell in [column.header, *column.cells])

    shown, hidden = list(columns), []
    while sum(map(size, shown)) > width and any(column.rank for column in shown):
        last = max(shown, key=lambda column: column.rank)
        shown.remove(last)
        hidden.append(last.header)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in shown:
        table.add_column(column.header, justify="right" if column.right else "left", no_wrap=True)
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*row)
    return table, hidden


def _axis_column(axis: str, rows: Sequence[CostCard] | Sequence[RunStatus]) -> Column:
    return Column(header=axis.split(".")[-1], cells=[axis_value(row.cell[axis]) for row in rows])


def new_console() -> Console:
    """A console as wide as the terminal; a log file takes any width."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def print_plan(sweep: Sweep, runs: Sequence[Run], cards: Sequence[CostCard], console: Console | None = None) -> None:
    """The cost cards as a table, with totals, assumptions and warnings."""
    console = console or new_console()
    console.print(f"[bold]{sweep.name}[/]: {sweep.file.description}", highlight=False, soft_wrap=True)
    notes: list[str] = []
    columns = _plan_columns(cards[:MAX_PLAN_ROWS], sweep.file.cost.currency, notes)
    table, hidden = fitted_table(columns, console.width)
    console.print(table, highlight=False)
    if hidden:
        console.print(f"not shown on {console.width} columns: {', '.join(hidden)}", style="dim", highlight=False)
    if len(cards) > MAX_PLAN_ROWS:
        console.print(f"... and {len(cards) - MAX_PLAN_ROWS} more runs (all of them with --json)")
    _print_totals(sweep, runs, cards, console)
    for i, note in enumerate(notes):
        console.print(f"[yellow]! {i + 1}[/] {note}", highlight=False, soft_wrap=True)


def _plan_columns(cards: Sequence[CostCard], currency: str, notes: list[str]) -> list[Column]:
    def column(header: str, cell: Callable[[CostCard], Any], rank: int = 0, right: bool = True) -> Column:
        return Column(header=header, cells=[cell(card) for card in cards], rank=rank, right=right)

    axes = varying([card.cell for card in cards])
    return [
        column("size", lambda card: card.cell["size"], right=False),
        *(_axis_column(axis, cards) for axis in axes),
        column("params", lambda card: number(card.params_total)),
        column("trunk", lambda card: number(card.params_trunk), 7),
        column("head", lambda card: number(card.params_head), 8),
        column("images", lambda card: _span([number(budget.images_seen) for budget in card.budgets])),
        column("epochs", lambda card: _span([number(budget.epochs) for budget in card.budgets]), 5),
        column("FLOPs", lambda card: _span([f"{budget.flops:.2e}" for budget in card.budgets]), 1),
        column("batch", lambda card: str(card.batch_size), 6),
        column("lr", lambda card: f"{card.lr_peak:.2g}", 9),
        column("devices", lambda card: str(card.devices), 3),
        column("memory", _memory, 4),
        column("disk", lambda card: data_size(card.disk_bytes), 10),
        column("time", lambda card: duration(card.wall_s)),
        column(
            "device-h",
            lambda card: f"{card.device_hours:,.3g}" if card.device_hours < 1000 else f"{card.device_hours:,.0f}",
        ),
        column(currency, lambda card: f"{card.price:,.0f}", 2),
        column("!", lambda card: ",".join(str(1 + _note(warning, notes)) for warning in card.warnings)),
    ]


def _note(warning: str, notes: list[str]) -> int:
    """Index of a warning in the notes under the table."""
    if warning not in notes:
        notes.append(warning)
    return notes.index(warning)


def _span(values: Sequence[str]) -> str:
    """First and last of an increasing row of values."""
    return values[0] if values[0] == values[-1] else f"{values[0]}..{values[-1]}"


def _memory(card: CostCard) -> str:
    """Bytes of a rank, with the ZeRO stage and the micro-batch that they belong to (r: activations recomputed)."""
    if card.memory_bytes is None:
        return "too large"
    recompute = "r" if card.activation_checkpointing else ""
    return f"{data_size(card.memory_bytes)} (z{card.zero_stage} m{card.micro_batch}{recompute})"


def _print_totals(sweep: Sweep, runs: Sequence[Run], cards: Sequence[CostCard], console: Console) -> None:
    total, cost = totals(sweep, runs, cards), sweep.file.cost
    console.print(
        f"{total.num_runs} runs, {total.num_rows} rows; {total.images_executed:,} images and "
        f"{total.flops_executed:.3g} FLOPs executed (decay branches included), {total.flops_evaluation:.3g} more in "
        f"validation and probes; {total.device_hours:,.4g} device-hours"
        f"{f' = {total.price:,.0f} {cost.currency}' if total.price else ''}; longest run "
        f"{duration(total.longest_wall_s)}; run directories {data_size(total.disk_bytes)} "
        f"({data_size(total.trunk_bytes)} of them the trunks kept for longer budgets), "
        f"image cache {data_size(total.cache_bytes)}; told to stop, a run gets up to "
        f"{duration(max(card.stop_s for card in cards))} to save; in host memory, all ranks of a run keep up to "
        f"{data_size(max(card.checkpoint_bytes for card in cards))} for the copy of a checkpoint",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"assuming {cost.device} at {cost.peak_tflops:g} TFLOP/s, MFU {100 * cost.mfu:g} %"
        f"{f', {cost.price_per_device_hour:g} {cost.currency} per device-hour' if cost.price_per_device_hour else ''}"
        f"{f', {cost.step_ms:g} ms per step beside its FLOPs' if cost.step_ms else ''}"
        f"{f', {cost.evaluation_s:g} s per budget for its evaluation' if cost.evaluation_s else ''}; "
        f"start-up is not counted{'' if cost.evaluation_s else ', nor the fitting of probe heads'}; "
        f"recipe {sweep.file.recipe}",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def status_table(status: SweepStatus, width: int) -> Group:
    """`aimscale status` on a terminal of this width."""

    def column(header: str, cell: Callable[[RunStatus], Any], rank: int = 0, right: bool = True) -> Column:
        return Column(header=header, cells=[cell(line) for line in status.runs], rank=rank, right=right)

    axes = varying([line.cell for line in status.runs])
    mfu = [
        Column(header=f"MFU {name}", cells=[_percent(share) for share in shares], rank=4)
        for field, name in MFU.items()
        if any(shares := [getattr(line, field) for line in status.runs])
    ]
    table, _ = fitted_table(
        [
            column("run", lambda line: line.run_id, right=False),
            *(_axis_column(axis, status.runs) for axis in axes),
            column("state", _state, right=False),
            column("done", lambda line: f"{100 * line.progress:.0f} %" if line.state != "not started" else ""),
            column("images", lambda line: number(line.images_seen) if line.images_seen else "", 5),
            column("step", lambda line: str(line.step) if line.step else "", 8),
            column("train loss", lambda line: f"{line.loss:.4f}" if line.loss is not None else "", 4),
            column("val loss", lambda line: f"{line.val_loss:.4f}" if line.val_loss is not None else "", 1),
            column("images/s", lambda line: number(line.images_per_s) if line.images_per_s else "", 3),
            *mfu,
            column("evaluated", _evaluated, 2),
            column("ETA", lambda line: duration(line.eta_s) if line.eta_s is not None else "", 2),
            column("tries", lambda line: str(line.attempts) if line.attempts else "", 6),
            column("beat", _beat, 7),
        ],
        width,
    )
    notes = [Text(f"{line.run_id}: {why}", style=STYLE[line.state]) for line in status.runs if (why := _why(line))]
    return Group(table, *notes, Text(status_summary(status), style="bold"))


def _state(line: RunStatus) -> Text:
    return Text(f"{line.state} ({line.phase})" if line.phase else line.state, style=STYLE[line.state])


def _percent(share: float | None) -> str:
    """A utilisation; one that cannot be is marked."""
    return f"{100 * share:.0f} %{' (!)' if share > 1 else ''}" if share else ""


def _evaluated(line: RunStatus) -> str:
    return f"{line.evaluated} of {line.to_evaluate}" if line.to_evaluate and line.state != "not started" else ""


def _beat(line: RunStatus) -> str:
    age = line.heartbeat_age_s if line.state == "running" else None
    return "" if age is None else duration(age)


def _why(line: RunStatus) -> str:
    """What a reader must know of a run besides its numbers: where it waits, or why it stands and where its log is."""
    if line.state in ("finished", "not started"):
        return f"evaluation {line.evaluation}" if line.evaluation else ""
    reason = ": ".join(part for part in (line.reason_class, line.reason) if part)
    if line.state in ("queued", "running"):
        return f"job {line.job_id} {f'({reason})' if reason else ''}".strip() if line.job_id else ""
    return "; ".join(part for part in (reason, line.log) if part)


def status_summary(status: SweepStatus) -> str:
    """The last line of `aimscale status`."""
    counts = ", ".join(f"{num} {state}" for state, num in sorted(status.counts.items(), key=lambda item: -item[1]))
    eta = f", about {duration(status.eta_s)} left" if status.eta_s is not None else ""
    old = f"; {len(status.unplanned)} run directories are of an earlier sweep file" if status.unplanned else ""
    hours = f"; {status.device_hours:.3g} of {status.device_hours_planned:.3g} planned device-hours spent"
    then = f"; next: {status.next_step}" if status.next_step else ""
    done = f"{100 * status.progress:.0f} % of the FLOPs{eta}{hours}{then}{old}"
    return f"{status.sweep}: {len(status.runs)} runs: {counts}; {done}"


def watch(look: Callable[[], SweepStatus], every_s: float) -> None:
    """Show the status again and again until Ctrl-C, or until nothing is left to happen."""
    console = Console()
    try:
        with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
            while True:
                live.update(status_table(look(), console.width), refresh=True)
                time.sleep(every_s)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
