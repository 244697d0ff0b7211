"""Files that are never seen half-written, and locks that die with their process.

What a process writes into a run that it holds passes through the run's fence (`harness.run.fence`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from aimscale.aim.errors import UserError
from aimscale.harness.run.fence import keeping_fence, writer_folder

T = TypeVar("T")


def cache_folder() -> Path:
    """Where what was found once on this machine is remembered: `$AIMSCALE_CACHE`, by default `~/.cache/aimscale`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("AIMSCALE_CACHE") or os.path.join(base, "aimscale"))


@contextlib.contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path to write to in place of `path`, which it replaces at the block's end; after an error nothing is left.

    A reader sees the old file or the new one, never a part. `durable` makes it last through a crash of the machine.
    """
    _make_parent(path)
    partial = _partial_file(path)
    try:
        with keeping_fence(path):
            yield partial
            if durable:
                _fsync(partial)
            # Opened before: whoever waits for this file may rename the folder that it completes.
            with _opened(path.parent) as folder:
                partial.replace(path)
                if durable:
                    os.fsync(folder)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk names no file
        raise


def _make_parent(path: Path) -> None:
    """Make the folders above a file, but never a writer's own folder anew: it would undo the fence."""
    folder = writer_folder(path)
    if folder is None or folder not in path.absolute().parents:
        path.parent.mkdir(parents=True, exist_ok=True)


def _partial_file(path: Path) -> Path:
    """Where this thread prepares a file that will be `path`."""
    name = f".{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return (writer_folder(path) or path.parent) / name


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file's text in one step."""
    with atomic_write(path, durable=durable) as partial:
        partial.write_text(text)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace a JSON file in one step.

    Raises:
        ValueError: there is a NaN or an infinity in it.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", durable=durable)


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see to its folder and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or move it away") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (a JSON {type(value).__name__}, no object); restore it, or move it away")
    return value


def read_as(path: Path, kind: TypeAdapter[T]) -> T | None:
    """A JSON object as what it should hold; None where there is no file."""
    value = read_object(path)
    try:
        return None if value is None else kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged ({field}: {first['msg']}); restore it, or move it away") from error


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `path` (not there before) at the block's end; after an error nothing is left.

    What an earlier attempt left goes.
    """
    partial = new_partial_dir(path)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_dir(path: Path, what: str = "writing") -> Path:
    """Where a folder is prepared that will be `path`, or what is to go from there: the same name on all ranks."""
    folder = writer_folder(path)
    if folder is None:
        return path.with_name(f".{what}-{path.name}")
    return folder / f"{what}-{path.parent.name}-{path.name}"


def new_partial_dir(path: Path) -> Path:
    """An empty folder to fill, for `publish_dir`; what an earlier attempt left of it goes."""
    partial = partial_dir(path)
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with keeping_fence(path):
        partial.mkdir()
    return partial


def publish_dir(partial: Path, final: Path) -> None:
    """Make a folder that was written aside visible under its final name, durably and in one step."""
    if final.exists():
        remove_dir(final)
    with keeping_fence(final):
        partial.rename(final)
    _fsync(final.parent)


def remove_dir(path: Path) -> None:
    """Remove a folder that readers may look at: whole, in one step. A missing one is no error."""
    doomed = partial_dir(path, "removing")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        with keeping_fence(path):
            path.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _fsync(path: Path) -> None:
    """Make a file durable, or the renames inside a folder."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an flock on a file for the block; the kernel drops it when the process dies, and the file goes at its end.

    Yields False where another process has it and `wait` is false.

    Raises:
        OSError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                yield False
                return
            raise
        if _is_file(path, descriptor):
            break
        os.close(descriptor)  # whoever held it before has removed the file
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open, too
        os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one under this name."""
    try:
        found = os.fstat(descriptor)
        return found.st_nlink > 0 and os.path.samestat(found, path.stat())
    except OSError:
        return False
