"""timm, random and raw-pixel baselines see what the run sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from aimscale.harness.data.stream.augment import normalise
from aimscale.harness.probe.features.baseline_models import TimmBackbone, baseline
from aimscale.harness.probe.features.benchmarks import ProbeError
from aimscale.harness.run.config import run_config

CPU = torch.device("cpu")
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


def make(target: str, *, weights: str | None = None, image_size: int | None = None):  # type: ignore[no-untyped-def]
    return baseline(target, LIKE, weights=weights, image_size=image_size, device=CPU)


def test_timm_blocks_are_raw_patch_tokens_of_images_in_the_models_own_normalisation() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    backbone = TimmBackbone(model, "t", CPU)
    assert (backbone.num_blocks, backbone.num_heads) == (12, 3)
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    outputs = []
    hook = model.blocks[5].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(pixels / 255 * 2 - 1)  # this model's mean and deviation are 0.5
    hook.remove()
    (features,) = backbone.features(normalise(pixels), [5])
    torch.testing.assert_close(features, outputs[0][:, 1:], rtol=1e-4, atol=1e-4)  # without the class token


def test_timm_weights_come_from_a_file_or_are_random_on_request(tmp_path: Path) -> None:
    torch.manual_seed(1)
    saved = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "vit.pth")
    loaded, geometry = make("timm:vit_tiny_patch16_224", weights=str(tmp_path / "vit.pth"), image_size=32)
    assert geometry.image_size == 32
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.features(images, [11]), TimmBackbone(saved, "", CPU).features(images, [11]))
    untrained, _ = make("timm:vit_tiny_patch16_224", weights="random", image_size=32)
    assert not torch.allclose(untrained.features(images, [11]), loaded.features(images, [11]))
    convolutional, geometry = make("timm:resnet10t", weights="random")
    assert convolutional.features(torch.randn(1, 3, 64, 64), [0]).shape == (1, 1, 4, 512)


@pytest.mark.parametrize(
    ("target", "options", "subject"),
    [
        ("timm:vit_tiny_patch16_22", {"weights": "random"}, "did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224", {}, "--weights"),
        ("timm:vit_tiny_patch16_224", {"weights": "gone.pth"}, "gone.pth"),
        ("timm:resnet10t", {"weights": "random", "image_size": 32}, "--image-size 32"),
        ("random", {"weights": "random"}, "--weights"),
        ("sift", {}, "sift"),
    ],
)
def test_impossible_baselines_are_refused(target: str, options: dict[str, object], subject: str) -> None:
    with pytest.raises(ProbeError, match=subject):
        make(target, **options)  # type: ignore[arg-type]
