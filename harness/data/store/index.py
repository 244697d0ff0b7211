"""A data set: tar shards plus `index.parquet` and `dataset.json`, opened for random access without a scan.

`dataset.json` holds version, name, counts, class names, the shards with their sizes, and a fingerprint of the
content. `index.parquet` holds one row per sample: key, shard (number), offset and size of the image file within
the shard, label, width, height, checksum (64-bit BLAKE2b of the image file) and ok (false: did not decode).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store.decoding import decode
from aimscale.harness.data.store.shard_cache import CachedReader
from aimscale.harness.data.store.shards import LocalReader, RemoteReader, ShardReader, is_url, join, read_bytes
from aimscale.harness.run.files import write_text, written_aside

FORMAT_VERSION = 1
INDEX_FILE = "index.parquet"
DATASET_FILE = "dataset.json"
NO_LABEL = -1
_ROW_GROUP = 1 << 18  # rows; a single key is read by its group
_CHECKED_SHARE = 16  # of so many reads one is compared with the index: 0.3 % of the time of reading photographs

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar file."""

    name: str
    """File name, relative to the data set's folder or to `DatasetInfo.shards_at`."""
    size: int
    """Bytes."""
    num_samples: int
    """Images in it, undecodable ones included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """`dataset.json`."""

    version: int = FORMAT_VERSION
    """Of the format of both files."""
    name: str
    """For messages and plots."""
    num_samples: int
    """Rows of the index."""
    num_bad: int
    """Rows whose image did not decode."""
    classes: tuple[str, ...] | None
    """Class names by label; null when labels have no names or there are none."""
    shards: tuple[ShardInfo, ...]
    """The tar files, in the order of the index's shard numbers."""
    shards_at: str | None = None
    """Folder or URL of the shards when the index is kept elsewhere."""
    fingerprint: str
    """16 hex digits of the checksums and labels in order, whatever the shards' names and sizes."""

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> DatasetInfo:
        """Parse the file's text; another version or a malformed file is a DataError."""
        try:
            values = json.loads(text)
            version = values["version"]
            if version == FORMAT_VERSION:
                shards = tuple(ShardInfo(**shard) for shard in values.pop("shards"))
                classes = values.pop("classes")
                return cls(**values, shards=shards, classes=None if classes is None else tuple(classes))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where} is no valid {DATASET_FILE} ({error}); run `aimscale data index` again") from error
        raise DataError(f"{where} has format version {version}, this program reads {FORMAT_VERSION}; index it again")


def content_fingerprint(checksums: npt.NDArray[np.uint64], labels: npt.NDArray[np.int64]) -> str:
    """Identity of a data set's content: which images with which labels, in which order."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(np.ascontiguousarray(checksums, dtype="<u8").tobytes())
    digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()


def image_checksum(data: bytes) -> int:
    """64-bit BLAKE2b of an image file."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class ShardDataset:
    """Random access to the images of one indexed data set; safe to fork and to pickle.

    What every read needs is held in memory, 25 bytes per image; keys, labels and checksums are fetched from the index
    when somebody asks.
    """

    def __init__(self, path: str, info: DatasetInfo, index: str | pa.Buffer, reader: ShardReader) -> None:
        self.path = path
        self.info = info
        self._index = index
        self._reader = reader
        table = self._columns("shard", "offset", "size", "width", "height", "ok")
        self.shard: npt.NDArray[np.int32] = table["shard"].to_numpy()
        self.offset: npt.NDArray[np.int64] = table["offset"].to_numpy()
        self.size: npt.NDArray[np.int32] = table["size"].to_numpy().astype(np.int32)
        self.width: npt.NDArray[np.int32] = table["width"].to_numpy()
        self.height: npt.NDArray[np.int32] = table["height"].to_numpy()
        self.ok: npt.NDArray[np.bool_] = table["ok"].to_numpy(zero_copy_only=False)
        self._seen, self._num_reads = np.zeros(len(info.shards), dtype=bool), 0

    def with_own_files(self) -> ShardDataset:
        """The same data set for another thread: it shares the arrays and opens its own files."""
        other = copy.copy(self)
        other._reader = pickle.loads(pickle.dumps(self._reader))
        return other

    def _columns(self, *names: str) -> pa.Table:
        return self._file().read(columns=list(names), use_threads=False)

    def _file(self) -> pq.ParquetFile:
        # No thread of Arrow's may hold these bytes: when the program ends at once, with an error message, such a thread
        # asks the dying interpreter for its lock to free them, and the process aborts instead of exiting with its code.
        source = self._index if isinstance(self._index, str) else pa.BufferReader(self._index)
        return pq.ParquetFile(source, pre_buffer=False)

    def __len__(self) -> int:
        return self.info.num_samples

    @functools.cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """(num_samples,) class numbers, -1 where one is missing; None when no sample has one."""
        column = self._columns("label")["label"]
        return None if column.null_count == len(column) else column.fill_null(NO_LABEL).to_numpy()

    @functools.cached_property
    def checksum(self) -> npt.NDArray[np.uint64]:
        """(num_samples,) 64-bit hashes of the image files."""
        return self._columns("checksum")["checksum"].to_numpy()

    def key(self, i: int) -> str:
        """Key of sample i: its path in the shard without extension."""
        file = self._file()
        for number in range(file.num_row_groups):
            num_rows = file.metadata.row_group(number).num_rows
            if i < num_rows:
                return str(file.read_row_group(number, columns=["key"], use_threads=False)["key"][i].as_py())
            i -= num_rows
        raise AssertionError("no such sample")

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names by label, when known."""
        return self.info.classes

    @property
    def num_classes(self) -> int:
        """Number of classes: names when known, else the largest label + 1; 0 without labels."""
        if self.info.classes is not None:
            return len(self.info.classes)
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify images, labels and order."""
        return self.info.fingerprint

    def require_labels(self) -> npt.NDArray[np.int64]:
        """The labels of a data set that needs one for every image.

        Raises:
            DataError: labels are missing.
        """
        if self.labels is None:
            raise DataError(
                f"{self.path} has no labels; pack an image folder with one sub-folder per class, or add .cls"
            )
        missing = int((self.labels[self.ok] < 0).sum())
        if missing:
            raise DataError(f"{self.path}: {missing} of {len(self)} images have no label; label or remove them")
        return self.labels

    def describe(self, i: int) -> str:
        """Shard and key of sample i, for messages."""
        return f"sample '{self.key(i)}' of {join(self.location, self.info.shards[self.shard[i]].name)}"

    @property
    def location(self) -> str:
        """Folder or URL of the shards."""
        return self.info.shards_at or self.path

    def read(self, i: int) -> bytes:
        """Bytes of image file i.

        Raises:
            DataError: the shard is missing or shorter than the index says.
        """
        name, size = self.info.shards[self.shard[i]].name, int(self.size[i])
        try:
            data = self._reader.read(name, int(self.offset[i]), size)
        except FileNotFoundError as error:
            raise DataError(f"shard {join(self.location, name)} is missing; restore it or index again") from error
        except OSError as error:
            raise DataError(f"cannot read shard {join(self.location, name)}: {error}") from error
        if len(data) != size:
            raise DataError(
                f"shard {join(self.location, name)} is truncated: {self.describe(i)} ends after its last byte"
            )
        return data

    def decode(self, i: int, channels: int = 3) -> torch.Tensor:
        """Image i as uint8 (channels, height, width).

        The first image of each shard, and one in sixteen after it, is compared with the index's checksum, so that a
        shard that was written anew does not pass for the old one.

        Raises:
            UndecodableImageError: the bytes are no image.
            DataError: the shard is missing or shorter than the index says, or holds another image.
        """
        data = self.read(i)
        image = decode(data, channels)
        shard = self.shard[i]
        self._num_reads += 1
        if not self._seen[shard] or self._num_reads % _CHECKED_SHARE == 0:
            self._seen[shard] = True
            if image_checksum(data) != self.checksum[i]:
                raise DataError(
                    f"shard {join(self.location, self.info.shards[shard].name)} was changed after it was indexed: "
                    f"{self.describe(i)} is another image; restore the shard, or run `aimscale data index` again"
                )
        return image


