"""What a person sees while a run trains: a progress bar on a terminal, one line per interval in a log."""

from __future__ import annotations

import sys


class Terminal:
    """Prints on rank 0 and nothing elsewhere."""

    def __init__(self, *, is_first: bool, images_planned: int) -> None:
        self._is_first = is_first
        self._progress = None
        if is_first and sys.stdout.isatty():
            from rich import progress

            self._progress = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=20),
                progress.TaskProgressColumn(),
                progress.TimeRemainingColumn(compact=True),
                progress.TextColumn("{task.fields[numbers]}"),
            )
            self._task = self._progress.add_task("start", total=images_planned, numbers="")
            self._progress.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        elif self._is_first:
            print(text, flush=True)

    def step(self, where: str, numbers: str, more: str, *, images_seen: int, images_done: int) -> None:
        """Where the run stands: moves the bar, or prints a line, which has room for `more`."""
        if self._progress is not None:
            self._progress.update(self._task, completed=images_done, description=where, numbers=numbers)
        elif self._is_first:
            print(f"{images_seen:>10} images  {where:<20} {numbers}  {more}", flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
