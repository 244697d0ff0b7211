"""Indexing of shards: in parallel, with the rows of one shard in memory, and without ever leaving a half-written index.

A sample (`tars`) has one image and, for its label, `cls` (a number) or `json` with a whole number under `label` or
`cls`. So the shards of timm's imagenet-1k-wds, of img2dataset and of DataComp can be indexed as they are.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aimscale.harness.data import DataError
from aimscale.harness.data.store.columns import IndexWriter, shard_table
from aimscale.harness.data.store.dataset_info import DATASET_FILE, INDEX_FILE, MAX_LABEL, DatasetInfo, image_checksum
from aimscale.harness.data.store.decoding import IMAGE_EXTENSIONS, UndecodableImageError, decode
from aimscale.harness.data.store.processes import map_in_processes
from aimscale.harness.data.store.remote import filesystem_of, is_url, join, open_file, with_retries
from aimscale.harness.data.store.tars import Members, expand_braces, read_samples
from aimscale.harness.run.files import publish_dir, write_text

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
"""Schema of `index.parquet`."""
SCAN_SCHEMA = pa.schema([field for field in SCHEMA if field.name != "shard"])
_LABEL_KEYS = ("label", "cls")
_READ = {*IMAGE_EXTENSIONS, "cls", "json"}
Progress = Callable[[str, int, int, str], None]
"""Callback with the name of the work, how much of it is done, out of how much, and the unit."""


class ShardScan(NamedTuple):
    """Everything that the index needs of one shard."""

    name: str
    size: int
    rows: pa.Table
    """Rows of SCAN_SCHEMA: the index's columns without the shard number."""


def scan_shard(location: str, name: str) -> ShardScan:
    """Read one tar file, decoding every image."""
    path = join(location, name)
    try:
        with open_file(path) as file:
            entries = [_entry(path, key, members) for key, members in read_samples(file, _READ)]
        size = shard_size(path)
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is missing; restore it or leave it out") from error
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"shard {path} is truncated or no tar file ({error}); copy or write it again") from error
    rows = pa.Table.from_pylist([entry for entry in entries if entry is not None], schema=SCAN_SCHEMA)
    return ShardScan(name, size, rows)


def shard_size(path: str) -> int:
    """Return the bytes of a local or remote file."""
    if not is_url(path):
        return os.stat(path).st_size
    filesystem, inner = filesystem_of(path)
    size = with_retries(lambda: filesystem.size(inner))
    if size is None:
        raise DataError(f"the server does not say how large {path} is; copy the shard to a folder or another server")
    return int(size)


def _entry(path: str, key: str, members: Members) -> dict[str, Any] | None:
    """Build the index row of one sample; None if it holds no image."""
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


def _label(path: str, key: str, members: Members) -> int | None:
    """Return the sample's class number, if it has one."""
    value: Any = None
    try:
        if "cls" in members:
            value = int(members["cls"][1])
        elif "json" in members:
            record = json.loads(members["json"][1])
            value = next((record[name] for name in _LABEL_KEYS if type(record.get(name)) is int), None)
    except (ValueError, AttributeError) as error:
        raise DataError(f"the label of sample '{key}' of {path} is no class number ({error}); repair it") from error
    if value is not None and not 0 <= value <= MAX_LABEL:
        text = str(value) if abs(value) < 10**20 else "beyond 64 bits"
        raise DataError(f"the label of sample '{key}' of {path} is {text}; class numbers lie in 0..{MAX_LABEL}")
    return value


def index_shards(
    location: str,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    classes: tuple[str, ...] | None = None,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> DatasetInfo:
    """Write the index of the shards at `location` into the folder `out`, which may be `location` itself.

    Args:
        location: folder or URL; all `*.tar` in it, unless `names` lists the shards.
        out: local folder for `index.parquet` and `dataset.json`.
        names: shard names relative to `location`.
        num_workers: processes, each reading one shard at a time.
    """
    shards = sorted(set(names)) if names is not None else list_shards(location)
    where = location if is_url(location) else str(Path(location).resolve())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}; give another folder with --out") from error

    def scans() -> Iterator[ShardScan]:
        for done, scan in enumerate(_scans(location, shards, num_workers), start=1):
            if progress is not None:
                progress(f"indexing {Path(location).name}", done, len(shards), "shards")
            yield scan

    return write_scans(
        out,
        scans(),
        name=Path(location).name,
        classes=classes,
        shards_at=None if where == str(out.resolve()) else where,
    )


