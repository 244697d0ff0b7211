"""What gives features: their precision, and pixels, which have no tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.harness.probe.features.backbones import AimBackbone, PixelBackbone, precision_difference


def test_bf16_features_are_near_those_of_fp32_and_the_difference_is_said(
    task: Any, model: AIM, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _ = task.open()
    backbone = AimBackbone(lambda: copy.deepcopy(model))
    difference = precision_difference(backbone, train.images(range(16)), torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert 1e-4 < difference < 0.03
    backbone.use(torch.float32)  # from the weights themselves, not from rounded ones
    images = train.images([3])
    assert torch.equal(backbone.features(images, [1]), model.features(images, [1]))
    wanted = task.section(epochs=4)
    exact = task.probe(wanted, seed=0, out=None)
    assert capsys.readouterr().err == ""
    wanted = wanted.model_copy(update={"precision": "bf16"})
    rounded = task.probe(wanted, seed=0, out=None)
    assert "features in bf16 differ from fp32 by" in capsys.readouterr().err
    for one, other in zip(exact, rounded, strict=True):
        assert one["precision_difference"] == 0 < other["precision_difference"] < 0.03
        assert one["top1"] == pytest.approx(other["top1"], abs=0.03)


def test_raw_pixels_have_no_tokens_to_attend_over(task: Any) -> None:
    with pytest.raises(UserError, match="leave out kind 'attentive'"):
        task.probe(task.section(), PixelBackbone(), seed=0, out=None)
    wanted = task.section(kinds=("linear", "knn"))
    for entry in task.probe(wanted, PixelBackbone(), seed=0, out=None):
        assert entry["top1"] > 0.8
