"""Byte ranges of shards: from local files, from anything that fsspec opens, and through a bounded local cache."""

from __future__ import annotations

import asyncio
import functools
import io
import itertools
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import fsspec
import fsspec.asyn

from aimscale.harness.data import DataError
from aimscale.harness.data.store.card import open_local

T = TypeVar("T")
_MAX_OPEN_FILES = 256  # of a process: `ulimit -n` is often 1024
_NUM_TRIES = 6  # of a remote read: some 6 s of pauses in all
_MAX_REQUESTS = 64  # under way at once, per process
_STALLED_S = 60.0  # without an answer a read has stalled and is tried again
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of this package, by protocol
_CHUNK_BYTES = 4 * 2**20  # of a download
_FIRST_PAUSE_S = 0.2  # before the second try; doubles


class ShardInfo(NamedTuple):
    """One tar file."""

    name: str
    """File name, relative to the folder or URL of the shards."""
    size: int
    """Bytes."""


Place = tuple[str, int, int]
"""A byte range of a shard: its name, the offset of the first byte and their number."""


def is_url(path: str) -> bool:
    """Whether fsspec, and not the local file system, opens this path."""
    return re.match(r"^[a-z][a-z0-9+.-]+://", path) is not None


def join(folder: str, name: str) -> str:
    """Path or URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def read_bytes(url: str) -> bytes:
    """All bytes of a URL; OSError when it cannot be read."""

    def read() -> bytes:
        filesystem, inner = filesystem_of(url)
        data: bytes = filesystem.cat_file(inner)
        return data

    return with_retries(read)


def open_file(path: str) -> IO[bytes]:
    """Open a local file or a URL for reading from front to back; raises as `card.open_local` does."""
    if not is_url(path):
        return open_local(path)
    filesystem, inner = filesystem_of(path)
    try:
        opened: IO[bytes] = filesystem.open(inner, "rb")
    except OSError:
        raise
    except Exception as error:  # each file system raises its own
        raise OSError(f"{type(error).__name__} {error}".strip()) from error
    return opened


def download(url: str, to: Path, size: int | None = None) -> None:
    """Copy a remote file, again where that failed, in bounded memory.

    Raises:
        OSError: it cannot be read, or has not `size` bytes.
    """

    def fetch() -> None:
        to.touch()
        with open_file(url) as source, to.open("r+b") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
            length = target.tell()
            target.truncate()
        if size not in (None, length):
            raise OSError(f"{url} has {length} bytes, the index says {size}")

    with_retries(fetch)


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, one per process, and the path within it.

    Raises:
        DataError: nothing installed knows the protocol, or it cannot use the URL.
    """
    protocol, options = url.partition("://")[0], {}
    if protocol in ("s3", "s3a"):  # botocore opens ten connections, behind which other reads of a batch would wait
        chosen = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": _MAX_REQUESTS, **chosen}
    try:
        filesystem, inner = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'aimscale[{extra}]'" if extra else f"install the package that fsspec names: {error}"
        raise DataError(f"{url} needs a package that is not installed; {how}") from error
    except Exception as error:  # whatever the protocol's own class raises of a URL that it cannot use
        raise DataError(f"{url} cannot be opened ({error}); give a folder or a URL that fsspec knows") from error
    return filesystem, inner


def with_retries(action: Callable[[], T]) -> T:
    """Try a remote action six times with growing pauses; a missing file is final at once.

    Raises:
        OSError: the last failure, whatever type the file system gave it.
    """
    for attempt in range(_NUM_TRIES):
        try:
            return action()
        except (FileNotFoundError, DataError):
            raise
        except Exception as error:  # each file system raises its own, botocore's among them
            if attempt == _NUM_TRIES - 1:
                raise OSError(f"{type(error).__name__} {error}".strip()) from error
            _pause(attempt)
    raise AssertionError("unreachable")


@functools.lru_cache(_MAX_OPEN_FILES)
def _opened(reader: int, path: Path) -> io.FileIO:
    """A file of a reader; closed when it was not read for long and nobody reads it."""
    return open(path, "rb", buffering=0)


