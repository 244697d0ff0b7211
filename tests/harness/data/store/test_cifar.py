"""The four archives of CIFAR, made small, and what damaged ones say."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store.cifar import pack_cifar
from aimscale.harness.data.store.index import open_dataset
from aimscale.sweeps.cli.main import main

NAMES = {"10": [f"thing{n}" for n in range(10)], "100": [f"fine{n:02d}" for n in range(100)]}


def make(kind: str, version: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files of the archive by name, (images, labels) by split): 12 images per batch."""
    rng = np.random.default_rng(int(kind))
    batches = [f"data_batch_{n}" for n in range(1, 6)] if kind == "10" else ["train"]
    by_split = {"train": batches, "test": ["test_batch" if kind == "10" else "test"]}
    files, expected = {}, {}
    for split, names in by_split.items():
        images = rng.integers(0, 256, (len(names), 12, 3072), dtype=np.uint8)
        labels = rng.integers(0, int(kind), (len(names), 12))
        expected[split] = images.reshape(-1, 3, 32, 32), labels.reshape(-1)
        for name, pixels, classes in zip(names, images, labels, strict=True):
            if version == "python":
                key = b"labels" if kind == "10" else b"fine_labels"
                batch = {b"data": pixels, key: classes.tolist(), b"batch_label": b"x", b"filenames": [b"a"] * 12}
                files[name] = pickle.dumps(batch, protocol=2)
            else:
                columns = [classes[:, None].astype(np.uint8), pixels]
                if kind == "100":
                    columns.insert(0, np.full((12, 1), 77, dtype=np.uint8))  # the coarse label
                files[f"{name}.bin"] = np.concatenate(columns, axis=1).tobytes()
    encoded = [name.encode() for name in NAMES[kind]]
    if version == "python":
        key = b"label_names" if kind == "10" else b"fine_label_names"
        files["batches.meta" if kind == "10" else "meta"] = pickle.dumps({key: encoded}, protocol=2)
    else:
        files["batches.meta.txt" if kind == "10" else "fine_label_names.txt"] = b"\n".join(encoded) + b"\n\n"
    return files, expected


def write(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"some-folder/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("kind", ["10", "100"])
def test_archives_and_folders_are_packed(kind: str, version: str, tmp_path: Path) -> None:
    files, expected = make(kind, version)
    archive, folder = tmp_path / f"cifar-{kind}-{version}.tar.gz", tmp_path / f"cifar-{kind}-batches"
    write(archive, files)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for split, (images, labels) in expected.items():
        with pytest.raises(SystemExit) as ended:
            main(["data", "pack", str(archive), str(tmp_path / split), "--split", split])
        assert ended.value.code == 0
        dataset = open_dataset(tmp_path / split)
        assert dataset.classes == tuple(NAMES[kind])
        assert len(dataset) == len(images)
        for i in range(len(dataset)):
            number = int(dataset.key(i))
            assert (dataset.decode(i).numpy() == images[number]).all()
            assert dataset.require_labels()[i] == labels[number]
        info = pack_cifar(folder, tmp_path / f"{split}-folder", split=split)
        assert info.fingerprint == dataset.fingerprint


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    files, _ = make("10", "python")
    archive = tmp_path / "cifar-10-python.tar.gz"
    write(archive, files)
    with pytest.raises(SystemExit) as ended:
        main(["data", "pack", str(archive), str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "choose one with --split train or --split test" in capsys.readouterr().err
    damaged = {
        "it asks for posix.mkdir": files | {"test_batch": pickle.dumps(Evil(), protocol=2)},
        "download it again": files | {"test_batch": files["test_batch"][:1000]},
        "holds no images and labels": files | {"test_batch": pickle.dumps({b"data": [1]}, protocol=2)},
        "does not hold the files": {name: data for name, data in files.items() if name != "test_batch"},
    }
    for says, content in damaged.items():
        write(archive, content)
        with pytest.raises(DataError, match=says):
            pack_cifar(archive, tmp_path / "out", split="test")
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        pack_cifar(archive, tmp_path / "out", split="test")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()
    binary, _ = make("10", "binary")
    write(archive, binary | {"test_batch.bin": binary["test_batch.bin"][:-1]})
    with pytest.raises(DataError, match="is truncated: 36875 bytes"):
        pack_cifar(archive, tmp_path / "out", split="test")
