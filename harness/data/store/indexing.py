"""Index many shards: in parallel, with the rows of one in memory, and never leaving a half-written index.

A sample is a run of members with one key (the path up to the first dot of the file name). It has one image (jpg, png,
webp, ...) and, for its label, `cls` (a number) or `json` with a whole number under `label` or `cls`; other members, a
caption in `txt` for one, are left alone. So the shards of timm's imagenet-1k-wds, of img2dataset and of DataComp read
as they are.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import webdataset

from aimscale.harness.data import DataError
from aimscale.harness.data.store.card import DATASET_FILE, INDEX_FILE, NO_LABEL, DatasetInfo, image_checksum
from aimscale.harness.data.store.columns import SAMPLE, IndexWriter, shard_table
from aimscale.harness.data.store.decoding import IMAGE_EXTENSIONS, UndecodableImageError, decode
from aimscale.harness.data.store.shards import REMOTE_ERRORS, filesystem_of, is_url, join, open_remote, with_retries
from aimscale.harness.run.files import publish_dir, write_text, written_aside

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
Progress = Callable[[int, int, int], None]
"""Called with shards done, shards in all, and images so far."""


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


def index_shards(
    location: str,
    out: Path,
    *,
    names: Sequence[str] | None = None,
    name: str | None = None,
    classes: tuple[str, ...] | None = None,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> DatasetInfo:
    """Write the index of the shards at `location` into the folder `out`, which may be `location` itself.

    Args:
        location: folder or URL; all `*.tar` in it, unless `names` lists the shards.
        out: local folder for `index.parquet` and `dataset.json`.
        names: shard names relative to `location`.
        name: of the data set; the folder's name by default.
        num_workers: processes, each reading one shard at a time.

    Raises:
        DataError: no shards, no images, or a shard that is missing, truncated or malformed.
    """
    shards = sorted(names) if names is not None else list_shards(location)
    same_place = not is_url(location) and Path(location).resolve() == out.resolve()
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            parts = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=out, prefix=".index-parts-")))
        except OSError as error:
            raise DataError(f"cannot write to {out}: {error.strerror}; give another folder with --out") from error
        num_samples = 0
        for done, num_rows in enumerate(_run(location, shards, parts, num_workers), start=1):
            num_samples += num_rows
            if progress is not None:
                progress(done, len(shards), num_samples)
        return write_scans(
            out,
            (_read_part(parts, shard) for shard in shards),
            num_samples=num_samples,
            name=name or Path(location).name,
            classes=classes,
            shards_at=None if same_place else _absolute(location),
        )


def list_shards(location: str) -> list[str]:
    """Names of the `*.tar` files of a folder or URL, sorted.

    Raises:
        DataError: there are none, or the server does not list its folders.
    """
    if is_url(location):
        try:
            filesystem, inner = filesystem_of(location)
            listed = with_retries(lambda: filesystem.ls(inner, detail=False))
            found = [path.rstrip("/").rpartition("/")[2] for path in listed]
        except REMOTE_ERRORS as error:
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
    """(folder or URL, shard names) of `FOLDER/NAME-{000..123}.tar`; names are None for a plain folder."""
    if not pattern.endswith(".tar"):
        return pattern.rstrip("/"), None
    folder, _, name = pattern.rpartition("/")
    return folder or ".", list(webdataset.shardlists.expand_urls(name))


def write_scans(
    folder: Path,
    scans: Iterable[ShardScan],
    *,
    num_samples: int,
    name: str,
    classes: tuple[str, ...] | None,
    shards_at: str | None = None,
) -> DatasetInfo:
    """Write the index of scanned shards, one in memory at a time; `dataset.json` comes last and vouches for the rest.

    Raises:
        DataError: the shards hold no image, or a label that has no class name.
    """
    if not num_samples:
        raise DataError(f"the shards of {shards_at or folder} hold no images ({', '.join(IMAGE_EXTENSIONS)})")
    aside = folder / f".{INDEX_FILE}.partial"
    mapped = folder / ".index.partial"
    shutil.rmtree(mapped, ignore_errors=True)
    mapped.mkdir()
    try:
        writer, shards = IndexWriter(mapped, num_samples), []
        with pq.ParquetWriter(aside, SCHEMA) as table:
            for number, scan in enumerate(scans):
                shards.append((scan.name, scan.size, len(scan.rows)))
                _require_names(scan, classes)
                _append(writer, table, number, scan.rows)
        table_of_shards = shard_table(*map(list, zip(*shards, strict=True)))
        info = writer.finish(table_of_shards, name=name, classes=classes, shards_at=shards_at)
        aside.replace(folder / INDEX_FILE)
        publish_dir(mapped, folder / info.index_folder)
        write_text(folder / DATASET_FILE, info.to_json())
    finally:
        aside.unlink(missing_ok=True)
        shutil.rmtree(mapped, ignore_errors=True)
    for old in folder.glob("index-*"):
        if old.name != info.index_folder and (old / "samples.npy").exists():
            shutil.rmtree(old)
    return info


def _append(writer: IndexWriter, table: pq.ParquetWriter, number: int, rows: pa.Table) -> None:
    samples = np.empty(len(rows), SAMPLE)
    for field in SAMPLE.names or ():
        samples[field] = rows[field].to_numpy()
    labels = rows["label"].fill_null(NO_LABEL).to_numpy()
    writer.append(samples, rows["checksum"].to_numpy(), labels)
    columns = {column: rows[column] for column in rows.column_names}
    columns["shard"] = pa.array(np.full(len(rows), number, dtype=np.int32))
    table.write_table(pa.table({field.name: columns[field.name] for field in SCHEMA}, schema=SCHEMA))


def _require_names(scan: ShardScan, classes: tuple[str, ...] | None) -> None:
    largest = pc.max(scan.rows["label"]).as_py()
    if classes is not None and largest is not None and largest >= len(classes):
        raise DataError(f"label {largest} has no name: {len(classes)} class names were given; give one per label")


def _absolute(location: str) -> str:
    return location if is_url(location) else str(Path(location).resolve())


def _read_part(parts: Path, name: str) -> ShardScan:
    table = pq.ParquetFile(_part_path(parts, name)).read(use_threads=False)
    size = int(table.schema.metadata[b"shard_size"])
    return ShardScan(name, size, table.replace_schema_metadata(None).cast(SCAN_SCHEMA))


def _run(location: str, names: Sequence[str], parts: Path, num_workers: int) -> Iterator[int]:
    """Number of images of each shard as it is finished, in any order."""
    if num_workers == 1 or len(names) <= 1:
        yield from (_scan_to_part(location, name, parts) for name in names)
        return
    context = multiprocessing.get_context("forkserver")
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(
            concurrent.futures.ProcessPoolExecutor(min(num_workers, len(names)), mp_context=context)
        )
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        futures = [pool.submit(_scan_to_part, location, name, parts) for name in names]
        yield from (future.result() for future in concurrent.futures.as_completed(futures))


def _scan_to_part(location: str, name: str, parts: Path) -> int:
    scan = scan_shard(location, name)
    table = scan.rows.replace_schema_metadata({"shard_size": str(scan.size)})
    with written_aside(_part_path(parts, name), durable=False) as aside:
        pq.write_table(table, aside)
    return len(scan.rows)


def _part_path(parts: Path, name: str) -> Path:
    return parts / f"{name.replace('/', '%')}.parquet"
