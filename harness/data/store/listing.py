"""Listings of images to pack: of a folder, whose sub-folders are classes, or of a file of MNIST's format."""

from __future__ import annotations

import dataclasses
import gzip
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
import numpy.typing as npt

from aimscale.harness.data import DataError
from aimscale.harness.data.images import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    from aimscale.harness.data.store.parquet import EncodedImages

Images = Union[Sequence[str], "EncodedImages", npt.NDArray[np.uint8]]
_UNSIGNED_BYTES = 8  # type code of the idx format


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """Images to pack, in an order that is always the same."""

    source: Path
    """Origin of the images, for messages."""
    images: Images
    """Image files, as text, since a million Path objects take ten times longer to reach a process; encoded images; or
    pixels, (n, H, W) or (n, H, W, C), numpy's or a mapped file's."""
    labels: Sequence[int] | None = None
    """Class numbers, -1 for none; None if there are no classes."""
    classes: tuple[str, ...] | None = None
    """Class names by label."""
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Ending -> number of files that are no images."""
    empty: tuple[str, ...] = ()
    """Sub-folders without an image, which are no classes."""

    def name_of(self, number: int) -> str:
        """Name an image, for messages."""
        image = self.images[number]
        return image if isinstance(image, str) else f"{number} of {self.source}"


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, in no order.

    Raises:
        OSError: a sub-folder cannot be read: without it a class, or a part of one, would be missing.
    """

    def refuse(error: OSError) -> None:
        raise error

    for root, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(root, name) for name in names)


def list_folder(folder: Path) -> Listing:
    """List the image files of a folder, sorted; the sub-folders that hold images, sorted, are the classes.

    Raises:
        OSError: a sub-folder cannot be read: without it a class, or a part of one, would be missing.
    """
    if not folder.is_dir():
        what = "is no folder of images" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}; an archive of a benchmark needs --benchmark")
    paths = [path for path in walk_files(folder) if path.is_file() or not path.exists()]  # the latter: a dangling link
    files = sorted(path for path in paths if path.suffix[1:].lower() in IMAGE_EXTENSIONS)
    left_out = Counter(path.suffix.lower() or path.name for path in paths)
    for extension in IMAGE_EXTENSIONS:
        del left_out[f".{extension}"]
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    names = [path.relative_to(folder).parts[0] for path in files if path.parent != folder]
    if not names:
        return Listing(source=folder, images=[*map(str, files)], left_out=left_out)
    if loose := len(files) - len(names):
        raise DataError(
            f"{folder} holds {loose} images beside its sub-folders, so their class is unknown; "
            "move them into a sub-folder, or pack a folder without any"
        )
    number_of = {name: number for number, name in enumerate(sorted(set(names)))}
    labels = [number_of[name] for name in names]
    empty = tuple(sorted({path.name for path in folder.iterdir() if path.is_dir()} - {*number_of}))
    return Listing(
        source=folder,
        images=[*map(str, files)],
        labels=labels,
        classes=tuple(number_of),
        left_out=left_out,
        empty=empty,
    )


def list_idx(images_path: Path, classes: tuple[str, ...] | None = None) -> Listing:
    """List one split of MNIST's format: `...-images-idx3-ubyte[.gz]`, and `...-labels-idx1-ubyte[.gz]` beside it."""
    labels_path = images_path.with_name(images_path.name.replace("images-idx3", "labels-idx1"))
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels; copy both")
    classes = classes or tuple(str(number) for number in range(int(labels.max()) + 1))
    return Listing(source=images_path, images=images, labels=labels.tolist(), classes=classes)


def _read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """Read the array of an idx file of unsigned bytes."""
    if not path.is_file():
        raise DataError(f"idx file {path} does not exist; images need the labels file of the same split beside them")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head, values = file.read(4 + 4 * num_dims), np.frombuffer(file.read(), np.uint8)
        if head[:4] != bytes([0, 0, _UNSIGNED_BYTES, num_dims]):
            raise ValueError(f"no idx file of unsigned bytes in {num_dims} dimensions")
        values = values.reshape(struct.unpack(f">{num_dims}I", head[4:]))
        if not values.size:
            raise ValueError("it is empty")
    except Exception as error:  # gzip, zlib, struct and numpy raise many types on damaged files
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
    return values
