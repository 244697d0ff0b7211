"""Validation losses: by hand, shared over ranks, with the standard error of a ratio."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aimscale.harness.validation
from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.data import DataError
from aimscale.harness.data.images import IMAGE_MEAN, IMAGE_STD, normalise
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.stream.held_out import EvalImages, prefix_lengths, validation_prefixes
from aimscale.harness.distributed.group import ALONE, Group, Placement
from aimscale.harness.run.config import ModelSection, ValidationSection
from aimscale.harness.validation import HeldOut, ValidationLosses, validate

MODEL = ModelSection(size="w16-d2", image_size=16, patch_size=4)


def eval_images(dataset: ShardDataset) -> torch.Tensor:
    """The first 13 images, normalised."""
    return normalise(EvalImages(dataset, MODEL, centre_crop=1.0, max_bad_fraction=0.0).pixels(range(13)))


def losses_of(group: Group, data: Path) -> ValidationLosses:
    aimscale.harness.validation.EVAL_TOKENS = 150  # passes of three images, the last one shorter
    model = AIM(model_config("w16-d2", image_size=16, patch_size=4, patch_order="inward_spiral"))
    section = ValidationSection(path=str(data / "validation"), num_prefixes=3, num_images=13, centre_crop=1.0)
    held_out = HeldOut(open_dataset(section.path), section, MODEL, group, max_bad_fraction=0.0)
    return validate(model, held_out, group)


def test_losses_equal_single_images_on_any_ranks(tiny_data: Path, in_group: Callable[..., list[Any]]) -> None:
    model = AIM(model_config("w16-d2", image_size=16, patch_size=4, patch_order="inward_spiral"))
    images = eval_images(open_dataset(tiny_data / "validation"))
    with torch.no_grad():
        expected = [
            sum(model(image[None], prefix[None])[0].item() for prefix in prefixes)
            for image, prefixes in zip(images, prefix_lengths(13, 3, 16), strict=True)
        ]
    given = prefix_lengths(13, 3, 16).numpy()
    for losses in (*in_group(losses_of, tiny_data), *in_group(losses_of, tiny_data, world_size=2)):
        assert losses.index.tolist() == list(range(13))
        assert losses.loss_sum == pytest.approx(expected, rel=1e-5)
        assert losses.num_targets.tolist() == (48 - given.sum(1)).tolist()


def test_the_loss_is_the_mean_over_targets_not_over_images() -> None:
    """Mean of images' means passed all tests: their images had as many targets each."""
    losses = ValidationLosses(index=np.arange(2), loss_sum=np.array([3.0, 1.0]), num_targets=np.array([10.0, 2.0]))
    assert losses.loss == 4 / 12


