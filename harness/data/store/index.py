"""A data set: tar shards and their index, opened for random access without a scan.

`dataset.json` says what the data set is (`DatasetInfo`). `index-FINGERPRINT/` holds what reading needs as .npy columns,
which are mapped: two billion images open as fast as two thousand, and processes share the pages. `index.parquet` holds
the same and the keys, for people and other tools (`indexing.SCHEMA`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64
from aimscale.harness.data.store.dataset_info import INDEX_FILE, DatasetInfo, image_checksum, read_info
from aimscale.harness.data.store.shards import ByteRange, Reader, cached_files, is_url, join, open_file, open_reader
from aimscale.harness.run.files import check_file

if TYPE_CHECKING:
    import torch

MAX_KEPT_BYTES = 256 * 2**20
"""Limit on the decoded pixels of small images that a process keeps, over all data sets."""
COLUMNS = {
    "samples": np.dtype([("offset", "<u8"), ("size", "<u4"), ("width", "<u2"), ("height", "<u2")]),
    "checksum": np.dtype("<u8"),
    "label": np.dtype("<i4"),
}
"""Columns of samples, see `Index`, and their types."""
MAX_COLUMN_BYTES = 10**12
"""Limit on the bytes of a column, which is mapped and not read."""
_FILES = tuple(f"{name}.npy" for name in (*COLUMNS, "shards", "bad", "bad_before"))


class Index:
    """Columns of one data set, mapped from a folder of .npy files; safe to fork; pickled by its name."""

    samples: npt.NDArray[Any]
    """Records of offset in the shard and size of the image file, bytes; width and height, pixels, 0 x 0 if bad."""
    checksum: npt.NDArray[np.uint64]
    """64-bit hashes of the image files."""
    label: npt.NDArray[np.int32] | None
    """Class numbers, NO_LABEL if one is missing; None when no sample has one."""
    shards: npt.NDArray[Any]
    """Table (num_shards,) of name (bytes), size (bytes of the file) and first (number of its first sample)."""
    bad: I64
    """Numbers of the undecodable samples, ascending."""
    bad_before: I64
    """Number of usable samples before each bad one."""

    def __init__(self, folder: Path) -> None:
        def mapped(name: str) -> npt.NDArray[Any]:
            check_file(path := folder / f"{name}.npy", MAX_COLUMN_BYTES)
            try:
                return np.asarray(np.lib.format.open_memmap(path, mode="r"))
            except Exception as error:  # numpy's reader of the header raises tokenize.TokenError and more
                raise OSError(f"{path.name}: {type(error).__name__} {error}") from error

        self._folder = folder
        self.samples, self.checksum, self.shards = mapped("samples"), mapped("checksum"), mapped("shards")
        self.bad, self.bad_before = mapped("bad"), mapped("bad_before")
        self.label = mapped("label") if (folder / "label.npy").exists() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self._folder,)

    @property
    def shard_sizes(self) -> dict[str, int]:
        """Bytes of the tar files by their names, which are relative to the folder or URL of the shards."""
        return dict(zip(map(os.fsdecode, self.shards["name"].tolist()), self.shards["size"].tolist(), strict=True))


class ShardDataset:
    """Random access to the images of one indexed data set; safe to fork and to pickle."""

    path: str
    """Folder or URL of the index."""
    info: DatasetInfo
    index: Index
    """Columns, one row per sample; reading all of one maps all of it."""

    def __init__(self, path: str, info: DatasetInfo, index: Index, reader: Reader) -> None:
        self.path = path
        self.info = info
        self.index = index
        self._reader = reader
        self._first = np.ascontiguousarray(index.shards["first"])
        self._seen = np.zeros(info.num_shards, dtype=bool)

    def __len__(self) -> int:
        return self.info.num_samples

    def usable(self, numbers: npt.ArrayLike | None = None) -> I64:
        """Return the sample numbers of the decodable images at `numbers` (0..info.num_usable-1), in index order; by
        default of all, which must fit into memory."""
        wanted = np.asarray(np.arange(self.info.num_usable) if numbers is None else numbers, dtype=np.int64)
        return wanted + np.searchsorted(self.index.bad_before, wanted, side="right")

    def sides(self, samples: I64) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return (heights, widths) of some samples, pixels."""
        rows = self.index.samples[samples]
        return rows["height"].astype(np.int32), rows["width"].astype(np.int32)

    @functools.cached_property
    def labels(self) -> I64 | None:
        """(num_samples,) class numbers, -1 where one is missing; None when no sample has one."""
        return None if self.index.label is None else self.index.label.astype(np.int64)

    def key(self, i: int) -> str:
        """Return the key of sample i: its path in the shard without extension."""
        # imported here: its allocator starts a thread, which loader processes do not need
        import pyarrow as pa
        import pyarrow.parquet as pq

        where = join(self.path, INDEX_FILE)
        try:
            # No Arrow thread may hold Python's bytes: if the program exits at that moment, with an error message,
            # such a thread asks the dying interpreter for its lock to free them, and the process aborts.
            with open_file(where) as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
                sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
                ends = np.cumsum(sizes)
                group = int(np.searchsorted(ends, i, side="right"))
                keys = file.read_row_group(group, columns=["key"], use_threads=False)["key"]
                return str(keys[i - ends[group]].as_py())
        except (pa.ArrowException, OSError, LookupError, UnicodeDecodeError) as error:
            raise DataError(f"{where} cannot be read ({error}); run `aimscale data index` again") from error

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
        """Return the labels, or raise DataError unless every usable image has one."""
        if self.labels is None:
            raise DataError(
                f"{self.path} has no labels; pack an image folder with one sub-folder per class, or add .cls"
            )
        missing = int((self.labels[self.usable()] < 0).sum())
        if missing:
            raise DataError(f"{self.path}: {missing} of {len(self)} images have no label; label or remove them")
        return self.labels

    def describe(self, i: int, reason: str = "") -> str:
        """Name shard and key of sample i, for messages, and the reason why it cannot be decoded, if given."""
        name = f"sample '{self.key(i)}' of {self._shard_path(self.shard_of(i))}"
        return f"{name} ({reason})" if reason else name

    @property
    def location(self) -> str:
        """Folder or URL of the shards."""
        return self.info.shards_at or self.path

    def shard_of(self, i: int) -> int:
        """Return the number of the shard that holds sample i."""
        return int(self._first.searchsorted(i, side="right")) - 1

    def byte_ranges(self, samples: Sequence[int] | I64) -> list[ByteRange]:
        """Return the byte ranges of some image files."""
        numbers = np.asarray(samples, dtype=np.int64)
        rows = self.index.samples[numbers]
        names = self.index.shards["name"][self._first.searchsorted(numbers, side="right") - 1].tolist()
        return list(zip(map(os.fsdecode, names), rows["offset"].tolist(), rows["size"].tolist(), strict=True))

    def read(self, i: int) -> bytes:
        """Read image file i."""
        return self.read_many([i])[0]

    def read_ahead(self, samples: I64, channels: int) -> None:
        """Start to read the images that this process will next ask for and whose pixels it does not keep; returns at
        once, and leaves errors to the reading."""
        cache = self._pixel_cache(channels)
        self._reader.read_ahead(self.byte_ranges(samples if cache is None else samples[~cache.known[samples]]))

    def read_many(self, samples: Sequence[int] | I64) -> list[bytes]:
        """Read some image files, in that order."""
        images = []
        for i, (name, offset, size) in zip(samples, self.byte_ranges(samples), strict=True):
            try:
                data = self._reader.read(name, offset, size)
            except OSError as error:
                shard = join(self.location, name)
                raise DataError(f"cannot read shard {shard} ({error}); restore it or index again") from error
            if len(data) != size:
                raise DataError(
                    f"shard {join(self.location, name)} is truncated: {self.describe(int(i))} ends after its last byte"
                )
            images.append(data)
        return images

    def decode(self, i: int, channels: int = 3) -> torch.Tensor:
        """Decode image i to uint8 (channels, height, width).

        Raises:
            DataError: the bytes are no image, or the shard is missing, shorter than the index says, or holds another.
        """
        images, problems = self.decode_many(np.array([i]), channels)
        if problems:
            raise DataError(f"{self.describe(i, problems[0])} cannot be decoded; repair the shard, or index it again")
        return images[0]

    def decode_many(self, samples: I64, channels: int) -> tuple[torch.Tensor, dict[int, str]]:
        """Read and decode images of one size.

        Returns:
            uint8 (number that decoded, channels, height, width), and the reasons of those that did not, by their place
            in `samples`.
        """
        import torch  # a plan opens data sets, on machines that have neither torch nor a decoder of images

        from aimscale.harness.data.images import UndecodableImageError, decode

        cache, problems = self._pixel_cache(channels), dict[int, str]()
        fresh = np.arange(len(samples)) if cache is None else np.flatnonzero(~cache.known[samples])
        decoded: list[torch.Tensor] = []
        for place, data in zip(fresh.tolist(), self.read_many(samples[fresh]), strict=True):
            try:
                image = decode(data, channels)
            except UndecodableImageError as error:
                problems[place] = str(error)
                continue
            self.check(int(samples[place]), data, image.shape[-2:])
            if cache is None:
                decoded.append(image)
            else:
                cache.pixels[samples[place]] = image
                cache.known[samples[place]] = True  # after the pixels: another thread may read at any moment
        if cache is not None:
            return cache.pixels[torch.from_numpy(np.delete(samples, list(problems)))], problems
        return torch.stack(decoded) if decoded else torch.empty(0, channels, 1, 1, dtype=torch.uint8), problems

    def _pixel_cache(self, channels: int) -> _PixelCache | None:
        """Return this process's cache of the decoded pixels; None if images differ in size or take too much memory."""
        shape = (len(self), channels, self.info.max_height, self.info.max_width)
        key = (self.path, self.fingerprint, channels)
        if key not in _PIXEL_CACHES:
            room = MAX_KEPT_BYTES - sum(cache.pixels.nbytes for cache in _PIXEL_CACHES.values())
            if not self.info.one_size or math.prod(shape) > room:
                return None
            import torch

            made = _PixelCache(torch.empty(shape, dtype=torch.uint8), np.zeros(len(self), dtype=bool))
            _PIXEL_CACHES.setdefault(key, made)
        return _PIXEL_CACHES[key]

    def check(self, i: int, data: bytes, sides: Sequence[int]) -> None:
        """Compare an image's height and width, and the checksum of the first image that is read of each shard, with the
        index, so that a rewritten shard does not pass for the old one."""
        row, shard = self.index.samples[i], self.shard_of(i)
        is_same = tuple(sides) == (row["height"], row["width"])
        if not self._seen[shard]:
            self._seen[shard] = True
            is_same &= image_checksum(data) == self.index.checksum[i]
        if not is_same:
            raise DataError(
                f"shard {self._shard_path(shard)} was changed after it was indexed: {self.describe(i)} is another "
                "image; restore the shard, or run `aimscale data index` again"
            )

    def _shard_path(self, number: int) -> str:
        return join(self.location, os.fsdecode(self.index.shards["name"][number]))


