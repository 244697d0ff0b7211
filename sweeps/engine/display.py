"""What a person sees while the local queue runs: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from aimscale.sweeps.engine.local_queue import Queue, print_events
from aimscale.sweeps.table.status import SweepStatus
from aimscale.sweeps.table.views import new_console, status_summary, status_table

PLAIN_EVERY_S = 30.0
LIVE_EVERY_S = 0.5


@contextmanager
def queue_display(look: Callable[[], SweepStatus]) -> Iterator[Callable[[Queue], None]]:
    """A function for `local_queue.run_queue(report=...)`: a live table on a terminal, lines otherwise."""
    console = new_console()
    shown = {"last": 0.0}
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def report(queue: Queue) -> None:
                for event in queue.events:
                    live.console.print(event, highlight=False, soft_wrap=True)
                queue.events.clear()
                if time.time() - shown["last"] >= LIVE_EVERY_S:
                    shown["last"] = time.time()
                    live.update(_live(look(), queue, console.width), refresh=True)

            yield report
        return

    def report_plain(queue: Queue) -> None:
        print_events(queue)
        if time.time() - shown["last"] >= PLAIN_EVERY_S:
            shown["last"] = time.time()
            print(status_summary(look()), flush=True)

    yield report_plain


def _live(status: SweepStatus, queue: Queue, width: int) -> Group:
    """Active runs as `aimscale status` shows them, and the whole sweep's bar."""
    active = {job.run.run_id for job in queue.active}
    shown = replace(status, runs=tuple(line for line in status.runs if line.run_id in active))
    bar = ProgressBar(total=1.0, completed=status.progress, width=40, complete_style="green")
    stop = Text("stopping: every run saves first (Ctrl-C again kills)", style="yellow") if queue.stopping else Text("")
    table = [status_table(shown, width, status_summary(status))] if shown.runs else []
    return Group(*table, bar, stop)
