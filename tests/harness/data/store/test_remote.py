"""Shards in object stores and on web servers: the images of files, faults that pass and faults that stay."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.store import index, shards
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.indexing import expand_shards, index_shards
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.stream import TrainStream
from aimscale.harness.run.config import RunConfig

Configure = Callable[..., RunConfig]
Serve = Callable[..., Any]


def test_http_gives_the_same_stream_as_files_and_each_shard_is_fetched_once(
    small_set: Path, tmp_path: Path, configure: Configure, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_KEPT_BYTES", 0)  # images decoded before would not be read
    url, handler = serve(small_set)
    index_shards(url, tmp_path / "index", classes=("ant", "bee", "cat"))
    assert open_dataset(tmp_path / "index").fingerprint == open_dataset(small_set).fingerprint
    expected = TrainStream(configure(path=small_set)).batch(range(40))
    for number, (path, start, workers) in enumerate(((tmp_path / "index", 0, 0), (url, 0, 2), (url, 16, 0))):
        handler.asked.clear()
        stream = TrainStream(configure(path=path), cache_dir=str(tmp_path / f"cache{number}"))
        steps = train_batches(stream, start=start, stop=40, batch_size=8, micro_batch=4, num_workers=workers)
        assert torch.equal(torch.cat([batch.images for step in steps for batch in step]), expected.images[start:])
        starts = [request for request in handler.asked.elements() if ".tar bytes=0-" in request]
        assert len(starts) == len(stream.datasets[0].index.shards), "a shard was fetched twice"
    handler.asked.clear()
    stream = TrainStream(configure(path=url), cache_dir=str(tmp_path / "cache1"))
    assert torch.equal(stream.batch(range(40)).images, expected.images)
    assert not [request for request in handler.asked if ".tar" in request], "what lies in the cache was asked for"


def test_the_users_own_cache_is_the_default(
    small_set: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIMSCALE_CACHE", str(tmp_path / "own"))
    dataset = open_dataset(serve(small_set)[0])
    assert dataset.read(7) == open_dataset(small_set).read(7)
    assert len([*(tmp_path / "own").rglob("*.tar")]) == 1


def test_remote_mistakes_are_named(
    small_set: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_set, tmp_path / "copy")
    url, _ = serve(tmp_path / "copy")
    dataset = open_dataset(url, cache_dir=str(tmp_path / "cache"))
    first, *_ = dataset.index.shard_sizes
    (tmp_path / "copy" / first).unlink()
    with pytest.raises(DataError, match=first):
        dataset.read(0)
    with pytest.raises(DataError, match="nowhere"):
        open_dataset(f"{url}/nowhere")
    with pytest.raises(DataError, match="cache_gb"):
        open_dataset(url, cache_dir=str(tmp_path / "cache"), cache_gb=1e-6).read(0)
    monkeypatch.setattr(shards, "FIRST_PAUSE_S", 0.0)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9"):
        open_dataset("http://127.0.0.1:9")
    with pytest.raises(DataError, match="more than 10,000,000 shards"):
        expand_shards("s3://b/x-{0..99999999999}.tar")
    assert expand_shards("gs://b/x-{008..010}.tar") == ("gs://b", ["x-008.tar", "x-009.tar", "x-010.tar"])


@pytest.mark.parametrize("kind", ["503", "cut", "stall"])
def test_faults_that_pass_leave_no_trace(
    kind: str, small_set: Path, tmp_path: Path, configure: Configure, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(shards, "STALLED_S", 0.7 if kind == "stall" else 60.0)
    expected = TrainStream(configure(path=small_set)).batch(range(32))
    url, handler = serve(small_set, lambda path, turn: kind if turn <= 2 and path.endswith("0.tar") else None)
    stream = TrainStream(configure(path=url), cache_dir=str(tmp_path / "cache"))
    assert torch.equal(stream.batch(range(32)).images, expected.images)
    assert stream.batch(range(32)).bad_samples == ()
    assert max(count for request, count in handler.asked.items() if "0.tar" in request) >= 3


def test_s3_gives_the_same_stream_as_files_and_names_a_shard_that_is_gone(
    small_set: Path, tmp_path: Path, bucket: str, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_KEPT_BYTES", 0)  # images decoded before would not be read
    index_shards(bucket, tmp_path / "index", classes=("ant", "bee", "cat"))
    assert open_dataset(tmp_path / "index").fingerprint == open_dataset(small_set).fingerprint
    expected = TrainStream(configure(path=small_set)).batch(range(40))
    for number, (path, workers) in enumerate(((tmp_path / "index", 2), (bucket, 0))):
        stream = TrainStream(configure(path=path), cache_dir=str(tmp_path / f"cache{number}"))
        steps = train_batches(stream, start=0, stop=40, batch_size=8, micro_batch=8, num_workers=workers)
        assert torch.equal(torch.cat([batch.images for step in steps for batch in step]), expected.images)
    assert [*(tmp_path / "cache1").glob("*/*/index-*/samples.npy")], "the index was not kept in the cache"
    with pytest.raises(DataError, match="nowhere"):
        open_dataset(f"{bucket}/nowhere")
    fsspec.filesystem("s3").rm("bucket/shard-000001.tar")
    with pytest.raises(DataError, match=f"{bucket}/shard-000001.tar"):
        TrainStream(configure(path=bucket), cache_dir=str(tmp_path / "empty")).batch(range(60))
