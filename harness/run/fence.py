"""The fence around a run: a process that lost the run's lock can change nothing in it any more.

The holder makes a folder of its own, `.writer-<token>`, and takes those of earlier holders into it. Every file is
prepared in the writer's own folder and renamed out of it, and what goes is renamed into it. Each of these is one step
of the file system, which fails once the folder is elsewhere, even where the writer looked a moment ago and then stood
still for minutes. This uses no clock and no lock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".writer-"
_writer_folders: dict[Path, Path] = {}
"""Fenced run -> the folder from which this process writes into it."""


class LockLost(RuntimeError):
    """Another process took the run over; this one must stop writing."""


@contextlib.contextmanager
def take_over(run: Path, token: str) -> Iterator[Path]:
    """For the block, be the one that writes into a run: from its start no earlier holder of the lock can.

    Yields the writer's folder. It goes at the end, but after an error stays for the next holder: other ranks may still
    read there what happened, and a checkpoint may be whole.
    """
    folder, pid = run.absolute() / f"{_PREFIX}{token}", os.getpid()
    folder.mkdir()
    for earlier in {*folder.parent.glob(f"{_PREFIX}*")} - {folder}:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            earlier.rename(folder / earlier.name)
    with fenced(run, folder):
        yield folder
    if os.getpid() == pid:  # a forked child has this block, not the right
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def fenced(run: Path, writer_folder: Path) -> Iterator[None]:
    """For the block, let what this process writes into a run pass through the folder of the one that took it over."""
    _writer_folders[run.absolute()] = writer_folder
    try:
        yield
    finally:
        _writer_folders.pop(run.absolute(), None)


def earlier_folders(path: Path) -> list[Path]:
    """Those of earlier holders of the run that `path` belongs to; they go with the holder's own, or before."""
    folder = writer_folder(path)
    return [] if folder is None else list(folder.glob(f"{_PREFIX}*"))


def check_fence(path: Path) -> None:
    """Look before a line is appended to `path`, or before something else that is no rename.

    Raises:
        LockLost: another process took over what `path` belongs to.
    """
    with keeping_fence(path):
        if folder := writer_folder(path):
            folder.stat()


@contextlib.contextmanager
def keeping_fence(path: Path) -> Iterator[None]:
    """Turn the failure of a step that the fence forbids into LockLost."""
    try:
        yield
    except FileNotFoundError as error:
        folder = writer_folder(path)
        if folder is None or folder.exists():
            raise
        raise LockLost(f"{folder.parent} was taken over by another process; this one stops writing") from error


def writer_folder(path: Path) -> Path | None:
    """From which this process writes into the run that a path belongs to; None where it holds none."""
    if not _writer_folders:
        return None
    path = path.absolute()
    return next((_writer_folders[root] for root in (path, *path.parents) if root in _writer_folders), None)