class LocalReader:
    """Positioned reads, by any number of threads, on a bounded number of files that the process keeps open."""

    _numbers = itertools.count()

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, next(self._numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalReader, (self._folder,)

    def read_many(self, places: Sequence[Place]) -> list[bytes]:
        """The bytes at each place, in order; fewer where the file ends before.

        Raises:
            OSError: a file is missing or cannot be read; its attribute `shard` names which.
        """
        return [self._read(*place) for place in places]

    def _read(self, name: str, offset: int, size: int) -> bytes:
        try:
            file = _opened(self._number, self._folder / name)  # held while it is read: it closes with its last holder
            return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise _of_shard(error, name) from error


class RemoteReader:
    """Range requests, those of a batch at once; what fails or stalls is asked for again, alone."""

    def __init__(self, location: str) -> None:
        self._location = location

    def read_many(self, places: Sequence[Place]) -> list[bytes]:
        """As `LocalReader.read_many`."""
        found: list[bytes | Exception] = [OSError("not asked for yet")] * len(places)
        for attempt in range(_NUM_TRIES):
            pending = [number for number, data in enumerate(found) if isinstance(data, Exception)]
            for number, data in zip(pending, self._fetch([places[number] for number in pending]), strict=True):
                found[number] = data
            if not (failed := [number for number in pending if isinstance(found[number], Exception)]):
                return [data for data in found if isinstance(data, bytes)]
            for number in failed:
                error = found[number]
                if isinstance(error, _FINAL_ERRORS) or attempt == _NUM_TRIES - 1:
                    assert isinstance(error, Exception)
                    raise _of_shard(error, places[number][0]) from error
            _pause(attempt)
        raise AssertionError("unreachable")

    def _fetch(self, places: Sequence[Place]) -> list[bytes | Exception]:
        """One try of each."""
        # looked up every time: fsspec keeps one file system per process, so that each worker has its own
        filesystem, _ = filesystem_of(self._location)
        paths = [filesystem._strip_protocol(join(self._location, name)) for name, _, _ in places]
        starts, ends = [start for _, start, _ in places], [start + size for _, start, size in places]
        if isinstance(filesystem, fsspec.asyn.AsyncFileSystem):
            found = fsspec.asyn.sync(filesystem.loop, _fetch_together, filesystem, paths, starts, ends)
        else:
            found = filesystem.cat_ranges(paths, starts, ends, on_error="return")
        return [
            IgnoredRangeError(_IGNORED_RANGE) if isinstance(data, bytes) and len(data) > size else data
            for data, (_, _, size) in zip(found, places, strict=True)
        ]


class IgnoredRangeError(OSError):
    """A server that answers a request for a part with the whole file."""


_IGNORED_RANGE = "the server ignores byte ranges; set cache_dir and a cache_gb that holds the whole data set"
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IgnoredRangeError)  # trying again cannot help


async def _fetch_together(
    filesystem: Any, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int]
) -> list[bytes | Exception]:
    """All ranges at once, up to a bound, each with a time limit of its own."""
    room = asyncio.Semaphore(_MAX_REQUESTS)

    async def fetch(path: str, start: int, end: int) -> bytes:
        async with room:
            try:
                data: bytes = await asyncio.wait_for(filesystem._cat_file(path, start=start, end=end), _STALLED_S)
            except TimeoutError as error:
                raise TimeoutError(f"stalled: {end - start} bytes did not come within {_STALLED_S:g} s") from error
            return data

    ranges = zip(paths, starts, ends, strict=True)
    found = await asyncio.gather(*(fetch(*each) for each in ranges), return_exceptions=True)
    for data in found:
        if isinstance(data, BaseException) and not isinstance(data, Exception):
            raise data
    return [data for data in found if isinstance(data, bytes | Exception)]


def _of_shard(error: Exception, name: str) -> OSError:
    """The same failure as an OSError that knows its shard."""
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    text = str(error) if isinstance(error, OSError) else f"{type(error).__name__} {error}".strip()
    told = kind(text)
    told.shard = name  # type: ignore[attr-defined]
    return told


def _pause(attempt: int) -> None:
    """Wait before the next try: twice as long each time, and not in step with other processes."""
    time.sleep(_FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
