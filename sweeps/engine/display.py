"""What a person sees while the local queue runs: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aimscale.sweeps.engine.local_queue import Queue, print_events
from aimscale.sweeps.table.status import SweepStatus
from aimscale.sweeps.table.views import duration, new_console, number, status_summary

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
                    live.update(_live(look(), queue), refresh=True)

            yield report
        return

    def report_plain(queue: Queue) -> None:
        print_events(queue)
        if time.time() - shown["last"] >= PLAIN_EVERY_S:
            shown["last"] = time.time()
            print(status_summary(look()), flush=True)

    yield report_plain


def _live(status: SweepStatus, queue: Queue) -> Group:
    """Active runs with a bar each, and the whole sweep's."""
    active = {job.run.run_id for job in queue.active}
    table = Table(box=None, pad_edge=False, show_header=False)
    for line in status.runs:
        if line.run_id in active:
            bar = ProgressBar(total=1.0, completed=line.progress, width=24)
            said, share = line.status, f"{100 * line.progress:3.0f} %"
            loss = f"loss {said.loss:.4f}" if said.loss is not None else ""
            speed = f"{number(said.images_per_s)} images/s" if said.images_per_s else ""
            table.add_row(line.run_id, bar, share, said.phase, loss, speed, duration(line.eta_s))
    bar = ProgressBar(total=1.0, completed=status.progress, width=24, complete_style="green")
    table.add_row(
        Text("sweep", style="bold"), bar, f"{100 * status.progress:3.0f} %", "", "", "", duration(status.eta_s)
    )
    stop = Text("stopping: every run saves first (Ctrl-C again kills)", style="yellow") if queue.stopping else Text("")
    return Group(table, Text(status_summary(status)), stop)
