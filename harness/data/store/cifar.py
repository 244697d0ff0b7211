"""The archives of CIFAR-10 and CIFAR-100, python and binary version, as downloaded or unpacked.

Classes are the 10, and the 100 fine ones. The python version holds pickles: nothing but arrays and text is built from
them.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store.info import DatasetInfo
from aimscale.harness.data.store.pack import PackedImage, encode, shuffled_order, write_dataset

SPLITS = ("train", "test")
"""Of both data sets."""

_PIXELS = 3 * 32 * 32
_SAFE_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Layout(NamedTuple):
    """File names of one version."""

    batches: dict[str, tuple[str, ...]]
    """By split."""
    names: str
    """The file of the class names."""
    num_label_bytes: int
    """Before the pixels of a record; the last of them is the label (binary version)."""


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_LAYOUTS = {
    ("10", "python"): _Layout({"train": _BATCHES, "test": ("test_batch",)}, "batches.meta", 0),
    ("100", "python"): _Layout({"train": ("train",), "test": ("test",)}, "meta", 0),
    ("10", "binary"): _Layout(
        {"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)}, "batches.meta.txt", 1
    ),
    ("100", "binary"): _Layout({"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt", 2),
}


def is_cifar(path: Path) -> bool:
    """Whether a file or folder is named like the archives: `cifar-10-python.tar.gz`, `cifar-10-batches-py`, ..."""
    return re.match(r"cifar-100?-", path.name) is not None


def pack_cifar(
    source: Path, out: Path, *, split: str, classes: tuple[str, ...] | None = None, part: tuple[int, int] | None = None
) -> DatasetInfo:
    """Pack one split of an archive, or of the folder that it unpacks to; images are stored as PNG, without loss.

    The sample's key is its number in the split; samples are written in a fixed shuffled order, or, with `part`,
    positions start..stop-1 of that order.

    Raises:
        DataError: files are missing, damaged or of another layout, or the part does not exist.
    """
    files = _read_files(source)
    for (kind, version), layout in _LAYOUTS.items():
        wanted = layout.batches[split]
        if kind == ("100" if source.name.startswith("cifar-100") else "10") and {*wanted, layout.names} <= files.keys():
            read = _python_batch if version == "python" else _binary_batch
            batches = [read(files[name], f"{name} of {source}", layout) for name in wanted]
            images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
            names = classes or _class_names(files[layout.names], f"{layout.names} of {source}", version)
            return write_dataset(out, _samples(images, labels, part), name=out.name, classes=names)
    raise DataError(f"{source} does not hold the files of CIFAR's {split} split; download or unpack it again")


def _read_files(source: Path) -> dict[str, bytes]:
    """Name -> content of every file of an archive or folder."""
    try:
        if source.is_dir():
            return {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
        with tarfile.open(source) as tar:
            members = [member for member in tar if member.isfile()]
            return {Path(member.name).name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    except FileNotFoundError as error:
        raise DataError(f"{source} does not exist") from error
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{source} cannot be read ({error}); download it again") from error


def _python_batch(data: bytes, where: str, layout: _Layout) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """uint8 (n, 3072) and labels (n,)."""
    batch = _unpickle(data, where)
    try:
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, _PIXELS)
        labels = np.asarray(batch[b"fine_labels"] if b"fine_labels" in batch else batch[b"labels"], dtype=np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} holds no images and labels ({error}); download it again") from error
    if labels.shape != (len(images),):
        raise DataError(f"{where} holds {len(images)} images and {len(labels)} labels; download it again")
    return images, labels


def _binary_batch(data: bytes, where: str, layout: _Layout) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    record = layout.num_label_bytes + _PIXELS
    if not data or len(data) % record:
        raise DataError(f"{where} is truncated: {len(data)} bytes are no multiple of {record}; download it again")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    return records[:, layout.num_label_bytes :], records[:, layout.num_label_bytes - 1].astype(np.int64)


def _class_names(data: bytes, where: str, version: str) -> tuple[str, ...]:
    if version == "binary":
        return tuple(data.decode(errors="replace").split())
    meta = _unpickle(data, where)
    names = meta.get(b"fine_label_names", meta.get(b"label_names"))
    if not isinstance(names, list):
        raise DataError(f"{where} holds no class names; download it again")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names)


class _ArraysOnly(pickle.Unpickler):
    """Builds nothing but numpy arrays, text, numbers and their containers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _unpickle(data: bytes, where: str) -> dict[bytes, Any]:
    try:
        found = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise anything
        raise DataError(f"{where} is no batch of CIFAR ({error}); download it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} is no batch of CIFAR (a {type(found).__name__}); download it again")
    return {key if isinstance(key, bytes) else str(key).encode(): value for key, value in found.items()}


def _samples(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], part: tuple[int, int] | None
) -> Iterator[PackedImage]:
    for number in shuffled_order(len(images), part):
        image = torch.from_numpy(images[number].reshape(3, 32, 32).copy())
        extension, data = encode(image)
        yield PackedImage(f"{number:09d}", extension, data, int(labels[number]), (32, 32))
