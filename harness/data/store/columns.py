"""Columns of an index: mapped from files that all processes of a machine share.

A mapped column costs nothing to open, and a row costs the page that it lies on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from aimscale.harness.data.random_access import I64
from aimscale.harness.data.store.card import NO_LABEL, DatasetInfo

SAMPLE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("width", "<u2"), ("height", "<u2")])
"""What every read needs: where the image file starts in its shard and its length, bytes; its pixels, 0 x 0 if bad."""

BLOCK_ROWS = 1 << 16
"""Rows of a column that are read at once when it is walked from front to back."""


class Column:
    """Rows of one dtype, of an .npy file; safe to fork, and pickled by the file's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")

    def __reduce__(self) -> tuple[Any, ...]:
        return Column, (self._path,)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> npt.NDArray[Any]:
        """The whole column, not copied; walking it maps all of it."""
        return self._values

    def take(self, rows: I64) -> npt.NDArray[Any]:
        """Copies of some rows."""
        return self._values[rows]

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """(first row, copy of up to BLOCK_ROWS rows), from front to back."""
        for first in range(0, len(self), BLOCK_ROWS):
            yield first, np.array(self._values[first : first + BLOCK_ROWS])


class Index:
    """The columns of one data set, in a folder of .npy files."""

    samples: Column
    """Of SAMPLE."""
    checksum: Column
    """uint64: 64-bit hashes of the image files."""
    label: Column | None
    """Class numbers, NO_LABEL where one is missing; None when no sample has one."""

    def __init__(self, folder: Path) -> None:
        self.samples, self.checksum = Column(folder / "samples.npy"), Column(folder / "checksum.npy")
        self.label = Column(folder / "label.npy") if (folder / "label.npy").exists() else None
        self._shards, self._bad, self._bad_before = (
            Column(folder / f"{name}.npy") for name in ("shards", "bad", "bad_before")
        )

    @property
    def shards(self) -> npt.NDArray[Any]:
        """(num_shards,) of name (bytes), size (bytes of the file) and first (number of its first sample)."""
        return self._shards.values

    @property
    def bad(self) -> I64:
        """Numbers of the undecodable samples, ascending."""
        return self._bad.values

    @property
    def bad_before(self) -> I64:
        """For each of them, how many usable samples stand before it."""
        return self._bad_before.values


def shard_table(names: list[str], sizes: list[int], counts: list[int]) -> npt.NDArray[Any]:
    """`Index.shards` of some tar files in order."""
    encoded = [name.encode() for name in names]
    width = max(map(len, encoded), default=1)
    table = np.zeros(len(names), np.dtype([("name", f"S{width}"), ("size", "<i8"), ("first", "<i8")]))
    table["name"], table["size"] = encoded, sizes
    table["first"][1:] = np.cumsum(counts[:-1])
    return table


class IndexWriter:
    """Writes the folder that `Index` reads, a stretch of `num_samples` samples at a time."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self._folder, self._end = folder, 0
        self._samples, self._checksum, self._label = (
            np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=(num_samples,))
            for name, dtype in (("samples", SAMPLE), ("checksum", "<u8"), ("label", "<i4"))
        )

    def append(self, samples: npt.NDArray[Any], checksums: npt.NDArray[np.uint64], labels: I64) -> None:
        """Add samples; `labels` holds NO_LABEL where one is missing."""
        rows = slice(self._end, self._end + len(samples))
        self._samples[rows], self._checksum[rows], self._label[rows] = samples, checksums, labels
        self._end = rows.stop

    def finish(
        self, shards: npt.NDArray[Any], *, name: str, classes: tuple[str, ...] | None, shards_at: str | None
    ) -> DatasetInfo:
        """Write the other files; what `dataset.json` says of them all."""
        num_samples = len(self._samples)
        assert self._end == num_samples, "IndexWriter: other samples than announced"
        for column in (self._samples, self._checksum, self._label):
            column.flush()
        digest, has_labels = hashlib.blake2b(self._checksum.data, digest_size=8), False
        for first in range(0, num_samples, BLOCK_ROWS):
            labels = self._label[first : first + BLOCK_ROWS]
            digest.update(labels.astype("<i8").tobytes())
            has_labels |= bool((labels != NO_LABEL).any())
        if not has_labels:
            (self._folder / "label.npy").unlink()
        width, height = self._samples["width"], self._samples["height"]
        bad = np.flatnonzero(width == 0)
        num_largest = np.count_nonzero((width == width.max()) & (height == height.max()))
        np.save(self._folder / "bad.npy", bad)
        np.save(self._folder / "bad_before.npy", bad - np.arange(len(bad)))
        np.save(self._folder / "shards.npy", shards)
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
