"""Progress of long work: a bar with rate and time left on a terminal, elsewhere a plain line now and then.

It is written to the standard error, so that results can be piped. A file gets no control characters.
"""

from __future__ import annotations

import datetime
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_S = 30.0
"""Seconds between two lines without a terminal; shorter work prints none."""


class Bar:
    """Progress bar, called often with how far the work is; with `shows=False` it shows nothing."""

    def __init__(self, *, shows: bool = True, every_s: float = PLAIN_EVERY_S) -> None:
        self._shows, self._every_s = shows, every_s
        self._console = Console(stderr=True)
        # Ask the file itself: with variables such as FORCE_COLOR, rich takes any file for a terminal.
        self._is_live = sys.stderr.isatty() and not self._console.is_dumb_terminal
        self._live: Progress | None = None
        self._last_print = time.monotonic()
        self._what = ""
        self._started, self._first, self._done = 0.0, 0, 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.clear()

    def __call__(self, what: str = "", done: int = 0, total: int | None = None, unit: str = "images", /) -> None:
        """Show `done` of `total` units of the work named `what`; the rate counts from the first call of that name."""
        if not what or not self._shows:
            return
        now = time.monotonic()
        if what != self._what or done < self._done:
            self._what, self._started, self._first = what, now, done
        self._done = done
        text = _standing(done, total, unit, rate=(done - self._first) / max(1e-9, now - self._started))
        if not self._is_live:
            if now - self._last_print >= self._every_s:
                print(f"{what}: {text}", file=sys.stderr, flush=True)
                self._last_print = now
            return
        if self._live is None:
            columns = TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[text]}")
            self._live = Progress(
                *columns,
                console=self._console,
                transient=True,
                refresh_per_second=4,
                redirect_stdout=False,  # piped output would go to the terminal
            )
            self._live.add_task(what, text=text)
            self._live.start()
        self._live.update(self._live.task_ids[0], description=what, completed=done, total=total, text=text)

    def say(self, line: str, *, err: bool = False) -> None:
        """Print a line of results above the bar."""
        if self._shows:
            self.clear()
            print(line, file=sys.stderr if err else sys.stdout, flush=True)

    def clear(self) -> None:
        """Remove the bar from the terminal; the next call shows it again."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _standing(done: int, total: int | None, unit: str, *, rate: float) -> str:
    """Format `1,024/5,000 images, 310/s, 0:00:12 left`; rate and time are left out if unknown."""
    text = f"{done:,} {unit}" if total is None else f"{done:,}/{total:,} {unit}"
    if rate <= 0:
        return text
    text += f", {rate:,.0f}/s" if rate >= 10 else f", {rate:.2g}/s"
    if total is None:
        return text
    return f"{text}, {datetime.timedelta(seconds=round((total - done) / rate))} left"
