import copy

import torch

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.aim.probes import TARGETS, add_lora

CONFIG = model_config("w16-d2", image_size=12, patch_size=4)


def lora_state(model: AIM) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.endswith((".lora_a", ".lora_b"))}


def test_adaptation_starts_from_the_model_and_trains_only_the_updates() -> None:
    model = AIM(CONFIG)
    frozen = copy.deepcopy(model.state_dict())
    images = torch.randn(4, 3, 12, 12)
    before = model.features(images, [1]).detach()
    added = add_lora(model, rank=2)
    assert torch.equal(model.features(images, [1]), before)
    assert len(added) == 2 * len(TARGETS) * CONFIG.depth
    assert not any("mlp" in name for name in lora_state(model))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in added}
    # rank x (in + out) of query, value and output projection
    assert sum(p.numel() for p in added) == 2 * CONFIG.depth * 3 * 2 * CONFIG.width
    released = model_config("aim-7B")
    assert 8 * released.depth * 3 * 2 * released.width == 6_291_456  # the paper's 0.1 %

    optimiser = torch.optim.AdamW(added, lr=1e-2)
    wanted = torch.randn_like(before)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (model.features(images, [1]) - wanted).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in added)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[name]) for name, value in model.state_dict().items() if name in frozen)
    assert model.state_dict().keys() - lora_state(model).keys() == frozen.keys()


def test_the_same_seed_gives_the_same_start_and_query_and_value_are_updated() -> None:
    first, second = AIM(CONFIG), AIM(CONFIG)
    add_lora(first, rank=2, seed=3)
    add_lora(second, rank=2, seed=3)
    for name, value in lora_state(first).items():
        assert torch.equal(value, lora_state(second)[name])
    layer = second.trunk.blocks[0].attn.qkv
    with torch.no_grad():
        layer.lora_b.normal_()
    x = torch.randn(3, CONFIG.width)
    query, key, value = layer(x).chunk(3, dim=1)
    frozen = (x @ layer.weight.T).chunk(3, dim=1)
    # alpha / rank, as in loralib with the authors' lora_alpha of 1
    torch.testing.assert_close(query, frozen[0] + x @ (layer.lora_b[0] @ layer.lora_a[0]).T / 2)
    assert torch.equal(key, frozen[1])  # the key is not adapted
    torch.testing.assert_close(value, frozen[2] + x @ (layer.lora_b[1] @ layer.lora_a[1]).T / 2)
