"""Byte ranges of shards: from local files, or from what fsspec opens, on web servers and in object stores.

Remote reads have retries and bounded waits. Whole shards are fetched, under a temporary name and renamed, into a
bounded cache: a folder, `aimscale-shards` within the one that the user names, shared by the processes of a machine and
by data sets. A file's modification time says when a process used it last.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import io
import itertools
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from aimscale.harness.data import DataError
from aimscale.harness.run.files import MAX_BYTES, atomic_write, cache_folder
from aimscale.harness.run.lock import is_held, locked
from aimscale.harness.run.timeouts import STALLED_S, WAIT_S

T = TypeVar("T")
NUM_TRIES = 6  # of a remote read: pauses of about 6 s in all
FIRST_PAUSE_S = 0.2  # before the second try; doubles
PROTOCOLS = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "memory")
"""Protocols of fsspec that read bytes and no more: others build a path of code, archives or further URLs."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # optional dependencies of this package, by protocol
_CHUNK_BYTES = 4 * 2**20  # of a download
CACHE_FOLDER = "aimscale-shards"
"""Name of the cache within the folder that a user names."""
_MAX_OPEN_FILES = 256  # per process: `ulimit -n` is often 1024
_CHECKED_AT_OPEN = 2000  # shards whose presence and size are checked when a data set is opened
_PARTIAL = ".partial"
_IN_USE_S = 30.0  # after its last use a shard may be evicted to fetch another ahead
_RETRY_S = 15.0  # until shards are fetched ahead again, once there was no room
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
        with open_file(url) as file:
            if len(data := file.read(MAX_BYTES + 1)) > MAX_BYTES:
                raise DataError(f"{url} has more than {MAX_BYTES:.0e} bytes; give another file")
            return data

    return with_retries(read)


def open_file(path: str) -> IO[bytes]:
    """Open a local file or a URL for sequential reading; OSError if it cannot be opened."""
    if not is_url(path):
        return open(path, "rb")
    filesystem, inner = filesystem_of(path)
    try:
        opened: IO[bytes] = filesystem.open(inner, "rb")
    except OSError:
        raise
    except Exception as error:  # each file system raises types of its own
        raise OSError(f"{type(error).__name__} {error}".strip()) from error
    return opened


def download(url: str, to: Path) -> int:
    """Copy a remote file to the front of a local one, with retries and in bounded memory; returns its bytes.

    Raises:
        OSError: it cannot be read, or written.
    """

    def fetch() -> int:
        with open_file(url) as source, to.open("r+b" if to.exists() else "wb") as target:
            shutil.copyfileobj(source, target, _CHUNK_BYTES)
            return target.tell()

    return with_retries(fetch)


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, one per process, and the path within it."""
    protocol, options = url.partition("://")[0], dict[str, Any]()
    if protocol not in PROTOCOLS or "::" in url:
        raise DataError(f"{url:.200} is no address that is read; give one of {', '.join(PROTOCOLS)}, without '::'")
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=STALLED_S, sock_read=STALLED_S)}
    try:
        import fsspec.core  # not installed where sweeps are only planned

        filesystem, inner = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'aimscale[{extra}]'" if extra else f"install the package that fsspec names: {error}"
        raise DataError(f"{url} needs a package that is not installed; {how}") from error
    except Exception as error:  # each protocol's class raises types of its own for unusable URLs
        raise DataError(f"{url} cannot be opened ({error}); give a folder or a URL that fsspec knows") from error
    return filesystem, inner


def with_retries(action: Callable[[], T]) -> T:
    """Try a remote action up to six times with growing pauses; a missing file and a URL that is none are final at once.

    Raises:
        OSError: the last failure, whatever type the file system gave it.
    """
    for attempt in range(NUM_TRIES):
        try:
            return action()
        except (FileNotFoundError, DataError):
            raise
        except Exception as error:  # each file system raises types of its own, such as botocore's
            if attempt == NUM_TRIES - 1 or isinstance(error, ValueError):
                raise OSError(f"{type(error).__name__} {error}".strip()) from error
            if attempt == NUM_TRIES // 2:
                logging.getLogger(__name__).warning("a server gives no data (%r); trying again", error)
            time.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
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
