"""Resizing and jitter on the device give the loader's bytes, whoever computes them and wherever a crop stands."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimscale.harness.data.random_access import I64
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.stream import crops as crops_module
from aimscale.harness.data.stream import positions as stream_module
from aimscale.harness.data.stream.augment import crop_resize
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.data.stream.crops import CropLayout, Crops, pack, resize_exactly
from aimscale.harness.data.stream.jitter import _draw, _jittered
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.run.config import RunConfig

Configure = Callable[..., RunConfig]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no card"))]


def by_kernel(crop: torch.Tensor, flip: bool, size: int) -> torch.Tensor:
    return crop_resize(crop.permute(2, 0, 1), (0, 0, crop.shape[0], crop.shape[1], flip), size)


@pytest.mark.parametrize("device", DEVICES)
@given(data=st.data(), size=st.sampled_from([1, 32, 97, 224]), channels=st.sampled_from([1, 3]))
@settings(max_examples=25, deadline=None)
def test_matrix_products_give_the_bytes_of_the_kernel(
    device: str, data: st.DataObject, size: int, channels: int
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sides = st.tuples(st.integers(1, 400), st.integers(1, 400))
    shapes = data.draw(st.lists(sides, min_size=1, max_size=5))
    # noise, and edges from black to white, where the filter overshoots most
    crops = [torch.from_numpy(rng.integers(0, 256, (*shape, channels), dtype=np.uint8)) for shape in shapes]
    crops += [255 * (crop > 127).byte() for crop in crops]
    flips = rng.random(len(crops)) < 0.5
    got = resize_exactly([crop.to(device) for crop in crops], flips, size).cpu()
    expected = torch.stack([by_kernel(crop, bool(flip), size) for crop, flip in zip(crops, flips, strict=True)])
    assert torch.equal(got, expected)


def test_strong_shrinking_is_exact_too() -> None:
    crop = torch.randint(0, 256, (3000, 17, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in (3, 32):
        assert torch.equal(resize_exactly([crop], np.array([False]), size)[0], by_kernel(crop, False, size))


def test_more_crops_than_one_group_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops_module, "_GROUP", 3)
    crops = [torch.full((40 + number, 50, 3), 10 * number, dtype=torch.uint8) for number in range(8)]
    images = resize_exactly(crops, np.zeros(8, dtype=bool), 32)
    assert [set(image.unique().tolist()) for image in images] == [{10 * number} for number in range(8)]


def test_packed_crops_are_found_again() -> None:
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 60, 70), dtype=np.uint8)) for _ in range(4)]
    views = [(image[:, 5 : 20 + i, 3:40], i % 2 == 1) for i, image in enumerate(images)]
    into = torch.full((100_000,), 7, dtype=torch.uint8)
    pixels, layout = pack(views, into)
    assert len(pixels) == sum(view.numel() for view, _ in views)
    assert (into[len(pixels) :] == 7).all(), "wrote behind its end"
    assert layout.flip.tolist() == [False, True, False, True]
    crops = Crops(pixels=pixels, layout=layout, size=32, channels=3)
    expected = [crop_resize(view, (0, 0, *view.shape[1:], flip), 32) for view, flip in views]
    assert torch.equal(crops.resized("cpu"), torch.stack(expected))
    empty, layout = pack([], into)
    assert Crops(pixels=empty, layout=layout, size=32, channels=3).resized("cpu").shape == (0, 3, 32, 32)


@pytest.mark.parametrize("device", DEVICES)
def test_jitter_of_a_batch_is_that_of_each_image(device: str) -> None:
    rng = np.random.default_rng(4)
    images = torch.from_numpy(rng.integers(0, 256, (60, 3, 24, 20), dtype=np.uint8))
    images[:20] = images[:20, :1]  # grey: every factor meets values that it should leave whole
    _, order, strength = _draw(9, rng.integers(0, 2**40, 60))
    for some in (images, images[:, :1]):
        at_once = _jittered(some.to(device), order, strength).cpu()
        one_by_one = [_jittered(some[i : i + 1], order[i : i + 1], strength[i : i + 1]) for i in range(60)]
        assert torch.equal(at_once, torch.cat(one_by_one))


def stretch(stream: TrainStream, start: int, stop: int, **how: int) -> Iterator[torch.Tensor]:
    """Normalised images of one rank of a stretch."""
    for step in train_batches(stream, start=start, stop=stop, batch_size=20, **how):
        for batch in step:
            yield batch.images_on("cpu")


@pytest.mark.parametrize("jitter", [False, True])
def test_the_device_gets_what_the_loader_would_have_made(
    configure: Configure, jitter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same boxes, same pixels; at any number of ranks and workers, and after a restart."""
    config = configure(color_jitter=jitter)
    expected = TrainStream(config).batch(np.arange(40, 100)).images_on("cpu")
    for world_size, micro_batch, num_workers in ((1, 20, 0), (2, 4, 1), (1, 7, 2)):
        stream = TrainStream(config, augment_on="device")
        how = {"world_size": world_size, "micro_batch": micro_batch, "num_workers": num_workers}
        ranks = [list(stretch(stream, 40, 100, rank=rank, **how)) for rank in range(world_size)]
        if world_size == 1:
            assert torch.equal(torch.cat(ranks[0]), expected)
        assert sorted(image.sum().item() for rank in ranks for images in rank for image in images) == sorted(
            image.sum().item() for image in expected
        )
    restarted = TrainStream(config, augment_on="device")
    assert torch.equal(torch.cat(list(stretch(restarted, 80, 100, micro_batch=8))), expected[40:])
    monkeypatch.setattr(stream_module, "MAX_CROP_PIXELS", 10_000)  # the larger half of the crops is resized before
    some = TrainStream(config, augment_on="device")
    batch = some.batch(np.arange(40, 100))
    assert isinstance(batch.images, Crops)
    assert torch.equal(batch.images_on("cpu"), expected)
    assert len(batch.images.pixels) <= some.num_bytes(60) == 60 * 3 * 10_000


