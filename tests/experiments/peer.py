"""Our step against the loop that others write: AIM in plain PyTorch, trained as the paper describes it, on one thread.

    python tests/experiments/peer.py w128-d6 64 bf16    # size, batch, precision; a head of 12 blocks of its width

Every token passes through the pixel head and is scored or not afterwards; prefixes are drawn independently; bf16 is
autocast over float32 weights. Nothing of `aim`'s layers is used, so none of its savings leak in. The parameters have
the same names, which lets `main` load our weights into the peer and find equal losses first.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.layers import sincos_positions
from aimscale.aim.model import AIM
from aimscale.aim.objective import normalise_patches, patchify, prefix_causal_mask
from aimscale.harness.bench.train import random_batches
from aimscale.harness.data.stream.draws import Batch
from aimscale.harness.device.distributed import find_placement, start_group, stop_group
from aimscale.harness.run.config import OptimiserSection, parse
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.feed import count_targets


class PeerModel(nn.Module):
    """AIM with raster order and the standard parametrisation, float32 weights."""

    positions: Tensor
    head_positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert (config.patch_order, config.parametrisation, config.target) == ("raster", "standard", "normalised")
        self.config = config
        width, head, eps = config.width, config.head, config.norm_eps
        patchifier = nn.Module()
        patchifier.proj = nn.Conv2d(config.channels, width, config.patch_size, stride=config.patch_size)
        patchifier.norm = nn.LayerNorm(width, eps=eps)
        self.preprocessor = _group(patchifier=patchifier)
        self.trunk = _group(
            blocks=nn.ModuleList(_PeerBlock(width, config.num_heads, eps) for _ in range(config.depth)),
            post_trunk_norm=nn.LayerNorm(width, eps=eps),
        )
        self.pixel_head = _group(
            proj_in=nn.Linear(width, head.width),
            blocks=nn.ModuleList(_PeerBlock(head.width, 0, eps) for _ in range(head.depth)),
            norm=nn.LayerNorm(head.width, eps=eps),
            proj_out=nn.Linear(head.width, config.patch_dim),
        )
        self.register_buffer("positions", sincos_positions(config.grid, width), persistent=False)
        self.register_buffer("head_positions", sincos_positions(config.grid, head.width), persistent=False)

    def forward(self, images: Tensor, prefix_len: Tensor) -> Tensor:
        """Mean loss over the scored targets, float32 scalar."""
        num_tokens = self.config.num_tokens
        patchifier, trunk, head = self.preprocessor.patchifier, self.trunk, self.pixel_head
        x = patchifier.norm(patchifier.proj(images).flatten(2).transpose(1, 2)) + self.positions
        mask = prefix_causal_mask(prefix_len, num_tokens)
        for block in trunk.blocks:
            x = block(x, mask)
        x = trunk.post_trunk_norm(x)
        x = head.proj_in(x) + self.head_positions
        for block in head.blocks:
            x = block(x, None)
        x = head.norm(x)
        targets = normalise_patches(patchify(images, self.config.patch_size))
        error = (head.proj_out(x)[:, :-1].float() - targets[:, 1:]).square().mean(dim=-1)
        position = torch.arange(num_tokens - 1, device=images.device)
        scored = (position[None, :] >= prefix_len[:, None] - 1).float()
        return (error * scored).sum() / scored.sum()


class _PeerBlock(nn.Module):
    """Pre-norm block: attention (none with 0 heads), then an MLP."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        if num_heads:
            self.norm_1 = nn.LayerNorm(width, eps=eps)
            qkv, proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.attn = _group(qkv=qkv, proj=proj)
        self.norm_2 = nn.LayerNorm(width, eps=eps)
        fc1, fc2 = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.mlp = _group(fc1=fc1, fc2=fc2)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (B, N, d) to (B, N, d)."""
        if self.num_heads:
            batch, num_tokens, width = x.shape
            qkv = self.attn.qkv(self.norm_1(x)).view(batch, num_tokens, 3, self.num_heads, width // self.num_heads)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = x + self.attn.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, width))
        out: Tensor = x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm_2(x))))
        return out


def _group(**parts: nn.Module) -> Any:
    """A module that only names its parts."""
    group = nn.Module()
    for name, part in parts.items():
        group.add_module(name, part)
    return group


def peer_step(
    config: ModelConfig, optimiser: OptimiserSection, step: Sequence[Batch], device: torch.device
) -> Callable[[], Tensor]:
    """One optimiser step over the same images: fused AdamW, clipping, and prefixes drawn anew every time."""
    model = PeerModel(config).to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimiser.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optimiser.lr_peak,
        betas=optimiser.betas,
        eps=optimiser.eps,
        fused=True,
    )
    generator = torch.Generator().manual_seed(0)

    def one() -> Tensor:
        total = torch.zeros((), device=device)
        for batch in step:
            prefix_len = torch.randint(1, config.num_tokens, (len(batch),), generator=generator).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=optimiser.precision == "bf16"):
                loss = model(batch.images_on(device), prefix_len)
            (loss / len(step)).backward()
            total += loss.detach() / len(step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimiser.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return total

    return one


def main(size: str, batch: str, precision: str) -> None:
    torch.set_num_threads(1)
    config = model_config(size, image_size=32, patch_size=4, head_depth=12)
    config = model_config(size, image_size=32, patch_size=4, head_width=config.width, head_depth=12)
    optimiser = parse(OptimiserSection, {"batch_size": int(batch), "precision": precision}, "the command line")
    group = start_group(find_placement(), "cpu")
    step = random_batches(config, int(batch), int(batch))
    num_targets = count_targets(step, config.num_tokens)
    model, peer = AIM(config), PeerModel(config)
    peer.load_state_dict(model.state_dict())
    with torch.no_grad():
        loss = model(step[0].images_on(group.device), step[0].prefix_len)[0] / num_targets
        torch.testing.assert_close(peer(step[0].images_on(group.device), step[0].prefix_len), loss)
    engine = Engine(config, optimiser, EngineOptions(zero_stage=0 if precision == "fp32" else 1), group)
    turns = (
        lambda: engine.step(step, num_targets=num_targets, lr=optimiser.lr_peak).loss_sum.item(),
        peer_step(config, optimiser, step, group.device),
    )
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(13):
        for turn, its in zip(turns, times, strict=True):
            started = time.process_time()
            turn()
            its.extend([time.process_time() - started] if number else [])  # the first warms up
    ours_s, peer_s = map(statistics.median, times)
    print(f"{size}, batch {batch}, {precision}: {ours_s:.3f} s against {peer_s:.3f} s, {ours_s / peer_s:.3f}")
    stop_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
