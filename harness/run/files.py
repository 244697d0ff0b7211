"""Files that are never seen half-written, locks that die with their process, and the name of a process for good."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def written_aside(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write to in place of `path`, which it replaces at the block's end; after an error nothing is left.

    A reader sees the old file or the new one, never a part. `durable` makes it last through a crash of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield aside
        if durable:
            _fsync(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        fsync_dir(path.parent)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file's text in one step."""
    with written_aside(path, durable=durable) as aside:
        aside.write_text(text)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace a JSON file in one step.

    Raises:
        ValueError: there is a NaN or an infinity in it.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", durable=durable)


def publish_dir(aside: Path, final: Path) -> None:
    """Make a folder that was written aside visible under its final name, durably and in one step."""
    if final.exists():
        doomed = final.with_name(f".old-{final.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        final.rename(doomed)
        aside.rename(final)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        aside.rename(final)
    fsync_dir(final.parent)


def fsync_dir(path: Path) -> None:
    """Make renames inside a folder durable."""
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an flock on a file, made if it is not there, for the block; the kernel drops it when the process dies.

    Yields False where another process has it and `wait` is false.

    Raises:
        OSError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not wait and not try_lock(file):
            yield False
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield True
        finally:
            # Closing is not enough: a process forked within the block has the same open file.
            fcntl.flock(file, fcntl.LOCK_UN)


def try_lock(file: IO[Any]) -> bool:
    """Take an flock on an open file if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def process_started(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot (field 22 of /proc/PID/stat); None for none or a zombie.

    Together with the pid it names a process for good: pids are used again.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]
