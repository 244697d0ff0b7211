"""Shards in object stores and on web servers: the images of files, faults that pass and faults that stay."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.store import index, remote, shards
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.indexing import expand_shards, index_shards
from aimscale.harness.data.stream.indexed import TrainStream
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.run.config import RunConfig

Configure = Callable[..., RunConfig]
Serve = Callable[..., Any]


def test_http_gives_the_same_stream_as_files(
    small_set: Path, tmp_path: Path, configure: Configure, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_KEPT_BYTES", 0)  # images decoded before would not be read
    url, handler = serve(small_set)
    index_shards(url, tmp_path / "index", classes=("ant", "bee", "cat"))
    assert open_dataset(tmp_path / "index").fingerprint == open_dataset(small_set).fingerprint
    expected = TrainStream(configure(path=small_set)).batch(range(40))
    for path in (str(tmp_path / "index"), url):
        stream = TrainStream(configure(path=path))
        assert torch.equal(stream.batch(range(40)).images, expected.images)
    assert all("bytes=" in request for request in handler.asked)

    for start, workers in ((0, 0), (16, 2)):
        handler.asked.clear()
        stream = TrainStream(configure(path=url))
        steps = train_batches(stream, start=start, stop=40, batch_size=8, micro_batch=4, num_workers=workers)
        assert torch.equal(torch.cat([batch.images for step in steps for batch in step]), expected.images[start:])
        assert {*handler.asked.values()} == {1}, "an image was read twice"

    cached = configure(path=url)
    shards_asked = [f"/{shard.name} bytes=0-{shard.size - 1}" for shard in open_dataset(small_set).shards]
    for workers in (2, 0):
        handler.asked.clear()
        stream = TrainStream(cached, cache_dir=str(tmp_path / "cache"))
        steps = train_batches(stream, start=0, stop=40, batch_size=8, micro_batch=8, num_workers=workers)
        assert torch.equal(torch.cat([batch.images for step in steps for batch in step]), expected.images)
        assert max(handler.asked[each] for each in shards_asked) <= 1, "a shard was fetched twice"


def test_what_fails_ahead_is_told_where_it_is_needed(
    small_set: Path, configure: Configure, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_KEPT_BYTES", 0)
    monkeypatch.setattr(shards, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "MAX_AHEAD_BYTES", 20_000)
    url, _ = serve(small_set, lambda path, turn: "503" if path.endswith("1.tar") else None)
    stream = TrainStream(configure(path=url))
    of_shard = [stream.datasets[0].shard_of(int(i)) for i in stream.locate(range(60))[1]]
    found = 0
    with pytest.raises(DataError, match=f"{url}/shard-000001.tar"):  # noqa: PT012  # what is counted comes before
        for (batch,) in train_batches(stream, start=0, stop=60, batch_size=1, micro_batch=1):
            found += len(batch)
    assert found == of_shard.index(1), "an error ahead ended the images before it"
    reader = stream.datasets[0]._reader
    assert isinstance(reader, remote.RemoteReader)
    assert reader._asked_bytes <= 20_000 + max(size for _, _, size in reader._asked)


def test_remote_mistakes_are_named(
    small_set: Path, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_set, tmp_path / "copy")
    url, handler = serve(tmp_path / "copy")
    dataset = open_dataset(url)
    handler.ranges = False
    with pytest.raises(DataError, match="ranges"):
        dataset.read(0)
    (tmp_path / "copy" / dataset.shards[0].name).unlink()
    with pytest.raises(DataError, match=dataset.shards[0].name):
        dataset.read(0)
    with pytest.raises(DataError, match="nowhere"):
        open_dataset(f"{url}/nowhere")
    monkeypatch.setattr(shards, "FIRST_PAUSE_S", 0.0)
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9"):
        open_dataset("http://127.0.0.1:9")
    assert expand_shards("gs://b/x-{008..010}.tar") == ("gs://b", ["x-008.tar", "x-009.tar", "x-010.tar"])


@pytest.mark.parametrize("kind", ["503", "cut", "stall"])
def test_faults_that_pass_leave_no_trace(
    kind: str, small_set: Path, configure: Configure, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "FIRST_PAUSE_S", 0.001)
    if kind == "stall":
        monkeypatch.setattr(remote, "_STALLED_S", 0.7)
    expected = TrainStream(configure(path=small_set)).batch(range(32))
    url, handler = serve(small_set, lambda path, turn: kind if turn <= 2 and path.endswith("0.tar") else None)
    stream = TrainStream(configure(path=url))
    assert torch.equal(stream.batch(range(32)).images, expected.images)
    assert stream.batch(range(32)).bad_samples == ()
    assert handler.under_way[1] > 4, "the reads of a batch did not go out together"
    counts = {request: count for request, count in handler.asked.items() if "0.tar" in request}
    if kind == "stall":  # on a busy machine a good read may seem to have stalled, too
        assert min(counts.values()) >= 3
        return
    assert {*counts.values()} == {3}
    assert {*(handler.asked - Counter(counts)).values()} == {1}, "good reads were redone"


@pytest.mark.parametrize("kind", ["500", "cut", "stall"])
def test_faults_of_s3_that_stay_name_shard_and_url(
    kind: str, configure: Configure, faulty_bucket: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_STALLED_S", 1.0 if kind == "stall" else 60.0)
    monkeypatch.setattr(remote, "NUM_TRIES", 1)
    url = faulty_bucket(lambda path, turn: kind if path.endswith("1.tar") else None, tries=1)
    stream = TrainStream(configure(path=url))
    shard = "." if kind == "stall" else "1"  # on a busy machine a good read may seem to have stalled, too
    with pytest.raises(DataError, match=f"{url}/shard-00000{shard}.tar"):
        stream.batch(range(60))


def test_s3_gives_the_same_stream_as_files_whatever_faults_pass(
    small_set: Path, tmp_path: Path, faulty_bucket: Serve, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MAX_KEPT_BYTES", 0)  # images decoded before would not be read
    monkeypatch.setattr(remote, "_STALLED_S", 2.0)
    kinds: dict[str, str] = {}
    url = faulty_bucket(lambda path, turn: kinds.get(path[-5:]) if turn == 1 else None, tries=2)
    classes = ("ant", "bee", "cat")
    index_shards(url, tmp_path / "index", classes=classes)
    assert open_dataset(tmp_path / "index").fingerprint == open_dataset(small_set).fingerprint
    kinds |= {"0.tar": "500", "1.tar": "cut", "2.tar": "stall"}
    expected = TrainStream(configure(path=small_set)).batch(range(40))
    for path, cache in ((str(tmp_path / "index"), None), (url, None), (url, str(tmp_path / "cache"))):
        stream = TrainStream(configure(path=path), cache_dir=cache)
        for workers in (0, 2):
            steps = train_batches(stream, start=0, stop=40, batch_size=8, micro_batch=8, num_workers=workers)
            assert torch.equal(torch.cat([batch.images for step in steps for batch in step]), expected.images)
    assert [*(tmp_path / "cache").glob("*/*/index-*/samples.npy")], "the index was not kept in the cache"
    with pytest.raises(DataError, match="nowhere"):
        open_dataset(f"{url}/nowhere")
    fsspec.filesystem("s3").rm(f"faulty/{open_dataset(small_set).shards[0].name}")
    with pytest.raises(DataError, match=f"{url}/shard-000000.tar"):
        TrainStream(configure(path=tmp_path / "index")).batch(range(60))
