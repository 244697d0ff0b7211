"""The files of CIFAR-10 and CIFAR-100 (read by torchvision) and of the MNIST family, as downloaded or unpacked."""

from __future__ import annotations

import gzip
import math
import re
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from aimscale.harness.data import DataError
from aimscale.harness.data.store.card import DatasetInfo, open_local
from aimscale.harness.data.store.decoding import MAX_IMAGE_SIDE
from aimscale.harness.data.store.pack import PackedImage, encode, shuffled_order, write_dataset
from aimscale.harness.data.store.tars import Member

SPLITS = ("train", "test")
"""Of CIFAR."""
_UNSIGNED_BYTES = 8  # idx's code of the type
_MAX_UNPACKED_BYTES = 2**31  # 2.7 million images of 28 px
_MAX_CIFAR_BYTES = 400_000_000  # the archives hold 186 MB
_CHUNK_BYTES = 2**20


def is_cifar(path: Path) -> bool:
    """Whether a file or folder is named like the archives: `cifar-10-python.tar.gz`, `cifar-10-batches-py`, ..."""
    return re.match(r"cifar-100?-", path.name) is not None


def is_idx(path: Path) -> bool:
    """Whether a file is named like the images of an MNIST-like split: `...-images-idx3-ubyte` or `.gz`."""
    return "images-idx3-ubyte" in path.name


def pack_cifar(
    source: Path, out: Path, *, split: str, classes: tuple[str, ...] | None = None, part: tuple[int, int] | None = None
) -> DatasetInfo:
    """Pack one split of the python archive, or of the folder that it unpacks to; classes are the 10, or the 100 fine.

    torchvision compares the files with their published checksums before it reads them. Images are stored as PNG,
    without loss. The sample's key is its number in the split; samples are written in a fixed shuffled order, or, with
    `part`, positions start..stop-1 of that order.

    Raises:
        DataError: files are missing or damaged, or the part does not exist.
    """
    kind = CIFAR100 if source.name.startswith("cifar-100") else CIFAR10
    with tempfile.TemporaryDirectory() as root:
        try:
            if source.is_dir():
                (Path(root) / kind.base_folder).symlink_to(source.resolve())
            else:
                with open_local(source) as file, tarfile.open(fileobj=file, tarinfo=Member) as tar:
                    _extract(tar, Path(root))
            found = kind(root, train=split == "train")
        except (OSError, EOFError, zlib.error, tarfile.TarError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{source} is not CIFAR's python version as published ({reason}); download it") from error
    samples = _samples(found.data.transpose(0, 3, 1, 2), found.targets, part)
    return write_dataset(out, samples, name=out.name, classes=classes or tuple(found.classes))


def _extract(tar: tarfile.TarFile, root: Path) -> None:
    """Unpack an archive that is no larger than CIFAR's."""
    left = _MAX_CIFAR_BYTES
    for member in tar:
        left -= member.size
        if left < 0:
            raise tarfile.ReadError(f"it holds more than {_MAX_CIFAR_BYTES:,} bytes")
        tar.extract(member, root, filter="data")


def pack_idx(
    images_path: Path, out: Path, *, classes: tuple[str, ...] | None = None, part: tuple[int, int] | None = None
) -> DatasetInfo:
    """Pack one split: its `...-images-idx3-ubyte[.gz]`, and the `...-labels-idx1-ubyte[.gz]` beside it.

    Keys and order as in `pack_cifar`.

    Raises:
        DataError: a file is missing, damaged or no idx file, the counts differ, or the part does not exist.
    """
    labels_path = images_path.with_name(images_path.name.replace("images-idx3", "labels-idx1"))
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels; copy both")
    if max(images.shape[1:]) > MAX_IMAGE_SIDE:
        raise DataError(f"images of {images_path} are {images.shape[1:]}; the limit is {MAX_IMAGE_SIDE:,} on a side")
    classes = classes or tuple(str(number) for number in range(int(labels.max()) + 1))
    return write_dataset(out, _samples(images[:, None], labels, part), name=out.name, classes=classes)


def _read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """The array of one idx file of unsigned bytes, mapped; what is compressed is unpacked into a temporary file."""
    if not path.is_file():
        raise DataError(f"idx file {path} does not exist; images need the labels file of the same split beside them")
    is_packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if is_packed else path.open("rb") as file:
            head = file.read(4 + 4 * num_dims)
            if len(head) < 4 + 4 * num_dims or head[:4] != bytes([0, 0, _UNSIGNED_BYTES, num_dims]):
                raise DataError(f"{path} is no idx file of unsigned bytes in {num_dims} dimensions; copy it again")
            shape = struct.unpack(f">{num_dims}I", head[4:])
            size = math.prod(shape)
            if is_packed and size > _MAX_UNPACKED_BYTES:
                raise DataError(f"{path} unpacks to {size:,} bytes; give the unpacked file, which needs no memory")
            where = tempfile.TemporaryFile() if is_packed else path  # noqa: SIM115 (mapped below, and gone with that)
            if isinstance(where, Path):
                length = path.stat().st_size - len(head)
            else:
                while where.tell() <= size and (chunk := file.read(_CHUNK_BYTES)):
                    where.write(chunk)
                length = where.tell()
                where.flush()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
    if length != size or not size:
        raise DataError(f"{path} is damaged: its header says {shape}, and its values are {length} bytes; copy it again")
    offset = len(head) if isinstance(where, Path) else 0
    return np.memmap(where, np.uint8, "r", offset=offset, shape=shape)


def _samples(
    images: npt.NDArray[np.uint8], labels: Sequence[int] | npt.NDArray[np.uint8], part: tuple[int, int] | None
) -> Iterator[PackedImage]:
    """Of images (n, C, H, W)."""
    for number in shuffled_order(len(images), part):
        extension, data = encode(torch.from_numpy(np.array(images[number])))
        yield PackedImage(f"{number:09d}", extension, data, int(labels[number]), images.shape[-2:])
