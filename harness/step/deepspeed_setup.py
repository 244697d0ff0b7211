"""Set-up of DeepSpeed: its configuration, the optimiser that it wraps, and a partitioned model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from aimscale.aim.config import ModelConfig
from aimscale.aim.model import AIM
from aimscale.harness.device.memory import bucket_values
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.config import OptimiserSection


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of training a model on this hardware."""

    zero_stage: int
    """Stage 0 replicates everything on every rank; 1 shards the optimiser state; 2 gradients too; 3 weights too."""
    activation_checkpointing: bool = False
    """Whether block activations are recomputed in the backward pass."""
    compile: bool = False
    """Whether torch.compile compiles every block."""
    freezes_backbone: bool = False
    """Whether some steps change the head alone (`init.freeze_images`)."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm, and changes nothing if the norm is not finite.

    It is used at ZeRO stage 0, where DeepSpeed clips without checking; the attributes are those that DeepSpeed reads
    from its own optimisers.
    """

    def __init__(self, *args: Any, clip_norm: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clip_norm = clip_norm
        self._global_grad_norm: Tensor | None = None
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step, or none if the gradient is not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm
        self.overflow = not math.isfinite(norm.item())
        if self.overflow:
            return
        # The same formula as DeepSpeed's at stages 1 to 3.
        torch._foreach_mul_(gradients, 1.0 / torch.clamp((norm + 1e-6) / self._clip_norm, min=1.0))
        super().step()


def make_optimiser(model: AIM, section: OptimiserSection, options: EngineOptions) -> torch.optim.Optimizer:
    """Make torch's AdamW over the model's parameter groups."""
    settings: dict[str, Any] = {"lr": section.lr_peak, "betas": section.betas, "eps": section.eps, "fused": True}
    groups = model.param_groups(section.weight_decay, backbone_apart=options.freezes_backbone)
    if options.zero_stage == 0:
        return GuardedAdamW(groups, clip_norm=section.clip_norm, **settings)
    return torch.optim.AdamW(groups, **settings)


def deepspeed_config(
    model: ModelConfig, section: OptimiserSection, options: EngineOptions, group: Group
) -> dict[str, Any]:
    """Build DeepSpeed's configuration."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # unused: sizes may differ, `Engine.step` scales sums
        "gradient_accumulation_steps": 1,  # unused too: `Engine.step` marks the boundary
        "gradient_clipping": 0.0 if options.zero_stage == 0 else section.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": options.zero_stage,
            "reduce_bucket_size": bucket_values(model),
            # Stages 1 and 2 reduce a bucket on all ranks either way. With reduce_scatter they divide by the number of
            # ranks first, in bf16, which rounds unless that is a power of two.
            "reduce_scatter": options.zero_stage == 3,
            "overlap_comm": group.world_size > 1,
        },
    }
    if section.precision == "bf16":
        config["bf16"] = {"enabled": True, "immediate_grad_update": options.zero_stage == 1}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def place_partitioned(deepspeed: Any, model: AIM, settings: dict[str, Any], device: torch.device) -> None:
    """Allocate a meta model for ZeRO 3, layer by layer, so that no rank ever holds it whole."""
    model.preprocessor.to_empty(device=device, recurse=False)
    model.pixel_head.to_empty(device=device, recurse=False)
    placed: Any = None
    for layer in model.modules():
        weights = list(layer.parameters(recurse=False))
        if not weights:
            continue
        layer.to_empty(device=device, recurse=False)
        if placed is None:
            deepspeed.zero.Init(module=layer, config_dict_or_path=settings, dtype=weights[0].dtype)
            placed = next(layer.parameters())
        else:
            placed.convert_to_zero_parameters(param_list=list(layer.parameters(recurse=False)))
