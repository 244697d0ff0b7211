"""The coordinate check: do activations move by the same amount at every width?"""

import math

import pytest
import torch

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM

WIDTHS = (32, 64, 128)
PROPORTIONAL = {"head_depth": 2}
CONSTANT = {"head_rule": "released", "head_width": 256, "head_depth": 2}
LINEAR = {"head_rule": "none"}
TRANSFORMER = {"head_depth": 1, "head_kind": "transformer"}
QK_NORM = {"head_depth": 2, "qk_norm": True}


def movement(parametrisation: str, width: int, head: dict) -> torch.Tensor:
    """Mean absolute change of both blocks' outputs and of the predictions over four AdamW steps."""
    model = AIM(model_config(f"w{width}-d2", image_size=12, patch_size=4, parametrisation=parametrisation, **head))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 12, 12, generator=generator).cumsum(2).cumsum(3)
    prefix_len = torch.arange(1, 9)

    def activations() -> list[torch.Tensor]:
        with torch.no_grad():
            return [*model.features(images, [0, 1]), model.predict(images, prefix_len).nan_to_num()]

    before = activations()
    groups = [{**group, "lr": 1e-3 * group["lr_scale"]} for group in model.param_groups(weight_decay=0.05)]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for _ in range(4):
        optimiser.zero_grad()
        loss_sum, num_targets = model(images, prefix_len)
        (loss_sum / num_targets).backward()
        optimiser.step()
    return torch.stack([(new - old).abs().mean() for new, old in zip(activations(), before, strict=True)])


def exponents(parametrisation: str, head: dict) -> list[float]:
    """Slope of log movement against log width: 0 means that a step does the same at every width."""
    moved = torch.stack([movement(parametrisation, width, head) for width in WIDTHS]).log()
    x = torch.tensor(WIDTHS).log()
    x = x - x.mean()
    return ((x @ moved) / (x @ x)).tolist()


@pytest.mark.parametrize("head", [PROPORTIONAL, CONSTANT, LINEAR, TRANSFORMER, QK_NORM], ids=str)
def test_mup_moves_activations_alike_at_every_width(head: dict) -> None:
    assert exponents("mup", head) == pytest.approx([0, 0, 0], abs=0.15)


def test_standard_parametrisation_moves_wide_models_more() -> None:
    block_0, block_1, _ = exponents("standard", PROPORTIONAL)
    assert min(block_0, block_1) > 0.5


def test_groups_cover_every_parameter_once_and_decay_only_matrices() -> None:
    for parametrisation in ("standard", "mup"):
        model = AIM(
            model_config("w64-d2", image_size=12, patch_size=4, parametrisation=parametrisation, ln_residual=True)
        )
        groups = model.param_groups(weight_decay=0.05)
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
        for group in groups:
            for parameter in group["params"]:
                if parameter.ndim >= 2:
                    # what AdamW multiplies a weight by in a step does not depend on the width
                    assert group["weight_decay"] * group["lr_scale"] == pytest.approx(0.05)
                else:
                    assert (group["weight_decay"], group["lr_scale"]) == (0, 1)
        scales = {group["lr_scale"] for group in groups}
        assert scales == ({1.0} if parametrisation == "standard" else {1.0, 256 / 64, 336 / 80})


def test_both_agree_at_the_base_widths_but_for_the_outputs_start() -> None:
    standard, mup = (
        AIM(
            model_config(
                "w256-d2", image_size=12, patch_size=4, parametrisation=parametrisation, head_kind="transformer"
            )
        )
        for parametrisation in ("standard", "mup")
    )
    for name, value in standard.state_dict().items():
        if name == "pixel_head.proj_out.weight":
            assert mup.state_dict()[name].abs().max() == 0
        else:
            torch.testing.assert_close(mup.state_dict()[name], value)
    assert all(group["lr_scale"] == 1 for group in mup.param_groups(0.05))
    assert mup.trunk.blocks[0].attn.scale == standard.trunk.blocks[0].attn.scale == 1 / math.sqrt(64)
    assert mup.pixel_head.blocks[0].attn.scale == standard.pixel_head.blocks[0].attn.scale == 1 / math.sqrt(16)
