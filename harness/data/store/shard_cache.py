"""Readers of a data set's files in its folder, at its URL, or in a cache of this machine.

The cache of shards is a folder of bounded size, `aimscale-shards` within the one that the user names, shared by the
processes of a machine and by data sets. Whole shards are fetched once, in the background, under a temporary name, and
renamed; until then, and without room, byte ranges are read. A file's modification time says when a process used it
last.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from aimscale.harness.data import DataError
from aimscale.harness.data.store.columns import Index
from aimscale.harness.data.store.dataset_info import DatasetInfo
from aimscale.harness.data.store.remote import RemoteReader
from aimscale.harness.data.store.shards import ByteRange, LocalReader, ShardInfo, download, is_url, join
from aimscale.harness.run.files import atomic_write, cache_folder
from aimscale.harness.run.lock import locked

CACHE_FOLDER = "aimscale-shards"
"""Name of the cache within the folder that a user names."""

_CHECKED_AT_OPEN = 2000  # shards whose presence and size are checked when a data set is opened
_MAPPED_FILES = ("samples.npy", "checksum.npy", "label.npy", "shards.npy", "bad.npy", "bad_before.npy")
_PARTIAL = ".partial"
_IN_USE_S = 30.0  # after its last use a shard may be evicted
_RETRY_S = 15.0  # until a shard without room, or fetched elsewhere, is requested again
_PART_BYTES, _PARTS_AT_ONCE = 4 * 2**20, 4  # parts in which a shard is fetched


class CachedReader:
    """Reader of one data set's shards from a cache in `cache_dir`; what is not there is read by byte ranges.

    Whole shards are fetched in the background if `read_ahead` names them and the cache can stay within `max_bytes`:
    shards that nobody has used for half a minute are evicted, the longest unused first.
    """

    def __init__(self, location: str, sizes: Mapping[str, int], cache_dir: Path, max_bytes: int) -> None:
        self._made_of = location, sizes, cache_dir, max_bytes
        self._location, self._sizes, self._max_bytes = location, sizes, max_bytes
        self._root = open_cache(cache_dir)
        self._folder = self._root / hashlib.blake2b(location.encode(), digest_size=8).hexdigest()
        self._remote, self._copied = RemoteReader(location), RemoteReader(location)
        self._used_at: dict[str, float] = {}
        self._tried_at: dict[str, float] = {}
        self._wanted: collections.deque[str] = collections.deque()
        self._fetching: threading.Thread | None = None
        self._starting = threading.Lock()
        self._paused_until, self._has_warned = 0.0, False

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedReader, self._made_of

    def read_ahead(self, byte_ranges: Sequence[ByteRange], shards: Collection[str] = ()) -> None:
        """Request byte ranges ahead, see `RemoteReader.read_ahead`, and fetch whole `shards`, in this order."""
        self._remote.read_ahead([byte_range for byte_range in byte_ranges if not self._path(byte_range[0]).exists()])
        now = time.monotonic()
        for name in shards:
            if self._path(name).exists():
                self._use(name)
            elif now > max(self._paused_until, self._tried_at.get(name, -_RETRY_S) + _RETRY_S):
                self._tried_at[name] = now
                self._wanted.append(name)
        with self._starting:  # only one thread fetches
            if self._wanted and (self._fetching is None or not self._fetching.is_alive()):
                self._fetching = threading.Thread(target=self._fetch_wanted, name="shards", daemon=True)
                self._fetching.start()

    def read_many(self, byte_ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read byte ranges, see `LocalReader.read_many`."""
        found = [None if self._remote.is_ahead(byte_range) else self._read(*byte_range) for byte_range in byte_ranges]
        missing = [byte_range for byte_range, data in zip(byte_ranges, found, strict=True) if data is None]
        others = iter(self._remote.read_many(missing) if missing else ())
        return [next(others) if data is None else data for data in found]

    def _read(self, name: str, offset: int, size: int) -> bytes | None:
        """Read a byte range from the cache; None if it lacks the shard."""
        try:  # a file kept open would occupy the disk after its eviction
            with self._path(name).open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError:  # evicted, or on a broken disk: read the source
            return None
        self._use(name)
        return data

    def _use(self, name: str) -> None:
        """Mark a shard as in use, for all processes of the machine."""
        now = time.monotonic()
        if now - self._used_at.get(name, -_IN_USE_S) > _IN_USE_S / 4:
            self._used_at[name] = now
            with contextlib.suppress(OSError):
                os.utime(self._path(name))

    def _path(self, name: str) -> Path:
        return self._folder / name.replace("/", "%")

    def _fetch_wanted(self) -> None:
        while self._wanted:
            try:
                has_room, problem = self._fetch(self._wanted.popleft()), ""
            except OSError as error:
                has_room, problem = False, str(error)
            if not has_room:
                self._paused_until = time.monotonic() + _RETRY_S
                self._wanted.clear()
            if problem and not self._has_warned:
                self._has_warned = True
                print(
                    f"the cache {self._root} cannot be used ({problem}); shards are read by byte ranges",
                    file=sys.stderr,
                )

    def _fetch(self, name: str) -> bool:
        """Fetch a shard into the cache, unless it is there or another process fetches it; False if there is no room.

        Raises:
            OSError: it cannot be fetched or written.
        """
        target, size = self._path(name), self._sizes[name]
        partial = target.with_name(f"{target.name}{_PARTIAL}")
        with locked(partial):
            if target.exists():
                return True
            try:
                if not self._make_room(partial, size):
                    return False
                parts = [(name, first, min(_PART_BYTES, size - first)) for first in range(0, size, _PART_BYTES)]
                with partial.open("r+b") as file:
                    for at in range(0, len(parts), _PARTS_AT_ONCE):
                        file.writelines(self._copied.read_many(parts[at : at + _PARTS_AT_ONCE]))
                    if file.tell() != size:
                        raise OSError(f"{join(self._location, name)} has fewer bytes than the index says, {size}")
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)
        return True

    def _make_room(self, partial: Path, size: int) -> bool:
        """Reserve room for a shard by the length of its file, evicting unused ones; False if it cannot fit."""
        with locked(self._root / ".lock"):
            files = []
            for path in self._root.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):  # a download that has just ended
                    if path != partial and path.is_file():
                        files.append((path.stat().st_mtime, path.stat().st_size, path))
            excess, evicted = sum(length for _, length, _ in files) + size - self._max_bytes, []
            for used_at, length, path in sorted(files):
                if excess > 0 and used_at < time.time() - _IN_USE_S:
                    excess -= length
                    evicted.append(path)
            if excess > 0:
                return False
            for path in evicted:
                path.unlink(missing_ok=True)
            os.truncate(partial, size)
        return True


