"""How DeepSpeed is set up: its configuration, the optimiser that it wraps, a model placed in parts, and the check that
this version of it has the private attributes that `harness.step.engine` reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.harness.device.distributed import Group
from aimscale.harness.device.memory import MAX_BUCKET_VALUES
from aimscale.harness.run.config import OptimiserSection

CompileMode = Literal["none", "blocks", "graphs"]
TESTED_DEEPSPEED = "0.19.8"
"""The version that the tests passed with."""


class DeepSpeedError(UserError):
    """A version of DeepSpeed that cannot be used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a model is trained on this hardware."""

    zero_stage: int
    """0: everything on every rank; 1: optimiser state is split over ranks; 2: gradients too; 3: weights too."""
    activation_checkpointing: bool = False
    """Recompute block activations in the backward pass."""
    compile: CompileMode = "none"
    """torch.compile: nothing, every block, or the whole model into CUDA graphs."""
    offload_optimiser: bool = False
    """Keep master weights and moments in host memory and update them there; ZeRO 1 to 3."""
    offload_weights: bool = False
    """Keep the weights themselves in host memory between their uses, too; ZeRO 3."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips on the global norm and leaves everything as it was when the norm is not finite.

    Used at ZeRO stage 0, where DeepSpeed clips without looking; the attributes are those that DeepSpeed reads from its
    own optimisers.
    """

    def __init__(self, *args: Any, clip_norm: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clip_norm = clip_norm
        self._global_grad_norm: Tensor | None = None
        self.overflow = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, or none."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        # The same formula as DeepSpeed's at stages 1 to 3.
        torch._foreach_mul_(gradients, 1.0 / torch.clamp((norm + 1e-6) / self._clip_norm, min=1.0))
        self._update()

    def _update(self) -> None:
        super().step()


class GuardedMuon(GuardedAdamW):
    """Torch's Muon for the `hidden` groups, AdamW for the others, clipped and guarded alike.

    Checkpoints know AdamW's state alone, so `exp_avg` holds Muon's momentum; its `exp_avg_sq` stays zero.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip_norm: float, **settings: Any) -> None:
        super().__init__(groups, clip_norm=clip_norm, **settings)
        hidden = [group for group in self.param_groups if group["hidden"]]  # shared: rates set in one are set in both
        self._muon = torch.optim.Muon(hidden, lr=settings["lr"], adjust_lr_fn="match_rms_adamw")

    def _update(self) -> None:
        matrices = [p for group in self._muon.param_groups for p in group["params"]]
        for matrix in matrices:
            state = self.state[matrix]
            if not state:
                state.update(
                    step=torch.zeros(()), exp_avg=torch.zeros_like(matrix), exp_avg_sq=torch.zeros_like(matrix)
                )
            state["step"] += 1
            self._muon.state[matrix] = {"momentum_buffer": state["exp_avg"]}
        self._muon.step()
        gradients = [matrix.grad for matrix in matrices]
        for matrix in matrices:
            matrix.grad = None  # which AdamW passes over
        super()._update()
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient


def make_optimiser(model: AIM, section: OptimiserSection, options: EngineOptions) -> torch.optim.Optimizer:
    """torch's AdamW over the model's parameter groups, or Muon for some of them."""
    settings: dict[str, Any] = {"lr": section.lr_peak, "betas": section.betas, "eps": section.eps, "fused": True}
    groups = model.param_groups(section.weight_decay, hidden_apart=section.name == "muon")
    if section.name == "muon":
        return GuardedMuon(groups, clip_norm=section.clip_norm, **settings)
    if options.zero_stage == 0:
        return GuardedAdamW(groups, clip_norm=section.clip_norm, **settings)
    return torch.optim.AdamW(groups, **settings)


def deepspeed_config(
    section: OptimiserSection, options: EngineOptions, num_values: int, group: Group
) -> dict[str, Any]:
    """What DeepSpeed is told; `num_values` is the model's number of parameters."""
    # Stages 1 to 3 allocate whole buckets.
    bucket = max(1, min(MAX_BUCKET_VALUES, num_values))
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
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": group.device.type == "cuda" and group.world_size > 1,
        },
    }
    to_host = {"device": "cpu", "pin_memory": group.device.type == "cuda"}
    if options.offload_optimiser:
        config["zero_optimization"]["offload_optimizer"] = to_host
    if options.offload_weights:
        config["zero_optimization"]["offload_param"] = to_host
    if section.precision == "bf16":
        config["bf16"] = {"enabled": True, "immediate_grad_update": options.zero_stage == 1}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def place_partitioned(deepspeed: Any, model: AIM, settings: dict[str, Any], device: torch.device) -> None:
    """Give a meta model its memory for ZeRO 3, layer by layer, so that no rank ever holds it whole."""
    model.preprocessor.to_empty(device=device, recurse=False)
    model.pixel_head.to_empty(device=device, recurse=False)
    to_host = settings["zero_optimization"].get("offload_param")
    placed: Any = None
    for layer in model.modules():
        own = list(layer.parameters(recurse=False))
        if not own:
            continue
        layer.to_empty(device=device, recurse=False)
        if placed is None:
            deepspeed.zero.Init(
                module=layer,
                config_dict_or_path=settings,
                dtype=own[0].dtype,
                remote_device=to_host["device"] if to_host else None,
                pin_memory=bool(to_host and to_host["pin_memory"]),
            )
            placed = next(layer.parameters())
        else:
            placed.convert_to_zero_parameters(param_list=list(layer.parameters(recurse=False)))


_READ_OF_FLAT = ("optimizer", "update_lp_params", "fp32_groups_flat_partition|single_partition_of_fp32_groups")
_READ = {
    0: ((), ()),
    1: (_READ_OF_FLAT, ("_hp_mapping",)),
    2: (_READ_OF_FLAT, ("_hp_mapping",)),
    3: (
        (
            "optimizer",
            "grad_position",
            "get_param_id",
            "fp32_partitioned_groups_flat",
            "fp16_groups",
            "persistent_parameters",
            "_partition_all_parameters",
            "_reassign_or_swap_out_partitioned_parameters",
        ),
        ("ds_shape", "ds_numel"),
    ),
}
"""ZeRO stage -> what is read of DeepSpeed's optimiser (`|`: one of them), and of each parameter."""


def check_deepspeed(engine: Any, optimizer: Any, parameters: list[nn.Parameter], stage: int) -> None:
    """Raise DeepSpeedError where this version lacks something that is read of it."""
    of_optimizer, of_parameters = _READ[stage]
    steps = ("set_gradient_accumulation_boundary", "get_global_grad_norm", "was_step_applied")
    missing = [
        f"{type(owner).__name__}.{names}"
        for owner, read in (
            (engine, (*steps, "enable_backward_allreduce")),
            (optimizer, of_optimizer),
            (parameters[0], of_parameters),
        )
        for names in read
        if not any(hasattr(owner, name) for name in names.split("|"))
    ]
    if missing:
        import deepspeed

        raise DeepSpeedError(
            f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}, which ZeRO stage {stage} needs here; "
            f"install {TESTED_DEEPSPEED}"
        )