def test_bytes_go_to_the_device_and_are_normalised_there(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without values stands for a GPU."""
    placement = Placement(rank=0, world_size=1, local_rank=0, address="", port=0)
    group, moved = Group(placement, torch.device("meta"), None), []

    def watched(images: torch.Tensor) -> torch.Tensor:
        moved.append((images.device.type, images.dtype))
        return normalise(images)

    monkeypatch.setattr(aimscale.harness.validation, "normalise", watched)
    section = ValidationSection(path=str(tiny_data / "validation"), num_images=13, centre_crop=1.0)
    held_out = HeldOut(open_dataset(section.path), section, MODEL, group, max_bad_fraction=0.0)
    assert {images.device.type for _, images in held_out.passes(5)} == {"meta"}
    assert set(moved) == {("meta", torch.uint8)}


@pytest.mark.parametrize("channels", [1, 3])
def test_every_byte_is_normalised_by_two_operations_that_ieee_defines(channels: int) -> None:
    """So that any device gives the same bits."""
    every = np.arange(256, dtype=np.float32)
    for channel in range(channels):
        mean, std = (np.array(each, dtype=np.float32) for each in (IMAGE_MEAN, IMAGE_STD))
        if channels == 1:
            mean, std = (torch.from_numpy(each).mean(0, keepdim=True).numpy() for each in (mean, std))
        expected = (every - np.float32(255) * mean[channel]) / (np.float32(255) * std[channel])
        images = torch.arange(256, dtype=torch.uint8).expand(channels, 1, 256)
        assert normalise(images)[channel, 0].numpy().tobytes() == expected.tobytes()


def losses_of_all(group: Group, data: Path, max_bad_fraction: float) -> ValidationLosses | str:
    """The losses of all images, measured twice, or the sentence that refuses them."""
    model = AIM(model_config("w16-d2", image_size=16, patch_size=4))
    section = ValidationSection(path=str(data), num_prefixes=2, centre_crop=1.0)
    held_out = HeldOut(open_dataset(section.path), section, MODEL, group, max_bad_fraction=max_bad_fraction)
    try:
        validate(model, held_out, group)
    except DataError as error:
        return str(error)
    return validate(model, held_out, group)


def test_images_that_rot_after_indexing_are_left_out_and_counted(
    tiny_data: Path, tmp_path: Path, spoil: Callable[..., Path], in_group: Callable[..., list[Any]]
) -> None:
    sound, spoilt = tiny_data / "validation", spoil(tiny_data / "validation", tmp_path / "rotten", [4, 9, 15])
    left = [i for i in range(16) if i not in (4, 9, 15)]
    for world_size in (1, 2):
        (whole, *_) = in_group(losses_of_all, sound, 0.003, world_size=world_size)
        for losses in in_group(losses_of_all, spoilt, 0.003, world_size=world_size):
            assert losses.index.tolist() == left
            assert losses.columns["val_num_images"] == 13
            assert losses.loss_sum == pytest.approx(whole.loss_sum[left], rel=1e-5)
            assert losses.num_targets.tolist() == whole.num_targets[left].tolist()
        for sentence in in_group(losses_of_all, spoilt, 0.002, world_size=world_size):
            assert "3 of 16 images of" in sentence
            assert f"last {open_dataset(spoilt).describe(15)} (" in sentence


def test_a_masked_model_is_validated_on_fixed_masks(tiny_data: Path) -> None:
    config = model_config("w16-d2", image_size=16, patch_size=4, masked=0.75)
    section = ValidationSection(path=str(tiny_data / "validation"), num_prefixes=3, num_images=13, centre_crop=1.0)
    losses = validate(
        AIM(config), HeldOut(open_dataset(section.path), section, MODEL, ALONE, max_bad_fraction=0.0), ALONE
    )
    masks, more = validation_prefixes(13, 3, config), validation_prefixes(500, 3, config)
    assert torch.equal(more[:13], masks)
    assert torch.equal(masks.sum(2), torch.full((13, 3), 4))
    assert len(set(map(tuple, masks.flatten(0, 1).tolist()))) > 35
    assert more.float().mean((0, 1)) == pytest.approx(torch.full((16,), 0.25), abs=0.06)  # four standard errors
    images = eval_images(open_dataset(section.path))
    with torch.no_grad():
        loss_sum, num_targets = AIM(config)(images.repeat_interleave(3, dim=0), masks.flatten(0, 1))
    assert losses.loss == pytest.approx((loss_sum / num_targets).item(), rel=1e-5)


def test_standard_error_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    deviations = []
    for _ in range(2000):
        num_targets = rng.integers(20, 40, 50).astype(float)
        # losses vary less than numbers of targets, so that an error of the sum alone would be twice too wide
        loss_sum = num_targets * rng.gamma(64, 0.4 / 64, 50)
        losses = ValidationLosses(index=np.arange(50), loss_sum=loss_sum, num_targets=num_targets)
        deviations.append((losses.loss - 0.4) / losses.standard_error)
    assert np.mean(np.abs(deviations) < 1.96) == pytest.approx(0.94, abs=0.02)
