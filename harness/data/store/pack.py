"""Packing of images into webdataset's shards with an index; nothing half-written is ever left behind.

Image files are packed in parallel, each decoded once. A source may be cut into random parts, alike in their classes, of
which no two hold the same image.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import webdataset
from PIL import Image

from aimscale.harness.data import DataError
from aimscale.harness.data.images import (
    IMAGE_EXTENSIONS,
    UndecodableImageError,
    decode,
    is_transparent,
    resize_shorter_side,
)
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.store.dataset_info import DatasetInfo, image_checksum
from aimscale.harness.data.store.indexing import SCAN_SCHEMA, Progress, ShardScan, write_scans
from aimscale.harness.data.store.listing import Images, Listing
from aimscale.harness.data.store.parquet import EncodedImage, EncodedImages
from aimscale.harness.data.store.processes import map_in_processes
from aimscale.harness.run.files import atomic_dir

MAX_SHARD_BYTES = 500e6
"""Default size at which a new shard begins."""
_MAX_SHARD_SAMPLES = 100_000
_LOSSLESS_SIDE = 128  # resized images up to this side are stored as PNG: JPEG's blocks would dominate them
_CHUNK = 64  # images that a process prepares at a time
_WORTH_PROCESSES = 5000  # images, from which on processes are worth their start


class PackedImage(NamedTuple):
    """Image file to write."""

    key: str
    extension: str
    data: bytes
    label: int | None
    shape: tuple[int, int] | None = None
    """Size (height, width) in pixels, if the bytes were decoded before."""
    is_transparent: bool = False
    """Whether pixels were laid on white."""


class Packed(NamedTuple):
    """Result of packing."""

    info: DatasetInfo
    skipped: list[str]
    """Images that were left out because they do not decode, with their reasons."""
    num_transparent: int
    """Images whose transparent pixels are read as white."""


def check_new(out: Path) -> None:
    """Raise DataError if there is something at a path to write to."""
    if out.exists():
        raise DataError(f"{out} exists already; choose another folder or remove it")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which is renamed to `out` at the end of the block and removed after an error."""
    check_new(out)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(atomic_dir(out))
        except OSError as error:
            raise DataError(f"cannot write to {out.parent}: {error.strerror}") from error
        yield folder


def write_dataset(
    out: Path,
    images: Iterable[PackedImage],
    *,
    classes: tuple[str, ...] | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> DatasetInfo:
    """Write shards of at most `max_shard_bytes` and their index to the new folder `out`."""
    with new_folder(out) as folder:
        scans = _write_shards(folder, images, max_shard_bytes)
        return write_scans(folder, scans, name=out.name, classes=classes)


def _write_shards(folder: Path, images: Iterable[PackedImage], max_shard_bytes: float) -> list[ShardScan]:
    """Write shards, and return what the index needs of each without decoding images of known size again."""
    scans: list[ShardScan] = []
    rows: dict[str, dict[str, Any]] = {}  # rows of the current shard, by file name

    def finish(path: str) -> None:
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        entries = [row | {"offset": offsets[member]} for member, row in rows.items()]
        table = pa.Table.from_pylist(entries, schema=SCAN_SCHEMA)
        scans.append(ShardScan(Path(path).name, Path(path).stat().st_size, table))
        rows.clear()

    pattern = f"{str(folder).replace('%', '%%')}/shard-%06d.tar"
    limits = {"maxcount": _MAX_SHARD_SAMPLES, "maxsize": max_shard_bytes}
    # with mtime 0 the same images give the same bytes
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


def shuffled_order(number: int, part: str | None = None) -> npt.NDArray[np.int64]:
    """Return the fixed order in which `number` images are packed, or the part `START:STOP` of it, in images or per
    cent."""
    try:
        start, stop = (
            number * int(bound[:-1]) // 100 if bound.endswith("%") else int(bound)
            for bound in (part or f"0:{number}").split(":")
        )
    except ValueError as error:
        raise DataError(f"--images {part} is no range; write START:STOP, as in 0:50000 or 0:80%") from error
    if not 0 <= start < stop <= number:
        raise DataError(f"images {start}:{stop} cannot be taken from {number}; give a range within 0:{number}")
    return permute(np.arange(start, stop), number, make_key("pack order"))


def encode(image: torch.Tensor) -> tuple[str, bytes]:
    """Encode uint8 (C, H, W) to (extension, bytes): PNG when small, JPEG of quality 95 otherwise."""
    lossless = max(image.shape[-2:]) <= _LOSSLESS_SIDE
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, "png", compress_level=1)
    else:
        picture.save(buffer, "jpeg", quality=95, subsampling=0)
    return ("png" if lossless else "jpg"), buffer.getvalue()


