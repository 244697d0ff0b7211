"""Write data sets: images in, webdataset's shards with an index out; nothing half-written is ever left behind.

A folder of image files is packed in parallel, each file decoded once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import tarfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.store.card import DatasetInfo, image_checksum
from aimscale.harness.data.store.decoding import (
    IMAGE_EXTENSIONS,
    UndecodableImageError,
    decode,
    is_transparent,
    resize_shorter_side,
)
from aimscale.harness.data.store.indexing import SCAN_SCHEMA, ShardScan, write_scans
from aimscale.harness.data.store.tars import MAX_IMAGE_BYTES
from aimscale.harness.run.files import written_dir_aside

MAX_SHARD_BYTES = 500e6
"""Size at which a new shard begins, unless told otherwise."""
_MAX_SHARD_SAMPLES = 100_000
_LOSSLESS_SIDE = 128  # resized images up to this side are stored as PNG: JPEG's blocks would dominate them
_CHUNK = 64  # images that a process prepares at a time
_WORTH_PROCESSES = 5000  # images, which take longer than starting processes


class PackedImage(NamedTuple):
    """One image file to write."""

    key: str
    extension: str
    data: bytes
    label: int | None
    shape: tuple[int, int] | None = None
    """(height, width) in pixels, where the bytes were decoded before."""
    is_transparent: bool = False
    """Whether pixels were laid on white."""


class Packed(NamedTuple):
    """An image folder that was packed."""

    info: DatasetInfo
    skipped: list[Path]
    """Files that were left out, since they do not decode."""
    num_transparent: int
    """Images whose transparent pixels are read as white."""


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
        scans = _write_shards(folder, images, max_shard_bytes)
        return write_scans(folder, scans, name=name or out.name, classes=classes)


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


def pack_folder(
    folder: Path,
    out: Path,
    *,
    resize: int | None = None,
    skip_bad: bool = False,
    part: tuple[int, int] | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    num_workers: int | None = None,
) -> Packed:
    """Pack an image folder; sub-folders, sorted, become classes.

    Images are written in a fixed shuffled order, so that the first n are a random subset. With `resize`, shorter sides
    above it are shrunk to it once, which spares every epoch the decoding of pixels that no crop keeps. With `part`,
    only positions start..stop-1 of the shuffled order: ranges that do not overlap are disjoint random subsets. The
    result is the same for any `num_workers` (processes; by default every core, where there are thousands of images).

    Raises:
        DataError: no images, images both in `folder` and in sub-folders, `out` exists, an undecodable image
            (unless `skip_bad`), or a part beyond the images that are there.
    """
    files, classes = list_images(folder)
    files = [files[number] for number in shuffled_order(len(files), part)]
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if len(files) >= _WORTH_PROCESSES else 1
    images = _ImageFolder(folder=folder, files=files, classes=classes, resize=resize)
    skipped: list[Path] = []
    transparent: list[Path] = []

    def good_ones(prepared: Iterator[PackedImage | str]) -> Iterator[PackedImage]:
        for file, image in zip(files, prepared, strict=True):
            if isinstance(image, PackedImage):
                if image.is_transparent:
                    transparent.append(file)
                yield image
            elif skip_bad:
                skipped.append(file)
            else:
                raise DataError(f"image {file} cannot be decoded ({image}); repair or remove it, or pass --skip-bad")
        if len(skipped) == len(files):
            raise DataError(f"none of the {len(files)} images of {folder} can be decoded")

    with contextlib.closing(_prepared(images, num_workers)) as prepared:
        info = write_dataset(out, good_ones(prepared), classes=classes, max_shard_bytes=max_shard_bytes)
    return Packed(info, skipped, len(transparent))


def list_images(folder: Path) -> tuple[list[Path], tuple[str, ...] | None]:
    """Image files, sorted, and class names: the sub-folders that hold images, or None when there are none.

    Raises:
        DataError: no folder, no images, or images both beside and inside of sub-folders.
    """
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist")
    named = (path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
    files = sorted(path for path in named if path.is_file() or not path.exists())  # the latter: a link to nothing
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    loose = sum(path.parent == folder for path in files)
    if classes and loose:
        raise DataError(
            f"{folder} holds {loose} images beside its sub-folders, so their class is unknown; "
            "move them into a sub-folder, or pack a folder without any"
        )
    return files, tuple(classes) or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ImageFolder(Dataset[PackedImage | str]):
    """Files in the order in which they are packed."""

    folder: Path
    files: Sequence[Path]
    classes: tuple[str, ...] | None
    resize: int | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> PackedImage | str:
        """The image to write for a file, or why there is none."""
        path = self.files[number]
        try:
            if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
                return f"it has {size:,} bytes; the limit is {MAX_IMAGE_BYTES:,}"
            data = path.read_bytes()
            image, on_white = decode(data), is_transparent(data)
        except (UndecodableImageError, OSError) as error:
            return str(error)
        extension = path.suffix[1:].lower()
        if self.resize is not None and min(image.shape[-2:]) > self.resize:
            image = resize_shorter_side(image, self.resize)
            extension, data = encode(image)
        label = self.classes.index(path.relative_to(self.folder).parts[0]) if self.classes else None
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)  # a dot would end the key
        height, width = image.shape[-2:]
        return PackedImage(f"{number:09d}-{stem}", extension, data, label, (height, width), on_white)


def _prepared(images: _ImageFolder, num_workers: int) -> Generator[PackedImage | str]:
    """`_ImageFolder[...]` of each file, in order, a few chunks ahead."""
    others = num_workers if num_workers > 1 else 0
    context = "forkserver" if others else None
    for chunk in DataLoader(
        images, batch_size=_CHUNK, num_workers=others, collate_fn=list, multiprocessing_context=context
    ):
        yield from chunk
