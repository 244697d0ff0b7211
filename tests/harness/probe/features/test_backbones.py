"""What gives features: AIM in two precisions, pixels, which have no tokens, and timm's vision transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from aimscale.aim.cost import param_count
from aimscale.aim.model import AIM
from aimscale.harness.data.images import normalise
from aimscale.harness.probe.features.backbones import AimBackbone, PixelBackbone, TimmBackbone, baseline
from aimscale.harness.probe.features.tasks import ProbeError
from aimscale.harness.run.config import run_config

VIT = "timm:vit_tiny_patch16_224"
LIKE = run_config(
    {
        "model": {"size": "rung-24", "image_size": 32, "patch_size": 4},
        "data": {"sources": [{"path": "x"}]},
        "optimiser": {"batch_size": 32},
        "budgets": [32],
        "validation": {"path": "x"},
    },
    "the test",
)


def test_bf16_features_are_near_those_of_fp32_which_come_back(task: Any, model: AIM) -> None:
    train, _ = task.open()
    backbone, images = AimBackbone(lambda: copy.deepcopy(model)), train.images(range(16))
    exact = backbone.features(images, [1])
    counted = param_count(model.config)
    held = sum(weight.nbytes for weight in backbone.model.parameters() if not weight.is_meta)
    assert held == 4 * (counted.total - counted.head), "the pixel head takes no memory"
    backbone.use(torch.bfloat16)
    difference = (backbone.features(images, [1]).float() - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < difference < 0.03
    backbone.use(torch.float32)  # from the weights themselves, not from rounded ones
    assert torch.equal(backbone.features(images, [1]), exact)
    wanted = task.section(epochs=4)
    rounded = task.probe(wanted.model_copy(update={"precision": "bf16"}), seed=0, out=None)
    for one, other in zip(task.probe(wanted, seed=0, out=None), rounded, strict=True):
        assert one["last_top1"] == pytest.approx(other["last_top1"], abs=0.03)  # on given blocks


def test_a_causal_task_is_another_evaluation_on_causal_features(task: Any, model: AIM) -> None:
    train, _ = task.open()
    backbone, images = AimBackbone(lambda: copy.deepcopy(model)), train.images(range(4))
    names = set()
    for attention in ("causal", "bidirectional", "causal"):  # one task leaves the next one's attention alone
        wanted = task.section(kinds=("knn",), attention=attention)
        names.add(task.probe(wanted, backbone, seed=0, out=None)[0]["evaluation"])
        expected = model.features(images, [1], is_causal=attention == "causal")
        assert torch.equal(backbone.features(images, [1]), expected)
    assert len(names) == 2
    with pytest.raises(ProbeError, match="raw-pixels has no causal"):
        task.probe(wanted, PixelBackbone(), seed=0, out=None)


def test_raw_pixels_have_no_tokens_and_no_trunk(task: Any) -> None:
    for kinds in (("linear", "attentive"), ("lora",)):
        with pytest.raises(ProbeError, match=kinds[-1]):
            task.probe(task.section(kinds=kinds), PixelBackbone(), seed=0, out=None)
    wanted = task.section(kinds=("linear", "knn"))
    for entry in task.probe(wanted, PixelBackbone(), seed=0, out=None):
        assert entry["top1"] > 0.8


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "linear"), ("bf16", "knn"), ("fp32", "lora")])
def test_features_that_are_not_finite_are_refused(task: Any, model: AIM, precision: str, kind: str) -> None:
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.trunk.blocks[0].norm_1.weight, float("nan"))
    with pytest.raises(ProbeError, match="not finite"):
        task.probe(task.section(precision=precision, kinds=(kind,)), AimBackbone(lambda: broken), seed=0, out=None)


def test_timm_blocks_are_raw_patch_tokens_of_images_in_the_models_own_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(VIT.removeprefix("timm:"), num_classes=0).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "vit.pth")
    backbone, geometry = baseline(VIT, LIKE, weights=str(tmp_path / "vit.pth"), device=torch.device("cpu"))
    assert isinstance(backbone, TimmBackbone)
    assert (backbone.num_blocks, backbone.num_heads, geometry.image_size) == (12, 3, 224)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    outputs = []
    hook = model.blocks[5].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(pixels / 255 * 2 - 1)  # this model's mean and deviation are 0.5
    hook.remove()
    (features,) = backbone.features(normalise(pixels), [5])
    torch.testing.assert_close(features, outputs[0][:, 1:], rtol=1e-4, atol=1e-4)  # without the class token


def test_an_untrained_timm_model_is_that_of_the_seed_and_leaves_the_random_state_alone() -> None:
    def first(seed: int) -> torch.Tensor:
        like = LIKE.model_copy(update={"training": LIKE.training.model_copy(update={"seed": seed})})
        backbone, _ = baseline(VIT, like, weights="random", device=torch.device("cpu"))
        assert backbone.name == f"{VIT} (random weights)"
        return backbone.features(torch.ones(1, 3, 224, 224), [0])

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(first(0), first(0))
    assert torch.rand(1) == expected
    assert not torch.equal(first(0), first(1))


@pytest.mark.parametrize(
    ("target", "weights", "subject"),
    [
        ("timm:vit_tiny_patch16_22", "gone.pth", "did you mean 'vit_tiny_patch16_224'?"),
        (VIT, None, "--weights"),
        (VIT, "gone.pth", "gone.pth"),
        ("random", "file.pth", "--weights"),
        ("sift", None, "sift"),
    ],
)
def test_impossible_baselines_are_refused(target: str, weights: str | None, subject: str) -> None:
    with pytest.raises(ProbeError, match=subject):
        baseline(target, LIKE, weights=weights, device=torch.device("cpu"))
