"""The fifteen benchmarks and idx files, made small in the layouts that their owners publish: none can be had here."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import pickle
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import scipy.io
import yaml
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from aimscale.harness.data import DataError
from aimscale.harness.data.store.benchmarks import BENCHMARKS
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.layouts import list_benchmark
from aimscale.harness.data.store.pack import pack_images
from aimscale.sweeps.cli.main import main

Made = tuple[list[str], dict[str, dict[bytes, str]]]
"""Classes by label, and for each split the class of each image."""


def aimscale(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 0


class Maker:
    """Writes files in a folder; no two pictures are alike."""

    def __init__(self, root: Path) -> None:
        self.root, self._number = root, 0

    def text(self, name: str, *lines: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text("\n".join([*lines, ""]))

    def picture(self, name: str) -> bytes:
        self._number += 1
        buffer = io.BytesIO()
        kind = "png" if name.endswith("png") else "jpeg"
        Image.new("RGB", (9, 8), (9 * self._number % 256, 90, 5 * self._number % 256)).save(buffer, kind)
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(buffer.getvalue())
        return buffer.getvalue()

    def tar(self, name: str, members: dict[str, bytes]) -> bytes:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        write_archive(self.root / name, "", members, "w")
        return (self.root / name).read_bytes()


def imagenet(make: Maker) -> Made:
    """The tars as downloaded; the kit's numbers are not in the order of the ids, and go beyond the classes."""
    wnids = ["n01440764", "n02084071", "n02085620"]
    made: dict[str, dict[bytes, str]] = {"train": {}, "val": {}}
    inner = {}
    for wnid in wnids:
        pictures = {f"{wnid}_{n}.JPEG": make.picture("aside/a.jpg") for n in (18, 7)}
        made["train"] |= dict.fromkeys(pictures.values(), wnid)
        inner[f"{wnid}.tar"] = make.tar("aside/a.tar", pictures)
    make.tar("ILSVRC2012_img_train.tar", inner)
    truth = [3, 1, 2, 3]
    pictures = {f"ILSVRC2012_val_{n + 1:08d}.JPEG": make.picture("aside/a.jpg") for n in range(4)}
    numbered = {1: wnids[1], 2: wnids[2], 3: wnids[0], 4: "n00001740"}
    made["val"] = dict(zip(pictures.values(), [numbered[number] for number in truth], strict=True))
    make.tar("ILSVRC2012_img_val.tar", dict(reversed(pictures.items())))
    kit = "ILSVRC2012_devkit_t12/data"
    make.text(f"{kit}/ILSVRC2012_validation_ground_truth.txt", *map(str, truth))
    synsets = np.array([*numbered.items()], dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    scipy.io.savemat(make.root / kit / "meta.mat", {"synsets": synsets.reshape(-1, 1)}, do_compression=True)
    return wnids, made


def inat18(make: Maker) -> Made:
    made = {}
    for split in ("train", "val"):
        files = {n: f"train_val2018/Aves/{n % 3}/{split}{n}.jpg" for n in range(5)}
        record = {
            "images": [{"id": n, "file_name": file} for n, file in reversed(files.items())],
            "annotations": [{"image_id": n, "category_id": n % 3} for n in files],
            "categories": [{"id": n, "name": f"taxon {n}"} for n in range(3)],
        }
        make.text(f"{split}2018.json", json.dumps(record))
        made[split] = {make.picture(file): f"{n % 3:04d}" for n, file in files.items()}
    return ["0000", "0001", "0002"], made


def food101(make: Maker) -> Made:
    made = {}
    for split in ("train", "test"):
        names = [f"{food}/{split == 'test'}{n}" for food in ("waffles", "apple_pie") for n in (22, 11)]
        make.text(f"meta/{split}.txt", *names)
        made[split] = {make.picture(f"images/{name}.jpg"): name.partition("/")[0] for name in names}
    return ["apple_pie", "waffles"], made


def dtd(make: Maker) -> Made:
    made: dict[str, dict[bytes, str]] = {"train": {}, "test": {}}
    for each in ("train1", "val1", "test1", "train2"):
        names = [f"{texture}/{texture}_{each}.jpg" for texture in ("zigzagged", "banded")]
        make.text(f"labels/{each}.txt", *names)
        pictures = {make.picture(f"images/{name}"): name.partition("/")[0] for name in names}
        made.get("test" if each == "test1" else "" if each == "train2" else "train", {}).update(pictures)
    return ["banded", "zigzagged"], made


def pets(make: Maker) -> Made:
    breeds, made = ["Abyssinian", "american_bulldog", "Bengal"], {}
    for split, each in (("train", "trainval"), ("test", "test")):
        names = [(f"{breed}_{split == 'test'}{n}", label) for label, breed in enumerate(breeds) for n in (1, 100)]
        make.text(f"annotations/{each}.txt", *(f"{name} {label + 1} 1 {label + 1}" for name, label in names))
        made[split] = {make.picture(f"images/{name}.jpg"): breeds[label] for name, label in names}
    return breeds, made


def cars(make: Maker) -> Made:
    names, made = ["Ram C/V Cargo Van Minivan 2012", "AM General Hummer SUV 2000"], {}
    (make.root / "devkit").mkdir(parents=True)
    for split, table in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(40, n % 2 + 1, f"{n + 1:05d}.jpg") for n in range(4)]
        cells = np.array(rows, dtype=[("bbox_x1", object), ("class", object), ("fname", object)])
        scipy.io.savemat(make.root / table, {"annotations": cells.reshape(1, -1)}, do_compression=split == "test")
        made[split] = {make.picture(f"cars_{split}/{file}"): names[label - 1] for _, label, file in rows}
    cell = np.array(names, dtype=object).reshape(1, -1)
    scipy.io.savemat(make.root / "devkit" / "cars_meta.mat", {"class_names": cell})
    return names, made


