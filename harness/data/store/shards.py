"""Byte ranges of shards: from local files, from anything that fsspec opens, and through a bounded local cache."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import fsspec

from aimscale.harness.data import DataError
from aimscale.harness.data.store.dataset_info import open_local

T = TypeVar("T")
_MAX_OPEN_FILES = 256  # per process: `ulimit -n` is often 1024
NUM_TRIES = 6  # of a remote read: pauses of about 6 s in all
MAX_REQUESTS = 64  # concurrent requests per data set and process
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # optional dependencies of this package, by protocol
_CHUNK_BYTES = 4 * 2**20  # of a download
FIRST_PAUSE_S = 0.2  # before the second try; doubles


class ShardInfo(NamedTuple):
    """Name and size of a tar file."""

    name: str
    """File name, relative to the folder or URL of the shards."""
    size: int
    """Bytes."""


ByteRange = tuple[str, int, int]
"""Byte range of a shard: its name, the offset of the first byte and their number."""


def is_url(path: str) -> bool:
    """Return whether fsspec, and not the local file system, opens this path."""
    return re.match(r"^[a-z][a-z0-9+.-]+://", path) is not None


def join(folder: str, name: str) -> str:
    """Join the path or URL of a folder and a file's name."""
    return f"{folder.rstrip('/')}/{name}"


def read_bytes(url: str) -> bytes:
    """Read all bytes of a URL; OSError if it cannot be read."""

    def read() -> bytes:
        filesystem, inner = filesystem_of(url)
        data: bytes = filesystem.cat_file(inner)
        return data

    return with_retries(read)


def open_file(path: str) -> IO[bytes]:
    """Open a local file or a URL for sequential reading; raises as `dataset_info.open_local` does."""
    if not is_url(path):
        return open_local(path)
    filesystem, inner = filesystem_of(path)
    try:
        opened: IO[bytes] = filesystem.open(inner, "rb")
    except OSError:
        raise
    except Exception as error:  # each file system raises types of its own
        raise OSError(f"{type(error).__name__} {error}".strip()) from error
    return opened


def download(url: str, to: Path) -> None:
    """Copy a remote file, with retries and in bounded memory; OSError if it cannot be read."""

    def fetch() -> None:
        with open_file(url) as source, to.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)

    with_retries(fetch)


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, one per process, and the path within it."""
    protocol, options = url.partition("://")[0], {}
    if protocol in ("s3", "s3a"):  # botocore's default of ten connections would make a batch's other reads wait
        chosen = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": MAX_REQUESTS, **chosen}
    try:
        filesystem, inner = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'aimscale[{extra}]'" if extra else f"install the package that fsspec names: {error}"
        raise DataError(f"{url} needs a package that is not installed; {how}") from error
    except Exception as error:  # each protocol's class raises types of its own for unusable URLs
        raise DataError(f"{url} cannot be opened ({error}); give a folder or a URL that fsspec knows") from error
    return filesystem, inner


def with_retries(action: Callable[[], T]) -> T:
    """Try a remote action up to six times with growing pauses; a missing file is final at once.

    Raises:
        OSError: the last failure, whatever type the file system gave it.
    """
    for attempt in range(NUM_TRIES):
        try:
            return action()
        except (FileNotFoundError, DataError):
            raise
        except Exception as error:  # each file system raises types of its own, such as botocore's
            if attempt == NUM_TRIES - 1:
                raise OSError(f"{type(error).__name__} {error}".strip()) from error
            time.sleep(retry_delay_s(attempt))
    raise AssertionError("unreachable")


@functools.lru_cache(_MAX_OPEN_FILES)
def _opened(reader: int, path: str) -> io.FileIO:
    """Open a reader's file; it is closed once it is long unused and nobody reads it."""
    return open(path, "rb", buffering=0)


class LocalReader:
    """Reader of byte ranges for any number of threads, with a bounded number of open files per process."""

    _numbers = itertools.count()

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, next(self._numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalReader, (self._folder,)

    def read_many(self, byte_ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read byte ranges, in order; fewer bytes if the file ends before.

        Raises:
            OSError: a file is missing or cannot be read; its attribute `shard` names which.
        """
        return [self._read(*byte_range) for byte_range in byte_ranges]

    def read_ahead(self, byte_ranges: Sequence[ByteRange], shards: Collection[str] = ()) -> None:
        """Have the kernel read byte ranges ahead, from a disk or over a network file system; returns at once."""
        for name, offset, size in byte_ranges:
            with contextlib.suppress(OSError):  # raised when the bytes are read
                os.posix_fadvise(self._open(name).fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def _read(self, name: str, offset: int, size: int) -> bytes:
        try:
            file = self._open(name)  # keeps the file open while it is read
            return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise shard_error(error, name) from error

    def _open(self, name: str) -> io.FileIO:
        return _opened(self._number, f"{self._folder}/{name}")  # text: making a Path takes as long as the read


def shard_error(error: Exception, name: str) -> OSError:
    """Turn a failure into an OSError that knows its shard."""
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    text = str(error) if isinstance(error, OSError) else f"{type(error).__name__} {error}".strip()
    wrapped = kind(text)
    wrapped.shard = name  # type: ignore[attr-defined]
    return wrapped


def retry_delay_s(attempt: int) -> float:
    """Return the seconds until the next try: doubled each time, with jitter."""
    return FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5)
