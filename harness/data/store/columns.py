"""Columns of an index, mapped from files that all processes of a machine share.

Opening a mapped column costs nothing, and reading a row costs the page that it lies on.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from aimscale.harness.data.random_access import I64
from aimscale.harness.data.store.dataset_info import NO_LABEL, DatasetInfo

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("width", "<u2"), ("height", "<u2")])
"""Record that every read needs: offset of the image file in its shard and its length, bytes; its width and height in
pixels, 0 x 0 if bad."""

FILES = ("samples.npy", "checksum.npy", "label.npy", "shards.npy", "bad.npy", "bad_before.npy")
"""Files of the folder; `label.npy` is missing if no sample has a label."""

BLOCK_ROWS = 1 << 16
"""Rows of a column that are read at once in a sequential scan."""


class Index:
    """Columns of one data set, mapped from a folder of .npy files; safe to fork; pickled by its name."""

    samples: npt.NDArray[Any]
    """Records of type SAMPLE."""
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

    def __init__(self, folder: Path, info: DatasetInfo) -> None:
        """Map the files; ValueError if they do not belong to the data set."""
        self._made_of = folder, info
        self.samples = _mapped(folder / "samples.npy", SAMPLE)
        self.checksum = _mapped(folder / "checksum.npy", "<u8")
        self.label = _mapped(folder / "label.npy", "<i4") if (folder / "label.npy").exists() else None
        self.shards = _mapped(folder / "shards.npy")
        self.bad, self.bad_before = (_mapped(folder / f"{name}.npy", "<i8") for name in ("bad", "bad_before"))
        if (self.shards.dtype.names or ()) != ("name", "size", "first"):
            raise ValueError("shards.npy holds no table of shards")
        of_samples = [column for column in (self.samples, self.checksum, self.label) if column is not None]
        lengths = [*map(len, of_samples), len(self.shards), len(self.bad), len(self.bad_before)]
        if lengths != [info.num_samples] * len(of_samples) + [info.num_shards, info.num_bad, info.num_bad]:
            raise ValueError(f"its files hold {lengths} rows")
        first = self.shards["first"]
        if len(first) and (first[0] != 0 or (np.diff(first) < 0).any() or first[-1] > info.num_samples):
            raise ValueError("its shards do not follow each other")

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, self._made_of


def _mapped(path: Path, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    """Map the rows of an .npy file; ValueError if it holds anything but rows of `dtype`."""
    values = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    if values.ndim != 1 or (dtype is not None and values.dtype != np.dtype(dtype)):
        raise ValueError(f"{path.name} holds {values.dtype} of shape {values.shape}")
    return values


def shard_table(names: list[str], sizes: list[int], counts: list[int]) -> npt.NDArray[Any]:
    """Build `Index.shards` from tar files in order."""
    encoded = [os.fsencode(name) for name in names]
    width = max(map(len, encoded), default=1)
    table = np.zeros(len(names), np.dtype([("name", f"S{width}"), ("size", "<i8"), ("first", "<i8")]))
    table["name"], table["size"] = encoded, sizes
    table["first"][1:] = np.cumsum(counts[:-1])
    return table


class IndexWriter:
    """Writer of the folder that `Index` reads, a block of samples at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._num_samples = folder, 0
        self._dtypes = {"samples": SAMPLE, "checksum": np.dtype("<u8"), "label": np.dtype("<i4")}
        for name in self._dtypes:
            self._write_header(name, "wb")

    def append(self, rows: pa.Table) -> None:
        """Add samples, as `indexing.SCAN_SCHEMA` has them."""
        samples = np.empty(len(rows), SAMPLE)
        for field in SAMPLE.names or ():
            samples[field] = rows[field].to_numpy()
        labels = rows["label"].fill_null(NO_LABEL).to_numpy()
        for name, values in (("samples", samples), ("checksum", rows["checksum"].to_numpy()), ("label", labels)):
            with (self._folder / f"{name}.npy").open("ab") as file:
                file.write(values.astype(self._dtypes[name]).tobytes())
        self._num_samples += len(rows)

    def finish(
        self, shards: npt.NDArray[Any], *, name: str, classes: tuple[str, ...] | None, shards_at: str | None
    ) -> DatasetInfo:
        """Write the other files, and return what `dataset.json` says of them all."""
        for column in self._dtypes:
            self._write_header(column, "r+b")  # numpy reserves space in it for any number
        samples, checksum, label = (
            np.lib.format.open_memmap(self._folder / f"{column}.npy", mode="r") for column in self._dtypes
        )
        digest, has_labels = hashlib.blake2b(checksum.data, digest_size=8), False
        for first in range(0, self._num_samples, BLOCK_ROWS):
            labels = label[first : first + BLOCK_ROWS]
            digest.update(labels.astype("<i8").tobytes())
            has_labels |= bool((labels != NO_LABEL).any())
        if not has_labels:
            (self._folder / "label.npy").unlink()
        width, height = samples["width"], samples["height"]
        bad = np.flatnonzero(width == 0)
        num_largest = np.count_nonzero((width == width.max()) & (height == height.max()))
        np.save(self._folder / "bad.npy", bad)
        np.save(self._folder / "bad_before.npy", bad - np.arange(len(bad)))
        np.save(self._folder / "shards.npy", shards)
        return DatasetInfo(
            name=name,
            num_samples=self._num_samples,
            num_bad=len(bad),
            num_shards=len(shards),
            total_bytes=int(shards["size"].sum()),
            max_width=int(width.max()),
            max_height=int(height.max()),
            max_pixels=int(np.multiply(width, height, dtype=np.int64).max()),
            one_size=bool(num_largest + len(bad) == self._num_samples),
            classes=classes,
            shards_at=shards_at,
            fingerprint=digest.hexdigest(),
        )

    def _write_header(self, name: str, mode: Literal["wb", "r+b"]) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtypes[name])
        with (self._folder / f"{name}.npy").open(mode) as file:
            shape = (self._num_samples,)
            np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
