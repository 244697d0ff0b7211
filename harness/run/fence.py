"""The fence around a run directory: a process that lost its lease can change nothing in it any more.

A process that takes a lease makes a folder of its own, `.writer-<token>`, and takes away those of earlier holders.
Behind a fence every file is prepared in the writer's own folder and renamed out of it, and what goes is renamed into
it. Each of these is one step of the file system, which fails once the folder is gone, even where the writer looked at
its lease a moment ago and then stood still for minutes. This uses no clock and no lock.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

_writer_folders: dict[Path, Path] = {}
"""Fenced folder -> the folder from which this process writes into it."""


class LeaseLost(RuntimeError):
    """This process no longer holds the lease it started with; it must stop writing."""


@contextlib.contextmanager
def fenced(roots: Iterable[Path], writer_folder: Path) -> Iterator[None]:
    """For the block, let what this process writes under `roots` pass through `writer_folder`."""
    added = {root.absolute(): writer_folder.absolute() for root in roots}
    _writer_folders.update(added)
    try:
        yield
    finally:
        for root in added:
            _writer_folders.pop(root, None)


def check_fence(path: Path) -> None:
    """Look before a line is appended to `path`, or before something else that is no rename.

    Raises:
        LeaseLost: another process took over what `path` belongs to.
    """
    with keeping_fence(path):
        folder = _writer_folder(path)
        if folder is not None:
            folder.stat()


@contextlib.contextmanager
def keeping_fence(path: Path) -> Iterator[None]:
    """Turn the failure of a step that the fence forbids into LeaseLost."""
    try:
        yield
    except FileNotFoundError as error:
        folder = _writer_folder(path)
        if folder is None or folder.exists():
            raise
        raise LeaseLost(f"{folder.parent} was taken over by another process; this one stops writing") from error


def make_parent(path: Path) -> None:
    """Make the folders above a file, but never a writer's own folder anew: it would undo the fence."""
    folder = _writer_folder(path)
    if folder is None or folder not in path.absolute().parents:
        path.parent.mkdir(parents=True, exist_ok=True)


def aside_file(path: Path) -> Path:
    """Where this thread prepares a file that will be `path`."""
    name = f".{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return (_writer_folder(path) or path.parent) / name


def aside_dir(path: Path, what: str = "writing") -> Path:
    """Where a folder is prepared that will be `path`, or what is to go from there: the same name on all ranks."""
    folder = _writer_folder(path)
    return (
        path.with_name(f".{what}-{path.name}") if folder is None else folder / f"{what}-{path.parent.name}-{path.name}"
    )


def earlier_folders(path: Path) -> list[Path]:
    """Those of earlier holders, which this one took away when it took over what `path` belongs to."""
    folder = _writer_folder(path)
    return [] if folder is None else list(folder.glob("earlier*"))


def _writer_folder(path: Path) -> Path | None:
    """Of the innermost fence around a path."""
    if not _writer_folders:
        return None
    path = path.absolute()
    return next((_writer_folders[root] for root in (path, *path.parents) if root in _writer_folders), None)
