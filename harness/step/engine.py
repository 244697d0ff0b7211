"""One optimiser step on DeepSpeed: ZeRO 0-3, bf16 or fp32, accumulation by sums, clipping, no drift on bad steps.

What DeepSpeed averages over ranks, this module turns back into a sum divided by the global count of targets. The
learning rate is set here for every step: DeepSpeed's own schedulers would stand still on skipped steps.
`Engine.fragments` shows where the float32 master weights and Adam moments of every parameter live on this rank, the
same way for every ZeRO stage; `harness.step.checkpoint` reads and writes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.device.distributed import Group, import_deepspeed
from aimscale.harness.device.memory import MAX_BUCKET_VALUES
from aimscale.harness.run.config import ConfigError, OptimiserSection

CompileMode = Literal["none", "blocks", "graphs"]
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step leaves behind; tensors stay on the device, so nothing waits for it."""

    loss_sum: Tensor
    """float32 scalar: this rank's share of the batch's loss sum."""
    grad_norm: Tensor
    """float32 scalar: global gradient norm before clipping."""
    was_applied: bool
    """False where the gradient was not finite: weights, moments and step count are as before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part of one parameter whose master weight and moments live on this rank."""

    name: str
    """Parameter name."""
    shape: torch.Size
    """Shape of the whole parameter."""
    flat: Tensor
    """The optimiser's own float32 tensor that holds the part."""
    flat_start: int
    """Where in `flat` the part starts."""
    param_start: int
    """Where in the flattened parameter the part starts."""
    numel: int
    """Length of the part; 0 where another rank owns the parameter."""


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
        super().step(closure)


class Engine:
    """A model, its optimiser, and the one way to step them."""

    def __init__(
        self,
        model: nn.Module,
        optimiser: OptimiserSection,
        options: EngineOptions,
        group: Group,
        *,
        log_file: Path | None = None,
    ) -> None:
        """Wrap `model` (float32, on the CPU or the device).

        Raises:
            ConfigError: bf16 at stage 0, which DeepSpeed gets wrong.
        """
        if optimiser.precision == "bf16" and options.zero_stage == 0:
            raise ConfigError("zero_stage 0 cannot keep float32 master weights for bf16; use zero_stage 1, 2 or 3")
        if options.offload_optimiser and options.zero_stage == 0:
            raise ConfigError("zero_stage 0 keeps its optimiser on the device; use zero_stage 1, 2 or 3 to offload it")
        if options.offload_weights and not (options.zero_stage == 3 and options.offload_optimiser):
            raise ConfigError("offload_weights needs zero_stage 3 and offload_optimiser")
        deepspeed = import_deepspeed(log_file)
        self.group = group
        self.options = options
        self.is_bf16 = optimiser.precision == "bf16"
        if options.activation_checkpointing:
            model.set_activation_checkpointing(True)  # type: ignore[operator]
        compile_model(model, options.compile)
        num_values = sum(p.numel() for p in model.parameters())
        initial = {name: p.detach().clone() for name, p in model.named_parameters()} if self.is_bf16 else {}
        if self.is_bf16:
            model.to(torch.bfloat16)  # buffers too, which DeepSpeed would leave as they are
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory statistics
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=_optimiser(model, optimiser, options, group.device),
                config=_deepspeed_config(optimiser, options, num_values, group),
            )
        if options.zero_stage == 0 and group.world_size == 1:
            self._engine.enable_backward_allreduce = False  # it would copy all gradients to and fro
        self.module: nn.Module = self._engine.module
        self._names = {id(p): name for name, p in self.module.named_parameters()}
        if initial:
            # The masters that DeepSpeed made come from rounded weights; start from the exact ones.
            for fragment in self.fragments():
                fragment_of(fragment.flat, fragment).copy_(part_of(initial[fragment.name], fragment))
            self.publish_masters()

    def step(self, micro_batches: Sequence[Batch], *, num_targets: int, lr: float) -> StepOutcome:
        """Forward and backward over this rank's micro-batches, then one update.

        Args:
            micro_batches: at least one, as many as on every other rank, on any device.
            num_targets: scored targets of the whole batch, over all ranks.
            lr: learning rate of this step.
        """
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = lr * param_group["lr_scale"]
        # DeepSpeed divides the sum of the ranks' gradients by their number.
        scale = self.group.world_size / num_targets
        loss_sum = torch.zeros((), device=self.group.device)
        for index, batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            images = batch.images_on(self.group.device)
            batch_loss_sum, _ = self._engine(images, batch.prefix_len)
            self._engine.backward(batch_loss_sum * scale, scale_wrt_gas=False)
            loss_sum += batch_loss_sum.detach()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepOutcome(
            loss_sum=loss_sum,
            grad_norm=norm if isinstance(norm, Tensor) else torch.tensor(float(norm)),
            was_applied=self._engine.was_step_applied(),
        )

    def close(self) -> None:
        """Give back weights, gradients, masters and moments; the engine is of no use afterwards."""
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        parameters = list(self.module.parameters())
        held = [parameters, [vars(p) for p in parameters], vars(self._optimizer), list(inner.state.values())]
        self._engine.destroy()
        # DeepSpeed's hooks keep some of these alive, so their memory is given back and not only their names.
        for tensor in _tensors_in(held):
            tensor.untyped_storage().resize_(0)
        del self._engine, self._optimizer, self.module

    def fragments(self) -> list[Fragment]:
        """Every parameter's part on this rank, in the model's order, the same list of names on every rank."""
        names, optimizer = self._names, self._optimizer
        found: dict[str, Fragment] = {}
        if self.options.zero_stage == 3:
            rank = self.group.rank
            for param in list[Any](self.module.parameters()):
                sub_group, start, numel = optimizer.grad_position[optimizer.get_param_id(param)]
                offset = rank * numel
                found[names[id(param)]] = Fragment(
                    name=names[id(param)],
                    shape=param.ds_shape,
                    flat=optimizer.fp32_partitioned_groups_flat[sub_group],
                    flat_start=start,
                    param_start=offset,
                    # The last rank's part is padded.
                    numel=max(0, min(numel, param.ds_numel - offset)),
                )
        else:
            for param in self.module.parameters():
                found[names[id(param)]] = self._whole_or_mapped(param)
        return list(found.values())

    def _whole_or_mapped(self, param: nn.Parameter) -> Fragment:
        name = self._names[id(param)]
        if self.options.zero_stage == 0:
            return Fragment(name=name, shape=param.shape, flat=param, flat_start=0, param_start=0, numel=param.numel())
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Fragment(name=name, shape=param.shape, flat=param, flat_start=0, param_start=0, numel=0)
        return Fragment(
            name=name,
            shape=param.shape,
            flat=self._flat_masters()[mapping.param_group_index],
            flat_start=mapping.hp_fragment_address.start,
            param_start=mapping.lp_fragment_address.start,
            numel=mapping.hp_fragment_address.numel,
        )

    def _flat_masters(self) -> list[Tensor]:
        """The float32 tensors that the inner AdamW updates, one per parameter group (stages 1 and 2)."""
        if hasattr(self._optimizer, "fp32_groups_flat_partition"):
            return list(self._optimizer.fp32_groups_flat_partition)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def optimiser_tensors(self) -> list[Tensor]:
        """The tensors that key the inner AdamW's state on this rank."""
        if self.options.zero_stage == 0:
            return [p for group in self._optimizer.param_groups for p in group["params"]]
        if self.options.zero_stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return self._flat_masters()

    def adam_state(self, owner: Tensor) -> dict[str, Any]:
        """`step`, `exp_avg` and `exp_avg_sq` of one tensor; zeros before the first step."""
        assert any(owner is tensor for tensor in self.optimiser_tensors()), "the state is keyed by the tensor object"
        inner = self._optimizer if self.options.zero_stage == 0 else self._optimizer.optimizer
        state = inner.state[owner]
        if not state:
            on_device = inner.defaults.get("fused") and owner.is_cuda
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device if on_device else "cpu")
            for moment in ADAM_MOMENTS:
                state[moment] = torch.zeros_like(owner)
        return state

    def publish_masters(self) -> None:
        """Copy the masters into the weights that the forward pass uses, on all ranks."""
        if self.options.zero_stage == 3:
            optimizer = self._optimizer
            optimizer._partition_all_parameters()
            for sub_group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            if optimizer.persistent_parameters:  # small ones, kept whole on every rank
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.options.zero_stage > 0:
            self._optimizer.update_lp_params()


