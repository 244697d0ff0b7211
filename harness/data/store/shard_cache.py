"""Where the files of a data set are read: in its folder, at its URL, or in a cache of this machine.

The cache of shards is a bounded folder of whole ones, `aimscale-shards` within the one that the user names, shared by
the processes of a machine and by data sets. Shards are downloaded once, aside, and renamed. What does not fit is read
by byte ranges; nothing makes room but the user, who may remove the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from aimscale.harness.data import DataError
from aimscale.harness.data.store.card import DatasetInfo
from aimscale.harness.data.store.columns import Index
from aimscale.harness.data.store.shards import LocalReader, Place, RemoteReader, ShardInfo, download, is_url, join
from aimscale.harness.run.files import cache_folder, locked, written_aside

CACHE_FOLDER = "aimscale-shards"
"""Name of the cache within the folder that a user names."""

_CHECKED_AT_OPEN = 2000  # shards whose presence and size are looked at when a data set is opened
_MAPPED_FILES = ("samples.npy", "checksum.npy", "label.npy", "shards.npy", "bad.npy", "bad_before.npy")
_PARTIAL = ".partial"
_RETRY_S = 60.0  # a shard that had no room, or is being fetched elsewhere, is asked for again after this


class CachedReader:
    """Reads shards of one data set through a cache in `cache_dir`, which never holds more than `max_bytes`.

    Raises:
        DataError: the cache cannot be made.
    """

    def __init__(self, location: str, sizes: Mapping[str, int], cache_dir: Path, max_bytes: int) -> None:
        self._location, self._sizes, self._max_bytes = location, sizes, max_bytes
        self._root = open_cache(cache_dir)
        self._folder = self._root / hashlib.blake2b(location.encode(), digest_size=8).hexdigest()
        self._local, self._remote = LocalReader(self._folder), RemoteReader(location)
        self._present: set[str] = set()
        self._not_before: dict[str, float] = {}

    def read_many(self, places: Sequence[Place]) -> list[bytes]:
        """As `LocalReader.read_many`."""
        found: dict[int, bytes] = {}
        for number, (name, offset, size) in enumerate(places):
            if name in self._present or self._obtain(name):
                try:
                    (found[number],) = self._local.read_many([(_file_name(name), offset, size)])
                except FileNotFoundError:  # somebody made room
                    self._present.discard(name)
        missing = [number for number in range(len(places)) if number not in found]
        if missing:
            found |= zip(missing, self._remote.read_many([places[number] for number in missing]), strict=True)
        return [found[number] for number in range(len(places))]

    def _obtain(self, name: str) -> bool:
        """Whether the shard is in the cache, after trying to put it there."""
        target = self._folder / _file_name(name)
        if target.exists():
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
                    download(join(self._location, name), aside, self._sizes[name])
                    aside.rename(target)
            finally:
                aside.unlink(missing_ok=True)
        self._present.add(name)
        return True

    def _reserve(self, aside: Path, size: int) -> bool:
        """Claim the room for a shard by the length of its file; False when it cannot fit."""
        with locked(self._root / ".lock"):
            if _bytes_in(self._root, but=aside) + size > self._max_bytes:
                return False
            os.truncate(aside, size)
        return True


Reader = LocalReader | RemoteReader | CachedReader
"""Reads byte ranges of the shards of one data set."""


def open_index(where: str, info: DatasetInfo, cache_dir: str | None) -> Index:
    """The mapped columns; those of a URL are fetched once per machine, without a cache into the user's own.

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
                with contextlib.suppress(FileNotFoundError), written_aside(folder / name) as aside:  # label.npy
                    download(join(join(where, info.index_folder), name), aside)
    return Index(folder, info)


def open_reader(location: str, shards: Sequence[ShardInfo], cache_dir: str | None, cache_gb: float) -> Reader:
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
    for name, size in shards[:_CHECKED_AT_OPEN]:
        path = folder / name
        there = path.stat().st_size if path.exists() else None
        if there != size:
            what = "is missing" if there is None else f"has {there} bytes, the index says {size}"
            raise DataError(f"shard {path} {what}; restore it or index the folder again")


def open_cache(cache_dir: Path) -> Path:
    """The cache's own folder in `cache_dir`, made if it does not exist.

    Raises:
        DataError: it cannot be made.
    """
    root = cache_dir / CACHE_FOLDER
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make a cache in {cache_dir} ({error}); choose another runtime.cache_dir") from error
    return root


def _bytes_in(root: Path, *, but: Path) -> int:
    """Of the files of the cache's data sets, without one."""
    total = 0
    for path in root.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # a download that has just ended
            total += path.stat().st_size if path != but and path.is_file() else 0
    return total


def _file_name(name: str) -> str:
    return name.replace("/", "%")
