"""Read one webdataset tar shard from front to back and list its images.

A sample is a run of members with one key (the path up to the first dot of the file name). It has one image (jpg, png,
webp, ...) and, for its label, `cls` (a number) or `json` with a whole number under `label` or `cls`; other members, a
caption in `txt` for one, are left alone. So the shards of timm's imagenet-1k-wds, of img2dataset and of DataComp read
as they are.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa

from aimscale.harness.data import DataError
from aimscale.harness.data.store.card import image_checksum
from aimscale.harness.data.store.decoding import IMAGE_EXTENSIONS, UndecodableImageError, decode
from aimscale.harness.data.store.shards import REMOTE_ERRORS, filesystem_of, is_url, join, open_remote

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("checksum", pa.uint64(), nullable=False),
        pa.field("ok", pa.bool_(), nullable=False),
    ]
)
"""Of `index.parquet`."""
SCAN_SCHEMA = pa.schema([field for field in SCHEMA if field.name != "shard"])
MAX_LABEL = 2**31 - 1
"""Largest class number."""
_LABEL_KEYS = ("label", "cls")


class ShardScan(NamedTuple):
    """Everything the index needs to know of one shard."""

    name: str
    size: int
    rows: pa.Table
    """Of SCAN_SCHEMA: the index's columns without the shard number."""


def scan_shard(location: str, name: str) -> ShardScan:
    """Read one tar file, decoding every image.

    Raises:
        DataError: the shard is missing, truncated, no tar file, or holds two images under one key.
    """
    path = join(location, name)
    try:
        size = shard_size(path)
        with _open(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            entries = [_entry(path, key, members) for key, members in _samples(tar)]
            # tarfile takes a file cut off between two members for a whole one; the end-of-archive mark tells them apart
            if size <= tar.offset:
                raise DataError(f"shard {path} is truncated: it lacks the end-of-archive mark; copy or write it again")
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is missing; restore it or leave it out") from error
    except (tarfile.TarError, EOFError, *REMOTE_ERRORS) as error:
        raise DataError(f"shard {path} is truncated or no tar file ({error}); copy or write it again") from error
    rows = pa.Table.from_pylist([entry for entry in entries if entry is not None], schema=SCAN_SCHEMA)
    return ShardScan(name, size, rows)


def shard_size(path: str) -> int:
    """Bytes of a local or remote file."""
    if not is_url(path):
        return os.stat(path).st_size
    filesystem, inner = filesystem_of(path)
    return int(filesystem.size(inner))


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
        key = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        content = tar.extractfile(member)
        assert content is not None
        members[extension.lower()] = (member.offset_data, content.read())
    if current is not None:
        yield current, members


def _entry(path: str, key: str, members: dict[str, tuple[int, bytes]]) -> dict[str, Any] | None:
    """The index row of one sample, or None when it holds no image."""
    images = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if not images:
        return None
    if len(images) > 1:
        raise DataError(f"sample '{key}' of {path} has {len(images)} images ({', '.join(images)}); keep one per key")
    offset, data = members[images[0]]
    try:
        height, width = decode(data).shape[-2:]
    except UndecodableImageError:
        height = width = 0
    return {
        "key": key,
        "offset": offset,
        "size": len(data),
        "label": _label(path, key, members),
        "width": width,
        "height": height,
        "checksum": image_checksum(data),
        "ok": height > 0,
    }


def _label(path: str, key: str, members: dict[str, tuple[int, bytes]]) -> int | None:
    """The sample's class number, if it has one."""
    value: Any = None
    try:
        if "cls" in members:
            value = int(members["cls"][1])
        elif "json" in members:
            record = json.loads(members["json"][1])
            value = next((record[name] for name in _LABEL_KEYS if type(record.get(name)) is int), None)
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"the label of sample '{key}' of {path} is no class number ({error}); repair it") from error
    if value is not None and not 0 <= value <= MAX_LABEL:
        text = str(value) if abs(value) < 10**20 else "beyond 64 bits"
        raise DataError(f"the label of sample '{key}' of {path} is {text}; class numbers lie in 0..{MAX_LABEL}")
    return value


def _open(path: str) -> IO[bytes]:
    return open_remote(path) if is_url(path) else open(path, "rb")