def require_channels(channels: int) -> None:
    """Refuse models of other than grey or colour images: DataError."""
    if channels not in (1, 3):
        raise DataError(f"image files are read as 1 (grey) or 3 (RGB) channels, not {channels}; change model.channels")


def open_dataset(path: str | Path, *, cache_dir: str | None = None, cache_gb: float = 100.0) -> ShardDataset:
    """Open a folder or URL that holds `dataset.json` and `index.parquet`.

    Local shards are checked to exist with the size that the index knows; shards at a URL are kept in `cache_dir`, at
    most `cache_gb` in all, or read by byte ranges when it is None.

    Raises:
        DataError: no index, an index that contradicts itself, or a missing or truncated shard.
    """
    where = str(path)
    if not is_url(where) and not Path(where).is_dir():
        raise DataError(f"data set folder {where} does not exist")
    try:
        info = DatasetInfo.from_json(read_bytes(join(where, DATASET_FILE)).decode(), join(where, DATASET_FILE))
        index = join(where, INDEX_FILE)
        source = pa.py_buffer(read_bytes(index)) if is_url(where) else index
        metadata = pq.read_metadata(pa.BufferReader(source) if is_url(where) else index)
    except FileNotFoundError as error:
        raise DataError(f"{where} has no index; run `aimscale data index {where}` or `aimscale data pack`") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot read the index of {where}: {error}") from error
    if metadata.schema.to_arrow_schema().remove_metadata() != SCHEMA or metadata.num_rows != info.num_samples:
        raise DataError(
            f"the index of {where} does not match its {DATASET_FILE}; run `aimscale data index {where}` again"
        )
    location = info.shards_at or where
    reader: ShardReader
    if not is_url(location):
        _check_shards(Path(location), info)
        reader = LocalReader(Path(location))
    elif cache_dir is None:
        reader = RemoteReader(location)
    else:
        sizes = {shard.name: shard.size for shard in info.shards}
        reader = CachedReader(location, sizes, Path(cache_dir), int(cache_gb * 1e9))
    return ShardDataset(where, info, source, reader)


def _check_shards(folder: Path, info: DatasetInfo) -> None:
    for shard in info.shards:
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


def write_index(folder: Path, info: DatasetInfo, columns: dict[str, Any]) -> None:
    """Replace both files, each in one step; `dataset.json` last, so that it vouches for the index."""
    table = pa.table(columns, schema=SCHEMA)
    assert len(table) == info.num_samples, "write_index: rows and num_samples differ"
    with written_aside(folder / INDEX_FILE) as aside:
        pq.write_table(table, aside, row_group_size=_ROW_GROUP)
    write_text(folder / DATASET_FILE, info.to_json())
