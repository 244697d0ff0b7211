"""Streams of webdataset shards without an index."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import write_tar

from aimscale.aim.errors import UserError
from aimscale.harness.data import DataError
from aimscale.harness.data.images import crop_resize, draw_boxes
from aimscale.harness.data.random_access import make_key
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.stream import TrainStream, open_stream
from aimscale.harness.evaluate.run import evaluate
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.train.run import train

WHOLE: dict[str, Any] = {"crop_scale": (1, 1), "horizontal_flip": False}
"""Crops that leave an image of 32 px as it is."""


@pytest.fixture
def shards(small_set: Path, tmp_path: Path) -> Path:
    """The small set's shards alone."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in small_set.glob("*.tar"):
        shutil.copy(path, folder)
    return folder


def braces(folder: Path | str) -> str:
    return f"wds://{folder}/shard-{{000000..000002}}.tar"


def seen(config: RunConfig, num_images: int, workers: int = 0) -> list[bytes]:
    stream = open_stream(config)
    steps = train_batches(stream, start=0, stop=num_images, batch_size=20, micro_batch=10, num_workers=workers)
    batches = [batch for step in steps for batch in step]
    assert torch.equal(torch.cat([batch.positions for batch in batches]), torch.arange(num_images))
    return [bytes(image.contiguous().numpy()) for batch in batches for image in batch.images]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_come_in_another_order_and_with_the_prefixes_of_their_positions(
    shards: Path, small_set: Path, configure: Callable[..., RunConfig], workers: int
) -> None:
    config = configure(path=braces(shards), shuffle_buffer=30, **WHOLE)
    dataset = open_dataset(small_set)
    known = [bytes(dataset.decode(number).contiguous().numpy()) for number in range(60)]
    found = seen(config, 400, workers)
    assert set(found) == set(known)
    order = [known.index(image) for image in found[:40]]
    assert order != sorted(order)
    indexed = TrainStream(configure(path=small_set)).batch(range(40))
    assert torch.equal(open_stream(config).batch(range(40)).prefix_lengths, indexed.prefix_lengths)
    assert seen(configure(path=braces(shards), seed=1, **WHOLE), 40) != found[:40]


def test_crops_and_flips_are_those_of_the_positions(shards: Path, configure: Callable[..., RunConfig]) -> None:
    whole, cut = (open_stream(configure(path=braces(shards), **crops)).batch(range(20)) for crops in (WHOLE, {}))
    sides = np.full((2, 20), 32, dtype=np.int32)
    boxes = draw_boxes(make_key("crop", 0), np.arange(20), *sides, scale=(0.4, 1.0), horizontal_flip=True)
    for row, image in enumerate(whole.images):
        assert torch.equal(cut.images[row], crop_resize(image, boxes[row].item(), 32))


def test_a_broken_shard_is_named(shards: Path, configure: Callable[..., RunConfig]) -> None:
    for path in shards.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=f"{shards}.*unexpected end of data"):
        open_stream(configure(path=braces(shards), shuffle_buffer=20)).batch(range(40))
    for path in shards.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=str(shards)):
        open_stream(configure(path=braces(shards)))


def test_undecodable_images_are_counted(tmp_path: Path, shards: Path, configure: Callable[..., RunConfig]) -> None:
    write_tar(tmp_path / "bad.tar", {f"{number}.png": b"nope" for number in range(3)})
    path = f"wds://{tmp_path}/bad.tar::{shards}/shard-000000.tar"
    config = configure(path=path, shuffle_buffer=10, **WHOLE)
    stream = open_stream(config)
    bad = [stream.batch(range(first, first + 10)).bad_samples for first in range(0, 60, 10)]
    named = {name.partition(" (")[0] for names in bad for name in names}
    assert named == {f"{tmp_path}/bad.tar: {number}" for number in range(3)}
    steps = train_batches(open_stream(config), start=0, stop=60, batch_size=20, micro_batch=10)
    assert [batch.bad_samples for step in steps for batch in step] == bad


def test_what_needs_an_index_and_a_relative_path_are_refused(configure: Callable[..., RunConfig]) -> None:
    mixed = [{"path": "wds:///a.tar", "probability": 0.5}, {"path": "b", "probability": 0.5}]
    for data in ({"sources": [{"path": "wds:///a.tar"}], "unique_images": 5}, {"sources": mixed}):
        with pytest.raises(UserError, match="wds://"):
            configure(**data)
    with pytest.raises(DataError, match="wds://"):
        open_stream(configure(sources=[{"path": "wds://shards/a.tar"}]))


def test_a_run_trains_on_such_a_stream(shards: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config({"device": "cpu"}, data={"sources": [{"path": braces(shards)}]}, budgets=[64])
    run = RunDir.create(tmp_path / "run", config)
    assert train(run.path) == 0
    assert evaluate([run.path]) == 0
    (row,) = run.read_rows()
    assert (row["images_seen"], row["unique_images"], row["epochs"]) == (64, None, None)
    assert np.isfinite(row["val_loss"])
