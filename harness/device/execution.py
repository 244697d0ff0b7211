"""Execution of a run on its devices: the rule that chooses ZeRO stage, micro-batch and activation checkpointing by the
estimated time of a step, among what fits the memory. Torch is not imported here."""

from __future__ import annotations

import dataclasses

from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens, param_count
from aimscale.aim.errors import UserError
from aimscale.harness.device.communication import Precision, step_communication
from aimscale.harness.device.memory import (
    CHECKPOINT_BYTES_PER_PARAM,
    HELD,
    held_bytes,
    kept_bytes_per_image,
    peak_bytes_per_image,
)
from aimscale.harness.run.config import RuntimeConfig, TrainingConfig
from aimscale.harness.run.row import model_of

USABLE_FRACTION = 0.8
"""Share of a device that may be planned for, 68 of the 85 GB of a GPU of 80 GB. The rest is for the context and NCCL's
buffers (2 to 3 GB), activations beyond their estimate (a tenth of them, by the tests), and fragmentation: a smaller
micro-batch costs a per cent of a step, running out of memory costs a run."""
MAX_MICRO_BATCH_TOKENS = 65_536
"""Tokens in one forward pass beyond which speed does not grow."""
GPU_MFU = 0.40
"""Assumption: the share of its peak at which a GPU executes large passes."""
BLOCK_S = 0.3e-3
"""Assumption: overhead of a block per pass on a GPU, forward and backward, for any number of images: some fifty kernel
launches, reading its weights and writing their gradients."""
CORE_MFU, CORE_BYTES_PER_S, CORE_STEP_S = 0.35, 0.5e9, 0.002
"""Performance of one CPU core: the share of its peak, the rate at which it moves what a forward pass keeps, and the
overhead of a pass. Assumption: within 15 % (24 % once) of the fastest steps of seven models from w24-d1 to rung-128 on
a core of a busy AMD EPYC; the processor time of four of them was .5 to .9 of it."""
STAGE_3_FACTOR = 1.2
"""Assumption: slowdown of ZeRO 3, where nothing is compiled and hooks gather the weights of every layer."""
NVLINK_BYTES_PER_S, NETWORK_BYTES_PER_S, HOST_BYTES_PER_S = 300e9, 25e9, 1e9
"""Assumption: send rates in large collectives: of a rank within a node (two thirds of an H100's NVLink); of a node for
each of its ranks (half of a 400 Gb/s network card each; a ring enters and leaves a node once, through all of them); and
of a rank on a CPU."""
CALL_S = 50e-6
"""Assumption: latency of one collective."""
BACKWARD_SHARE, HIDDEN_COST = 2 / 3, 0.1
"""Share of a pass during which gradients are reduced; and share of the overlapped communication time that slows down
computation nevertheless, since it takes some of a GPU's processors. Assumption."""

TIE_RATIO = 1.01
"""Ratio of two estimates below which they count as equal."""


