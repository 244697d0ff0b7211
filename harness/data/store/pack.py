"""Write data sets: images in, webdataset tar shards with an index out; nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.store.decoding import UndecodableImageError, decode
from aimscale.harness.data.store.indexing import write_scans
from aimscale.harness.data.store.info import DatasetInfo, image_checksum
from aimscale.harness.data.store.scan import SCAN_SCHEMA, ShardScan
from aimscale.harness.run.files import written_dir_aside

MAX_SHARD_BYTES = 500e6
"""Size at which a new shard begins, unless told otherwise."""
_MAX_SHARD_SAMPLES = 100_000
_SHARD_PATTERN = "shard-%06d.tar"
_LOSSLESS_SIDE = 128  # resized images up to this side are stored as PNG: JPEG's blocks would dominate them


class PackedImage(NamedTuple):
    """One image file to write."""

    key: str
    extension: str
    data: bytes
    label: int | None
    shape: tuple[int, int] | None = None
    """(height, width) in pixels, where the bytes were decoded before."""


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, named `out` when the block ends well and removed after an error.

    Raises:
        DataError: `out` exists already, or cannot be written.
    """
    if out.exists():
        raise DataError(f"{out} exists already; choose another folder or remove it")
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(written_dir_aside(out))
        except OSError as error:
            raise DataError(f"cannot write to {out.parent}: {error.strerror}") from error
        yield folder


def write_dataset(
    out: Path,
    images: Iterable[PackedImage],
    *,
    name: str | None = None,
    classes: tuple[str, ...] | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> DatasetInfo:
    """Write shards of at most `max_shard_bytes` and their index to the new folder `out`.

    Raises:
        DataError: `out` exists, there are no images, or one cannot be decoded.
    """
    with new_folder(out) as folder:
        scans: list[ShardScan] = []
        writer = ShardWriter(folder, max_shard_bytes, scans.append)
        for image in images:
            writer.add(image)
        writer.close()
        return write_scans(folder, name or out.name, scans, classes)


class ShardWriter:
    """Writes images into tar shards and says of each finished one what its index needs, without reading it again."""

    def __init__(
        self, folder: Path, max_shard_bytes: float, finished: Callable[[ShardScan], None], *, number: int = 0
    ) -> None:
        """`number` is the first shard's; `finished` is called after each one is closed."""
        self._folder, self._max_shard_bytes, self._finished = folder, max_shard_bytes, finished
        self._number, self._num_bytes = number, 0
        self._tar: tarfile.TarFile | None = None
        self._rows: list[dict[str, Any]] = []

    def add(self, image: PackedImage) -> None:
        """Write one image, in a new shard when the last one is full.

        Raises:
            DataError: its size is not known and it cannot be decoded.
        """
        if self._num_bytes >= self._max_shard_bytes or len(self._rows) >= _MAX_SHARD_SAMPLES:
            self.close()
        if self._tar is None:
            self._tar = tarfile.open(self._folder / (_SHARD_PATTERN % self._number), "w")  # noqa: SIM115 (see close)
        if image.label is not None:
            self._member(f"{image.key}.cls", str(image.label).encode())
        offset = self._member(f"{image.key}.{image.extension}", image.data)
        try:
            height, width = image.shape or decode(image.data).shape[-2:]
        except UndecodableImageError as error:
            raise DataError(f"image {image.key} cannot be decoded ({error}); nothing was written") from error
        row = {"key": image.key, "offset": offset, "size": len(image.data), "label": image.label, "ok": True}
        self._rows.append(row | {"width": width, "height": height, "checksum": image_checksum(image.data)})

    def close(self) -> None:
        """End the shard that is being written, if there is one."""
        if self._tar is None:
            return
        self._tar.close()
        name = _SHARD_PATTERN % self._number
        rows = pa.Table.from_pylist(self._rows, schema=SCAN_SCHEMA)
        self._finished(ShardScan(name, (self._folder / name).stat().st_size, rows))
        self._tar, self._rows, self._num_bytes, self._number = None, [], 0, self._number + 1

    def _member(self, name: str, data: bytes) -> int:
        """Write one member; returns where its data start."""
        assert self._tar is not None, "ShardWriter: no shard is open"
        member = tarfile.TarInfo(name)  # its time is 0: the same images give the same bytes
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        self._num_bytes += len(data)
        return self._tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def shuffled_order(number: int, part: tuple[int, int] | None = None) -> npt.NDArray[np.int64]:
    """The fixed order in which `number` images are packed, or positions start..stop-1 of it.

    Raises:
        DataError: the part is empty or reaches beyond the images.
    """
    start, stop = part or (0, number)
    if not 0 <= start < stop <= number:
        raise DataError(f"images {start}:{stop} cannot be taken from {number}; give a range within 0:{number}")
    return permute(np.arange(start, stop), number, make_key("pack order"))


def encode(image: torch.Tensor) -> tuple[str, bytes]:
    """(extension, bytes) of uint8 (C, H, W): PNG when small, JPEG of quality 95 otherwise."""
    lossless = max(image.shape[-2:]) <= _LOSSLESS_SIDE
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, "png", compress_level=1)
    else:
        picture.save(buffer, "jpeg", quality=95, subsampling=0)
    return ("png" if lossless else "jpg"), buffer.getvalue()