def list_shards(location: str) -> list[str]:
    """List the `*.tar` files of a folder or URL by name, sorted."""
    if is_url(location):
        try:
            filesystem, inner = filesystem_of(location)
            listed = with_retries(lambda: filesystem.ls(inner, detail=False))
            found = [path.rstrip("/").rpartition("/")[2] for path in listed]
        except OSError as error:
            raise DataError(
                f"cannot list {location} ({error}); name the shards: {location}/NAME-{{000..123}}.tar"
            ) from error
    else:
        found = [path.name for path in Path(location).glob("*.tar")]
    shards = sorted({name for name in found if name.endswith(".tar")})
    if not shards:
        raise DataError(f"{location} holds no .tar shards")
    return shards


def expand_shards(pattern: str) -> tuple[str, list[str] | None]:
    """Split `FOLDER/NAME-{000..123}.tar` into (folder or URL, shard names); names are None for a plain folder."""
    if not pattern.endswith(".tar"):
        return pattern.rstrip("/"), None
    folder, _, name = pattern.rpartition("/")
    return folder or ".", expand_braces(name)


def write_scans(
    folder: Path,
    scans: Iterable[ShardScan],
    *,
    name: str,
    classes: tuple[str, ...] | None,
    shards_at: str | None = None,
) -> DatasetInfo:
    """Write the index of scanned shards, one in memory at a time; `dataset.json` comes last and marks the index
    complete."""
    partial = folder / f".{INDEX_FILE}.partial"
    mapped = folder / ".index.partial"
    shutil.rmtree(mapped, ignore_errors=True)
    mapped.mkdir()
    try:
        writer, shards = IndexWriter(mapped), []
        with pq.ParquetWriter(partial, SCHEMA) as table:
            for number, scan in enumerate(scans):
                shards.append((scan.name, scan.size, len(scan.rows)))
                _require_names(scan, classes)
                writer.append(scan.rows)
                shard = pa.array(np.full(len(scan.rows), number, dtype=np.int32))
                table.write_table(scan.rows.add_column(1, SCHEMA.field("shard"), shard))
        if not any(count for _, _, count in shards):
            raise DataError(f"the shards of {shards_at or folder} hold no images ({', '.join(IMAGE_EXTENSIONS)})")
        table_of_shards = shard_table(*map(list, zip(*shards, strict=True)))
        info = writer.finish(table_of_shards, name=name, classes=classes, shards_at=shards_at)
        partial.replace(folder / INDEX_FILE)
        publish_dir(mapped, folder / info.index_folder)
        write_text(folder / DATASET_FILE, info.to_json())
    finally:
        partial.unlink(missing_ok=True)
        shutil.rmtree(mapped, ignore_errors=True)
    for old in folder.glob("index-*"):
        if old.name != info.index_folder and (old / "samples.npy").exists():
            shutil.rmtree(old)
    return info


def _require_names(scan: ShardScan, classes: tuple[str, ...] | None) -> None:
    """Raise DataError if a label has no class name."""
    largest = pc.max(scan.rows["label"]).as_py()
    if classes is not None and largest is not None and largest >= len(classes):
        raise DataError(f"label {largest} has no name: {len(classes)} class names were given; give one per label")


def _scans(location: str, names: Sequence[str], num_workers: int) -> Iterator[ShardScan]:
    """Scan each shard, in order; raises as `map_in_processes` does, too."""
    scan = functools.partial(scan_shard, location)
    if num_workers == 1 or len(names) <= 1:
        yield from map(scan, names)
        return
    yield from map_in_processes(scan, names, min(num_workers, len(names)))
