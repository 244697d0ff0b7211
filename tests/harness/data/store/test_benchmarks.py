"""The fifteen benchmarks and idx files, made small in the layouts that are read: none can be had here."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import re
import struct
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import yaml
from commands import say
from pictures import saved, write_tar
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from aimscale.analysis.published import TASKS
from aimscale.harness.data import DataError
from aimscale.harness.data.store.benchmark_readers import list_benchmark
from aimscale.harness.data.store.benchmarks import BENCHMARKS
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.pack import pack_images

Made = tuple[list[str], dict[str, dict[bytes, str]]]
"""Classes by label, and for each split the class of each image."""


def picture(kind: str = "jpeg") -> bytes:
    """A file of an image that no other call gives."""
    return saved(Image.fromarray(np.frombuffer(os.urandom(9 * 8 * 3), np.uint8).reshape(9, 8, 3)), kind)


def write(root: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def folders(root: Path) -> Made:
    """One folder per class in that of each split; a class may lack images in one."""
    classes = {"train": ["n01440764", "n02084071", "n02085620"], "val": ["n02085620", "n01440764"]}
    made: dict[str, dict[bytes, str]] = {}
    for split, names in classes.items():
        files = {f"{split}/{name}/{number}.jpeg": picture() for name in names for number in range(2)}
        write(root, files)
        made[split] = {data: name.split("/")[1] for name, data in files.items()}
    return classes["train"], made


def food101(root: Path) -> Made:
    named = {"train": {"waffles": ["waffles/22"], "apple_pie": ["apple_pie/9"]}, "test": {"waffles": ["waffles/3"]}}
    named["test"]["apple_pie"] = []
    write(root, {f"food-101/meta/{split}.json": json.dumps(names) for split, names in named.items()})
    return ["apple_pie", "waffles"], written(root, "food-101/images", named)


def dtd(root: Path) -> Made:
    named = {
        "train1": {"banded": ["banded/e"], "zigzagged": ["zigzagged/b"]},
        "val1": {"banded": ["banded/a"], "zigzagged": ["zigzagged/f"]},
        "test1": {"banded": ["banded/c"], "zigzagged": ["zigzagged/g"]},
        "train2": {"banded": ["banded/d"]},
    }
    for split, names in named.items():
        write(
            root, {f"dtd/dtd/labels/{split}.txt": "".join(f"{each}.jpg\n" for file in names.values() for each in file)}
        )
    made = written(root, "dtd/dtd/images", named)
    return ["banded", "zigzagged"], {"train": made["train1"] | made["val1"], "test": made["test1"]}


def pets(root: Path) -> Made:
    texts = {"trainval": "Bengal_7 3 1 3\nAbyssinian_100 1 1 1\namerican_bulldog_10 2 2 1\n"}
    texts["test"] = "Abyssinian_2 1 1 1\namerican_bulldog_3 2 2 1\nBengal_4 3 1 3\n"
    write(root, {f"oxford-iiit-pet/annotations/{split}.txt": text for split, text in texts.items()})
    classes = {"Bengal": "Bengal", "Abyssinian": "Abyssinian", "american_bulldog": "American Bulldog"}
    named: dict[str, dict[str, list[str]]] = {}
    for split, text in texts.items():
        files = [line.split()[0] for line in text.splitlines()]
        named[split] = {classes[file.rpartition("_")[0]]: [file] for file in files}
    made = written(root, "oxford-iiit-pet/images", named)
    return sorted(classes.values(), key=str.lower), {"train": made["trainval"], "test": made["test"]}


def written(root: Path, folder: str, named: Mapping[str, Mapping[str, list[str]]]) -> dict[str, dict[bytes, str]]:
    """Write the images named by split and class; returns the class of each by split."""
    made: dict[str, dict[bytes, str]] = {}
    for split, names in named.items():
        files = {f"{folder}/{file}.jpg": name for name, several in names.items() for file in several}
        pictures = {file: picture() for file in files}
        write(root, pictures)
        made[split] = {pictures[file]: name for file, name in files.items()}
    return made


def cars(root: Path) -> Made:
    names, made = ["Ram C/V Cargo Van Minivan 2012", "AM General Hummer SUV 2000"], {}
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    for split, table in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(40, n % 2 + 1, f"{n + 1:05d}.jpg") for n in range(4)]
        cells = np.array(rows, dtype=[("bbox_x1", object), ("class", object), ("fname", object)])
        scipy.io.savemat(folder / table, {"annotations": cells.reshape(1, -1)}, do_compression=split == "test")
        files = {f"cars_{split}/{file}": picture() for _, _, file in rows}
        write(folder, files)
        made[split] = dict(zip(files.values(), [names[label - 1] for _, label, _ in rows], strict=True))
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([names], dtype=object)})
    return names, made


MAKERS = {"imagenet-1k": folders, "fmow": folders, "food101": food101, "dtd": dtd, "pets": pets, "cars": cars}


def make_small(name: str, counts: dict[str, int], num_classes: int, patch: pytest.MonkeyPatch) -> None:
    """Expect so many images and classes in place of those published."""
    patch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], counts=counts, num_classes=num_classes))


@pytest.mark.parametrize("name", MAKERS)
def test_images_and_classes_are_those_of_the_published_lists(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    classes, made = MAKERS[name](source)
    assert [*made] == [*BENCHMARKS[name].counts]
    with pytest.raises(DataError, match=f"{BENCHMARKS[name].num_train:,}"):
        list_benchmark(name, source, "train")
    make_small(name, {split: len(images) for split, images in made.items()}, len(classes), monkeypatch)
    for split, images in made.items():
        say("data", "pack", source, tmp_path / split, "--benchmark", name, "--split", split)
        dataset = open_dataset(tmp_path / split)
        assert dataset.classes == tuple(classes)
        assert {dataset.read(i): classes[label] for i, label in enumerate(dataset.require_labels())} == images
        assert len(dataset) == len(images)
    with pytest.raises(DataError, match="--split train or --split"):
        list_benchmark(name, source, "seq")
    printed = say("data", "pack", "--benchmark", name)
    assert all(f"--benchmark {name} --split {split}" in printed for split in made)


def test_the_pages_table_6_names_every_benchmark_and_the_split_that_is_scored() -> None:
    page = (Path(__file__).parents[4] / "docs" / "evaluation.md").read_text()
    tasks = yaml.safe_load(re.search(r"```yaml\n(- \{task: imagenet.*?)```", page, re.DOTALL)[1])
    assert [(task["task"], task["test"]) for task in tasks] == [
        (name, f"packs/{name}-{BENCHMARKS[name].scored or 'test'}") for name in TASKS
    ]


def test_patch_camelyon_is_packed_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py")
    make_small("pcam", {"train": 7, "test": 7}, 2, monkeypatch)
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (7, 96, 96, 3), dtype=np.uint8), rng.integers(0, 2, (7, 1, 1, 1))
    for letter, values in (("x", images), ("y", labels.astype(np.uint8))):
        with h5py.File(tmp_path / f"camelyonpatch_level_2_split_test_{letter}.h5", "w") as file:
            file.create_dataset(letter, data=values)
    say("data", "pack", tmp_path, tmp_path / "out", "--benchmark", "pcam", "--split", "test")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.classes == ("normal", "tumor")
    for i in range(7):
        number = number_of(dataset.key(i))
        assert (dataset.decode(i).permute(1, 2, 0).numpy() == images[number]).all()
        assert dataset.require_labels()[i] == labels[number, 0, 0, 0]
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        list_benchmark("pcam", tmp_path, "test")


def number_of(key: str) -> int:
    """Read the number of an image in its array from its key."""
    return int(key.partition("-")[2])


def made_cifar(kind: type[CIFAR10]) -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """(files of the archive by name, (images, labels) by split): 12 images per batch."""
    rng, key = np.random.default_rng(0), kind.meta["key"]
    files, expected = {kind.meta["filename"]: pickle.dumps({key: [f"class{n}" for n in range(100)]})}, {}
    for split, names in (("train", kind.train_list), ("test", kind.test_list)):
        images = rng.integers(0, 256, (len(names), 12, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, (len(names), 12))
        expected[split] = images.reshape(-1, 3, 32, 32), labels.reshape(-1)
        for (name, _), pixels, classes in zip(names, images, labels, strict=True):
            files[name] = pickle.dumps({"data": pixels, "fine_labels" if kind is CIFAR100 else "labels": [*classes]})
    return files, expected


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_archives_and_folders_of_cifar_are_packed(
    kind: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, expected = made_cifar(kind)
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(kind, name, [[file, None] for file, _ in getattr(kind, name)])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    benchmark = "cifar100" if kind is CIFAR100 else "cifar10"
    make_small(benchmark, {split: len(images) for split, (images, _) in expected.items()}, 100, monkeypatch)
    archive, folder = tmp_path / kind.filename, tmp_path / kind.base_folder
    write_tar(archive, {f"{kind.base_folder}/{name}": data for name, data in files.items()}, "w:gz")
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for split, (images, labels) in expected.items():
        say("data", "pack", archive, tmp_path / split, "--benchmark", benchmark, "--split", split)
        dataset = open_dataset(tmp_path / split)
        assert dataset.classes == tuple(f"class{n}" for n in range(100))
        assert len(dataset) == len(images)
        for i in range(len(dataset)):
            number = number_of(dataset.key(i))
            assert (dataset.decode(i).numpy() == images[number]).all()
            assert dataset.require_labels()[i] == labels[number]
        again = pack_images(list_benchmark(benchmark, folder, split), tmp_path / f"{split}-folder")
        assert again.info.fingerprint == dataset.fingerprint


def test_what_is_not_cifar_as_published_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    archive = tmp_path / CIFAR10.filename
    files = made_cifar(CIFAR10)[0] | {"test_batch": pickle.dumps(Evil())}
    write_tar(archive, {f"{CIFAR10.base_folder}/{name}": data for name, data in files.items()}, "w:gz")
    for damage in (lambda: None, lambda: archive.write_bytes(archive.read_bytes()[:200]), archive.unlink):
        damage()
        with pytest.raises(DataError, match=str(archive)):
            list_benchmark("cifar10", archive, "test")
    assert not (tmp_path / "pwned").exists()


def test_an_archive_of_a_benchmark_writes_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    outside = tmp_path / "outside"
    linked = tarfile.TarInfo("batches")
    linked.type, linked.linkname = tarfile.SYMTYPE, str(tmp_path)
    for i, members in enumerate(([tarfile.TarInfo("../../outside")], [linked, tarfile.TarInfo("batches/outside")])):
        archive = tmp_path / f"{i}.tar"
        with tarfile.open(archive, "w") as tar:
            for member in members:
                tar.addfile(member)
        with pytest.raises(DataError, match=r"Outside|AbsoluteLink"):
            list_benchmark("cifar10", archive, "test")
    assert not outside.exists()


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_idx_files_are_packed(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    images, labels = rng.integers(0, 256, (30, 9, 11)), rng.integers(0, 4, 30)
    for suffix in ("", ".gz"):
        source = tmp_path / f"train-images-idx3-ubyte{suffix}"
        write_idx(source, images)
        write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels)
        say("data", "pack", source, tmp_path / f"out{suffix}")
        dataset = open_dataset(tmp_path / f"out{suffix}")
        for i in range(30):
            number = number_of(dataset.key(i))
            assert (dataset.decode(i, channels=1)[0].numpy() == images[number]).all()
            assert dataset.require_labels()[i] == labels[number]
