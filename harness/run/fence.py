"""The fence around a run: a process that lost the run's lock cannot change the run any more.

The lock's holder makes a folder of its own, `.writer-<token>`, and moves those of earlier holders into it. Every file
is prepared in the writer's own folder and renamed out of it, and every removal renames into it. Each rename is atomic
and fails once the folder has moved, even if the writer checked a moment before and then stood still for minutes. No
clock and no further lock are needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_PREFIX = ".writer-"
_writer_folders: dict[Path, Path] = {}
"""Fenced run -> folder through which this process writes into it."""


class LockLost(RuntimeError):
    """Loss of the run to another process; this one must stop writing."""


@contextlib.contextmanager
def take_over(run: Path, token: str) -> Iterator[Path]:
    """Become the only writer of a run for the block: from its start on, no earlier holder of the lock can write.

    Yields the writer's folder. It is removed at the end; after an error it stays for the next holder, since other ranks
    may still read there what happened, and a checkpoint in it may be complete.
    """
    folder, pid = run.absolute() / f"{_PREFIX}{token}", os.getpid()
    folder.mkdir()
    for earlier in {*folder.parent.glob(f"{_PREFIX}*")} - {folder}:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            earlier.rename(folder / earlier.name)
    with fenced(run, folder):
        yield folder
    if os.getpid() == pid:  # a forked child also leaves this block, but must not remove the folder
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def fenced(run: Path, writer_folder: Path) -> Iterator[None]:
    """Route what this process writes into a run through the writer's folder, for the block."""
    _writer_folders[run.absolute()] = writer_folder
    try:
        yield
    finally:
        _writer_folders.pop(run.absolute(), None)


def earlier_folders(path: Path) -> list[Path]:
    """Return the folders of earlier holders of the run that `path` belongs to."""
    folder = writer_folder(path)
    return [] if folder is None else list(folder.glob(f"{_PREFIX}*"))


def check_fence(path: Path) -> None:
    """Check that this process still owns the run, before it appends to `path` or does anything else that is not a
    rename.

    Raises:
        LockLost: another process took over what `path` belongs to.
    """
    with keeping_fence(path):
        if folder := writer_folder(path):
            folder.stat()


@contextlib.contextmanager
def keeping_fence(path: Path) -> Iterator[None]:
    """Turn the failure of a rename that the fence forbids into LockLost."""
    try:
        yield
    except FileNotFoundError as error:
        folder = writer_folder(path)
        if folder is None or folder.exists():
            raise
        raise LockLost(f"{folder.parent} was taken over by another process; this one stops writing") from error


def writer_folder(path: Path) -> Path | None:
    """Return the folder through which this process writes into the run of `path`; None if it holds none."""
    if not _writer_folders:
        return None
    path = path.absolute()
    return next((_writer_folders[root] for root in (path, *path.parents) if root in _writer_folders), None)
