"""The idx files of the MNIST family (MNIST, Fashion-MNIST, KMNIST, EMNIST), gzipped or not."""

from __future__ import annotations

import gzip
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store.info import DatasetInfo
from aimscale.harness.data.store.pack import PackedImage, encode, shuffled_order, write_dataset

_UINT8 = 8  # the type code of the third magic byte


def is_idx(path: Path) -> bool:
    """Whether a file is named like the images of an MNIST-like split: `...-images-idx3-ubyte` or `.gz`."""
    return "images-idx3-ubyte" in path.name


def pack_idx(
    images_path: Path, out: Path, *, classes: tuple[str, ...] | None = None, part: tuple[int, int] | None = None
) -> DatasetInfo:
    """Pack one split: its `...-images-idx3-ubyte[.gz]`, and the `...-labels-idx1-ubyte[.gz]` beside it.

    The sample's key is its number in the file; samples are written in a fixed shuffled order, or, with `part`,
    positions start..stop-1 of that order.

    Raises:
        DataError: a file is missing, truncated or no idx file, the counts differ, or the part does not exist.
    """
    labels_path = images_path.with_name(images_path.name.replace("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"{images_path} has shape {images.shape} and {labels_path} {labels.shape}; expected (n, h, w) and (n,)"
        )
    if classes is None:
        classes = tuple(str(number) for number in range(int(labels.max(initial=0)) + 1))
    return write_dataset(out, _samples(images, labels, part), name=out.name, classes=classes)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of one idx file of unsigned bytes.

    Raises:
        DataError: missing, truncated, or no idx file.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise DataError(
            f"idx file {path} does not exist; images need the labels file of the same split beside them"
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"idx file {path} cannot be read ({error}); copy it again") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UINT8:
        raise DataError(f"{path} is no idx file of unsigned bytes")
    header = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:header]) if len(data) >= header else (-1,)
    if math.prod(shape) != len(data) - header:
        raise DataError(f"idx file {path} is truncated: its header says {shape}, it holds {len(data) - header} bytes")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _samples(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], part: tuple[int, int] | None
) -> Iterator[PackedImage]:
    for number in shuffled_order(len(images), part):
        extension, data = encode(torch.from_numpy(images[number].copy())[None])
        yield PackedImage(f"{number:09d}", extension, data, int(labels[number]), images.shape[1:])
