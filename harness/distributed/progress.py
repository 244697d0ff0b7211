"""Progress of long work that all ranks share: a callback that shows it, and stops the work if a signal asks to."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[..., None]
"""Callback that all ranks call together, often: (what, done, total, unit). It shows progress, if there is a `what`, and
raises to stop the work."""


def ignore_progress(*_: object) -> None:
    """Ignore progress, and stop nothing."""


def numbered_progress(report_progress: ProgressCallback, number: int, count: int) -> ProgressCallback:
    """Prefix the names of one of several pieces of work with `number/count`."""
    if count == 1:
        return report_progress
    return lambda what="", *standing: report_progress(what and f"{number}/{count} {what}", *standing)
