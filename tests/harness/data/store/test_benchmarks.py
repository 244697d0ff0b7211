"""CIFAR and idx files, made small, and what damaged ones say."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

from aimscale.harness.data import DataError
from aimscale.harness.data.store.benchmarks import pack_cifar
from aimscale.harness.data.store.index import open_dataset
from aimscale.sweeps.cli.main import main


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


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
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
    archive, folder = tmp_path / kind.filename, tmp_path / kind.base_folder
    write_archive(archive, kind.base_folder, files)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for split, (images, labels) in expected.items():
        with pytest.raises(SystemExit) as ended:
            main(["data", "pack", str(archive), str(tmp_path / split), "--split", split])
        assert ended.value.code == 0
        dataset = open_dataset(tmp_path / split)
        assert dataset.classes is not None
        assert dataset.classes[7] == "class7"
        assert len(dataset) == len(images)
        for i in range(len(dataset)):
            number = int(dataset.key(i))
            assert (dataset.decode(i).numpy() == images[number]).all()
            assert dataset.require_labels()[i] == labels[number]
        assert pack_cifar(folder, tmp_path / f"{split}-folder", split=split).fingerprint == dataset.fingerprint


def test_what_is_not_cifar_as_published_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    archive = tmp_path / CIFAR10.filename
    write_archive(archive, CIFAR10.base_folder, made_cifar(CIFAR10)[0] | {"test_batch": pickle.dumps(Evil())})
    with pytest.raises(SystemExit) as ended:
        main(["data", "pack", str(archive), str(tmp_path / "out")])
    assert ended.value.code == 2, "no split was chosen"
    for damage in (lambda: None, lambda: archive.write_bytes(archive.read_bytes()[:200]), archive.unlink):
        damage()
        with pytest.raises(DataError, match=str(archive)):
            pack_cifar(archive, tmp_path / "out", split="test")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


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
        with pytest.raises(SystemExit) as ended:
            main(["data", "pack", str(source), str(tmp_path / f"out{suffix}")])
        assert ended.value.code == 0
        dataset = open_dataset(tmp_path / f"out{suffix}")
        for i in range(30):
            number = int(dataset.key(i))
            assert (dataset.decode(i, channels=1)[0].numpy() == images[number]).all()
            assert dataset.require_labels()[i] == labels[number]
