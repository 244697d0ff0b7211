"""Where the files of a data set are read: in its folder, at its URL, or in a cache of this machine.

The cache of shards is a bounded folder of whole ones, shared by the processes of a machine and by data sets.

The cache is a folder of its own, `aimscale-shards` within the one that the user names: made and marked by the first
process, so that nothing is ever deleted but shards that were downloaded here. Shards are downloaded once, aside, and
renamed. When the next one would pass the bound, shards of other data sets make room, the longest unused first; a data
set never evicts its own, because a shuffled stream comes back to every shard all the time and would download each again
for every image. What does not fit is read by byte ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from aimscale.harness.data import DataError
from aimscale.harness.data.store.columns import Index
from aimscale.harness.data.store.shards import (
    LocalReader,
    Place,
    RemoteReader,
    ShardInfo,
    is_url,
    join,
    open_remote,
    read_bytes,
    with_retries,
)
from aimscale.harness.run.files import cache_folder, locked, written_aside

CACHE_FOLDER = "aimscale-shards"
"""Name of the cache within the folder that a user names."""

_MARK = "CACHEDIR.TAG"  # also tells backup tools to leave the folder out (bford.info/cachedir)
_MARK_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Shards downloaded by aimscale, which deletes them here.\n"
_CHECKED_AT_OPEN = 2000  # shards whose presence and size are looked at when a data set is opened
_MAPPED_FILES = ("samples.npy", "checksum.npy", "label.npy", "shards.npy", "bad.npy", "bad_before.npy")
_DATASET_FOLDER = re.compile(r"[0-9a-f]{16}")
_PARTIAL = ".partial"
_CHUNK_BYTES = 4 * 2**20
_RETRY_S = 60.0  # a shard that had no room, or is being fetched elsewhere, is asked for again after this


class CachedReader:
    """Reads shards of one data set through a cache in `cache_dir`, which never holds more than `max_bytes`.

    Raises:
        DataError: what is in the cache's place is not a cache, or it cannot be made.
    """

    def __init__(self, location: str, sizes: Mapping[str, int], cache_dir: Path, max_bytes: int) -> None:
        self._location, self._sizes, self._max_bytes = location, sizes, max_bytes
        self._root = open_cache(cache_dir)
        self._folder = self._root / hashlib.blake2b(location.encode(), digest_size=8).hexdigest()
        self._local, self._remote = LocalReader(self._folder), RemoteReader(location)
        self._present: set[str] = set()
        self._not_before: dict[str, float] = {}

    def read_many(self, places: Sequence[Place]) -> list[bytes]:
        """See `ShardReader`."""
        found: dict[int, bytes] = {}
        for number, (name, offset, size) in enumerate(places):
            if name in self._present or self._obtain(name):
                try:
                    (found[number],) = self._local.read_many([(_file_name(name), offset, size)])
                except FileNotFoundError:  # another data set's process made room
                    self._present.discard(name)
        missing = [number for number in range(len(places)) if number not in found]
        if missing:
            found |= zip(missing, self._remote.read_many([places[number] for number in missing]), strict=True)
        return [found[number] for number in range(len(places))]

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
        aside = self._folder / f"{_file_name(name)}{_PARTIAL}"
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
        with locked(self._root / ".lock"):
            files = [(path, stat) for path, stat in _shards_in(self._root) if path != aside]
            excess = sum(stat.st_size for _, stat in files) + size - self._max_bytes
            foreign = [(path, stat) for path, stat in files if path.parent != self._folder and not _is_in_use(path)]
            if excess > sum(stat.st_size for _, stat in foreign):
                return False
            for path, stat in sorted(foreign, key=lambda entry: (entry[0].suffix != _PARTIAL, entry[1].st_mtime)):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= stat.st_size
            os.truncate(aside, size)
        return True

    def _download(self, name: str, aside: Path) -> None:
        def fetch() -> None:
            length = 0
            with open_remote(join(self._location, name)) as source, aside.open("r+b") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    length += len(chunk)
            if length != self._sizes[name]:
                raise OSError(f"{join(self._location, name)} has {length} bytes, the index says {self._sizes[name]}")

        with_retries(fetch)


def open_index(where: str, folder_name: str, cache_dir: str | None) -> Index:
    """The mapped columns; those of a URL are fetched once per machine, without a cache into the user's own."""
    if not is_url(where):
        return Index(Path(where) / folder_name)
    root = cache_folder() / "indexes" if cache_dir is None else open_cache(Path(cache_dir))
    folder = root / hashlib.blake2b(where.encode(), digest_size=8).hexdigest() / folder_name
    with locked(root / ".index-lock"):
        for name in _MAPPED_FILES:
            if not (folder / name).exists():
                with contextlib.suppress(FileNotFoundError), written_aside(folder / name) as aside:  # label.npy
                    aside.write_bytes(read_bytes(join(join(where, folder_name), name)))
    return Index(folder)


def open_reader(
    location: str, shards: Sequence[ShardInfo], cache_dir: str | None, cache_gb: float
) -> LocalReader | RemoteReader | CachedReader:
    """What reads the shards at a folder or URL; see `open_dataset`.

    Raises:
        DataError: a missing or truncated shard in a folder.
    """
    if not is_url(location):
        _check_shards(Path(location), shards)
        return LocalReader(Path(location))
    if cache_dir is None:
        return RemoteReader(location)
    return CachedReader(location, dict(shards), Path(cache_dir), int(cache_gb * 1e9))


def _check_shards(folder: Path, shards: Sequence[ShardInfo]) -> None:
    for shard in shards[:_CHECKED_AT_OPEN]:
        try:
            size = (folder / shard.name).stat().st_size
        except FileNotFoundError:
            raise DataError(f"shard {folder / shard.name} is missing; restore it or index the folder again") from None
        if size != shard.size:
            word = "truncated" if size < shard.size else "longer than indexed"
            raise DataError(
                f"shard {folder / shard.name} is {word}: {size} bytes, the index says {shard.size}; "
                "restore it or index the folder again"
            )


def open_cache(cache_dir: Path) -> Path:
    """The cache's own folder in `cache_dir`, made and marked if it does not exist.

    Raises:
        DataError: a folder of that name was made by something else, or none can be made.
    """
    root = cache_dir / CACHE_FOLDER
    try:
        if not root.exists():
            aside = cache_dir / f".{CACHE_FOLDER}.{os.getpid()}"
            aside.mkdir(parents=True, exist_ok=True)
            (aside / _MARK).write_text(_MARK_TEXT)
            try:
                aside.rename(root)
            except OSError:  # another process was faster
                (aside / _MARK).unlink()
                aside.rmdir()
        if (root / _MARK).read_text() == _MARK_TEXT:
            return root
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    except OSError as error:
        raise DataError(f"cannot make a cache in {cache_dir} ({error}); choose another runtime.cache_dir") from error
    raise DataError(f"{root} is no cache of shards (it lacks {_MARK}); choose another runtime.cache_dir or remove it")


def _shards_in(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file of the cache's data sets."""
    for folder in root.iterdir():
        if not _DATASET_FOLDER.fullmatch(folder.name) or folder.is_symlink():
            continue
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a download that has just ended
                if path.is_file() and not path.is_symlink():
                    yield path, path.stat()


def _is_in_use(path: Path) -> bool:
    """Whether a process is downloading this file; one that was killed leaves an unlocked `.partial`."""
    if path.suffix != _PARTIAL:
        return False
    with locked(path, wait=False) as free:
        return not free


def _file_name(name: str) -> str:
    return name.replace("/", "%")
