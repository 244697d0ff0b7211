"""Bytes of shards: from local files, or from anything that fsspec opens, through a bounded local cache.

The cache is a folder, `aimscale-shards` within the one that the user names, shared by the processes of a machine and by
data sets. Whole shards are fetched under a temporary name and renamed. A file's modification time says when a process
used it last.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import io
import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aimscale.harness.data import DataError
from aimscale.harness.data.store.remote import download, is_url, join
from aimscale.harness.run.files import atomic_write, cache_folder
from aimscale.harness.run.lock import is_held, locked
from aimscale.harness.run.timeouts import WAIT_S

CACHE_FOLDER = "aimscale-shards"
"""Name of the cache within the folder that a user names."""
_MAX_OPEN_FILES = 256  # per process: `ulimit -n` is often 1024
_CHECKED_AT_OPEN = 2000  # shards whose presence and size are checked when a data set is opened
_PARTIAL = ".partial"
_IN_USE_S = 30.0  # after its last use a shard may be evicted to fetch another ahead
_RETRY_S = 15.0  # until shards are fetched ahead again, once there was no room


ByteRange = tuple[str, int, int]
"""Byte range of a shard: its name, the offset of the first byte and their number."""


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

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read a byte range; fewer bytes if the file ends before; OSError if it is missing or cannot be read."""
        file = _opened(self._number, f"{self._folder}/{name}")  # text: making a Path takes as long as the read
        return os.pread(file.fileno(), size, offset)

    def read_ahead(self, byte_ranges: Sequence[ByteRange]) -> None:
        """Have the kernel read byte ranges ahead, from a disk or over a network file system; returns at once."""
        for name, offset, size in byte_ranges:
            with contextlib.suppress(OSError):  # raised when the bytes are read
                file = _opened(self._number, f"{self._folder}/{name}")
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


