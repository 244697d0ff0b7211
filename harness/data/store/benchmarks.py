"""The files of CIFAR-10 and CIFAR-100 and of the MNIST family, as downloaded or unpacked, read by torchvision."""

from __future__ import annotations

import gzip
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from aimscale.harness.data import DataError
from aimscale.harness.data.store.card import DatasetInfo
from aimscale.harness.data.store.pack import PackedImage, encode, shuffled_order, write_dataset

SPLITS = ("train", "test")
"""Of CIFAR."""


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
                with tarfile.open(source) as tar:
                    tar.extractall(root, filter="data")
            found = kind(root, train=split == "train")
        except (OSError, EOFError, tarfile.TarError, RuntimeError) as error:
            raise DataError(f"{source} is not CIFAR's python version as published ({error}); download it") from error
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
    samples = _samples(images, torch.tensor(found.targets), part)
    return write_dataset(out, samples, name=out.name, classes=classes or tuple(found.classes))


def pack_idx(
    images_path: Path, out: Path, *, classes: tuple[str, ...] | None = None, part: tuple[int, int] | None = None
) -> DatasetInfo:
    """Pack one split: its `...-images-idx3-ubyte[.gz]`, and the `...-labels-idx1-ubyte[.gz]` beside it.

    Keys and order as in `pack_cifar`.

    Raises:
        DataError: a file is missing, damaged or no idx file, the counts differ, or the part does not exist.
    """
    labels_path = images_path.with_name(images_path.name.replace("images-idx3", "labels-idx1"))
    images, labels = _read_idx(images_path), _read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not images.numel():
        raise DataError(
            f"{images_path} has shape {tuple(images.shape)} and {labels_path} {tuple(labels.shape)}; expected (n, h, w)"
            " and (n,)"
        )
    classes = classes or tuple(str(number) for number in range(int(labels.max()) + 1))
    return write_dataset(out, _samples(images[:, None], labels, part), name=out.name, classes=classes)


def _read_idx(path: Path) -> torch.Tensor:
    """The array of one idx file of unsigned bytes."""
    try:
        with tempfile.NamedTemporaryFile() as plain:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                shutil.copyfileobj(file, plain)
            plain.flush()
            values: torch.Tensor = read_sn3_pascalvincent_tensor(plain.name)
    except FileNotFoundError as error:
        raise DataError(
            f"idx file {path} does not exist; images need the labels file of the same split beside them"
        ) from error
    except Exception as error:  # damaged files raise anything, down to an IndexError and zlib's own
        raise DataError(f"{path} is damaged or no idx file ({type(error).__name__} {error}); copy it again") from error
    if values.dtype != torch.uint8:
        raise DataError(f"{path} is no idx file of unsigned bytes")
    return values


def _samples(images: torch.Tensor, labels: torch.Tensor, part: tuple[int, int] | None) -> Iterator[PackedImage]:
    for number in shuffled_order(len(images), part):
        extension, data = encode(images[number])
        yield PackedImage(f"{number:09d}", extension, data, int(labels[number]), (images.shape[-2], images.shape[-1]))
