"""Indexing of shards: in parallel, with the rows of one shard in memory, and without ever leaving a half-written index.

A sample (`tars`) has one image and, for its label, `cls` (a number) or `json` with a whole number under `label` or
`cls`. So the shards of timm's imagenet-1k-wds, of img2dataset and of DataComp can be indexed as they are.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aimscale.harness.data import DataError
from aimscale.harness.data.images import IMAGE_EXTENSIONS, UndecodableImageError, decode
from aimscale.harness.data.store.dataset_info import (
    DATASET_FILE,
    INDEX_FILE,
    MAX_LABEL,
    NO_LABEL,
    DatasetInfo,
    image_checksum,
)
from aimscale.harness.data.store.index import COLUMNS
from aimscale.harness.data.store.processes import map_in_processes
from aimscale.harness.data.store.shards import filesystem_of, is_url, join, open_file, with_retries
from aimscale.harness.data.store.tars import Members, expand_braces, read_samples
from aimscale.harness.run.files import new_partial_dir, publish_dir, write_text

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
_BLOCK_ROWS = 1 << 20  # of a column that are converted at once
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
            size = getattr(file, "size", None) if is_url(path) else os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise DataError(f"shard {path} is missing; restore it or leave it out") from error
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"shard {path} is truncated or no tar file ({error}); copy or write it again") from error
    if size is None:
        raise DataError(f"the server does not say how large {path} is; copy the shard to a folder or another server")
    rows = pa.Table.from_pylist([entry for entry in entries if entry is not None], schema=SCAN_SCHEMA)
    return ShardScan(name, size, rows)


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
            text = members["cls"][1].strip()
            if not text.removeprefix(b"-").isdigit():  # int() also takes 1_0
                raise ValueError(repr(text[:40]))
            value = int(text)
        elif "json" in members:
            record = json.loads(members["json"][1])
            value = next((record[name] for name in _LABEL_KEYS if isinstance(record.get(name), int | float)), None)
            if isinstance(value, bool | float):
                raise ValueError(repr(value))
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"the label of sample '{key}' of {path} is no class number ({error}); repair it") from error
    if value is not None and not 0 <= value <= MAX_LABEL:
        raise DataError(f"the label of sample '{key}' of {path} is {value}; class numbers lie in 0..{MAX_LABEL}")
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
    """Write the index of the shards at a folder or URL into the folder `out`, which may be the same.

    Args:
        names: shard names relative to `location`; by default all `*.tar` in it.
    """
    shards = sorted(set(names)) if names is not None else list_shards(location)
    where = location if is_url(location) else str(Path(location).resolve())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}; give another folder with --out") from error

    def scans() -> Iterator[ShardScan]:
        scan_one, number = functools.partial(scan_shard, location), min(num_workers, len(shards))
        results = map(scan_one, shards) if number == 1 else map_in_processes(scan_one, shards, number)
        for done, scan in enumerate(results, start=1):
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
            names = [path.rstrip("/").rpartition("/")[2] for path in listed]
        except OSError as error:
            raise DataError(
                f"cannot list {location} ({error}); name the shards: {location}/NAME-{{000..123}}.tar"
            ) from error
    else:
        names = [path.name for path in Path(location).glob("*.tar")]
    shards = sorted({name for name in names if name.endswith(".tar")})
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
    """Write the index of scanned shards; `dataset.json` comes last and marks it complete."""
    partial = folder / f".{INDEX_FILE}.partial"
    mapped = new_partial_dir(folder / "index")
    try:
        shards = _write_table(partial, scans, classes)
        if not pq.read_metadata(partial).num_rows:
            raise DataError(f"the shards of {shards_at or folder} hold no images ({', '.join(IMAGE_EXTENSIONS)})")
        info = _write_columns(mapped, partial, shards, name=name, classes=classes, shards_at=shards_at)
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


def _write_table(path: Path, scans: Iterable[ShardScan], classes: tuple[str, ...] | None) -> npt.NDArray[Any]:
    """Write `index.parquet`, and return `Index.shards`."""
    rows: list[tuple[bytes, int, int]] = []
    first = 0
    with pq.ParquetWriter(path, SCHEMA) as table:
        for number, scan in enumerate(scans):
            largest = pc.max(scan.rows["label"]).as_py()
            if classes is not None and largest is not None and largest >= len(classes):
                raise DataError(
                    f"label {largest} has no name: {len(classes)} class names were given; give one per label"
                )
            shard = pa.array(np.full(len(scan.rows), number, dtype=np.int32))
            table.write_table(scan.rows.add_column(1, SCHEMA.field("shard"), shard))
            rows.append((os.fsencode(scan.name), scan.size, first))
            first += len(scan.rows)
    width = max((len(name) for name, *_ in rows), default=1)
    return np.array(rows, np.dtype([("name", f"S{width}"), ("size", "<i8"), ("first", "<i8")]))


def _write_columns(
    folder: Path,
    table: Path,
    shards: npt.NDArray[Any],
    *,
    name: str,
    classes: tuple[str, ...] | None,
    shards_at: str | None,
) -> DatasetInfo:
    """Write the mapped columns (`Index`) of a written table, and return what `dataset.json` says of them."""
    with pq.ParquetFile(table) as file:
        num_samples = file.metadata.num_rows
        samples, checksum, label = (
            np.lib.format.open_memmap(folder / f"{column}.npy", "w+", dtype, (num_samples,))
            for column, dtype in COLUMNS.items()
        )
        digest, first = hashlib.blake2b(digest_size=8), 0
        for batch in file.iter_batches():
            rows = slice(first, first + len(batch))
            for field in COLUMNS["samples"].names or ():
                samples[field][rows] = batch[field]
            checksum[rows], label[rows] = batch["checksum"], batch["label"].fill_null(NO_LABEL)
            digest.update(checksum[rows].tobytes())
            first = rows.stop
    for rows in (slice(first, first + _BLOCK_ROWS) for first in range(0, num_samples, _BLOCK_ROWS)):
        digest.update(label[rows].astype("<i8").tobytes())
    if not (label != NO_LABEL).any():
        (folder / "label.npy").unlink()
    width, height = samples["width"], samples["height"]
    bad = np.flatnonzero(width == 0)
    num_largest = np.count_nonzero((width == width.max()) & (height == height.max()))
    np.save(folder / "bad.npy", bad)
    np.save(folder / "bad_before.npy", bad - np.arange(len(bad)))
    np.save(folder / "shards.npy", shards)
    return DatasetInfo(
        name=name,
        num_samples=num_samples,
        num_bad=len(bad),
        num_shards=len(shards),
        total_bytes=int(shards["size"].sum()),
        max_width=int(width.max()),
        max_height=int(height.max()),
        max_pixels=int(np.multiply(width, height, dtype=np.int64).max()),
        one_size=bool(num_largest + len(bad) == num_samples),
        classes=classes,
        shards_at=shards_at,
        fingerprint=digest.hexdigest(),
    )
