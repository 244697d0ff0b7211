"""The optimiser step on DeepSpeed: ZeRO 0-3, bf16 or fp32, accumulation of sums, clipping, and no drift on bad steps.

DeepSpeed averages over ranks; this module turns the average back into a sum over the global count of targets. The
learning rate is set here for every step: DeepSpeed's own schedulers would not advance on skipped steps.
`Engine.fragments` shows where the float32 master weights and Adam moments of every parameter are on this rank, in the
same way for every ZeRO stage; `harness.step.checkpoint` reads and writes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aimscale.aim.config import ModelConfig, ModelConfigError
from aimscale.aim.cost import param_count
from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM, DTYPES
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.device.memory import bucket_values
from aimscale.harness.distributed.group import Group, import_deepspeed
from aimscale.harness.run.config import ConfigError, OptimiserSection

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
TESTED_DEEPSPEED = "0.19.8"
"""Version of DeepSpeed that the tests passed with."""


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
        self._global_grad_norm = norm = torch.nn.utils.get_total_norm(gradients)
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


class DeepSpeedError(UserError):
    """Version of DeepSpeed that lacks what this module reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """Result of a step on one rank; its tensors are on the device."""

    loss_sum: Tensor
    """This rank's share of the batch's loss sum, float32 scalar."""
    grad_norm: Tensor
    """Global gradient norm before clipping, float32 scalar."""
    was_applied: bool
    """Whether the step was applied; one whose gradient is not finite changes nothing."""
    forward_s: float = 0.0
    """Time of this rank's forward passes, s; those of slow devices take longest, while all others wait later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragment:
    """Part of one parameter whose master weight and moments are on this rank."""

    name: str
    shape: torch.Size
    """Shape of the whole parameter."""
    flat: Tensor
    """The optimiser's float32 tensor that holds the part."""
    flat_start: int
    """Start of the part in `flat`."""
    param_start: int
    """Start of the part in the flattened parameter."""
    numel: int
    """Length of the part; 0 where another rank owns the parameter."""


