"""Engines that DeepSpeed's steps are compared with: plain PyTorch alone, and PyTorch's own FSDP2.

Both step the same model on the same images with the `step` and `close` of `harness.step.engine.Engine`, without its
guard against non-finite steps. Neither trains runs.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from aimscale.aim.model import AIM
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.engine import StepOutcome


class ReferenceEngine:
    """AdamW in plain PyTorch: sharded by `fully_shard`, or on one rank and by autocast, as anybody would write it."""

    def __init__(
        self, model: AIM, optimiser: OptimiserSection, options: EngineOptions, group: Group, *, sharded: bool
    ) -> None:
        """Wrap float32 weights; under FSDP2 bf16 means bf16 weights for use, float32 shards and float32 reduction."""
        assert sharded or group.world_size == 1, "the bare loop knows one rank"
        is_bf16 = optimiser.precision == "bf16"
        self._group, self._clip_norm = group, optimiser.clip_norm
        self._autocasts = is_bf16 and not sharded
        self._model = model.to(group.device)
        model.set_activation_checkpointing(options.activation_checkpointing)
        if options.compile:
            model.compile_blocks()
        if sharded:
            _shard(model, is_bf16)
        self._adamw = torch.optim.AdamW(
            model.param_groups(optimiser.weight_decay),
            lr=optimiser.lr_peak,
            betas=optimiser.betas,
            eps=optimiser.eps,
            fused=True,
        )

    def step(self, micro_batches: Sequence[Batch], *, num_targets: int, lr: float) -> StepOutcome:
        """Take a step as `Engine.step` does; every step is applied."""
        for param_group in self._adamw.param_groups:
            param_group["lr"] = lr * param_group["lr_scale"]
        scale = self._group.world_size / num_targets  # FSDP2 averages over ranks, too
        loss_sum = torch.zeros((), device=self._group.device)
        for index, batch in enumerate(micro_batches):
            if isinstance(self._model, FSDPModule):
                self._model.set_requires_gradient_sync(index == len(micro_batches) - 1)
            with torch.autocast(self._group.device.type, torch.bfloat16, enabled=self._autocasts):
                batch_loss_sum, _ = self._model(batch.images_on(self._group.device), batch.prefix_lengths)
            (batch_loss_sum * scale).backward()
            loss_sum += batch_loss_sum.detach()
        norm: Any = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return StepOutcome(
            loss_sum=loss_sum, grad_norm=norm.full_tensor() if hasattr(norm, "full_tensor") else norm, was_applied=True
        )

    def close(self) -> None:
        """Free the model and the optimiser."""
        del self._model, self._adamw
        gc.collect()


def _shard(model: AIM, is_bf16: bool) -> None:
    """Shard every block on its own, and the rest with the model."""
    half = torch.bfloat16 if is_bf16 else None
    # Images stay float32, from which targets are computed.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in (*model.trunk.blocks, *model.pixel_head.blocks):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for buffer in model.buffers() if is_bf16 else ():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(torch.bfloat16)