Reader = LocalReader | RemoteReader | CachedReader
"""Reader of byte ranges of one data set's shards."""


def open_index(where: str, info: DatasetInfo, cache_dir: str | None) -> Index:
    """Open the mapped columns; those of a URL are fetched once per machine, without `cache_dir` into the user's own
    cache.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged.
    """
    if not is_url(where):
        return Index(Path(where) / info.index_folder, info)
    root = cache_folder() / "indexes" if cache_dir is None else open_cache(Path(cache_dir))
    folder = root / hashlib.blake2b(where.encode(), digest_size=8).hexdigest() / info.index_folder
    with locked(root / ".index-lock"):
        for name in _MAPPED_FILES:
            if not (folder / name).exists():
                with contextlib.suppress(FileNotFoundError), atomic_write(folder / name) as partial:  # label.npy
                    download(join(join(where, info.index_folder), name), partial)
    return Index(folder, info)


def open_reader(location: str, shards: Sequence[ShardInfo], cache_dir: str | None, cache_gb: float) -> Reader:
    """Open a reader of the shards at a folder or URL; see `open_dataset`."""
    if not is_url(location):
        _check_shards(Path(location), shards)
        return LocalReader(Path(location))
    if cache_dir is None:
        return RemoteReader(location)
    return CachedReader(location, dict(shards), Path(cache_dir), int(cache_gb * 1e9))


def _check_shards(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Raise DataError if one of the first shards is missing or has another size."""
    for name, size in shards[:_CHECKED_AT_OPEN]:
        path = folder / name
        there = path.stat().st_size if path.exists() else None
        if there != size:
            what = "is missing" if there is None else f"has {there} bytes, the index says {size}"
            raise DataError(f"shard {path} {what}; restore it or index the folder again")


def open_cache(cache_dir: Path) -> Path:
    """Make the cache's own folder in `cache_dir` if needed, and return it."""
    root = cache_dir / CACHE_FOLDER
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make a cache in {cache_dir} ({error}); choose another runtime.cache_dir") from error
    return root
