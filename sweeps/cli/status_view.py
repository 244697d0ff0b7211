"""Status of a sweep and its runs on a terminal: once, or live while they go on."""

from __future__ import annotations

import contextlib
import operator
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from aimscale.analysis.display import MFU
from aimscale.sweeps.cli.layout import (
    Column,
    axis_columns,
    fitted_table,
    format_duration,
    format_number,
    key_value_text,
    new_console,
    notice_lines,
    style_of,
)
from aimscale.sweeps.planning.run import Notice
from aimscale.sweeps.state.run_state import State
from aimscale.sweeps.sweep_status import RunStatus, SweepStatus

LOOK_INTERVAL_S, LOG_INTERVAL_S, MAX_LOOK_SHARE = 2.0, 30.0, 0.05
"""Interval between looks at all runs, s, on a terminal and in the log of a launch; maximum share of the time that they
may take."""
MAX_LISTED = 16
"""Number of runs up to which each has a line of its own; more are grouped by size."""
MAX_DATA_WAIT = 0.3
"""Share of time spent waiting for images, 0..1, above which a run gets a notice."""
CONSTANT_LOSS = 1.0
"""Loss on normalised targets of a model that predicts the mean of every patch."""


def status_view(status: SweepStatus, width: int, *, every_run: bool = False) -> Group:
    """Lay out `aimscale status`: the summary, what needs attention, and runs, or groups of them if they are many."""
    parts: list[Any] = [key_value_text(status_summary(status), width)]
    failed_jobs = [Notice(level="failed", key="jobs", text=reason) for reason in status.failed_jobs]
    failed_jobs += [Notice(level="failed", key="disk", text=status.disk)] if status.disk else []
    notices = (notice.of(line.run_id) for line in status.runs if (notice := _notice(line)))
    if flags := [*failed_jobs, *notice_lines(notices)]:
        parts.append(key_value_text(flags, width))
    is_short = every_run or len(status.runs) <= MAX_LISTED
    return Group(*parts, runs_table(status.runs, width) if is_short else groups_table(status.runs, width))


def _optional(header: str, value: Callable[[Any], Any], text: Callable[[Any], str], drop_order: int = 0) -> Column:
    """Make a column that is blank where a row has no value."""
    return Column(header=header, cell=lambda row: text(shown) if (shown := value(row)) else "", drop_order=drop_order)


def runs_table(lines: Sequence[RunStatus], width: int) -> Table:
    """Make a table with a line for each run, and its node unless all are executed on this machine."""
    unit = lines[0].unit if lines else "images"
    is_elsewhere = bool({line.place for line in lines} - {"", socket.gethostname()})
    columns = [
        Column(header="run", cell=lambda line: line.run_id, align_right=False),
        *axis_columns(lines, lambda line: line.cell),
        Column(header="state", cell=_state, align_right=False),
        Column(
            header="done", cell=lambda line: "" if line.state is State.NOT_STARTED else f"{100 * line.progress:.0f} %"
        ),
        _optional(unit, lambda line: line.status.images_seen, format_number, 5),
        _optional("train loss", lambda line: line.status.loss, "{:.4f}".format, 4),
        _optional("val loss", lambda line: line.val_loss, "{:.4f}".format, 1),
        *([Column(header="forecast", cell=_on_track, drop_order=1, align_right=False)] if _has_forecast(lines) else []),
        _optional("spikes", lambda line: line.num_loss_spikes, str, 3),
        _optional(f"{unit}/s", lambda line: line.status.images_per_s, format_number, 3),
        *(_optional(f"MFU {name}", operator.attrgetter(f"status.{field}"), _percent, 4) for field, name in MFU.items()),
        Column(header="evaluated", cell=_evaluated, drop_order=2),
        _optional("ETA", lambda line: line.eta_s, format_duration, 2),
        Column(header="node", cell=lambda line: line.place if is_elsewhere else "", align_right=False, drop_order=6),
        _optional("last sign", _since_heartbeat, lambda age_s: f"{format_duration(age_s)} ago", 7),
    ]
    return fitted_table(columns, lines, width)


def groups_table(lines: Sequence[RunStatus], width: int) -> Table:
    """Make a table with a line for each size."""
    groups: dict[str, list[RunStatus]] = {}
    unit = lines[0].unit if lines else "images"
    for line in lines:
        groups.setdefault(str(line.cell["size"]), []).append(line)

    def best_val_loss(group: list[RunStatus]) -> float | None:
        return min((each.val_loss for each in group if each.val_loss and each.state is State.FINISHED), default=None)

    columns = [
        Column(header="size", cell=lambda group: str(group[0].cell["size"]), align_right=False),
        Column(header="runs", cell=lambda group: str(len(group))),
        Column(header="states", cell=_count_states, align_right=False),
        Column(header="done", cell=lambda group: f"{100 * sum(each.progress for each in group) / len(group):.0f} %"),
        _optional("best val loss", best_val_loss, "{:.4f}".format, 1),
        _optional(f"{unit}/s", _images_per_s, format_number, 3),
        _optional("ETA", lambda group: max(each.eta_s or 0.0 for each in group), format_duration, 2),
    ]
    return fitted_table(columns, list(groups.values()), width)


def _images_per_s(lines: Iterable[RunStatus]) -> float:
    return sum(line.status.images_per_s or 0.0 for line in lines if line.state is State.RUNNING)


