"""Byte ranges of shards, from local files or from anything that fsspec opens."""

from __future__ import annotations

import collections
import os
import re
from pathlib import Path
from typing import Any, Protocol

import fsspec

_MAX_OPEN_FILES = 128


class ShardReader(Protocol):
    """Reads byte ranges of the shards of one data set."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of shard `name` from `offset` on; fewer when the file ends before."""


def is_url(path: str) -> bool:
    """Whether fsspec, and not the local file system, opens this path."""
    return re.match(r"^[a-z][a-z0-9+.-]+://", path) is not None


def join(folder: str, name: str) -> str:
    """Path or URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def read_bytes(path: str) -> bytes:
    """All bytes of a local file or URL."""
    if not is_url(path):
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        data: bytes = file.read()
    return data


def open_reader(location: str, *, cache_dir: str | None, cache_gb: float) -> ShardReader:
    """The reader that suits a folder or URL of shards."""
    return RemoteReader(location) if is_url(location) else LocalReader(Path(location))


class LocalReader:
    """Positioned reads on a bounded number of open files; a forked or unpickled copy opens its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_folder"])  # type: ignore[misc]  # a fresh object with no open file

    def __del__(self) -> None:
        if self._pid == os.getpid():
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
    """One range request per image."""

    def __init__(self, location: str) -> None:
        self._location = location

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `ShardReader.read`."""
        filesystem, path = fsspec.core.url_to_fs(join(self._location, name))
        data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
        return data
