from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2
from hypothesis import given, settings
from hypothesis import strategies as st

from aimscale.harness.data import DataError
from aimscale.harness.data.images import (
    crop_resize,
    crop_resize_into,
    crop_resize_small,
    draw_boxes,
    jitter_colours,
    normalise,
    resize_shorter_side,
)
from aimscale.harness.data.random_access import make_key, permute
from aimscale.harness.data.store import index
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.stream.held_out import EvalImages, prefix_lengths
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.stream import Batch, TrainStream
from aimscale.harness.distributed.group import ALONE
from aimscale.harness.run.config import RunConfig

Configure = Callable[..., RunConfig]
Spoil = Callable[..., Path]


def whole(parts: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, prefix lengths and positions of some batches, sorted by position."""
    positions = torch.cat([batch.positions for batch in parts])
    order = positions.argsort()
    images = torch.cat([batch.images for batch in parts])[order]
    return images, torch.cat([batch.prefix_lengths for batch in parts])[order], positions[order]


def run(stream: TrainStream, start: int, stop: int, *, micro: int, world: int = 1, workers: int = 0, batch: int = 16):
    """Every rank's batches of a stretch, step by step."""
    sizes = {"batch_size": batch, "micro_batch": micro, "world_size": world, "num_workers": workers}
    ranks = [train_batches(stream, start=start, stop=stop, rank=rank, **sizes) for rank in range(world)]
    for step in zip(*ranks, strict=True):
        assert len({len(micro_batches) for micro_batches in step}) == 1, "ranks differ in their number of micro-batches"
        yield [batch for micro_batches in step for batch in micro_batches]


def test_permute_spreads_evenly_over_keys() -> None:
    keys = np.array([make_key("test", number) for number in range(20_000)], dtype=np.uint64)
    counts = np.bincount(permute(np.full(20_000, 3), 10, keys), minlength=10)
    assert (np.abs(counts - 2000) < 5 * np.sqrt(2000 * 0.9)).all()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(
    ("world", "micro", "workers", "batch"),
    [
        *((1, 16, 0, 16), (2, 3, 0, 16), (1, 1, 4, 16), (3, 4, 0, 10), (5, 16, 0, 6)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((4, 4, 1, 16), (2, 8, 2, 16))),
    ],
)
def test_stream_is_the_same_for_any_split(
    configure: Configure, world: int, micro: int, workers: int, batch: int
) -> None:
    stream = TrainStream(configure(color_jitter=True, shuffle_shards=2))
    expected = whole([stream.batch(np.arange(100, 220))])
    parts = [
        part for step in run(stream, 100, 220, micro=micro, world=world, workers=workers, batch=batch) for part in step
    ]
    for got, want in zip(whole(parts), expected, strict=True):
        assert torch.equal(got, want)
    assert max(len(part) for part in parts) <= micro
    restarted = TrainStream(configure(color_jitter=True, shuffle_shards=2)).batch([170])
    assert torch.equal(restarted.images_on("cpu")[0], normalise(expected[0][70]))
    assert restarted.prefix_lengths[0] == expected[1][70]
    if micro > 1:
        assert all((part.positions[0::2] + 1 == part.positions[1::2]).all() for part in parts), "a pair was split"


def test_every_epoch_is_a_permutation_over_restarts_and_world_sizes(configure: Configure) -> None:
    config = configure(shuffle_shards=2)  # of three
    seen: list[tuple[int, int]] = []
    position = 0
    for world, stop in ((1, 48), (2, 112), (4, 128), (3, 272), (1, 300)):
        stream = TrainStream(config)  # a restart
        for step in run(stream, position, stop, micro=4, world=world):
            where = whole(step)[2].numpy()
            seen += zip(*(values.tolist() for values in stream.locate(where)), strict=True)
        position = stop
    assert len(seen) == 300
    for source, size in ((0, 60), (1, 24)):
        samples = [sample for number, sample in seen if number == source]
        for epoch in range(len(samples) // size):
            assert sorted(samples[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert sum(number == 0 for number, _ in seen) == 240


def test_seeds_change_order_and_prefixes_but_not_the_subset(configure: Configure) -> None:
    first, second = (TrainStream(configure(seed=seed, unique_images=40)) for seed in (0, 1))
    a, b = (np.stack(stream.locate(np.arange(40))) for stream in (first, second))
    assert not np.array_equal(a, b)
    assert {*zip(*a.tolist(), strict=True)} == {*zip(*b.tolist(), strict=True)}
    assert not np.array_equal(first.prefix_lengths(range(40)), second.prefix_lengths(range(40)))


def test_subsets_are_nested_and_counted(configure: Configure) -> None:
    subsets = []
    for unique in (5, 20, 37, 75, None):
        stream = TrainStream(configure(unique_images=unique))
        assert stream.unique_images == (unique or 84)
        subsets.append({*zip(*(values.tolist() for values in stream.locate(np.arange(4000))), strict=True)})
    assert [len(subset) for subset in subsets] == [5, 20, 37, 75, 84]
    assert all(small < big for small, big in itertools.pairwise(subsets))
    with pytest.raises(DataError, match=r"unique_images 100 .*60"):
        TrainStream(configure(unique_images=100))


def test_prefixes_are_uniform_and_paired(configure: Configure) -> None:
    paired = TrainStream(configure()).prefix_lengths(range(64_000))
    assert (paired[0::2] + paired[1::2] == 64).all()
    uniform = TrainStream(configure(prefix="uniform")).prefix_lengths(range(64_000))
    for lengths in (paired, uniform, paired[0::2]):
        counts = np.bincount(lengths, minlength=65)
        expected = len(lengths) / 63
        assert counts[0] == counts[64] == 0
        assert np.abs(counts[1:64] - expected).max() < 6 * np.sqrt(expected)
    assert (TrainStream(configure(prefix="none")).prefix_lengths(range(9)) == 1).all()


def test_masks_hide_as_many_patches_of_every_image_alike_on_any_ranks(configure: Configure) -> None:
    stream = TrainStream(configure(masked=0.75, prefix="none"))
    _, visible, _ = whole([*itertools.chain(*run(stream, 0, 4096, micro=16))])
    assert visible.shape == (4096, 64)
    assert visible.dtype == torch.bool
    assert (visible.sum(1) == 16).all()
    assert (visible.float().mean(0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4096) ** 0.5
    _, elsewhere, _ = whole([*itertools.chain(*run(stream, 160, 224, micro=3, world=2, workers=1))])
    assert torch.equal(elsewhere, visible[160:224])
    other = TrainStream(configure(masked=0.75, seed=1)).batch(range(9)).prefix_lengths
    assert not torch.equal(other, visible[:9])


def test_validation_prefixes_are_stratified_and_fixed() -> None:
    lengths = prefix_lengths(2000, 4, 64)
    assert torch.equal(lengths[:7], prefix_lengths(7, 4, 64))
    assert lengths.min() == 1
    assert lengths.max() == 63
    for stratum in range(4):
        inside = lengths[:, stratum]
        assert 1 + 63 * stratum // 4 <= inside.min()
        assert inside.max() <= 1 + 63 * (stratum + 1) // 4
    assert abs(lengths.double().mean() - 32) < 0.5


def test_boxes_follow_random_resized_crop() -> None:
    torch.manual_seed(0)
    number, height, width = 4000, 120, 200
    scale, ratio, image = (0.4, 1.0), (3 / 4, 4 / 3), torch.empty(3, height, width)
    sides = np.full((number, 2), (height, width)).T
    boxes = draw_boxes(7, np.arange(number), *sides, scale=scale, ratio=ratio, horizontal_flip=True)
    theirs = torchvision.transforms.RandomResizedCrop.get_params
    reference = np.array([theirs(image, [*scale], [*ratio]) for _ in range(number)])
    ours = np.stack([boxes[name] for name in ("top", "left", "height", "width")], axis=1)
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    error = np.hypot(ours.std(0), reference.std(0)) / np.sqrt(number)
    assert (np.abs(ours.mean(0) - reference.mean(0)) < 5 * error).all()
    np.testing.assert_allclose(ours.std(0), reference.std(0), rtol=0.06)
    assert abs(boxes["flip"].mean() - 0.5) < 0.04


@given(data=st.data(), height=st.integers(1, 64), width=st.integers(1, 64), size=st.sampled_from([8, 32, 56]))
@settings(max_examples=40, deadline=None)
def test_batched_crop_equals_the_single_one(data: st.DataObject, height: int, width: int, size: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    images = torch.from_numpy(rng.integers(0, 256, (5, 3, height, width), dtype=np.uint8))
    sides = np.full((5, 2), (height, width)).T
    positions = rng.integers(0, 2**40, 5)
    boxes = draw_boxes(1, positions, *sides, scale=(0.1, 1.0), ratio=(0.5, 2.0), horizontal_flip=True)
    batch = crop_resize_small(images, boxes, size)
    for row in range(5):
        single = crop_resize(images[row], boxes[row].item(), size)
        assert (batch[row].int() - single.int()).abs().max() <= 2
    soft = images // 3 + 80  # overshoots of the filter stay inside of 0..255: the exact result needs no clipping
    batch = crop_resize_small(soft, boxes, size)
    for row in range(5):
        top, left, rows, columns, flip = boxes[row].item()
        exact = soft[row][:, top : top + rows, left : left + columns].double()[None]
        exact = F.interpolate(exact, size=(size, size), mode="bicubic", antialias=True)[0]
        assert (batch[row].flip(-1) if flip else batch[row]).double().sub(exact).abs().max() < 1.5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "box", [(3, 5, 60, 70, False), (3, 5, 60, 70, True), (0, 0, 9, 90, True), (1, 2, 32, 32, True)]
)
def test_a_crop_is_that_of_plain_torch_wherever_it_goes(channels: int, box: tuple[int, int, int, int, bool]) -> None:
    top, left, height, width, flip = box
    pixels = np.random.default_rng(0).integers(0, 256, (80, 90, channels), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    crop = image[None, :, top : top + height, left : left + width]
    (expected,) = F.interpolate(crop, size=(32, 32), mode="bicubic", antialias=True)
    expected = expected.flip(-1) if flip else expected
    assert torch.equal(crop_resize(image, box, 32), expected)
    assert torch.equal(crop_resize(image.contiguous(), box, 32), expected)
    planes = torch.zeros(3, channels, 32, 32, dtype=torch.uint8)
    for batch in (planes, planes.to(memory_format=torch.channels_last)):
        crop_resize_into(batch[1:2], pixels, box)
        assert torch.equal(batch[1], expected)
        assert not batch[::2].any()


def test_colour_jitter_is_drawn_by_position_and_draws_nothing_of_torch() -> None:
    images = torch.full((400, 3, 4, 4), 0, dtype=torch.uint8)
    images[:, 0], images[:, 1], images[:, 2] = 150, 100, 60
    before, out = torch.get_rng_state(), images.clone()
    jitter_colours(out, 3, np.arange(400))
    assert torch.equal(torch.get_rng_state(), before)
    changed = (out != images).flatten(1).any(1)
    assert abs(changed.double().mean() - 0.8) < 0.08
    some = images[:50].clone()
    jitter_colours(some, 3, np.arange(200, 250))
    assert torch.equal(some, out[200:250])
    reference = torchvision.transforms.v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    expected = torch.stack([reference(image) for image in images[changed]]).double().mean((2, 3))
    got = out[changed].double().mean((2, 3))
    assert ((got.mean(0) - expected.mean(0)).abs() < 5 * (2 / len(got)) ** 0.5 * expected.std(0)).all()
    torch.testing.assert_close(got.std(0), expected.std(0), rtol=0.2, atol=0)
    grey = images[:, :1].clone()
    jitter_colours(grey, 3, np.arange(400))
    assert grey.shape == (400, 1, 4, 4)


def test_other_than_grey_or_colour_is_refused(configure: Configure) -> None:
    config = configure()

    def with_channels(channels: int) -> RunConfig:
        model = config.training.model.model_copy(update={"channels": channels})
        return config.model_copy(update={"training": config.training.model_copy(update={"model": model})})

    grey = with_channels(1)
    assert TrainStream(grey).batch(range(6)).images.shape == (6, 1, 32, 32)
    with pytest.raises(DataError, match="4"):
        TrainStream(with_channels(4))


def test_normalise_by_imagenets_statistics() -> None:
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(normalise(images), (images / 255 - mean) / std)


@pytest.mark.parametrize("bound", [2**20, 0])
def test_small_images_are_decoded_once_and_others_each_time(
    small_set: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    monkeypatch.setattr(index, "MAX_KEPT_BYTES", bound)
    decoded: list[int] = []
    read_many = ShardDataset.read_many

    def watched(self: ShardDataset, samples: Any) -> list[bytes]:
        decoded.extend(samples)
        return read_many(self, samples)

    monkeypatch.setattr(ShardDataset, "read_many", watched)
    model, stream = configure().training.model, TrainStream(configure(path=small_set))
    evaluation = {"centre_crop": 1.0, "max_bad_fraction": 0.0}
    first = EvalImages(stream.datasets[0], model, **evaluation).pixels([3, 0])
    assert torch.equal(EvalImages(open_dataset(small_set), model, **evaluation).pixels([0, 3]), first[[1, 0]])
    assert decoded == ([3, 0] if bound else [3, 0, 0, 3])
    for start in (0, 60):
        stream.batch(range(start, start + 60))
    assert len(decoded) == (60 if bound else 124)


def test_eval_images_are_centre_crops(large_set: Path, configure: Configure) -> None:
    dataset = open_dataset(large_set)
    # the authors' way: the shorter side to ceil(32 / 0.875), then the middle 32 px of both sides
    resized = resize_shorter_side(dataset.decode(3)[None], 37)[0]
    top, left = ((side - 32) // 2 for side in resized.shape[-2:])
    images = EvalImages(dataset, configure().training.model, centre_crop=0.875, max_bad_fraction=0.0)
    _, cropped = images.pixels([0, 3])
    assert torch.equal(cropped, resized[:, top : top + 32, left : left + 32])


def test_a_shard_that_was_written_anew_is_refused(
    small_set: Path, large_set: Path, tmp_path: Path, configure: Configure
) -> None:
    for folder in (small_set, large_set):
        path = tmp_path / folder.parent.name
        shutil.copytree(folder, path)
        dataset = open_dataset(path)
        smallest = min(dataset.read_many(range(len(dataset))), key=len)
        for name, offset, size in dataset.byte_ranges(range(len(dataset))):
            with (path / name).open("r+b") as shard:
                shard.seek(offset)
                shard.write(smallest.ljust(size, b"\0"))
        with pytest.raises(DataError, match=r"sample '.*shard-"):
            TrainStream(configure(path=path)).batch(np.arange(24))


def test_bad_samples_are_replaced_alike_and_counted(
    small_set: Path, tmp_path: Path, spoil: Spoil, configure: Configure
) -> None:
    path = spoil(small_set, tmp_path / "spoilt", [7, 30])
    config = configure(path=path)
    expected = TrainStream(config).batch(np.arange(60))
    assert len(expected.bad_samples) >= 2
    assert all(re.fullmatch(r"sample '.+' of .+shard-\d+\.tar \(.+\)", text) for text in expected.bad_samples)
    clean = TrainStream(configure(path=small_set)).batch(np.arange(60))
    changed = (expected.images != clean.images).flatten(1).any(1)
    assert changed.sum() == 2
    again = TrainStream(config)
    for _ in range(2):  # what was drawn for the stretch stays, though a sample was replaced
        assert again.batch(np.arange(60)).bad_samples == expected.bad_samples
    for world, micro in ((2, 4), (4, 3)):
        parts = [part for step in run(TrainStream(config), 0, 60, micro=micro, world=world, batch=20) for part in step]
        assert torch.equal(whole(parts)[0], expected.images)
        assert {name for part in parts for name in part.bad_samples} == {*expected.bad_samples}


def test_a_flipped_bit_of_a_picture_is_a_bad_sample_that_evaluations_leave_out_and_count(
    small_set: Path, tmp_path: Path, configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    path = shutil.copytree(small_set, tmp_path / "copy")
    ((name, offset, size),) = open_dataset(path).byte_ranges([33])
    data = bytearray((path / name).read_bytes())
    data[offset + size // 2] ^= 1
    (path / name).write_bytes(data)
    (named,) = TrainStream(configure(path=path)).batch(np.arange(60)).bad_samples
    assert named.startswith(open_dataset(path).describe(33, "")), named
    dataset, model = open_dataset(path), configure().training.model
    for fraction in (0.001, 0.0):  # of 1,000 images at least
        images = EvalImages(dataset, model, centre_crop=1.0, max_bad_fraction=fraction)
        samples = np.array([32, 33, 34])
        assert images.pixels(samples).flatten(1).any(1).tolist() == [True, False, True]
        assert images.is_good(samples).tolist() == [True, False, True]
        assert torch.equal(images.pixels(samples)[[0, 2]], torch.cat([images.pixels([32]), images.pixels([34])]))
        if fraction:
            images.agree(ALONE, np.arange(60))
            images.agree(ALONE, samples[[0]])  # a second look, without the bad one: it still counts
            assert caplog.text.count(named) == 1
        else:
            with pytest.raises(DataError, match=re.escape(f"1 of 60 images of {path} cannot be decoded, last {named}")):
                images.agree(ALONE, np.arange(60))
    images.is_read = True
    with pytest.raises(DataError, match=re.escape(named)):
        images.pixels(samples)
    with pytest.raises(DataError, match=re.escape(f"none of 1 images of {path} can be decoded: {named}")):
        images.agree(ALONE, samples[1:2])


@pytest.mark.parametrize("workers", [0, 2])
def test_sixteen_undecodable_samples_in_a_row_are_an_error_that_names_one(
    small_set: Path, tmp_path: Path, spoil: Spoil, configure: Configure, workers: int
) -> None:
    path = spoil(small_set, tmp_path / "spoilt", list(range(60)))
    stream = TrainStream(configure(path=path))
    with pytest.raises(DataError, match=r"position 0\b.*'[\w-]+'"):
        list(run(stream, 0, 64, micro=16, workers=workers))


def test_images_that_changed_under_a_run_are_refused(small_set: Path, configure: Configure) -> None:
    held = open_dataset(small_set).fingerprint
    TrainStream(configure(sources=[{"path": str(small_set), "fingerprint": held}]))
    with pytest.raises(DataError, match=held):
        TrainStream(configure(sources=[{"path": str(small_set), "fingerprint": "another"}]))