def iwildcam(make: Maker) -> Made:
    rows = [("train", 2), ("id_test", 0), ("train", 0), ("val", 1), ("test", 2), ("test", 2)]
    lines = [f"{split},{n},{n}.jpg,{y}" for n, (split, y) in enumerate(rows)]
    make.text("metadata.csv", "split,location_remapped,filename,y", *lines)
    made: dict[str, dict[bytes, str]] = {"train": {}, "test": {}, "id_test": {}}
    for n, (split, y) in enumerate(rows):
        made.get(split, {})[make.picture(f"train/{n}.jpg")] = f"{y:03d}"
    return ["000", "001", "002"], made


def camelyon17(make: Maker) -> Made:
    made: dict[str, dict[bytes, str]] = {"train": {}, "val": {}}
    lines = []
    for n, (center, drawn, split) in enumerate(
        [(0, 0, "train"), (3, 1, ""), (4, 0, "train"), (1, 0, "val"), (2, 0, "")]
    ):
        lines.append(f"{n},004,4,{32 * n},{n},{n % 2},20,{center},{drawn}")
        picture = make.picture(f"patches/patient_004_node_4/patch_patient_004_node_4_x_{32 * n}_y_{n}.png")
        made.get(split, {})[picture] = ("normal", "tumor")[n % 2]
    make.text("metadata.csv", ",patient,node,x_coord,y_coord,tumor,slide,center,split", *lines)
    return ["normal", "tumor"], made


def rxrx1(make: Maker) -> Made:
    made: dict[str, dict[bytes, str]] = {"train": {}, "val": {}}
    lines = []
    for dataset, experiment, label in (("train", "HEPG2-01", 1), ("val", "U2OS-04", 0), ("test", "RPE-08", 2)):
        for site in (1, 2):
            lines.append(f"{dataset},{experiment},3,B02,{site},s2{label},{label}")
            picture = make.picture(f"images/{experiment}/Plate3/B02_s{site}.png")
            if dataset == "val" or (dataset, site) == ("train", 1):
                made[dataset][picture] = f"{label:04d}"
    make.text("metadata.csv", "dataset,experiment,plate,well,site,sirna,sirna_id", *lines)
    return ["0000", "0001", "0002"], made


def eurosat(make: Maker) -> Made:
    made = {}
    for split in ("train", "test"):
        names = [f"{place}_{split == 'test'}{n}.jpg" for place in ("SeaLake", "Forest") for n in (2, 1)]
        make.text(f"eurosat-{split}.txt", *names)
        made[split] = {make.picture(f"2750/{name.partition('_')[0]}/{name}"): name.partition("_")[0] for name in names}
    return ["Forest", "SeaLake"], made


def fmow(make: Maker) -> Made:
    rows = [
        ("train", 2012),
        ("seq", 2011),
        ("val", 2012),
        ("val", 2013),
        ("train", 2013),
        ("val", 2016),
        ("test", 2016),
    ]
    made: dict[str, dict[bytes, str]] = {"train": {}, "val": {}}
    for n, (split, _) in enumerate(rows):
        picture = make.picture(f"images/rgb_img_{n}.png")
        if n in (0, 3):
            made[split][picture] = ("zoo", "airport")[n % 2]
    lines = [f"{split},{('zoo', 'airport')[n % 2]},{year}-01-01T00:00:00Z" for n, (split, year) in enumerate(rows)]
    make.text("rgb_metadata.csv", "split,category,timestamp", *lines)
    return ["airport", "zoo"], made


def infographic(make: Maker) -> Made:
    """The published order is not that of the names, and a class may lack test images."""
    names, made = ["tent", "The_Eiffel_Tower", "tiger"], {}
    for split, labels in (("train", [0, 1, 2]), ("test", [2, 0])):
        files = {f"infograph/{names[label]}/infograph_{label:03d}_{split}.jpg": label for label in labels}
        make.text(f"infograph_{split}.txt", *(f"{file} {label}" for file, label in files.items()))
        made[split] = {make.picture(file): names[label] for file, label in files.items()}
    return names, made


