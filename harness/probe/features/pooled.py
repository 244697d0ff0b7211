"""The pooled features of every block, one vector per image and block: in memory, or in a file of bounded size.

Vectors are kept as deviations from a centre, so that bf16 rounds what distinguishes images and not a common offset. A
file is written stretch by stretch, each with a checksum and the state of the pass at its end: a pass that was cut off
goes on, and a damaged or foreign file is computed again.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.backbones import ProbeError
from aimscale.harness.run.files import written_aside

STRETCH_ROWS = 4096
"""Rows per checksum: at most so many are computed again after an interruption."""


class PooledFeatures:
    """Means over tokens of all blocks for this rank's images: image i is row i // world_size of rank i mod world_size.

    `put` fills rows, `seal` makes a stretch of them last; `num_sealed` says how many an earlier process left.
    """

    num_tokens = 1

    def __init__(
        self,
        num_rows: int,
        centre: Tensor,
        dtype: torch.dtype,
        group: Group,
        *,
        file: Path | None = None,
        key: str = "",
    ):
        """Rows of (L, d) values about `centre` (L, d), in memory or, with `file`, on disk under a `key`.

        Raises:
            ProbeError: the disk has no room.
        """
        self.group = group
        self.num_rows = num_rows
        self.num_blocks, self.width = centre.shape
        self.num_sealed = 0
        self.state: Any = None
        """Of the pass at the end of the sealed stretches."""
        self._centre = centre
        self._file, self._key = file, key
        self._checksums: list[int] = []
        if file is None or not num_rows:
            self._file = None
            self._values = torch.empty(num_rows, *centre.shape, dtype=dtype)
        else:
            self._values = self._map(file, num_rows * centre.numel() * dtype.itemsize, dtype)
            self._go_on()

    @property
    def num_bytes(self) -> int:
        """Of this rank's rows."""
        return self._values.numel() * self._values.element_size()

    @property
    def is_on_disk(self) -> bool:
        """Whether a file holds them."""
        return self._file is not None

    def _map(self, file: Path, num_bytes: int, dtype: torch.dtype) -> Tensor:
        """The file's bytes as values; all of its space is claimed now, so that no write can fail later."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a+b") as opened:
                opened.truncate(num_bytes)
                os.posix_fallocate(opened.fileno(), 0, num_bytes)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise ProbeError(
                f"{file} needs {num_bytes / 1e9:.3g} GB for pooled features and cannot have them ({error.strerror}); "
                "free space there, or give memory with --cache-gb"
            ) from error
        values = torch.from_file(str(file), shared=True, size=num_bytes, dtype=torch.uint8)
        return values.view(dtype).view(self.num_rows, self.num_blocks, self.width)

    def _go_on(self) -> None:
        """Take over what an earlier process sealed, if it is of the same key and whole."""
        assert self._file is not None
        try:
            record = torch.load(self._record, map_location="cpu", weights_only=True)
            if record["key"] != self._key:
                return
            checksums = list(record["checksums"])
        except FileNotFoundError:
            return
        except Exception:  # torch raises many kinds for a file that it cannot read
            checksums = [-1]
        if any(self._checksum(number) != wanted for number, wanted in enumerate(checksums)):
            print(f"{self._file} is damaged; its features are computed again", file=sys.stderr, flush=True)
            return
        self._checksums, self.num_sealed, self.state = checksums, len(checksums), record["state"]

    @property
    def _record(self) -> Path:
        assert self._file is not None
        return self._file.with_suffix(".partial.pt")  # counts as progress of a probe job

    def _checksum(self, number: int) -> int:
        rows = self._values[number * STRETCH_ROWS : (number + 1) * STRETCH_ROWS]
        return zlib.crc32(rows.contiguous().view(torch.uint8).numpy().data)

    def put(self, first_row: int, vectors: Tensor) -> None:
        """Write rows from `first_row` on: float32 (L, n, d)."""
        rows = (vectors - self._centre[:, None]).transpose(0, 1)
        self._values[first_row : first_row + len(rows)] = rows.to("cpu", self._values.dtype)

    def seal(self, state: Any) -> None:
        """The next stretch is complete; with a file, it and the `state` of the pass outlive this process."""
        if self._file is not None:
            self._checksums.append(self._checksum(self.num_sealed))
            with written_aside(self._record, durable=False) as aside:
                torch.save({"key": self._key, "checksums": self._checksums, "state": state}, aside)
        self.num_sealed += 1

    def remove(self) -> None:
        """Give the disk back."""
        if self._file is not None:
            self._values = self._values[:0].clone()
            self._file.unlink(missing_ok=True)
            self._record.unlink(missing_ok=True)

    def rows(self, numbers: Tensor | slice) -> Tensor:
        """Vectors float32 (L, n, d) of these rows, on the device."""
        stored = self._values[numbers].to(self._centre.device)
        return stored.float().transpose(0, 1) + self._centre[:, None]

    def parts(self, chunks: Iterable[Sequence[int]], epoch: int | None = None) -> Iterator[Tensor]:
        """The vectors of this rank's images as one token each: (L, b, 1, d) for every chunk."""
        for chunk in chunks:
            numbers = torch.as_tensor(chunk, dtype=torch.int64) // self.group.world_size
            yield self.rows(numbers)[:, :, None]
