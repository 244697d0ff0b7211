"""Readers of images published as arrays: CIFAR (by torchvision), files of MNIST's format, PatchCamelyon."""

from __future__ import annotations

import gzip
import math
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torchvision.datasets import CIFAR10

from aimscale.harness.data import DataError
from aimscale.harness.data.store.dataset_info import open_local
from aimscale.harness.data.store.decoding import MAX_IMAGE_SIDE
from aimscale.harness.data.store.pack import Listing
from aimscale.harness.data.store.tars import Member

_UNSIGNED_BYTES = 8  # type code of the idx format
_MAX_UNPACKED_BYTES = 2**30  # 1.3 million images of 28 px
_MAX_CIFAR_BYTES = 400_000_000  # the archives hold 186 MB
_MAX_CHUNK_BYTES = 2**26  # of an HDF5 file; a chunk is unpacked as a whole


def list_cifar(source: Path, split: str, kind: type[CIFAR10]) -> Listing:
    """List one split of the python archive, or of the folder that it unpacks to; classes are the 10, or the 100 fine
    ones.

    torchvision compares the files with their published checksums before it reads them.
    """
    with tempfile.TemporaryDirectory() as root:
        if source.is_dir():
            (Path(root) / kind.base_folder).symlink_to(source.resolve())
        else:
            with open_local(source) as file, tarfile.open(fileobj=file, tarinfo=Member) as tar:
                _extract(tar, Path(root))
        found = kind(root, train=split == "train")
    return Listing(source=source, images=found.data, labels=found.targets, classes=tuple(found.classes))


def _extract(tar: tarfile.TarFile, root: Path) -> None:
    """Unpack an archive that is no larger than CIFAR's."""
    left = _MAX_CIFAR_BYTES
    for member in tar:
        left -= member.size
        if left < 0:
            raise tarfile.ReadError(f"it holds more than {_MAX_CIFAR_BYTES:,} bytes")
        tar.extract(member, root, filter="data")


def list_idx(images_path: Path, classes: tuple[str, ...] | None = None) -> Listing:
    """List one split of MNIST's format: `...-images-idx3-ubyte[.gz]`, and `...-labels-idx1-ubyte[.gz]` beside it."""
    labels_path = images_path.with_name(images_path.name.replace("images-idx3", "labels-idx1"))
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{images_path} holds {len(images)} images and {labels_path} {len(labels)} labels; copy both")
    if max(images.shape[1:]) > MAX_IMAGE_SIDE:
        raise DataError(f"images of {images_path} are {images.shape[1:]}; the limit is {MAX_IMAGE_SIDE:,} on a side")
    classes = classes or tuple(str(number) for number in range(int(labels.max()) + 1))
    return Listing(source=images_path, images=images, labels=labels.tolist(), classes=classes)


def _read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """Map the array of an idx file of unsigned bytes; a compressed one is unpacked into memory."""
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
            if is_packed:
                values = np.frombuffer(file.read(size + 1), np.uint8)
            else:
                values = np.memmap(path, np.uint8, "r")[len(head) :]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
    if len(values) != size or not size:
        raise DataError(f"{path} is damaged: {shape} in its header, {len(values)} bytes of values; copy it again")
    return values.reshape(shape)


def list_pcam(source: Path, split: str) -> Listing:
    """List one split of PatchCamelyon from its pair of HDF5 files."""
    try:
        import h5py
    except ImportError as error:
        raise DataError("PatchCamelyon's files need a package that is not installed; pip install h5py") from error
    found = []
    for name in "xy":
        path = source / f"camelyonpatch_level_2_split_{split}_{name}.h5"
        open_local(path).close()
        file = h5py.File(path)
        values = file[name]
        chunk = math.prod(values.chunks or ())
        is_own = isinstance(file.get(name, getlink=True), h5py.HardLink) and not values.external
        if values.dtype != np.uint8 or values.ndim != 4 or not is_own or values.is_virtual or chunk > _MAX_CHUNK_BYTES:
            raise ValueError(f"{path.name} holds something else than {name}, four-dimensional, of bytes")
        found.append(values)
    images, labels = found
    if images.shape[3] != 3 or max(images.shape[1:3]) > MAX_IMAGE_SIDE or labels.shape != (len(images), 1, 1, 1):
        raise ValueError(f"its arrays are {images.shape} and {labels.shape}")
    return Listing(source=source, images=images, labels=labels[:, 0, 0, 0].tolist(), classes=("normal", "tumor"))
