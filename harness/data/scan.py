"""Read webdataset tar shards once, in parallel, and index every image in them.

A sample is a run of members with one key (the path up to the first dot of the file name): one image (jpg, png, webp,
...) and, for its label, `cls` (a number) or `json` with an integer `label` or `cls`. Captions (`txt`) are left alone.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
import numpy as np

from harness.data.decode import UndecodableImageError, decode
from harness.data.index import NO_LABEL, DataError, DatasetInfo, ShardInfo, content_fingerprint, write_index
from harness.data.shards import is_url, join

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "pgm", "tif", "tiff")
_LABEL_KEYS = ("label", "cls")


class Entry(NamedTuple):
    """One image of a shard."""

    key: str
    offset: int
    size: int
    label: int
    width: int
    height: int
    checksum: int
    ok: bool


class ShardScan(NamedTuple):
    """Everything the index needs to know of one shard."""

    name: str
    size: int
    entries: list[Entry]


def scan_shard(location: str, name: str) -> ShardScan:
    """Read one tar file from front to back, decoding every image.

    Raises:
        DataError: the shard is missing, truncated, no tar file, or holds two images under one key.
    """
    path = join(location, name)
    try:
        with _open(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            entries = [_entry(path, key, members) for key, members in _samples(tar)]
        return ShardScan(name, _size(path), [entry for entry in entries if entry is not None])
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is missing; restore it or leave it out") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"shard {path} is truncated or no tar file ({error}); write it again") from error


def scan_shards(
    location: str, names: Sequence[str], *, num_workers: int = 1, progress: Callable[[ShardScan], None] | None = None
) -> list[ShardScan]:
    """`scan_shard` of every shard, in order; `progress` is called as each ends."""
    scans: dict[str, ShardScan] = {}
    with contextlib.ExitStack() as stack:
        results: Iterator[ShardScan]
        if num_workers > 1 and len(names) > 1:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(min(num_workers, len(names))))
            futures = [pool.submit(scan_shard, location, name) for name in names]
            stack.callback(lambda: [future.cancel() for future in futures])
            results = (future.result() for future in concurrent.futures.as_completed(futures))
        else:
            results = (scan_shard(location, name) for name in names)
        for scan in results:
            scans[scan.name] = scan
            if progress is not None:
                progress(scan)
    return [scans[name] for name in names]


def write_scans(
    folder: Path, name: str, scans: Sequence[ShardScan], classes: tuple[str, ...] | None, shards_at: str | None = None
) -> DatasetInfo:
    """Turn scans into `index.parquet` and `dataset.json` in `folder`.

    Raises:
        DataError: the shards hold no image, or a label that has no class name.
    """
    entries = [entry for scan in scans for entry in scan.entries]
    if not entries:
        raise DataError(f"the shards of {shards_at or folder} hold no images ({', '.join(IMAGE_EXTENSIONS)})")
    labels = np.array([entry.label for entry in entries], dtype=np.int64)
    if classes is not None and labels.max() >= len(classes):
        raise DataError(f"label {labels.max()} has no name: {len(classes)} class names were given; give one per label")
    checksums = np.array([entry.checksum for entry in entries], dtype=np.uint64)
    columns: dict[str, Any] = {
        "key": [entry.key for entry in entries],
        "shard": np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.entries) for scan in scans]),
        "offset": [entry.offset for entry in entries],
        "size": [entry.size for entry in entries],
        "label": [None if entry.label == NO_LABEL else entry.label for entry in entries],
        "width": [entry.width for entry in entries],
        "height": [entry.height for entry in entries],
        "checksum": checksums,
        "ok": [entry.ok for entry in entries],
    }
    info = DatasetInfo(
        name=name,
        num_samples=len(entries),
        num_bad=sum(not entry.ok for entry in entries),
        classes=classes,
        shards=tuple(ShardInfo(name=scan.name, size=scan.size, num_samples=len(scan.entries)) for scan in scans),
        shards_at=shards_at,
        fingerprint=content_fingerprint(checksums, labels),
    )
    write_index(folder, info, columns)
    return info


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """(key, {extension: (offset, bytes)}) of every run of members with one key."""
    current: str | None = None
    members: dict[str, tuple[int, bytes]] = {}
    for member in tar:
        if not member.isfile():
            continue
        folder, _, file_name = member.name.rpartition("/")
        stem, _, extension = file_name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        content = tar.extractfile(member)
        assert content is not None
        members[extension.lower()] = (member.offset_data, content.read())
    if current is not None:
        yield current, members


def _entry(path: str, key: str, members: dict[str, tuple[int, bytes]]) -> Entry | None:
    images = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if not images:
        return None
    if len(images) > 1:
        raise DataError(f"sample '{key}' of {path} has {len(images)} images ({', '.join(images)}); keep one per key")
    offset, data = members[images[0]]
    checksum = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    try:
        height, width = decode(data).shape[-2:]
    except UndecodableImageError:
        height = width = 0
    return Entry(key, offset, len(data), _label(path, key, members), width, height, checksum, height > 0)


def _label(path: str, key: str, members: dict[str, tuple[int, bytes]]) -> int:
    """The sample's class number, or NO_LABEL."""
    value: Any = None
    try:
        if "cls" in members:
            value = int(members["cls"][1])
        elif "json" in members:
            record = json.loads(members["json"][1])
            value = next((record[name] for name in _LABEL_KEYS if isinstance(record.get(name), int)), None)
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"the label of sample '{key}' of {path} is no class number ({error}); repair the shard"
        ) from error
    if value is not None and value < 0:
        raise DataError(f"the label of sample '{key}' of {path} is {value}; class numbers start at 0")
    return NO_LABEL if value is None else int(value)


def _open(path: str) -> IO[bytes]:
    if not is_url(path):
        return open(path, "rb")
    opened: IO[bytes] = fsspec.open(path, "rb").open()
    return opened


def _size(path: str) -> int:
    if not is_url(path):
        return os.stat(path).st_size
    filesystem, inner = fsspec.core.url_to_fs(path)
    return int(filesystem.size(inner))
