"""Byte ranges of shards: from local files, from anything that fsspec opens, and through a bounded local cache."""

from __future__ import annotations

import asyncio
import collections
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import aiohttp
import fsspec

from aimscale.harness.data.errors import DataError

T = TypeVar("T")
REMOTE_ERRORS = (OSError, aiohttp.ClientError, asyncio.TimeoutError)
"""What fsspec's file systems raise when the network or the server fails."""
_MAX_OPEN_FILES = 128
_NUM_TRIES = 4  # of a remote read
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # of this package, by protocol
_FIRST_PAUSE_S = 0.2  # before the second try; doubles


class ShardReader(Protocol):
    """Reads byte ranges of the shards of one data set."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of shard `name` from `offset` on; fewer when the file ends before.

        Raises:
            OSError: the file is missing or cannot be read.
        """


def is_url(path: str) -> bool:
    """Whether fsspec, and not the local file system, opens this path."""
    return re.match(r"^[a-z][a-z0-9+.-]+://", path) is not None


def join(folder: str, name: str) -> str:
    """Path or URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def read_bytes(path: str) -> bytes:
    """All bytes of a local file or URL; OSError when it cannot be read."""
    if not is_url(path):
        return Path(path).read_bytes()

    def read() -> bytes:
        filesystem, inner = filesystem_of(path)
        data: bytes = filesystem.cat_file(inner)
        return data

    return with_retries(read)


def open_remote(url: str) -> IO[bytes]:
    """Open a URL for reading from front to back."""
    filesystem, inner = filesystem_of(url)
    opened: IO[bytes] = filesystem.open(inner, "rb")
    return opened


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, one per process, and the path within it.

    Raises:
        DataError: nothing installed knows the protocol.
    """
    try:
        filesystem, inner = fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'aimscale[{extra}]'" if extra else f"install the package that fsspec names: {error}"
        raise DataError(f"{url} needs a package that is not installed; {how}") from error
    except ValueError as error:
        raise DataError(f"{url} cannot be opened ({error}); give a folder or a URL that fsspec knows") from error
    return filesystem, inner


def with_retries(action: Callable[[], T]) -> T:
    """Try a remote action four times with growing pauses; a missing file is final at once.

    Raises:
        OSError: the last failure, whatever type the file system gave it.
    """
    for attempt in range(_NUM_TRIES):
        try:
            return action()
        except FileNotFoundError:
            raise
        except REMOTE_ERRORS as error:
            if attempt == _NUM_TRIES - 1:
                raise OSError(f"{type(error).__name__} {error}".strip()) from error
            time.sleep(_FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


class LocalReader:
    """Positioned reads on a bounded number of open files; an unpickled copy opens its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: collections.OrderedDict[str, int] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_files": collections.OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `ShardReader.read`."""
        descriptor = self._files.get(name)
        if descriptor is None:
            descriptor = self._files[name] = os.open(self._folder / name, os.O_RDONLY)
            if len(self._files) > _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(name)
        return os.pread(descriptor, size, offset)


class RemoteReader:
    """One range request per read."""

    def __init__(self, location: str) -> None:
        self._location = location

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `ShardReader.read`."""

        def fetch() -> bytes:
            # looked up every time: fsspec keeps one file system per process, so that a forked worker gets its own
            filesystem, path = filesystem_of(join(self._location, name))
            data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
            return data

        data = with_retries(fetch)
        if len(data) > size:
            raise OSError("the server ignores byte ranges; set cache_dir and a cache_gb that holds the whole data set")
        return data
