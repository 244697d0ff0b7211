"""Data that others wrote: idx files, public webdataset layouts, URLs; and what the index says of them."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import say
from pictures import saved, smooth, write_tar

from aimscale.harness.data import DataError
from aimscale.harness.data.store import shards
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.indexing import index_shards
from aimscale.harness.data.store.shards import CACHE_FOLDER, CachedReader
from aimscale.harness.data.stream.order import count_shared
from aimscale.harness.data.stream.stream import TrainStream
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.lock import locked


def encoded(rng: np.random.Generator, height: int, width: int, kind: str = "jpeg") -> bytes:
    return saved(smooth(rng, height, width), kind, quality=90)


def write_imagenet_wds(folder: Path) -> None:
    """The layout of timm/imagenet-1k-wds: jpg, cls and json under one key."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(6):
            key, label = f"n0144{label_of(shard, number)}_{number}", label_of(shard, number)
            record = json.dumps({"label": label, "filename": f"{key}.JPEG", "width": 90, "height": 80}).encode()
            members |= {f"{key}.jpg": encoded(rng, 80, 90), f"{key}.cls": b"%d" % label, f"{key}.json": record}
        write_tar(folder / f"imagenet1k-train-{shard:04d}.tar", members)


def label_of(shard: int, number: int) -> int:
    return (shard * 6 + number) * 7 % 11


def write_img2dataset(folder: Path) -> None:
    """The layout of img2dataset and DataComp: an image, its caption and a record; failed downloads have no image."""
    rng = np.random.default_rng(6)
    folder.mkdir()
    for shard in range(2):
        members: dict[str, bytes] = {}
        for number in range(5):
            key = f"{shard:05d}{number:04d}"
            if number != 2:
                side, kind, extension = (70, "jpeg", "jpg") if number % 2 else (50, "webp", "webp")
                members[f"{key}.{extension}"] = encoded(rng, side, side + 5, kind)
            record = {"url": "https://x.test/a.b.jpg", "caption": "7", "key": key, "status": "success"}
            members |= {f"{key}.txt": b"7", f"{key}.json": json.dumps(record).encode()}
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"")


def test_public_layouts_are_read_as_they_are(tmp_path: Path) -> None:
    write_imagenet_wds(tmp_path / "imagenet")
    info = index_shards(str(tmp_path / "imagenet"), tmp_path / "imagenet", num_workers=2)
    dataset = open_dataset(tmp_path / "imagenet")
    assert (info.num_samples, info.num_bad, info.num_shards) == (18, 0, 3)
    assert dataset.require_labels().tolist() == [label_of(shard, n) for shard in range(3) for n in range(6)]
    assert dataset.num_classes == 11
    assert dataset.key(7) == f"n0144{label_of(1, 1)}_1"
    assert dataset.decode(7).shape == (3, 80, 90)

    write_img2dataset(tmp_path / "datacomp")
    index_shards(str(tmp_path / "datacomp"), tmp_path / "datacomp")
    dataset = open_dataset(tmp_path / "datacomp")
    assert len(dataset) == 8
    assert dataset.labels is None, "a caption was taken for a label"
    for channels in (1, 3):
        shapes = {dataset.decode(i, channels).shape for i in range(8)}
        assert shapes == {(channels, 70, 75), (channels, 50, 55)}, "torchvision has no grey WebP"
    assert sorted(path.name for path in (tmp_path / "datacomp").iterdir() if "index" in path.name) == [
        dataset.info.index_folder,
        "index.parquet",
    ]