class _PixelCache(NamedTuple):
    """Decoded images of a data set; memory is taken as they come."""

    pixels: torch.Tensor
    """uint8 (number of samples, channels, height, width)."""
    known: npt.NDArray[np.bool_]
    """Mask of the decoded samples, bool (number of samples,)."""


_PIXEL_CACHES: dict[tuple[str, str, int], _PixelCache] = {}
"""Caches by path, fingerprint and channels: a run reads small images many times."""


def require_channels(channels: int) -> None:
    """Raise DataError for models of other than grey or colour images."""
    if channels not in (1, 3):
        raise DataError(f"image files are read as 1 (grey) or 3 (RGB) channels, not {channels}; change model.channels")


def open_dataset(path: str | Path, *, cache_dir: str | None = None, cache_gb: float = 100.0) -> ShardDataset:
    """Open a folder or URL that holds `dataset.json` and its index.

    Local shards, the first 2,000 of them, are checked to exist with the size that the index knows; the index and shards
    of a URL are kept in `cache_dir`, by default the user's own cache, shards up to `cache_gb` in all.

    Raises:
        DataError: no index, an index that contradicts itself, or a missing or truncated shard.
    """
    where = str(path)
    info = read_info(where)
    try:
        folder = Path(where) / info.index_folder
        if is_url(where):
            folder = cached_files(where, info.index_folder, _FILES, cache_dir)
        index = Index(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"the index of {where} cannot be read ({reason}); run `aimscale data index` again") from error
    reader = open_reader(info.shards_at or where, index.shard_sizes, cache_dir, cache_gb)
    return ShardDataset(where, info, index, reader)