def compile_mode(wanted: Literal["auto", "graphs"] | bool, device: torch.device, zero_stage: int) -> CompileMode:
    """What `runtime.compile` means: `auto` compiles the blocks on a card, but not at ZeRO 3, whose hooks break graphs.

    Raises:
        ConfigError: it was asked for where it makes steps slower.
    """
    if device.type == "cuda":
        if wanted == "auto" and zero_stage == 3:
            return "none"
        return "graphs" if wanted == "graphs" else "blocks" if wanted else "none"
    if wanted in ("auto", False):
        return "none"
    raise ConfigError(
        f"runtime.compile {wanted} makes steps slower on a CPU (measured: 1.3 to 1.5 times as long); leave it on auto"
    )


def compile_model(model: Any, mode: CompileMode) -> None:
    """Compile a model in place, before it is wrapped."""
    if mode == "blocks":
        model.compile_blocks()
    elif mode == "graphs":
        model.compile_whole()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors inside nested lists and dictionaries, gradients included."""
    if isinstance(value, Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


def fragment_of(flat: Tensor, fragment: Fragment) -> Tensor:
    """The part's values inside one of the optimiser's flat tensors, 1-D."""
    return flat.detach().view(-1).narrow(0, fragment.flat_start, fragment.numel)


def part_of(whole: Tensor, fragment: Fragment) -> Tensor:
    """The part's values inside the whole parameter, 1-D."""
    return whole.reshape(-1).narrow(0, fragment.param_start, fragment.numel)


def _optimiser(
    model: nn.Module, section: OptimiserSection, options: EngineOptions, device: torch.device
) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": section.lr_peak, "betas": section.betas, "eps": section.eps, "fused": True}
    groups = model.param_groups(section.weight_decay)  # type: ignore[operator]
    if options.zero_stage == 0:
        model.to(device)  # the fused kernel looks at the device of its parameters
        return GuardedAdamW(groups, clip_norm=section.clip_norm, **settings)
    return torch.optim.AdamW(groups, **settings)


def _deepspeed_config(
    section: OptimiserSection, options: EngineOptions, num_values: int, group: Group
) -> dict[str, Any]:
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
