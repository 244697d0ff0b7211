"""What gives features: their precision, and pixels, which have no tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from aimscale.aim.model import AIM
from aimscale.harness.probe.features.backbones import AimBackbone, PixelBackbone, precision_difference
from aimscale.harness.probe.features.benchmarks import ProbeError


def test_bf16_features_are_near_those_of_fp32_and_the_difference_is_said(
    task: Any, model: AIM, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _ = task.open()
    backbone = AimBackbone(lambda: copy.deepcopy(model))
    difference = precision_difference(backbone, train.images(range(16)), torch.bfloat16)
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
    with pytest.raises(ProbeError, match="attentive"):
        task.probe(task.section(), PixelBackbone(), seed=0, out=None)
    wanted = task.section(kinds=("linear", "knn"))
    for entry in task.probe(wanted, PixelBackbone(), seed=0, out=None):
        assert entry["top1"] > 0.8


def test_features_that_are_not_finite_are_refused(task: Any, model: AIM) -> None:
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.trunk.blocks[0].norm_1.weight, float("nan"))
    for precision in ("fp32", "bf16"):
        with pytest.raises(ProbeError, match="of aim are not finite"):
            task.probe(task.section(precision=precision), AimBackbone(lambda: broken), seed=0, out=None)