class Engine:
    """Model and its optimiser, which step together."""

    def __init__(
        self, config: ModelConfig, optimiser: OptimiserSection, options: EngineOptions, group: Group, *, seed: int = 0
    ) -> None:
        """Make an AIM on the group's device, whose weights are those of `AIM.initial_value` at this seed.

        The model is never whole in host memory: a rank draws, tensor by tensor, those whose master weights it holds.

        Raises:
            ConfigError: bf16 at stage 0, which DeepSpeed gets wrong.
            ModelConfigError: the model has another number of parameters than `aim.cost` counts.
            DeepSpeedError: this version of DeepSpeed lacks a private attribute that is read here.
        """
        if optimiser.precision == "bf16" and options.zero_stage == 0:
            raise ConfigError("zero_stage 0 cannot keep float32 master weights for bf16; use zero_stage 1, 2 or 3")
        deepspeed = import_deepspeed()
        self.group = group
        self.config = config
        self.options = options
        with torch.device("meta"):
            model = AIM(config)
        model.to(DTYPES[optimiser.precision])  # buffers too, which DeepSpeed would leave as they are
        model.set_activation_checkpointing(options.activation_checkpointing)
        if options.compile:
            model.compile_blocks()
        num_params, counted = sum(shape.numel() for shape in model.shapes.values()), param_count(config).total
        if num_params != counted:
            raise ModelConfigError(
                f"{config.name} has {num_params} parameters, and aim.cost.param_count counts {counted}; laws would be "
                "fitted to a wrong N; correct the formula"
            )
        settings = deepspeed_config(config, optimiser, options, group)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory statistics
            if options.zero_stage == 3:
                place_partitioned(deepspeed, model, settings, group.device)
            else:
                model.to_empty(device=group.device)
            model.fill_constants()
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=make_optimiser(model, optimiser, options), config=settings
            )
        self.module: nn.Module = self._engine.module
        if group.world_size == 1 and options.zero_stage <= 1 and not hasattr(self._optimizer, "reduce_gradients"):
            self._engine.enable_backward_allreduce = False  # it would copy all gradients back and forth
        self._names = {id(p): name for name, p in self.module.named_parameters()}
        try:
            self.set_weights(lambda name: model.initial_value(name, seed))
        except AttributeError as error:
            raise DeepSpeedError(
                f"DeepSpeed {deepspeed.__version__} lacks what ZeRO stage {options.zero_stage} needs here ({error}); "
                f"install {TESTED_DEEPSPEED}"
            ) from error

    def set_weights(self, value_of: Callable[[str], Tensor | None]) -> None:
        """Set the parts of the weights that are on this rank; all ranks call this together.

        Args:
            value_of: gives a parameter's whole value by name, of which only this rank's part is read; None keeps what
                it is.
        """
        for fragment in self.fragments():
            if fragment.numel and (value := value_of(fragment.name)) is not None:
                flat_slice(fragment.flat, fragment).copy_(param_slice(value, fragment))
        self.sync_weights_from_fp32()

    def step(
        self, micro_batches: Sequence[Batch], *, num_targets: int, lr: float, is_frozen: bool = False
    ) -> StepOutcome:
        """Run forward and backward over this rank's micro-batches, then one update.

        Args:
            micro_batches: at least one, equally many on every rank, on any device.
            num_targets: scored targets of the whole batch, over all ranks.
            is_frozen: whether the backbone stays as it is, and its moments alone follow (`EngineOptions`); decoupled
                decay scales with the rate, so it drifts no more than the rest.
        """
        for param_group in self._optimizer.param_groups:
            param_group["lr"] = 0.0 if is_frozen and param_group["is_backbone"] else lr * param_group["lr_scale"]
        # DeepSpeed divides the sum of the ranks' gradients by their number.
        scale = self.group.world_size / num_targets
        loss_sum = torch.zeros((), device=self.group.device)
        is_cuda, spans = self.group.device.type == "cuda", list[tuple[Any, Any]]()
        for index, batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            images = batch.images_on(self.group.device)
            start = _mark(is_cuda)
            batch_loss_sum, _ = self._engine(images, batch.prefix_lengths)
            spans.append((start, _mark(is_cuda)))
            self._engine.backward(batch_loss_sum * scale, scale_wrt_gas=False)
            loss_sum += batch_loss_sum.detach()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepOutcome(
            loss_sum=loss_sum,
            grad_norm=norm if isinstance(norm, Tensor) else torch.tensor(float(norm)),
            was_applied=self._engine.was_step_applied(),
            forward_s=_total_s(spans, is_cuda),  # behind it the images' memory may be used again
        )

    def close(self) -> None:
        """Remove DeepSpeed's hooks; the engine is unusable afterwards."""
        self._engine.destroy()
        del self._engine, self._optimizer, self.module

    def fragments(self) -> list[Fragment]:
        """Return every parameter's part on this rank, in the model's order, the same list of names on every rank."""
        return [self._fragment(param) for param in self.module.parameters()]

    def _fragment(self, param: Any) -> Fragment:
        stage, optimizer = self.options.zero_stage, self._optimizer
        # Whole on every rank at stage 0, else another rank's, unless it is found below.
        flat, flat_start, param_start, numel = param, 0, 0, 0 if stage else param.numel()
        if stage == 3:
            sub_group, flat_start, numel = optimizer.grad_position[optimizer.get_param_id(param)]
            flat, param_start = optimizer.fp32_partitioned_groups_flat[sub_group], self.group.rank * numel
            numel = max(0, min(numel, param.ds_numel - param_start))  # the last rank's part is padded
        elif stage and (mapping := param._hp_mapping) is not None:
            flat, part = self.optimiser_tensors()[mapping.param_group_index], mapping.hp_fragment_address
            flat_start, param_start, numel = part.start, mapping.lp_fragment_address.start, part.numel
        name, shape = self._names[id(param)], param.ds_shape if stage == 3 else param.shape
        place = {"flat": flat, "flat_start": flat_start, "param_start": param_start, "numel": numel}
        return Fragment(name=name, shape=shape, **place)

    @property
    def adamw(self) -> torch.optim.Optimizer:
        """The AdamW inside DeepSpeed's optimiser, which updates `optimiser_tensors`."""
        inner: torch.optim.Optimizer = self._optimizer if self.options.zero_stage == 0 else self._optimizer.optimizer
        return inner

    def optimiser_tensors(self) -> list[Tensor]:
        """Return the float32 tensors that key the inner AdamW's state on this rank."""
        optimizer, stage = self._optimizer, self.options.zero_stage
        if stage == 0:
            return [p for group in optimizer.param_groups for p in group["params"]]
        if stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
        return list(optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups)

    def adam_state(self, owner: Tensor) -> dict[str, Any]:
        """Return `step`, `exp_avg` and `exp_avg_sq` of one tensor; zeros before the first step."""
        assert any(owner is tensor for tensor in self.optimiser_tensors()), "the state is keyed by the tensor object"
        state = self.adamw.state[owner]
        if not state:
            on_device = self.adamw.defaults.get("fused") and owner.is_cuda
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device if on_device else "cpu")
            for moment in ADAM_MOMENTS:
                state[moment] = torch.zeros_like(owner)
        return state

    def state(self, fragments: Iterable[Fragment]) -> Iterator[tuple[str, int, Tensor]]:
        """Yield everything that a checkpoint holds of these parts, float32, by `param/<name>`, `exp_avg/<name>` and
        `exp_avg_sq/<name>`, with its start in the flattened parameter."""
        for fragment in fragments:
            for kind in ("param", *ADAM_MOMENTS) if fragment.numel else ():
                flat = fragment.flat if kind == "param" else self.adam_state(fragment.flat)[kind]
                yield f"{kind}/{fragment.name}", fragment.param_start, flat_slice(flat, fragment)

    def sync_weights_from_fp32(self) -> None:
        """Copy the master weights into the weights of the forward pass, on all ranks."""
        if self.options.zero_stage == 3:
            optimizer = self._optimizer
            optimizer._partition_all_parameters()
            for sub_group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            if optimizer.persistent_parameters:  # small ones, kept whole on every rank
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.options.zero_stage > 0:
            self._optimizer.update_lp_params()


def flat_slice(flat: Tensor, fragment: Fragment) -> Tensor:
    """Return the part's values inside one of the optimiser's flat tensors, 1-D."""
    return flat.detach().view(-1).narrow(0, fragment.flat_start, fragment.numel)


def param_slice(whole: Tensor, fragment: Fragment) -> Tensor:
    """Return the part's values inside the whole parameter, 1-D."""
    return whole.reshape(-1).narrow(0, fragment.param_start, fragment.numel)


def _mark(is_cuda: bool) -> Any:
    """Return the time, or on a GPU, which works behind the host, an event behind the work that it was given."""
    if not is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _total_s(spans: Sequence[tuple[Any, Any]], is_cuda: bool) -> float:
    """Return the time between pairs of marks, s; waits for the last one's work, and for no later work."""
    if not is_cuda:
        return sum(stop - start for start, stop in spans)
    spans[-1][1].synchronize()
    return sum(start.elapsed_time(stop) for start, stop in spans) / 1000