class DoesNotFitError(UserError):
    """Model that fits no device of this size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """Speed of a rank, and the layout of its neighbours."""

    flops_per_s: float
    """FLOP/s that it executes in large passes."""
    cores: int | None
    """Cores of a CPU; None for a GPU, which reduces gradients during the backward pass."""
    ranks_per_node: int
    """Ranks of a node that is fully used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Estimated time of a step of one rank, s."""

    images_s: float
    """Time of its images, recomputed activations included."""
    passes_s: float
    """Overhead of its passes, whatever their images."""
    exposed_communication_s: float
    """Communication that no computation hides, and the slowdown of computation by the hidden rest."""

    @property
    def compute_s(self) -> float:
        """Time of images and passes."""
        return self.images_s + self.passes_s

    @property
    def total_s(self) -> float:
        """Total time, without the wait for images."""
        return self.compute_s + self.exposed_communication_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """Plan of how a run uses its devices."""

    zero_stage: int
    micro_batch: int
    """Maximum images per forward pass and rank."""
    activation_checkpointing: bool
    copies_checkpoints: bool
    """Whether checkpoints are written from a copy in host memory while training goes on; else training waits."""
    memory_bytes: int
    """Peak memory of one rank during a step, or while it measures during training."""
    held_bytes: int
    """Memory among these that is held between steps."""
    measures: bool
    """Whether there is memory to measure during training; otherwise nothing is measured."""
    step: StepTime
    """Estimated time of a step."""


def execution_plan(
    training: TrainingConfig,
    runtime: RuntimeConfig,
    *,
    pace: Pace,
    world_size: int,
    device_bytes: int,
    host_bytes: int | None = None,
    measuring: int = 0,
) -> ExecutionPlan:
    """Choose what `runtime` leaves open: the shortest step by estimate among what fits; no choice changes a result.

    Among steps within a per cent of the shortest, the lowest ZeRO stage is chosen: an estimate is no finer.

    Args:
        device_bytes: memory that a rank may plan for.
        host_bytes: its share of the host's memory, for the copy of a checkpoint; None if the device is the host.
        measuring: `measuring_bytes`; 0 where nothing is measured during training. It changes no choice of the steps.

    Raises:
        DoesNotFitError: nothing fits, whatever the pace.
    """
    config, precision = model_of(training), training.optimiser.precision
    num_images, usable = images_per_rank(training.optimiser.batch_size, world_size), USABLE_FRACTION * device_bytes
    copy = CHECKPOINT_BYTES_PER_PARAM * param_count(config).total // world_size
    plans = []
    for stage, recompute in _settings(precision, runtime):
        held = held_bytes(config, precision, zero_stage=stage, world_size=world_size)
        per_image = peak_bytes_per_image(config, precision, recompute)
        room = int((usable - held) // per_image)
        if runtime.micro_batch == "auto":
            size = pass_size(num_images, min(room, max(1, MAX_MICRO_BATCH_TOKENS // config.num_tokens)))
        else:
            size = min(runtime.micro_batch, num_images)
        if 0 < size <= room:
            has_room = held + measuring <= usable
            total = held + max(size * per_image, measuring if has_room else 0)
            plan = ExecutionPlan(
                zero_stage=stage,
                micro_batch=size,
                activation_checkpointing=recompute,
                copies_checkpoints=copy <= (usable - total if host_bytes is None else USABLE_FRACTION * host_bytes),
                memory_bytes=total,
                held_bytes=held,
                measures=measuring > 0 and has_room,
                step=_step_time(training, pace, stage, recompute, num_images, -(-num_images // size), world_size),
            )
            plans.append(plan)
    if not plans:
        raise DoesNotFitError(
            f"{config.name} does not fit {device_bytes / 2**30:.3g} GiB per rank with {world_size} ranks and this "
            "setting; use more ranks, or leave zero_stage, micro_batch and activation_checkpointing on auto"
        )
    shortest_s = min(plan.step.total_s for plan in plans)
    return next(plan for plan in plans if plan.step.total_s <= TIE_RATIO * shortest_s)


def _settings(precision: Precision, runtime: RuntimeConfig) -> list[tuple[int, bool]]:
    """List pairs of ZeRO stage and recomputation (False, True) that precision and `runtime` allow."""
    found = [
        (stage, recompute)
        for stage in range(4)
        for recompute in (False, True)
        if (precision, stage) in HELD
        if runtime.zero_stage in ("auto", stage) and runtime.activation_checkpointing in ("auto", recompute)
    ]
    if not found:
        raise DoesNotFitError(f"zero_stage {runtime.zero_stage} cannot train in {precision}; use 1, 2 or 3")
    return found


def _step_time(
    training: TrainingConfig,
    pace: Pace,
    zero_stage: int,
    recompute: bool,
    num_images: int,
    num_passes: int,
    world_size: int,
) -> StepTime:
    """Estimate the time of a step with so many images per rank."""
    config, precision = model_of(training), training.optimiser.precision
    flops = executed_flops_per_image(config, mean_scored_tokens(config, training.objective.prefix))
    again = flops.forward - flops.patch_embed if recompute else 0.0
    image_s, pass_s = (flops.train + again) / pace.flops_per_s, CORE_STEP_S
    if pace.cores is None:
        pass_s = BLOCK_S * (config.depth + config.head.depth)
    else:
        image_s += kept_bytes_per_image(config, precision, False) / (pace.cores * CORE_BYTES_PER_S)
    images_s = num_images * image_s * (STAGE_3_FACTOR if zero_stage == 3 else 1)
    sent = step_communication(
        param_count(config).total,
        precision=precision,
        zero_stage=zero_stage,
        world_size=world_size,
        micro_batches=num_passes,
    )
    rate = HOST_BYTES_PER_S if pace.cores else NVLINK_BYTES_PER_S
    if world_size > pace.ranks_per_node:
        rate = min(rate, NETWORK_BYTES_PER_S * pace.ranks_per_node)
    exposed_s = sent.sent_bytes / rate + CALL_S * sent.num_calls
    if pace.cores is None:
        beside_s = exposed_s * (1 - sent.exposed_bytes / max(1, sent.sent_bytes))
        hiding_s = BACKWARD_SHARE * images_s / (num_passes if zero_stage < 2 else 1)  # during the last pass, or all
        exposed_s -= (1 - HIDDEN_COST) * min(beside_s, hiding_s)
    return StepTime(images_s=images_s, passes_s=num_passes * pass_s, exposed_communication_s=exposed_s)


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