def test_index_records_undecodable_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    good, cut = encoded(rng, 60, 60), encoded(rng, 60, 60)[:-200]
    write_tar(tmp_path / "a.tar", {"0.jpg": good, "1.jpg": cut, "2.jpg": b"", "3.jpg": encoded(rng, 64, 64)})
    index_shards(str(tmp_path), tmp_path)
    dataset = open_dataset(tmp_path)
    assert dataset.usable().tolist() == dataset.usable(np.arange(2)).tolist() == [0, 3]
    assert dataset.info.num_bad == dataset.info.num_usable == 2
    command = [sys.executable, "-m", "aimscale", "data", "info", f"file://{tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, "a thread of Arrow's that outlives the last line would abort it (134)"
    assert "sample '2' of" in ended.stdout
    for broken, extension in (
        (b"cat", "cls"),
        (b"-3", "cls"),
        (b"9" * 25, "cls"),
        (b'{"label": 4294967296}', "json"),
        (b'{"label": "\xff"}', "json"),
        (b'{"label":' + b"[" * 50_000, "json"),
    ):
        write_tar(tmp_path / "b.tar", {"0.jpg": good, f"0.{extension}": broken})
        with pytest.raises(DataError, match=r"'0' of .*b\.tar"):
            index_shards(str(tmp_path), tmp_path)


def read_through(url: str, local: Path, root: Path, bound: int) -> None:
    """In a process of its own: read a data set twice through a cache that fetches every shard of it."""
    dataset = open_dataset(local)
    reader = CachedReader(url, dataset.index.shard_sizes, root, bound)
    for i in 2 * [*range(len(dataset))]:
        (byte_range,) = dataset.byte_ranges([i])
        reader.read_ahead([byte_range])
        time.sleep(0.01)
        assert reader.read(*byte_range) == dataset.read(i)
    fetched(reader)  # else the end of the process cuts a shard off


def fetched(reader: CachedReader) -> None:
    """Wait for the shards that it fetches in the background."""
    if reader._fetching is not None:
        reader._fetching.join()


def test_cache_keeps_its_bound_and_touches_nothing_else(
    small_set: Path, tmp_path: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_IN_USE_S", 0.1)
    monkeypatch.setattr(shards, "_RETRY_S", 0.05)
    theirs = tmp_path / "cache" / "0123456789abcdef" / "c.raw"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(bytes(200_000))
    bound = sum(sorted(open_dataset(small_set).index.shard_sizes.values())[:2]) + 1000
    cached, seen = tmp_path / "cache" / CACHE_FOLDER, set()
    with multiprocessing.get_context("fork").Pool(2) as pool:  # knows the short times
        others = [(serve(small_set)[0], small_set, cached, bound) for _ in range(2)]
        reading = pool.starmap_async(read_through, others)
        while not reading.ready():
            reading.wait(0.02)
            sizes = {}
            for path in cached.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):
                    sizes[path] = path.stat().st_size
            seen |= {path for path in sizes if path.suffix == ".tar"}
            # one that was evicted while others were looked at was not there beside all of them
            assert sum(size for path, size in sizes.items() if path.exists()) <= bound
        reading.get()
    assert len({path.parent for path in seen}) == 2, "one data set never made room for the other"
    assert len(seen) > 2, "nothing was evicted"
    assert not [*cached.rglob("*.partial")]
    assert theirs.stat().st_size == 200_000


def read_all(url: str, local: Path, root: Path, bound: int) -> int:
    """Read a data set in a process of its own, from each shard in turn; returns the number of images."""
    dataset = open_dataset(local)
    reader = CachedReader(url, dataset.index.shard_sizes, root, bound)
    numbers = np.argsort([offset for _, offset, _ in dataset.byte_ranges(range(len(dataset)))], kind="stable")
    assert [reader.read(*dataset.byte_ranges([i])[0]) for i in numbers] == dataset.read_many(numbers)
    return len(dataset)


def test_two_processes_with_a_cache_for_one_shard_fetch_no_shard_in_vain(
    small_set: Path, tmp_path: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def left_slowly(path: Path, **options: Any) -> Iterator[bool]:
        with locked(path, **options) as is_mine:
            yield is_mine
        time.sleep(0.02 * (path.suffix == ".partial"))  # time enough for the other process to evict what was fetched

    monkeypatch.setattr(shards, "locked", left_slowly)
    bound = max(open_dataset(small_set).index.shard_sizes.values())
    url, handler = serve(small_set)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        reading = pool.starmap_async(read_all, 2 * [(url, small_set, tmp_path / "cache", bound)])
        num_read = sum(reading.get())
    assert handler.asked.total() <= num_read


def test_what_a_killed_process_was_fetching_makes_room_and_what_a_live_one_fetches_is_waited_for(
    small_set: Path, tmp_path: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "WAIT_S", 1.0)
    dataset = open_dataset(small_set)
    sizes = dataset.index.shard_sizes
    left = tmp_path / "0123456789abcdef" / "x.tar.partial"
    left.parent.mkdir()
    left.write_bytes(bytes(max(sizes.values())))
    reader = CachedReader(serve(small_set)[0], sizes, tmp_path, max(sizes.values()))
    (byte_range,) = dataset.byte_ranges([0])
    with locked(left):
        left.write_bytes(bytes(max(sizes.values())))
        with pytest.raises(OSError, match="had no room"):
            reader.read(*byte_range)
    left.write_bytes(bytes(max(sizes.values())))
    assert reader.read(*byte_range) == dataset.read(0)
    assert not left.exists()


def test_a_cache_that_loses_shards_costs_no_image_and_one_that_cannot_be_written_is_named(
    small_set: Path, tmp_path: Path, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(small_set)
    sizes, (url, handler) = dataset.index.shard_sizes, serve(small_set)
    byte_ranges = dataset.byte_ranges(range(len(dataset)))
    reader = CachedReader(url, sizes, tmp_path / "cache", 10**9)
    reader.read_ahead(byte_ranges)
    fetched(reader)
    kept = [*(tmp_path / "cache").rglob("*.tar")]
    assert len(kept) == len(sizes)
    handler.asked.clear()
    assert [reader.read(*each) for each in byte_ranges] == dataset.read_many(range(len(dataset)))
    assert not handler.asked, "what lies in the cache was asked for"
    kept[0].unlink()
    assert [reader.read(*each) for each in byte_ranges] == dataset.read_many(range(len(dataset)))
    assert {request.split()[0] for request in handler.asked} == {f"/{kept[0].name}"}

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    broken = open_dataset(url, cache_dir=str(tmp_path / "third"))
    broken.read_ahead(np.arange(9), 3)
    with pytest.raises(DataError, match=r"shard-000000\.tar.*No space left"):
        broken.read_many(range(9))
    assert isinstance(broken._reader, CachedReader)
    fetched(broken._reader)
    assert not [*(tmp_path / "third").rglob("*.[tp]ar*")]


def test_validation_images_can_never_enter_training(
    small_set: Path, tmp_path: Path, configure: Callable[..., RunConfig]
) -> None:
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(9)
    for number in range(5):
        smooth(rng, 32, 32).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "leak.png").write_bytes(open_dataset(small_set).read(33))
    say("data", "pack", tmp_path / "in", tmp_path / "validation")
    with pytest.raises(DataError, match="leak"):
        TrainStream(configure(validation=tmp_path / "validation", unique_images=5))
    assert count_shared(open_dataset(small_set), open_dataset(tmp_path / "validation")) == 1