def pack_images(
    listing: Listing,
    out: Path,
    *,
    resize: int | None = None,
    skip_bad: bool = False,
    order: npt.NDArray[np.int64] | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    num_workers: int | None = None,
    progress: Progress = lambda *_: None,
) -> Packed:
    """Pack listed images; the result is the same for any number of processes.

    Image files are copied byte by byte, in a fixed shuffled order, so that the first n are a random subset. With
    `resize`, images with a longer shorter side are shrunk to it once. `order` names the images to pack, by default all
    in `shuffled_order`.
    """
    order = shuffled_order(len(listing.images)) if order is None else order
    if num_workers is None:
        is_many = len(order) >= _WORTH_PROCESSES and isinstance(listing.images, list | EncodedImages)
        num_workers = len(os.sched_getaffinity(0)) if is_many else 1
    skipped: list[str] = []
    num_transparent = 0

    def good_ones(prepared: Iterator[PackedImage | str]) -> Iterator[PackedImage]:
        nonlocal num_transparent
        for done, (number, image) in enumerate(zip(order.tolist(), prepared, strict=True)):
            progress(f"packing {out.name}", done, len(order), "images")
            if isinstance(image, PackedImage):
                num_transparent += image.is_transparent
                yield image
            elif skip_bad:
                skipped.append(f"{listing.name_of(number)} ({image})")
            else:
                raise DataError(
                    f"image {listing.name_of(number)} cannot be decoded ({image}); repair or remove it, or pass "
                    "--skip-bad"
                )
        if len(skipped) == len(order):
            raise DataError(f"none of the {len(order)} images of {listing.source} can be decoded")

    def prepared() -> Generator[PackedImage | str]:
        chunks = (range(first, min(first + _CHUNK, len(order))) for first in range(0, len(order), _CHUNK))
        prepare = functools.partial(_prepare, listing, order, resize)
        for chunk in map(prepare, chunks) if num_workers == 1 else map_in_processes(prepare, chunks, num_workers):
            yield from chunk

    with contextlib.closing(prepared()) as images:
        info = write_dataset(out, good_ones(images), classes=listing.classes, max_shard_bytes=max_shard_bytes)
    return Packed(info, skipped, num_transparent)


def _prepare(listing: Listing, order: npt.NDArray[np.int64], resize: int | None, at: range) -> list[PackedImage | str]:
    """Return the images to write at these positions of the order, or why there is none."""
    return [_packed(listing, int(order[position]), position, resize) for position in at]


def _packed(listing: Listing, number: int, position: int, resize: int | None) -> PackedImage | str:
    """Return a listed image as it is written at a position, or why there is none."""
    try:
        name, data = _read(listing.images[number], number)
        image, on_white = decode(data), is_transparent(data)
    except (UndecodableImageError, DataError, OSError) as error:
        return str(error)
    stem, _, extension = name.rpartition(".")
    if extension.lower() not in IMAGE_EXTENSIONS:
        return f"its name ends in none of {', '.join(IMAGE_EXTENSIONS)}"
    if resize is not None and min(image.shape[-2:]) > resize:
        image = resize_shorter_side(image[None], resize)[0]
        extension, data = encode(image)
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", stem)  # a dot would end the key
    label = -1 if listing.labels is None else int(listing.labels[number])
    height, width = image.shape[-2:]
    return PackedImage(
        f"{position:09d}-{stem}", extension.lower(), data, None if label < 0 else label, (height, width), on_white
    )


def _read(image: str | EncodedImage | npt.NDArray[np.uint8], number: int) -> tuple[str, bytes]:
    """Read (file name, bytes) of an image file, or encode an array to one."""
    if isinstance(image, EncodedImage):
        return image
    if isinstance(image, np.ndarray):
        pixels = np.array(image if image.ndim == 3 else image[..., None])
        extension, data = encode(torch.from_numpy(pixels).permute(2, 0, 1))
        return f"{number}.{extension}", data
    return os.path.basename(image), Path(image).read_bytes()


class Split(NamedTuple):
    """Parts into which a listing is cut."""

    parts: dict[str, npt.NDArray[np.int64]]
    """Part -> its images in packing order."""
    num_together: int
    """Images that equal another one byte for byte and follow it into its part."""
    absent: dict[str, list[str]]
    """Part -> classes without an image in it."""


def split_images(listing: Listing, shares: Mapping[str, int]) -> Split:
    """Cut a listing into random parts of so many per cent, each with its share of every class to within an image or
    two; equal images fall into one part."""
    order = shuffled_order(len(listing.images))
    labels = np.zeros(len(order), np.int64) if listing.labels is None else np.asarray(listing.labels, np.int64)
    equal: dict[int, list[int]] = {}
    contents = _contents(listing.images)
    for position in np.argsort(labels[order], kind="stable").tolist():
        equal.setdefault(int(contents[order[position]]), []).append(position)
    positions: dict[str, list[int]] = {name: [] for name in shares}
    lacking = dict.fromkeys(shares, 0.0)
    for members in equal.values():
        for name, share in shares.items():
            lacking[name] += share / 100 * len(members)
        chosen = max(shares, key=lambda name: lacking[name])
        lacking[chosen] -= len(members)
        positions[chosen] += members
    if empty := [name for name, members in positions.items() if not members]:
        raise DataError(f"{listing.source}: {len(order)} images leave none for {' and '.join(empty)}")
    parts = {name: order[sorted(members)] for name, members in positions.items()}
    held = {name: set(labels[part].tolist()) for name, part in parts.items()}
    classes = listing.classes or ()
    absent = {part: [each for label, each in enumerate(classes) if label not in held[part]] for part in parts}
    return Split(parts, len(order) - len(equal), absent)


def _contents(images: Images) -> npt.NDArray[np.uint64]:
    """Return a number for each image (n,) that equal ones share; only files of equal size are read."""
    if isinstance(images, np.ndarray):
        return np.array([image_checksum(image.tobytes()) for image in images], np.uint64)
    if isinstance(images, EncodedImages):
        return np.array([image_checksum(images[i].data) for i in range(len(images))], np.uint64)
    sizes = [os.stat(path).st_size if os.path.exists(path) else -1 for path in images]
    count = Counter(sizes)
    keys = (
        image_checksum(Path(path).read_bytes() if size >= 0 and count[size] > 1 else os.fsencode(path))
        for path, size in zip(images, sizes, strict=True)
    )
    return np.fromiter(keys, np.uint64, len(images))
