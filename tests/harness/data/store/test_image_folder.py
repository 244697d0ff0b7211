"""Packing in parallel, and going on where a killed process stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store import image_folder
from aimscale.harness.data.store.image_folder import pack_folder
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.pack import PackedImage
from aimscale.harness.run.files import locked


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_any_number_of_processes_writes_the_same_bytes(small_set: Path, tmp_path: Path) -> None:
    source = small_set.parent / "images"
    (tmp_path / "one").mkdir()
    for where, workers in ((tmp_path / "one" / "packed", 1), (tmp_path / "packed", 3)):
        pack_folder(source, where, max_shard_bytes=30_000, num_workers=workers)
    assert files_of(tmp_path / "one" / "packed") == files_of(tmp_path / "packed")
    assert open_dataset(tmp_path / "packed").info.num_shards >= 4


def test_every_image_is_decoded_once(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aimscale.harness.data.store import decoding, pack, scan

    decoded: list[int] = []

    def counting(data: bytes, channels: int = 3) -> Any:
        decoded.append(len(data))
        return decoding.decode(data, channels)

    for module in (pack, scan, image_folder):
        monkeypatch.setattr(module, "decode", counting)
    pack_folder(small_set.parent / "images", tmp_path / "out")
    assert len(decoded) == 60


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Interrupt `prepare` at a file; returns the list of files that it was asked for."""
    asked: list[int] = []
    prepare = image_folder._ImageFolder.prepare

    def prepare_or_stop(images: Any, wanted: int) -> PackedImage | str:
        if wanted == number:
            raise KeyboardInterrupt
        asked.append(wanted)
        return prepare(images, wanted)

    monkeypatch.setattr(image_folder._ImageFolder, "prepare", prepare_or_stop)
    return asked


def test_an_interrupted_pack_goes_on(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    for path in (small_set.parent / "images").rglob("*.png"):
        (source / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    for number in range(3):
        (source / f"broken-{number}.png").write_bytes(b"no image")
    expected = pack_folder(source, tmp_path / "whole", max_shard_bytes=30_000, skip_bad=True)
    with monkeypatch.context() as patched:
        stop_at(patched, 50)
        with pytest.raises(KeyboardInterrupt):
            pack_folder(source, out, max_shard_bytes=30_000, skip_bad=True)
    assert not out.exists()
    with locked(tmp_path / ".out.partial" / ".pack" / "lock"), pytest.raises(DataError, match="by another process"):
        pack_folder(source, out, max_shard_bytes=30_000, skip_bad=True)
    with monkeypatch.context() as patched:
        asked = stop_at(patched, -1)
        info, skipped = pack_folder(source, out, max_shard_bytes=30_000, skip_bad=True)
    assert 20 < min(asked) <= 50, "it began anew"
    assert (
        {path.name for path in skipped} == {path.name for path in expected[1]} == {f"broken-{n}.png" for n in range(3)}
    )
    assert info.fingerprint == expected[0].fingerprint
    assert {name: data for name, data in files_of(out).items() if name.endswith(".tar")} == {
        name: data for name, data in files_of(tmp_path / "whole").items() if name.endswith(".tar")
    }
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_changed_files_begin_anew(small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_set.parent / "images"
    with monkeypatch.context() as patched:
        stop_at(patched, 50)
        with pytest.raises(KeyboardInterrupt):
            pack_folder(source, tmp_path / "out", max_shard_bytes=30_000)
    with monkeypatch.context() as patched:
        asked = stop_at(patched, -1)
        pack_folder(source, tmp_path / "out", max_shard_bytes=20_000)
    assert min(asked) == 0
    assert open_dataset(tmp_path / "out").num_usable == 60


def pack_slowly(source: Path, out: Path) -> None:
    prepare = image_folder._ImageFolder.prepare

    def prepare_slowly(images: Any, number: int) -> PackedImage | str:
        time.sleep(0.02)
        return prepare(images, number)

    image_folder._ImageFolder.prepare = prepare_slowly  # type: ignore[method-assign]
    pack_folder(source, out, max_shard_bytes=10_000)


def test_a_killed_pack_goes_on(small_set: Path, tmp_path: Path) -> None:
    source, out = small_set.parent / "images", tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=pack_slowly, args=(source, out))
    process.start()
    while len([*(tmp_path / ".out.partial" / ".pack").glob("*.parquet")]) < 3:
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.005)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    info, _ = pack_folder(source, out, max_shard_bytes=10_000)
    assert info.fingerprint == open_dataset(small_set).fingerprint
    assert files_of(out)["shard-000002.tar"]
    assert [path.name for path in tmp_path.glob(".*")] == []