FILES: dict[str, Callable[[Maker], Made]] = {
    "imagenet-1k": imagenet,
    **{each.__name__: each for each in (inat18, food101, dtd, pets, cars, iwildcam, camelyon17, rxrx1, eurosat, fmow)},
    "infographic": infographic,
}


def make_small(name: str, counts: dict[str, int], num_classes: int, patch: pytest.MonkeyPatch) -> None:
    """Expect so many images and classes in place of those published."""
    patch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], counts=counts, num_classes=num_classes))


@pytest.mark.parametrize("name", FILES)
def test_images_and_classes_are_those_of_the_published_lists(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    classes, made = FILES[name](Maker(source))
    assert [*made] == [*BENCHMARKS[name].counts]
    with pytest.raises(DataError, match=f"{BENCHMARKS[name].num_train:,}"):
        list_benchmark(name, source, "train")
    make_small(name, {split: len(images) for split, images in made.items()}, len(classes), monkeypatch)
    for split, images in made.items():
        aimscale("data", "pack", source, tmp_path / split, "--benchmark", name, "--split", split)
        dataset = open_dataset(tmp_path / split)
        assert dataset.classes == tuple(classes)
        assert {dataset.read(i): classes[label] for i, label in enumerate(dataset.require_labels())} == images
        assert len(dataset) == len(images)
    with pytest.raises(DataError, match="--split train or --split"):
        list_benchmark(name, source, "seq")
    capsys.readouterr()
    aimscale("data", "pack", "--benchmark", name)
    printed = capsys.readouterr().out
    assert all(f"--benchmark {name} --split {split}" in printed for split in made)


def test_the_pages_table_6_names_every_benchmark_and_the_split_that_is_scored() -> None:
    page = (Path(__file__).parents[4] / "docs" / "evaluation.md").read_text()
    tasks = yaml.safe_load(re.search(r"```yaml\n(- \{task: imagenet.*?)```", page, re.DOTALL)[1])
    assert [(task["task"], task["test"]) for task in tasks] == [
        (each.name, f"packs/{each.name}-{each.scored or 'test'}") for each in BENCHMARKS.values()
    ]


def test_imagenet_is_the_same_from_tars_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes, made = imagenet(Maker(tmp_path))
    make_small("imagenet-1k", {"train": 6, "val": 4}, 3, monkeypatch)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    (tmp_path / "ILSVRC2012_devkit_t12").rename(unpacked / "ILSVRC2012_devkit_t12")
    for split in made:
        with tarfile.open(tmp_path / f"ILSVRC2012_img_{split}.tar") as tar:
            tar.extractall(unpacked / split, filter="data")
    for path in [*(unpacked / "train").iterdir()]:
        with tarfile.open(path) as tar:
            tar.extractall(path.with_suffix(""), filter="data")
        path.unlink()
    for split, images in made.items():
        pack_images(list_benchmark("imagenet-1k", unpacked, split), tmp_path / split)
        dataset = open_dataset(tmp_path / split)
        assert {dataset.read(i): classes[label] for i, label in enumerate(dataset.require_labels())} == images


def test_patch_camelyon_is_packed_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py")
    make_small("pcam", {"train": 7, "test": 7}, 2, monkeypatch)
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (7, 96, 96, 3), dtype=np.uint8), rng.integers(0, 2, (7, 1, 1, 1))
    for letter, values in (("x", images), ("y", labels.astype(np.uint8))):
        with h5py.File(tmp_path / f"camelyonpatch_level_2_split_test_{letter}.h5", "w") as file:
            file.create_dataset(letter, data=values)
    aimscale("data", "pack", tmp_path, tmp_path / "out", "--benchmark", "pcam", "--split", "test")
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
    """Of an image of an array, within it."""
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


def write_archive(path: Path, folder: str, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w:gz") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}".lstrip("/"))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


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
    write_archive(archive, kind.base_folder, files)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for split, (images, labels) in expected.items():
        aimscale("data", "pack", archive, tmp_path / split, "--benchmark", benchmark, "--split", split)
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
    write_archive(archive, CIFAR10.base_folder, made_cifar(CIFAR10)[0] | {"test_batch": pickle.dumps(Evil())})
    for damage in (lambda: None, lambda: archive.write_bytes(archive.read_bytes()[:200]), archive.unlink):
        damage()
        with pytest.raises(DataError, match=str(archive)):
            list_benchmark("cifar10", archive, "test")
    assert not (tmp_path / "pwned").exists()


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
        aimscale("data", "pack", source, tmp_path / f"out{suffix}")
        dataset = open_dataset(tmp_path / f"out{suffix}")
        for i in range(30):
            number = number_of(dataset.key(i))
            assert (dataset.decode(i, channels=1)[0].numpy() == images[number]).all()
            assert dataset.require_labels()[i] == labels[number]