class CachedReader:
    """Reader of the shards at a URL, through a cache of at most `max_bytes` in `root`.

    A shard that is not there is fetched when it is read, in place of the shards that were unused the longest. Those of
    `read_ahead` are fetched in the background, in place of shards that nobody has used for half a minute.
    """

    def __init__(self, location: str, sizes: Mapping[str, int], root: Path, max_bytes: int) -> None:
        self._made_of = location, sizes, root, max_bytes
        self._location, self._sizes, self._root, self._max_bytes = self._made_of
        self._folder = root / hashlib.blake2b(location.encode(), digest_size=8).hexdigest()
        self._used_at: dict[str, float] = {}
        self._wanted: collections.deque[str] = collections.deque()
        self._fetching: threading.Thread | None = None
        self._starting, self._paused_until = threading.Lock(), 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedReader, self._made_of

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read a byte range, see `LocalReader.read`, once the shard is in the cache."""
        with self._opened(name) as file:  # a file kept open would occupy the disk after its eviction
            data = os.pread(file.fileno(), size, offset)
        self._use(name)
        return data

    def read_ahead(self, byte_ranges: Sequence[ByteRange]) -> None:
        """Fetch the shards of these byte ranges, in this order; returns at once."""
        names = dict.fromkeys(name for name, _, _ in byte_ranges)
        missing = [name for name in names if name not in self._wanted and not self._use(name)]
        with self._starting:  # only one thread fetches
            if time.monotonic() > self._paused_until:
                self._wanted.extend(missing)
            if self._wanted and (self._fetching is None or not self._fetching.is_alive()):
                self._fetching = threading.Thread(target=self._fetch_wanted, name="shards", daemon=True)
                self._fetching.start()

    def _opened(self, name: str) -> io.FileIO:
        """Open a shard in the cache, once it is there."""
        with contextlib.suppress(FileNotFoundError):
            return open(self._path(name), "rb", buffering=0)
        fetched = self._fetch(name, is_ahead=False)
        assert fetched is not None, "room was made, or an error raised"
        return fetched

    def _use(self, name: str) -> bool:
        """Mark a shard as in use, for all processes of the machine; False if it is not in the cache."""
        now = time.monotonic()
        if now - self._used_at.get(name, -_IN_USE_S) <= _IN_USE_S / 4:
            return True
        try:
            os.utime(self._path(name))
        except FileNotFoundError:
            return False
        self._used_at[name] = now
        return True

    def _path(self, name: str) -> Path:
        return self._folder / name.replace("/", "%")

    def _fetch_wanted(self) -> None:
        while self._wanted:
            fetched = None
            with contextlib.suppress(OSError, DataError):  # raised where the shard is read
                fetched = self._fetch(self._wanted.popleft(), is_ahead=True)
            if fetched is None:
                self._paused_until = time.monotonic() + _RETRY_S
                self._wanted.clear()
            else:
                fetched.close()

    def _fetch(self, name: str, *, is_ahead: bool) -> io.FileIO | None:
        """Fetch a shard into the cache, unless another process does, and open it; None if there is no room ahead.

        Raises:
            OSError: it cannot be fetched or written.
            DataError: it is larger than the cache.
        """
        target, size = self._path(name), self._sizes[name]
        partial = target.with_name(f"{target.name}{_PARTIAL}")
        with locked(partial):
            with contextlib.suppress(FileNotFoundError):
                return open(target, "rb", buffering=0)  # another process has fetched it
            deadline = time.monotonic() + WAIT_S
            try:
                while not self._make_room(partial, size, is_ahead=is_ahead):
                    if is_ahead:
                        return None
                    if time.monotonic() > deadline:
                        raise OSError(f"{self._root} had no room for {WAIT_S / 60:.0f} minutes; end what else fetches")
                    time.sleep(0.1)  # until other processes have fetched theirs
                if (num_bytes := download(join(self._location, name), partial)) != size:
                    raise OSError(f"it has {num_bytes:,} bytes, the index says {size:,}")
                file = io.FileIO(partial)  # before others see the shard, who may evict it at once
                partial.rename(target)
                return file
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, partial: Path, size: int, *, is_ahead: bool) -> bool:
        """Reserve room for a shard by the length of its file, evicting unused ones; False if there is none."""
        if size > self._max_bytes:
            raise DataError(
                f"shard {join(self._location, partial.name.removesuffix(_PARTIAL))} has {size / 1e9:.2g} GB, more than "
                f"the cache of {self._max_bytes / 1e9:.2g}; raise runtime.cache_gb"
            )
        with locked(self._root / ".lock"):
            files = []
            for path in self._root.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):  # a download that has just ended
                    if path != partial and path.is_file():
                        files.append((path.stat().st_mtime, path.stat().st_size, path))
            excess, evicted = sum(length for _, length, _ in files) + size - self._max_bytes, []
            for used_at, length, path in sorted(files):
                is_free = used_at < time.time() - _IN_USE_S or not is_ahead
                if excess > 0 and is_free and not (path.suffix == _PARTIAL and is_held(path)):
                    excess -= length
                    evicted.append(path)
            if excess > 0:
                return False
            for path in evicted:
                path.unlink(missing_ok=True)
            os.truncate(partial, size)
        return True


Reader = LocalReader | CachedReader
"""Reader of byte ranges of one data set's shards."""


def open_reader(location: str, sizes: Mapping[str, int], cache_dir: str | None, cache_gb: float) -> Reader:
    """Open a reader of the shards at a folder or URL; see `index.open_dataset`."""
    if is_url(location):
        return CachedReader(location, sizes, _open_cache(cache_dir), int(cache_gb * 1e9))
    for name, size in itertools.islice(sizes.items(), _CHECKED_AT_OPEN):
        path = Path(location) / name
        stored_size = path.stat().st_size if path.exists() else None
        if stored_size != size:
            what = "is missing" if stored_size is None else f"has {stored_size} bytes, the index says {size}"
            raise DataError(f"shard {path} {what}; restore it or index the folder again")
    return LocalReader(Path(location))


def cached_files(where: str, folder: str, names: Sequence[str], cache_dir: str | None) -> Path:
    """Return a copy of a folder of a URL, fetched once per machine; OSError if a file other than labels is missing."""
    root = _open_cache(cache_dir)
    copy = root.with_name("aimscale-indexes") / hashlib.blake2b(where.encode(), digest_size=8).hexdigest() / folder
    with locked(copy.parent / ".lock"):
        for name in names:
            if not (copy / name).exists():
                with contextlib.suppress(FileNotFoundError), atomic_write(copy / name) as partial:
                    download(join(join(where, folder), name), partial)
    return copy


def _open_cache(cache_dir: str | None) -> Path:
    """Make the cache's own folder, by default in the user's cache, if needed, and return it."""
    root = (Path(cache_dir) if cache_dir else cache_folder()) / CACHE_FOLDER
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make a cache in {root.parent} ({error}); choose another runtime.cache_dir") from error
    return root
