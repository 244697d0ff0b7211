"""Write data sets: images in, webdataset's shards with an index out; nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import webdataset
from PIL import Image

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.store.card import DatasetInfo, image_checksum
from aimscale.harness.data.store.decoding import UndecodableImageError, decode
from aimscale.harness.data.store.indexing import write_scans
from aimscale.harness.data.store.scan import SCAN_SCHEMA, ShardScan
from aimscale.harness.run.files import written_dir_aside

MAX_SHARD_BYTES = 500e6
"""Size at which a new shard begins, unless told otherwise."""
_MAX_SHARD_SAMPLES = 100_000
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
        return write_scans(folder, name or out.name, _write_shards(folder, images, max_shard_bytes), classes)


def _write_shards(folder: Path, images: Iterable[PackedImage], max_shard_bytes: float) -> list[ShardScan]:
    """What the index needs to know of each shard, without decoding an image again whose size is known."""
    scans: list[ShardScan] = []
    rows: dict[str, dict[str, Any]] = {}  # of the shard that is being written, by the file's name in it

    def finish(path: str) -> None:
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        entries = [row | {"offset": offsets[member]} for member, row in rows.items()]
        table = pa.Table.from_pylist(entries, schema=SCAN_SCHEMA)
        scans.append(ShardScan(Path(path).name, Path(path).stat().st_size, table))
        rows.clear()

    pattern = f"{str(folder).replace('%', '%%')}/shard-%06d.tar"
    limits = {"maxcount": _MAX_SHARD_SAMPLES, "maxsize": max_shard_bytes}
    # its files' time is 0: the same images give the same bytes
    with webdataset.ShardWriter(pattern, **limits, post=finish, verbose=0, encoder=False, mtime=0) as writer:
        for image in images:
            try:
                height, width = image.shape or decode(image.data).shape[-2:]
            except UndecodableImageError as error:
                raise DataError(f"image {image.key} cannot be decoded ({error}); nothing was written") from error
            label = {} if image.label is None else {"cls": str(image.label).encode()}
            writer.write({"__key__": image.key, image.extension: image.data, **label})
            row = {"key": image.key, "size": len(image.data), "label": image.label, "ok": True}
            row |= {"width": width, "height": height, "checksum": image_checksum(image.data)}
            rows[f"{image.key}.{image.extension}"] = row
    return scans


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
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, "png", compress_level=1)
    else:
        picture.save(buffer, "jpeg", quality=95, subsampling=0)
    return ("png" if lossless else "jpg"), buffer.getvalue()