def _count_states(lines: Iterable[RunStatus]) -> str:
    return ", ".join(f"{num} {state}" for state, num in Counter(line.state for line in lines).most_common())


def _state(line: RunStatus) -> Text:
    phase = f" ({line.status.phase})" if line.state is State.RUNNING and line.status.phase else ""
    return Text(line.state + phase, style=style_of(line.state))


def _percent(share: float) -> str:
    """Format a utilisation in per cent; mark a value above 100 %, which is impossible."""
    return f"{100 * share:.0f} %{' (!)' if share > 1 else ''}"


def _evaluated(line: RunStatus) -> str:
    return f"{line.evaluated} of {line.to_evaluate}" if line.to_evaluate and line.state is not State.NOT_STARTED else ""


def _has_forecast(lines: Iterable[RunStatus]) -> bool:
    return any(line.status.deviation is not None for line in lines)


def _on_track(line: RunStatus) -> str:
    """Say whether a run is on its forecast from smaller runs."""
    if line.status.deviates_since is not None:
        side = "above" if (line.status.deviation or 0.0) > 0 else "below"
        return f"{line.status.deviation:+.1f} sd {side} since {format_number(line.status.deviates_since)} {line.unit}"
    if line.status.deviation is not None:
        return "on track"
    return "not known: no smaller run has come so far" if line.state is State.RUNNING and line.val_loss else ""


def _since_heartbeat(line: RunStatus) -> float | None:
    return (
        max(0.0, time.time() - line.status.heartbeat) if line.state is State.RUNNING and line.status.heartbeat else None
    )


def _notice(line: RunStatus) -> Notice | None:
    """Return what to say of a run that needs attention: it does not go on by itself, or not well."""
    if not (line.state.active or line.state in (State.FINISHED, State.NOT_STARTED)):
        return Notice(level=line.state, text=line.status.reason or "")
    loss = line.val_loss if line.val_loss is not None else line.status.loss
    if line.is_normalised and loss is not None and loss >= CONSTANT_LOSS:
        text = f"loss {loss:.2f}, no better than a constant prediction: lower optimiser.lr_peak"
        return Notice(level="unstable", text=text)
    if line.state is State.RUNNING and line.status.deviates_since is not None:
        void = "the forecast is void: see whether this run or the smaller ones differ in more than size"
        advice = "see what changed there" if (line.status.deviation or 0.0) > 0 else void
        text = f"loss {_on_track(line)}, which 1 % of sound runs come to; {advice}"
        return Notice(level=State.OFF_TRACK, text=text)
    data_wait = line.status.data_wait or 0.0
    if line.state is State.RUNNING and line.status.phase in ("train", "decay") and data_wait > MAX_DATA_WAIT:
        share = f"waits for images {100 * data_wait:.0f} % of the time"
        return Notice(level="data-bound", text=f"{share}: raise runtime.num_workers or pack smaller images")
    return None


def status_summary(status: SweepStatus) -> list[Notice]:
    """Summarise the sweep in key-value lines."""
    facts = [("runs", f"{len(status.runs)}: {_count_states(status.runs)}"), ("done", _progress_text(status))]
    if status.eta_s is not None:
        basis = "" if status.eta_is_measured else " by the plan; nothing is measured yet"
        facts.append(("left", f"about {format_duration(status.eta_s)}{basis}"))
    facts.append(("spent", f"{status.device_hours:.3g} of {status.device_hours_planned:.3g} planned device-hours"))
    if status.unplanned:
        facts.append(("unplanned", f"{len(status.unplanned)} run directories of an earlier sweep file"))
    return [Notice(key=key, text=value) for key, value in facts]


def _progress_text(status: SweepStatus) -> str:
    """Describe the share of work done, the share in failed or cancelled runs, and the current images/s."""
    pace = _images_per_s(status.runs)
    given_up = f", {100 * status.given_up:.0f} % in failed or cancelled runs" if status.given_up else ""
    now = f", {format_number(pace)} {status.runs[0].unit}/s" if pace else ""
    return f"{100 * status.progress:.0f} % of the work{given_up}{now}"


def progress_line(status: SweepStatus) -> str:
    """Format the progress of a sweep as one line of a log."""
    time_left = f", about {format_duration(status.eta_s)} left" if status.eta_s is not None else ""
    return f"{_progress_text(status)}{time_left}; {_count_states(status.runs)}"


@contextlib.contextmanager
def show_status(
    *, every_run: bool = False, on_screen: bool = False
) -> Iterator[tuple[Callable[[SweepStatus], None], bool]]:
    """Yield a function that shows a status, and whether it renews a table on a terminal; else it prints a line, to the
    error stream where the status comes later.

    Args:
        on_screen: whether the table has the whole terminal, until the status comes.
    """
    console = new_console()
    live = Live(console=console, auto_refresh=False, screen=on_screen, transient=True) if console.is_terminal else None

    def show(status: SweepStatus) -> None:
        if live is None:
            typer.echo(progress_line(status), err=on_screen)
        else:
            live.update(status_view(status, console.width, every_run=every_run), refresh=True)

    with live or contextlib.nullcontext():
        yield show, live is not None


def pause_s(started: float, *, is_log: bool = False) -> float:
    """Return the time to the next look after one that began at `started` (`time.monotonic`) and has ended now, s."""
    return max(LOG_INTERVAL_S if is_log else LOOK_INTERVAL_S, (time.monotonic() - started) / MAX_LOOK_SHARE)
