import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from variants import VARIANTS

from aimscale.aim.config import ModelConfig, known_sizes, model_config
from aimscale.aim.cost import (
    executed_flops_per_image,
    flops_per_image,
    largest_param,
    matrix_sizes,
    mean_scored_tokens,
    param_count,
)
from aimscale.aim.model import AIM

PRINTED_TRUNKS = {"aim-600M": 679_627_776, "aim-1B": 1_208_160_256, "aim-3B": 2_718_210_048, "aim-7B": 6_442_983_424}
SMALL = "w24-d3"
CASES = [
    *((size, {"head_rule": "released" if size.startswith("aim") else "proportional"}) for size in known_sizes()),
    ("rung-32", {"head_rule": "released", "ln_residual": True}),
    (SMALL, {"head_depth": 0, "channels": 1}),
    (SMALL, {"head_depth": 0, "head_width": 256}),
    (SMALL, {"image_size": 64, "patch_size": 16}),
    (SMALL, {"head_kind": "transformer", "head_depth": 2}),
    *((SMALL, variant) for variant in VARIANTS),
]


@pytest.mark.parametrize(("size", "trunk"), PRINTED_TRUNKS.items())
def test_parameters_equal_the_released_models(size: str, trunk: int) -> None:
    assert param_count(model_config(size)).trunk == trunk


@pytest.mark.parametrize(("size", "options"), CASES, ids=str)
def test_parameters_equal_the_modules(size: str, options: dict) -> None:
    config, model = _on_meta(size, options)
    count = param_count(config)
    assert count.preprocessor == _numel(model.preprocessor)
    assert count.trunk == _numel(model.trunk)
    assert count.head == _numel(model.pixel_head) + (_numel(model.mask) if model.mask else 0)
    assert count.total == _numel(model)
    assert matrix_sizes(config) == [each.numel() for each in model.parameters() if each.dim() > 1]
    assert largest_param(config) == max(each.numel() for each in model.parameters())


# every size obeys one formula, and counting operators takes seconds for a large one
@pytest.mark.parametrize(("size", "options"), [case for case in CASES if case[0] in (SMALL, "rung-32")], ids=str)
def test_flops_equal_pytorchs_counter(size: str, options: dict) -> None:
    config, model = _on_meta(size, options)
    # with a gradient for the images, the backward pass is exactly twice the forward pass
    images = torch.empty(2, config.channels, config.image_size, config.image_size, device="meta", requires_grad=True)
    prefix_lengths = torch.tensor([3, config.num_tokens - 7])
    scored_tokens = (2 * config.num_tokens - prefix_lengths.sum().item()) / 2
    without = torch.ones_like(prefix_lengths)
    if config.masked is not None:
        prefix_lengths = without = torch.arange(config.num_tokens).expand(2, -1) >= config.masked * config.num_tokens
        scored_tokens = config.masked * config.num_tokens

    assert _count(lambda: model.predict(images, prefix_lengths)) == 2 * flops_per_image(config).forward
    executed = executed_flops_per_image(config, scored_tokens)
    assert _count(lambda: model(images, prefix_lengths)) == 2 * executed.forward
    assert _count(lambda: model(images, prefix_lengths)[0].backward()) == 2 * executed.train
    without_prefix = executed_flops_per_image(config, mean_scored_tokens(config, "none"))
    assert _count(lambda: model(images, without)) == 2 * without_prefix.forward


def _on_meta(size: str, options: dict) -> tuple[ModelConfig, AIM]:
    geometry = {} if size.startswith("aim") else {"image_size": 32, "patch_size": 4}
    config = model_config(size, **{**geometry, **options})
    with torch.device("meta"):
        return config, AIM(config)


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
