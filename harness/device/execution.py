"""Execution of a run on its devices: ZeRO stage, micro-batch and activation checkpointing, by a rule on memory.

On several ranks ZeRO 2 is taken, 3 where that does not fit; on one rank, which shares nothing out, the lowest stage
that trains in its precision. Activations are recomputed where nothing else fits. Then the largest micro-batch that fits
is taken. If a step then has several passes, in each of which ZeRO 2 and 3 reduce gradients, and GPUs have no fast link,
ZeRO 1 is taken where it fits. Torch is not imported here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from aimscale.aim.cost import mean_scored_tokens
from aimscale.aim.errors import UserError
from aimscale.harness.device.memory import (
    HELD,
    Precision,
    held_bytes,
    measuring_bytes,
    peak_bytes_per_image,
    waiting_bytes,
)
from aimscale.harness.device.speed import has_fast_link
from aimscale.harness.run.config import ConfigError, RunConfig, RuntimeConfig, TrainingConfig, build_model_config
from aimscale.harness.run.failures import TooLargeError, describe_out_of_memory, is_out_of_memory
from aimscale.harness.run.schedule import Counted, num_points

if TYPE_CHECKING:
    import torch

USABLE_FRACTION = 0.8
"""Share of a device that may be planned for, 68 of the 85 GB of a GPU of 80 GB. Tensors are within 5 % of the estimate
(3 GB), by rehearsals. The rest is for what only a GPU shows: its context and NCCL's buffers (2 to 3 GB), workspaces of
kernels, what other streams still hold, and fragmentation. A smaller micro-batch costs a per cent of a step, running out
of memory costs a run."""
MAX_MICRO_BATCH_TOKENS = 65_536
"""Tokens in one forward pass beyond which speed does not grow."""


class DoesNotFitError(UserError):
    """Model that fits no device of this size."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """Plan of how a run uses its devices."""

    zero_stage: int
    micro_batch: int
    """Maximum images per forward pass and rank."""
    activation_checkpointing: bool
    memory_bytes: int
    """Peak memory of one rank during a step, or while it measures during training."""
    measures: bool
    """Whether there is memory to measure during training; otherwise nothing is measured."""
    half_micro_batch: int
    """Micro-batch of the next start if memory runs out before the first checkpoint; 0: there is no second try."""
    is_lowered: bool = False
    """Whether this is the second try."""

    def settings(self, *, device: str, world_size: int) -> dict[str, Any]:
        """Return the settings on which the memory of a step depends, beside the run itself."""
        names = ("zero_stage", "micro_batch", "activation_checkpointing")
        return {name: getattr(self, name) for name in names} | {"device": device, "world_size": world_size}


def execution_plan(
    training: TrainingConfig,
    runtime: RuntimeConfig,
    *,
    world_size: int,
    device_bytes: int,
    is_gpu: bool = True,
    is_linked: bool = True,
    measuring: int = 0,
) -> ExecutionPlan:
    """Choose what `runtime` leaves open by the rule above; no choice changes a result.

    Args:
        device_bytes: memory that a rank may plan for.
        is_gpu: whether the device is a GPU, where NCCL sends and not gloo.
        is_linked: whether a fast link joins the devices of a node (`has_fast_link`).
        measuring: `measuring_bytes`; 0 where nothing is measured during training. It changes no choice of the steps.

    Raises:
        DoesNotFitError: nothing fits.
    """
    config, precision = build_model_config(training), training.optimiser.precision
    scored_tokens = mean_scored_tokens(config, training.objective.prefix)
    num_images, usable = images_per_rank(training.optimiser.batch_size, world_size), USABLE_FRACTION * device_bytes

    def fit(stage: int, recompute: bool) -> tuple[int, bool, int, int, int] | None:
        """Return these two, the micro-batch, and the bytes held and for an image; None if nothing fits."""
        per_image = peak_bytes_per_image(config, precision, recompute, scored_tokens)
        where: dict[str, Any] = {"zero_stage": stage, "world_size": world_size, "is_gpu": is_gpu}
        for accumulates in (False, True):
            held = held_bytes(config, precision, **where, accumulates=accumulates)
            room = int((usable - held) // per_image)
            if runtime.micro_batch == "auto":
                size = pass_size(num_images, min(room, max(1, MAX_MICRO_BATCH_TOKENS // config.num_tokens)))
            else:
                size = min(runtime.micro_batch, num_images)
            if size == num_images:
                break
        return (stage, recompute, size, held, per_image) if 0 < size <= room else None

    best = next(filter(None, itertools.starmap(fit, _settings(precision, runtime, world_size))), None)
    if best and best[0] > 1 and best[2] < num_images and not is_linked and runtime.zero_stage == "auto":
        best = fit(1, best[1]) or best
    if best is None:
        raise DoesNotFitError(
            f"{config.name} does not fit {device_bytes / 2**30:.3g} GiB per rank with {world_size} ranks and this "
            "setting; use more ranks, or leave zero_stage, micro_batch and activation_checkpointing on auto"
        )
    stage, recompute, size, held, per_image = best
    has_room = held + measuring <= usable
    step = held + size * per_image
    if size == num_images:
        step -= waiting_bytes(config, precision, zero_stage=stage, world_size=world_size, activations=size * per_image)
    total = max(step, held + measuring if has_room else 0)
    return ExecutionPlan(
        zero_stage=stage,
        micro_batch=size,
        activation_checkpointing=recompute,
        memory_bytes=total,
        measures=measuring > 0 and has_room,
        half_micro_batch=pass_size(num_images, size // 2),
    )


def plan_start(
    training: TrainingConfig,
    runtime: RuntimeConfig,
    too_large: Mapping[str, Any] | None,
    *,
    device: str,
    world_size: int,
    **memory: Any,
) -> ExecutionPlan:
    """Plan a start of a run, with half of the micro-batch if memory ran out in the start before, with settings
    `too_large`."""
    memory |= {"world_size": world_size, "is_linked": has_fast_link(device)}
    plan = execution_plan(training, runtime, **memory)
    if too_large is None or plan.micro_batch < (failed := too_large["micro_batch"]):
        return plan
    if too_large != plan.settings(device=device, world_size=world_size) | {"micro_batch": failed}:
        return plan
    fixed = {"zero_stage": plan.zero_stage, "activation_checkpointing": plan.activation_checkpointing}
    fixed["micro_batch"] = pass_size(images_per_rank(training.optimiser.batch_size, world_size), failed // 2)
    lowered = execution_plan(training, runtime.model_copy(update=fixed), **memory)
    return dataclasses.replace(lowered, is_lowered=True, half_micro_batch=0)


def out_of_memory(error: Exception, plan: ExecutionPlan, *, device: str, world_size: int) -> TooLargeError | None:
    """Return the error that makes the next start take half of the micro-batch, if memory ran out and that is possible.
    This start ends: other ranks may wait in a collective that this one never enters."""
    if not plan.half_micro_batch or not is_out_of_memory(error):
        return None
    return TooLargeError(
        f"{describe_out_of_memory(error)} before the first checkpoint with a micro-batch of {plan.micro_batch}; "
        f"the next start takes {plan.half_micro_batch}; start the run again",
        plan.settings(device=device, world_size=world_size),
    )


def _settings(precision: Precision, runtime: RuntimeConfig, world_size: int) -> list[tuple[int, bool]]:
    """List pairs of ZeRO stage and recomputation (False, True) to try, in this order."""
    stages: tuple[int, ...] = (2, 3)
    if runtime.zero_stage != "auto":
        stages = (runtime.zero_stage,)
    elif world_size == 1:
        stages = (min(stage for kind, stage in HELD if kind == precision),)
    if (precision, stages[0]) not in HELD:
        raise DoesNotFitError(f"zero_stage {runtime.zero_stage} cannot train in {precision}; use 1, 2 or 3")
    choices = (False, True) if runtime.activation_checkpointing == "auto" else (runtime.activation_checkpointing,)
    return [(stage, recompute) for recompute in choices for stage in stages]


def images_per_rank(batch_size: int, world_size: int) -> int:
    """Return the images of a step on the rank that has most; pairs of an even batch stay on one rank."""
    unit = 2 - batch_size % 2
    return unit * -(-batch_size // (unit * world_size))


def pass_size(num_images: int, most: int) -> int:
    """Choose the images of a pass: the largest divisor of a rank's images up to `most`, so that all passes of a step
    are of one size.

    It is even if the number of images is, so that pairs stay together. If the divisor is less than half of `most`,
    passes are as few as possible and differ by at most a pair. Returns 0 if `most` is none.
    """
    unit, most = 2 - num_images % 2, min(most, num_images)
    if most < unit:
        return max(0, most)
    size = max(each for each in range(unit, most + 1, unit) if num_images % each == 0)
    if 2 * size >= most:
        return size
    num_passes = -(-num_images // most)
    while (size := unit * -(-num_images // (unit * num_passes))) > most:
        num_passes += 1
    return size


def curve_bytes(config: RunConfig, lookup: Callable[[str], Counted | None]) -> int:
    """Return the bytes on a rank, beside what training holds, while it measures during training; 0 if it never does."""
    precision = config.training.optimiser.precision
    return measuring_bytes(build_model_config(config.training), precision) if num_points(config, lookup) else 0


def should_compile(wanted: Literal["auto"] | bool, device: torch.device, zero_stage: int) -> bool:
    """Interpret `runtime.compile`: `auto` compiles the blocks on a GPU, but not at ZeRO 3, whose hooks break graphs."""
    if device.type == "cuda":
        return zero_stage < 3 if wanted == "auto" else wanted
    if wanted is True:
        raise ConfigError(
            "runtime.compile makes steps slower on a CPU (measured: 1.3 to 1.5 times as long); leave it on auto"
        )
    return False