def test_pinned_or_copied_crops_are_the_same(configure: Configure) -> None:
    batch = TrainStream(configure(), augment_on="device").batch(np.arange(12))
    assert isinstance(batch.images, Crops)
    copy = batch.clone()
    expected = batch.images_on("cpu")
    batch.images.pixels.zero_()
    assert torch.equal(copy.images_on("cpu"), expected)


def test_replaced_samples_are_cropped_alike(large_set: Path, tmp_path: Path, configure: Configure) -> None:
    dataset = open_dataset(large_set)
    sources = [{"path": str(large_set)}]
    streams = [TrainStream(configure(sources=sources), augment_on=where) for where in ("loader", "device")]
    _, samples = streams[0].locate(np.arange(24))
    for stream in streams:
        column = stream.datasets[0].index.samples
        shortened = column.values.copy()
        shortened["size"][samples[3]] = 5  # its first bytes alone are no image
        column._values = shortened
    expected, got = (stream.batch(np.arange(24)) for stream in streams)
    assert len(expected.bad_samples) == 1
    assert got.bad_samples == expected.bad_samples
    assert dataset.key(int(samples[3])) in got.bad_samples[0]
    assert torch.equal(got.images_on("cpu"), expected.images_on("cpu"))


def test_a_layout_is_small_to_send() -> None:
    layout = CropLayout(np.zeros(512, np.int32), np.zeros(512, np.int32), np.zeros(512, bool))
    assert len(pickle.dumps(layout)) < 8192, "several must fit into a pipe"


def test_crops_are_cut_once_by_the_thread_too(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches that were read several at a time were read again one by one."""
    stream = TrainStream(configure(), augment_on="device")
    asked: list[int] = []
    batch = stream.batch

    def counted(positions: I64, **more: torch.Tensor) -> Batch:
        asked.append(len(positions))
        return batch(positions, **more)

    monkeypatch.setattr(stream, "batch", counted)
    steps = list(train_batches(stream, start=0, stop=48, batch_size=8, micro_batch=4))
    assert len(steps) == 6
    assert sum(asked) == 48
