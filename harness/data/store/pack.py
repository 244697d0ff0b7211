"""Write data sets: images in, webdataset tar shards with an index out; nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import webdataset
from PIL import Image

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.resize import resize_shorter_side
from aimscale.harness.data.store.decoding import UndecodableImageError, decode
from aimscale.harness.data.store.indexing import write_scans
from aimscale.harness.data.store.info import DatasetInfo
from aimscale.harness.data.store.scan import IMAGE_EXTENSIONS, scan_shard
from aimscale.harness.run.files import written_dir_aside

_MAX_SHARD_BYTES = 500e6
_SHARD_PATTERN = "shard-%06d.tar"
_LOSSLESS_SIDE = 128  # resized images up to this side are stored as PNG: JPEG's blocks would dominate them


class PackedImage(NamedTuple):
    """One image file to write."""

    key: str
    extension: str
    data: bytes
    label: int | None


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
    max_shard_bytes: float = _MAX_SHARD_BYTES,
) -> DatasetInfo:
    """Write shards of at most `max_shard_bytes` and their index to the new folder `out`.

    Raises:
        DataError: `out` exists, there are no images, or one cannot be decoded.
    """
    with new_folder(out) as folder:
        # mtime=0: the same images give the same bytes, and no extended header (1 KB per member) for a fractional time
        with webdataset.ShardWriter(
            str(folder / _SHARD_PATTERN), maxcount=100_000, maxsize=max_shard_bytes, verbose=0, mtime=0
        ) as sink:
            for image in images:
                members: dict[str, object] = {"__key__": image.key, image.extension: image.data}
                if image.label is not None:
                    members["cls"] = str(image.label).encode()
                sink.write(members)
        shards = sorted(path.name for path in folder.glob("*.tar"))
        info = write_scans(folder, name or out.name, [scan_shard(str(folder), shard) for shard in shards], classes)
        if info.num_bad:
            raise DataError(f"{info.num_bad} of {info.num_samples} images written to {out} cannot be decoded")
    return info


def pack_folder(
    folder: Path,
    out: Path,
    *,
    resize: int | None = None,
    skip_bad: bool = False,
    part: tuple[int, int] | None = None,
    max_shard_bytes: float = _MAX_SHARD_BYTES,
) -> tuple[DatasetInfo, list[Path]]:
    """Pack an image folder; sub-folders, sorted, become classes. Returns the data set and the files left out as bad.

    Images are written in a fixed shuffled order, so that the first n are a random subset. With `resize`, shorter sides
    above it are shrunk to it once, which spares every epoch the decoding of pixels that no crop keeps. With `part`,
    only positions start..stop-1 of the shuffled order: ranges that do not overlap are disjoint random subsets.

    Raises:
        DataError: no images, images both in `folder` and in sub-folders, `out` exists, an undecodable image
            (unless `skip_bad`), or a part beyond the images that are there.
    """
    files, classes = list_images(folder)
    skipped: list[Path] = []
    files = [files[number] for number in shuffled_order(len(files), part)]
    images = _read_images(folder, files, classes, resize, skipped if skip_bad else None)
    info = write_dataset(out, images, name=out.name, classes=classes, max_shard_bytes=max_shard_bytes)
    return info, skipped


def shuffled_order(number: int, part: tuple[int, int] | None = None) -> npt.NDArray[np.int64]:
    """The fixed order in which `number` images are packed, or positions start..stop-1 of it.

    Raises:
        DataError: the part is empty or reaches beyond the images.
    """
    start, stop = part or (0, number)
    if not 0 <= start < stop <= number:
        raise DataError(f"images {start}:{stop} cannot be taken from {number}; give a range within 0:{number}")
    return permute(np.arange(start, stop), number, make_key("pack order"))


def list_images(folder: Path) -> tuple[list[Path], tuple[str, ...] | None]:
    """Image files, sorted, and class names: the sub-folders that hold images, or None when there are none.

    Raises:
        DataError: no folder, no images, or images both beside and inside of sub-folders.
    """
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist")
    files = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file())
    if not files:
        for path in sorted(folder.glob("*images-idx3-ubyte*")):
            raise DataError(f"{folder} holds idx files, one data set each; name the images of one, as in {path}")
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    for name in classes:
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in name):  # how Python shows bytes that are no text
            raise DataError(f"the class folder {name!r} of {folder} has a name that is not UTF-8 text; rename it")
    loose = sum(path.parent == folder for path in files)
    if classes and loose:
        raise DataError(
            f"{folder} holds {loose} images beside its sub-folders, so their class is unknown; "
            "move them into a sub-folder, or pack a folder without any"
        )
    return files, tuple(classes) or None


def _read_images(
    folder: Path, files: list[Path], classes: tuple[str, ...] | None, resize: int | None, skipped: list[Path] | None
) -> Iterator[PackedImage]:
    label_of = {name: label for label, name in enumerate(classes or ())}
    for number, path in enumerate(files):
        label = label_of[path.relative_to(folder).parts[0]] if classes else None
        try:
            data = path.read_bytes()
            image = decode(data)
        except (UndecodableImageError, OSError) as error:
            if skipped is None:
                raise DataError(
                    f"image {path} cannot be decoded ({error}); repair or remove it, or pass --skip-bad"
                ) from error
            skipped.append(path)
            continue
        extension = path.suffix[1:].lower()
        if resize is not None and min(image.shape[-2:]) > resize:
            extension, data = encode(resize_shorter_side(image, resize))
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)  # a dot would end the key
        yield PackedImage(f"{number:09d}-{stem}", extension, data, label)
    if skipped is not None and len(skipped) == len(files):
        raise DataError(f"none of the {len(files)} images of {folder} can be decoded")


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
