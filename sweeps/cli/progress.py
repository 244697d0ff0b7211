"""Progress of a launch: the status as a live table on a terminal, else as a line of a log now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.live import Live

from aimscale.sweeps.cli.layout import new_console
from aimscale.sweeps.cli.status_view import progress_line, status_view
from aimscale.sweeps.engine.active_run import Event
from aimscale.sweeps.engine.worker import Report, Worker, print_events
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.sweep_status import sweep_status

LOG_INTERVAL_S, LIVE_INTERVAL_S = 30.0, 2.0
"""Interval between looks at all runs, s, in a log and on a terminal."""
MAX_LOOK_SHARE = 0.05
"""Maximum share of the time that is spent on looking at all runs, to show their progress."""


@contextlib.contextmanager
def show_progress(planned: PlannedSweep, tell: Callable[[Event], str | None] = str) -> Iterator[Report]:
    """Yield what shows a launch's progress, for `launch(report=...)`.

    Args:
        tell: turns an event, such as the end of a run, into the line that is printed; none for None.
    """
    console, next_look = new_console(), 0.0
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def report(worker: Worker) -> None:
        nonlocal next_look
        print_events(worker, tell)  # above the table
        if (started := time.monotonic()) < next_look:
            return
        planned.look()
        status = sweep_status(planned)
        now = time.monotonic()
        next_look = now + max(LIVE_INTERVAL_S if live else LOG_INTERVAL_S, (now - started) / MAX_LOOK_SHARE)
        if live is None:
            print(progress_line(status), flush=True)
        else:
            live.update(status_view(status, console.width), refresh=True)

    with live or contextlib.nullcontext():
        yield report
