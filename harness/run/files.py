"""Atomic writes of files and folders.

Those into a run that this process holds are prepared in its writer's folder (`harness.run.lock`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from aimscale.aim.errors import UserError
from aimscale.harness.run.lock import PASSING_ERRORS, check_writer, writer_folder

T = TypeVar("T")
CHECKSUM = "checksum"
"""Key of a JSON object that holds the CRC-32 of the others."""
MAX_BYTES = 10**9
"""Limit on the bytes of a file that is read into memory."""


def cache_folder() -> Path:
    """Return the folder of what is remembered on this machine: `$AIMSCALE_CACHE`, by default `~/.cache/aimscale`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("AIMSCALE_CACHE") or os.path.join(base, "aimscale"))


@contextlib.contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` at the end of the block; after an error nothing is left.

    Readers see the old file or the new one, never a part. With `durable`, the file survives a crash of the machine.
    """
    check_writer(path)
    writer = writer_folder(path)
    partial = (writer or path.parent) / f".{path.name}.{uuid.uuid4().hex}"
    if writer is None or writer not in path.absolute().parents:  # the writer's own folder must not come back
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if durable:
            flush(partial)
        # Open it first: a process that waits for this file may then rename the folder.
        with _opened(path.parent) as folder:
            partial.replace(path)
            if durable:
                os.fsync(folder)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            check_writer(path)
            if error.errno and error.filename is None:
                error.filename = str(path)  # a full disk names no file
        raise


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a text file atomically."""
    with atomic_write(path, durable=durable) as partial:
        partial.write_text(text)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", durable=durable)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line, visible to readers at once; a line cut off by a kill stays a line of its own.

    Raises:
        LockLost: another process took the run over.
        ValueError: there is a NaN or an infinity in it.
    """
    check_writer(path)
    with path.open("a+b") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        begins_anew = size == 0 or file.read(1) == b"\n"
        file.write((("" if begins_anew else "\n") + json.dumps(line, allow_nan=False) + "\n").encode())


def read_file(path: Path) -> bytes:
    """Read a file; UserError if it is a pipe, a socket or a device, which may never end, or too large."""
    try:
        with _opened(path, os.O_RDONLY | os.O_NONBLOCK) as descriptor:  # a file server is asked once
            if stat.S_ISREG((status := os.fstat(descriptor)).st_mode) or stat.S_ISDIR(status.st_mode):
                if status.st_size > MAX_BYTES:
                    raise UserError(f"{path} has more than {MAX_BYTES:.0e} bytes; give a smaller file in its place")
                return b"".join(iter(lambda: os.read(descriptor, max(1, status.st_size)), b""))
    except OSError as error:
        if error.errno != errno.ENXIO:  # that of a socket
            raise
    raise UserError(f"{path} is a pipe, a socket or a device; give a file in its place")


def may_pass(error: BaseException) -> bool:
    """Return whether an error, or its cause, is one that a file server gives for a while: another look may succeed."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    return isinstance(cause, OSError) and cause.errno in PASSING_ERRORS


def check_file(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Raise UserError for what is there, but is a pipe, a socket, a device, or a file with more bytes."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe, a socket or a device; give a file in its place")
    if path.is_file() and path.stat().st_size > max_bytes:
        raise UserError(f"{path} has more than {max_bytes:.0e} bytes; give a smaller file in its place")


def file_crc32(path: Path) -> int:
    """Compute the CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """Give a JSON object the checksum of its other keys, by which readers find a bit that was flipped."""
    rest = {key: each for key, each in value.items() if key != CHECKSUM}
    return rest | {CHECKSUM: zlib.crc32(json.dumps(rest, sort_keys=True).encode())}


def is_intact(value: dict[str, Any]) -> bool:
    """Test a JSON object against its checksum; one without, as earlier releases wrote them, counts as intact."""
    return CHECKSUM not in value or sealed(value)[CHECKSUM] == value[CHECKSUM]


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no file.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(read_file(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); see to its folder and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or move it away") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (a JSON {type(value).__name__}, no object); restore it, or move it away")
    if not is_intact(value):
        raise UserError(f"{path} is damaged (its checksum is another); restore it, or move it away")
    return value


def read_as(path: Path, kind: TypeAdapter[T]) -> T | None:
    """Read a JSON object and validate it as `kind`; None if there is no file."""
    value = read_object(path)
    try:
        return None if value is None else kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is damaged ({field}: {first['msg']}); restore it, or move it away") from error


@contextlib.contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `path`, which must not exist, at the end; after an error nothing is left.

    Leftovers of an earlier attempt are removed.
    """
    partial = new_partial_dir(path)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_dir(path: Path, what: str = "writing") -> Path:
    """Return where a folder is prepared that will be `path`, or moved to be removed: the same name on all ranks."""
    folder = writer_folder(path)
    if folder is None:
        return path.with_name(f".{what}-{path.name}")
    return folder / f"{what}-{path.parent.name}-{path.name}"


def new_partial_dir(path: Path) -> Path:
    """Make an empty folder to fill, for `publish_dir`; leftovers of an earlier attempt are removed."""
    partial = partial_dir(path)
    check_writer(path)
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    return partial


def publish_dir(partial: Path, final: Path) -> None:
    """Rename a finished partial folder to its final name, durably and atomically."""
    if final.exists():
        remove_dir(final)
    check_writer(final)
    partial.rename(final)
    flush(final.parent)


def remove_dir(path: Path) -> None:
    """Remove a folder that others may be reading: atomically. A missing one is no error."""
    doomed = partial_dir(path, "removing")
    check_writer(path)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or the renames inside a folder, to disk."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Yield a descriptor of a file or folder."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
