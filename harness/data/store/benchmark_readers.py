"""Readers of the fifteen benchmarks: by torchvision where it reads them as published, else one folder per class.

Counts of images and classes that differ from the published ones are refused before an image is read.
"""

from __future__ import annotations

import dataclasses
import functools
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchvision.datasets import CIFAR10, CIFAR100, DTD, Food101, OxfordIIITPet, StanfordCars

from aimscale.harness.data import DataError
from aimscale.harness.data.store.benchmarks import find_benchmark
from aimscale.harness.data.store.listing import Listing, list_folder


def list_benchmark(name: str, source: Path, split: str | None) -> Listing:
    """List the images of one split of a benchmark, with its classes in the published order of the labels."""
    benchmark = find_benchmark(name)
    if split is None or split not in benchmark.counts:
        raise DataError(f"say which split of {name}: --split {' or --split '.join(benchmark.counts)}")
    try:
        listing = _READERS.get(name, _list_split)(source, split)
    except Exception as error:  # readers of tar, HDF5 and MATLAB raise many types on damaged files
        if isinstance(error, DataError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{source} is not {name} as published ({reason}); SOURCE is {benchmark.layout}") from error
    for what, number, expected in (
        ("images", len(listing.images), benchmark.counts[split]),
        ("classes", len(listing.classes or ()), benchmark.num_classes),
    ):
        if number != expected:
            raise DataError(
                f"{source} holds {number:,} {what} of {name}'s split {split}, not the {expected:,} that are published; "
                f"complete it: SOURCE is {benchmark.layout}"
            )
    return listing


def _list_split(source: Path, split: str) -> Listing:
    """List the folder of a split, with one sub-folder per class; a class may lack images in some split."""
    listing = list_folder(source / split)
    classes = tuple(sorted({path.name for path in source.glob("*/*") if path.is_dir()}))
    number_of = [classes.index(name) for name in listing.classes or ()]
    return dataclasses.replace(listing, labels=[number_of[label] for label in listing.labels or ()], classes=classes)


def _list_files(source: Path, split: str, kind: Callable[..., Any], splits: dict[str, Sequence[str]]) -> Listing:
    """List the image files of one of torchvision's data sets; `source` is its root."""
    parts = [kind(source, split=each) for each in splits.get(split, [split])]
    if kind is StanfordCars:
        pairs = [pair for part in parts for pair in part._samples]
    else:
        images = "_images" if kind is OxfordIIITPet else "_image_files"
        pairs = [pair for part in parts for pair in zip(getattr(part, images), part._labels, strict=True)]
    files, labels = zip(*pairs, strict=True)
    return Listing(source=source, images=[*map(str, files)], labels=labels, classes=tuple(parts[0].classes))


def _list_cifar(source: Path, split: str, kind: type[CIFAR10]) -> Listing:
    """List the python archive, or the folder that it unpacks to; classes are the 10, or the 100 fine ones.

    torchvision compares the files with their published checksums before it reads them.
    """
    with tempfile.TemporaryDirectory() as root:
        if source.is_dir():
            (Path(root) / kind.base_folder).symlink_to(source.resolve())
        else:
            with tarfile.open(source) as tar:
                tar.extractall(root, filter="data")
        cifar = kind(root, train=split == "train")
    return Listing(source=source, images=cifar.data, labels=cifar.targets, classes=tuple(cifar.classes))


def _list_pcam(source: Path, split: str) -> Listing:
    """List PatchCamelyon from its pair of HDF5 files."""
    try:
        import h5py
    except ImportError as error:
        raise DataError("PatchCamelyon's files need a package that is not installed; pip install h5py") from error
    images, labels = (h5py.File(source / f"camelyonpatch_level_2_split_{split}_{name}.h5")[name] for name in "xy")
    return Listing(source=source, images=images, labels=labels[:, 0, 0, 0].tolist(), classes=("normal", "tumor"))


_READERS: dict[str, Callable[[Path, str], Listing]] = {
    "cifar10": functools.partial(_list_cifar, kind=CIFAR10),
    "cifar100": functools.partial(_list_cifar, kind=CIFAR100),
    "food101": functools.partial(_list_files, kind=Food101, splits={}),
    "dtd": functools.partial(_list_files, kind=DTD, splits={"train": ["train", "val"]}),
    "pets": functools.partial(_list_files, kind=OxfordIIITPet, splits={"train": ["trainval"]}),
    "cars": functools.partial(_list_files, kind=StanfordCars, splits={}),
    "pcam": _list_pcam,
}
