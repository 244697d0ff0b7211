"""The peer is the same model: equal weights give equal losses and gradients, though it scores every token."""

from __future__ import annotations

import pytest
import torch

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.bench.peer import PeerModel, peer_step
from aimscale.harness.bench.train import random_batches
from aimscale.harness.run.config import OptimiserSection


@pytest.mark.parametrize(
    "options", [{"head_width": 32, "head_depth": 3}, {"ln_residual": True}, {"head_rule": "none"}, {"target": "raw"}]
)
def test_loss_and_gradients_equal_ours_at_any_prefix(options: dict) -> None:
    config = model_config("w32-d2", image_size=16, patch_size=4, **options)
    model, peer = AIM(config), PeerModel(config)
    peer.load_state_dict(model.state_dict())
    images, prefix_len = torch.randn(6, 3, 16, 16), torch.tensor([1, 2, 7, 9, 14, 15])
    loss_sum, num_targets = model(images, prefix_len)
    ours = torch.autograd.grad(loss_sum / num_targets, list(model.parameters()))
    loss = peer(images, prefix_len)
    theirs = dict(zip(dict(peer.named_parameters()), torch.autograd.grad(loss, list(peer.parameters())), strict=True))
    assert (loss_sum / num_targets).item() == pytest.approx(loss.item(), rel=1e-6)
    for (name, _), gradient in zip(model.named_parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_steps_learn(precision: str) -> None:
    config = model_config("w32-d2", image_size=16, patch_size=4)
    optimiser = OptimiserSection(batch_size=8, precision=precision, lr_peak=3e-3)  # type: ignore[arg-type]
    step = peer_step(config, optimiser, random_batches(config, 8, 4), torch.device("cpu"))
    losses = [step().item() for _ in range(20)]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
