"""A bounded folder of whole shards, shared by the processes of a machine and by data sets.

Shards are downloaded once, aside, and renamed. When the next one would pass the bound, shards of other data sets make
room, the longest unused first; a data set never evicts its own, because a shuffled stream comes back to every shard
all the time and would download each again for every image. What does not fit is read by byte ranges.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import fsspec

from aimscale.harness.data.store.shards import LocalReader, RemoteReader, join, with_retries
from aimscale.harness.run.files import locked

_CHUNK_BYTES = 4 * 2**20
_RETRY_S = 60.0  # a shard that had no room, or is being fetched elsewhere, is asked for again after this


class CachedReader:
    """Reads shards of one data set through `cache_dir`, which never holds more than `max_bytes`."""

    def __init__(self, location: str, sizes: Mapping[str, int], cache_dir: Path, max_bytes: int) -> None:
        self._location, self._sizes, self._cache_dir, self._max_bytes = location, dict(sizes), cache_dir, max_bytes
        self._folder = cache_dir / hashlib.blake2b(location.encode(), digest_size=8).hexdigest()
        self._local, self._remote = LocalReader(self._folder), RemoteReader(location)
        self._present: set[str] = set()
        self._not_before: dict[str, float] = {}

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `ShardReader.read`."""
        if name in self._present or self._obtain(name):
            try:
                return self._local.read(_file_name(name), offset, size)
            except FileNotFoundError:  # another data set's process made room
                self._present.discard(name)
        return self._remote.read(name, offset, size)

    def _obtain(self, name: str) -> bool:
        """Whether the shard is in the cache, after trying to put it there."""
        target = self._folder / _file_name(name)
        if target.exists():
            os.utime(target)
            self._present.add(name)
            return True
        now = time.monotonic()
        if now < self._not_before.get(name, 0.0):
            return False
        self._not_before[name] = now + _RETRY_S
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f"{_file_name(name)}.partial"
        with locked(aside, wait=False) as mine:
            if not mine:  # another process is fetching it
                return False
            try:
                if not target.exists():
                    if not self._reserve(aside, self._sizes[name]):
                        return False
                    self._download(name, aside)
                    aside.rename(target)
            finally:
                aside.unlink(missing_ok=True)
        self._present.add(name)
        return True

    def _reserve(self, aside: Path, size: int) -> bool:
        """Make room for a shard and claim it by the length of its file; False when it cannot fit."""
        with locked(self._cache_dir / ".lock"):
            files = [(path, path.stat()) for path in self._cache_dir.glob("*/*") if path != aside]
            excess = sum(stat.st_size for _, stat in files) + size - self._max_bytes
            foreign = [
                (path, stat) for path, stat in files if path.parent != self._folder and path.suffix != ".partial"
            ]
            if excess > sum(stat.st_size for _, stat in foreign):
                return False
            for path, stat in sorted(foreign, key=lambda entry: entry[1].st_mtime):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= stat.st_size
            os.truncate(aside, size)
        return True

    def _download(self, name: str, aside: Path) -> None:
        def fetch() -> None:
            filesystem, path = fsspec.core.url_to_fs(join(self._location, name))
            length = 0
            with filesystem.open(path, "rb") as source, aside.open("r+b") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    length += len(chunk)
            if length != self._sizes[name]:
                raise OSError(f"{join(self._location, name)} has {length} bytes, the index says {self._sizes[name]}")

        with_retries(fetch)


def _file_name(name: str) -> str:
    return name.replace("/", "%")
