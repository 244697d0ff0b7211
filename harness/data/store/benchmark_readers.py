"""Readers of the fifteen benchmarks in their published form: folders, and lists of files and labels.

Names that lead out of the folder, labels without a class and counts that differ from the published ones are refused
before an image is read.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from aimscale.harness.data import DataError
from aimscale.harness.data.store.array_files import list_cifar, list_pcam
from aimscale.harness.data.store.benchmarks import find_benchmark
from aimscale.harness.data.store.dataset_info import open_local
from aimscale.harness.data.store.pack import Listing, list_by_class, list_folder
from aimscale.harness.data.store.tars import Slice, list_slices

Row = dict[str, str]
"""Row of a table with a header."""
_MAX_MATLAB_BYTES = 2**26  # unpacked; the files published take less than 1 MB


def list_benchmark(name: str, source: Path, split: str | None) -> Listing:
    """List the images of one split of a benchmark, with its classes in the published order of the labels."""
    benchmark = find_benchmark(name)
    if split is None or split not in benchmark.counts:
        raise DataError(f"say which split of {name}: --split {' or --split '.join(benchmark.counts)}")
    try:
        found = _READERS[name](source, split)
    except Exception as error:  # readers of csv, json, tar, HDF5 and MATLAB raise many types on damaged files
        if isinstance(error, DataError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{source} is not {name} as published ({reason}); SOURCE is {benchmark.layout}") from error
    for what, number, expected in (
        ("images", len(found.images), benchmark.counts[split]),
        ("classes", len(found.classes or ()), benchmark.num_classes),
    ):
        if number != expected:
            raise DataError(
                f"{source} holds {number:,} {what} of {name}'s split {split}, not the {expected:,} that are published; "
                f"complete it: SOURCE is {benchmark.layout}"
            )
    labels = found.labels or [-1]
    if min(labels) < 0 or max(labels) >= benchmark.num_classes:
        raise DataError(f"{source} has labels of {name} outside of 0..{benchmark.num_classes - 1}; download it again")
    return found


def _imagenet(root: Path, split: str) -> Listing:
    """List ImageNet from its tars, or a folder; validation labels come from class folders, or else from the devkit."""
    tar, folder = root / f"ILSVRC2012_img_{split}.tar", root / split
    if folder.is_dir() and any(path.is_dir() for path in folder.iterdir()):
        return list_folder(folder)
    is_packed = tar.exists() or split == "train"
    images: list[str | Slice] = list(list_slices(tar)) if is_packed else sorted(map(str, folder.iterdir()))
    names = [image.name if isinstance(image, Slice) else image for image in images]
    if split == "train":
        wnids = [name.partition("/")[0] for name in names]
    else:
        kit = root / "ILSVRC2012_devkit_t12" / "data"
        synsets = _matlab(kit / "meta.mat")["synsets"]
        wnid_of = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        truth = _read(kit / "ILSVRC2012_validation_ground_truth.txt").split()
        numbers = [int(PurePosixPath(name).stem.rpartition("_")[2]) for name in names]
        wnids = [wnid_of[int(truth[number - 1])] for number in numbers]
    return list_by_class(root, images, wnids)


def _inaturalist(root: Path, split: str) -> Listing:
    """List iNaturalist; classes are the four-digit numbers of the categories."""
    record = json.loads(_read(root / f"{split}2018.json"))
    file_of = {image["id"]: image["file_name"] for image in record["images"]}
    pairs = [(file_of[each["image_id"]], int(each["category_id"])) for each in record["annotations"]]
    return _listing(root, pairs, [f"{number:04d}" for number in range(len(record["categories"]))])


def _food101(root: Path, split: str) -> Listing:
    """List Food-101."""
    names = _read(root / "meta" / f"{split}.txt").split()
    return _by_folder(root / "images", [f"{name}.jpg" for name in names])


def _dtd(root: Path, split: str) -> Listing:
    """List DTD, whose first split trains on train and val."""
    lists = ("train1", "val1") if split == "train" else ("test1",)
    return _by_folder(
        root / "images", [name for each in lists for name in _read(root / "labels" / f"{each}.txt").split()]
    )


def _eurosat(root: Path, split: str) -> Listing:
    """List EuroSAT."""
    names = _read(root / f"eurosat-{split}.txt").split()
    return _by_folder(root / "2750", [f"{name.rpartition('_')[0]}/{name}" for name in names])


def _pets(root: Path, split: str) -> Listing:
    """List Oxford-IIIT Pets."""
    path = root / "annotations" / ("trainval.txt" if split == "train" else f"{split}.txt")
    rows = [line.split() for line in _read(path).splitlines()]
    name_of = {int(label): name.rpartition("_")[0] for name, label, *_ in rows}
    pairs = [(f"{name}.jpg", int(label) - 1) for name, label, *_ in rows]
    return _listing(root / "images", pairs, [name_of[label + 1] for label in range(len(name_of))])


def _cars(root: Path, split: str) -> Listing:
    """List Stanford Cars."""
    lists = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    rows = np.atleast_1d(_matlab(root / lists[split])["annotations"])
    pairs = [(str(row["fname"]), int(row["class"]) - 1) for row in rows]
    return _listing(root / f"cars_{split}", pairs, _matlab(root / "devkit" / "cars_meta.mat")["class_names"].tolist())


def _infographic(root: Path, split: str) -> Listing:
    """List Infograph from lines `infograph/CLASS/FILE LABEL`; a class may lack images in one of the lists."""
    rows = {
        each: [line.rsplit(maxsplit=1) for line in _read(root / f"infograph_{each}.txt").splitlines()]
        for each in ("train", "test")
    }
    name_of = {int(label): PurePosixPath(name).parent.name for each in rows.values() for name, label in each}
    pairs = [(name, int(label)) for name, label in rows[split]]
    return _listing(root, pairs, [name_of[label] for label in range(len(name_of))])


def _wilds(root: Path, split: str, table: str, of: Callable[[int, Row], tuple[str, str, str]]) -> Listing:
    """List a WILDS set from a table with one row per image; `of` maps row number and columns to (split, file,
    class)."""
    rows = [of(number, row) for number, row in enumerate(csv.DictReader(io.StringIO(_read(root / table))))]
    classes = sorted({name for _, _, name in rows})
    number_of = {name: number for number, name in enumerate(classes)}
    return _listing(root, [(file, number_of[name]) for where, file, name in rows if where == split], classes)


def _iwildcam_row(number: int, row: Row) -> tuple[str, str, str]:
    """Map a row of iWildCam to (split, file, class)."""
    return row["split"], f"train/{row['filename']}", f"{int(row['y']):03d}"


def _camelyon17_row(number: int, row: Row) -> tuple[str, str, str]:
    """Map a row of Camelyon17; all hospitals but two are in `train`, apart from the held-out part of their patches."""
    split = {1: "val", 2: "test"}.get(int(row["center"])) or ("train", "id_val")[int(row["split"])]
    slide = f"patient_{row['patient']}_node_{row['node']}"
    file = f"patches/{slide}/patch_{slide}_x_{row['x_coord']}_y_{row['y_coord']}.png"
    return split, file, ("normal", "tumor")[int(row["tumor"])]


def _rxrx1_row(number: int, row: Row) -> tuple[str, str, str]:
    """Map a row of RxRx1; the second site of a training experiment is the in-distribution test."""
    split = "id_test" if row["dataset"] == "train" and int(row["site"]) == 2 else row["dataset"]
    file = f"images/{row['experiment']}/Plate{row['plate']}/{row['well']}_s{row['site']}.png"
    return split, file, f"{int(row['sirna_id']):04d}"


def _fmow_row(number: int, row: Row) -> tuple[str, str, str]:
    """Map a row of FMoW; the official splits are also cut by time, at the starts of 2013 and 2016 (UTC)."""
    year, drawn = int(row["timestamp"][:4]), row["split"]
    era = "train" if year < 2013 else "val" if year < 2016 else "test"
    return drawn if drawn == era else "", f"images/rgb_img_{number}.png", row["category"]


def _by_folder(root: Path, names: Sequence[str]) -> Listing:
    """List files `CLASS/FILE`."""
    return list_by_class(root, _inside(root, names), [PurePosixPath(name).parent.name for name in names])


def _listing(root: Path, pairs: Iterable[tuple[str, int]], classes: Sequence[str]) -> Listing:
    """List files within `root` with their labels."""
    names, labels = zip(*pairs, strict=True)
    return Listing(source=root, images=_inside(root, names), labels=labels, classes=tuple(classes))


def _inside(root: Path, names: Iterable[str]) -> list[str]:
    """Return the paths of files in a folder; ValueError if a name leads out of it."""
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in name.split("/") or "\0" in name:
            raise ValueError(f"{name!r} leads out of {root}")
    return [f"{root}/{name}" for name in names]


def _read(path: Path) -> str:
    with open_local(path) as file:
        return file.read().decode()


def _matlab(path: Path) -> dict[str, Any]:
    """Read the variables of a MATLAB file (version 5), after checking that it unpacks to bounded memory."""
    import scipy.io

    with open_local(path) as file:
        data = file.read(_MAX_MATLAB_BYTES)
    at, total = 128, 0
    while at + 8 <= len(data) and total < _MAX_MATLAB_BYTES:
        kind, size = struct.unpack("<II", data[at : at + 8])
        if kind == 15:  # compressed
            total += len(zlib.decompressobj().decompress(data[at + 8 : at + 8 + size], _MAX_MATLAB_BYTES))
        at += 8 + size
    if total >= _MAX_MATLAB_BYTES:
        raise ValueError(f"{path} unpacks to more than {_MAX_MATLAB_BYTES:,} bytes")
    found: dict[str, Any] = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)
    return found


_READERS: dict[str, Callable[[Path, str], Listing]] = {
    "imagenet-1k": _imagenet,
    "inat18": _inaturalist,
    "cifar10": functools.partial(list_cifar, kind=CIFAR10),
    "cifar100": functools.partial(list_cifar, kind=CIFAR100),
    "food101": _food101,
    "dtd": _dtd,
    "pets": _pets,
    "cars": _cars,
    "iwildcam": functools.partial(_wilds, table="metadata.csv", of=_iwildcam_row),
    "camelyon17": functools.partial(_wilds, table="metadata.csv", of=_camelyon17_row),
    "pcam": list_pcam,
    "rxrx1": functools.partial(_wilds, table="metadata.csv", of=_rxrx1_row),
    "eurosat": _eurosat,
    "fmow": functools.partial(_wilds, table="rgb_metadata.csv", of=_fmow_row),
    "infographic": _infographic,
}
