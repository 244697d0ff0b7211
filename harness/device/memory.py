"""Memory of one rank, and the rule that chooses ZeRO stage, micro-batch and activation checkpointing from it.

Torch is not imported here: the planner prints these numbers before anything runs. Bytes per parameter are those that
DeepSpeed 0.19 was measured to hold (tests/harness/device/test_memory.py measures again); activations are counted from
what the backward pass of a block keeps.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal, NamedTuple

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import DENSE_ATTENTION_TOKENS, param_count
from aimscale.aim.errors import UserError
from aimscale.harness.run.config import OptimiserSection, RuntimeConfig

Precision = Literal["fp32", "bf16"]

MAX_BUCKET_VALUES = 50_000_000
"""Largest reduction bucket (`harness.step.engine`): 200 MB messages are long enough for any network."""
MAX_BUFFER_VALUES = 500_000_000
"""DeepSpeed flattens gradients and gathers weights in pieces of at most this many values."""


class _Held(NamedTuple):
    """Bytes per parameter during a step."""

    weights: tuple[int, int]
    """(on every rank, shared)."""
    gradients: tuple[int, int]
    """(on every rank, shared)."""
    optimiser: tuple[int, int]
    """(on every rank, shared): master weights and moments."""
    buffers: tuple[int, int]
    """(of a rank alone, of one among several), of at most MAX_BUFFER_VALUES parameters."""
    bucket: int
    """Of at most MAX_BUCKET_VALUES parameters."""
    host: tuple[int, int] = (0, 0)
    """(on every rank, shared), in host memory."""


HELD = {
    ("fp32", 0): _Held((4, 0), (4, 0), (8, 0), (0, 4), 0),
    ("fp32", 1): _Held((4, 0), (8, 4), (0, 12), (0, 0), 2),
    ("fp32", 2): _Held((4, 0), (0, 12), (0, 12), (0, 0), 5),
    ("fp32", 3): _Held((0, 4), (0, 4), (0, 8), (14, 14), 8),
    ("bf16", 1): _Held((2, 0), (6, 0), (0, 12), (1, 6), 0),
    ("bf16", 2): _Held((2, 0), (2, 8), (0, 12), (0, 0), 8),
    ("bf16", 3): _Held((0, 2), (0, 4), (0, 12), (10, 10), 8),
}
"""By precision and ZeRO stage. bf16 gradients of one backward pass are held beside their float32 accumulation."""
OFFLOADED = {
    ("fp32", 1): _Held((4, 0), (8, 0), (0, 0), (1, 1), 2, (0, 20)),
    ("fp32", 2): _Held((4, 0), (0, 4), (0, 0), (2, 2), 5, (0, 20)),
    ("fp32", 3): _Held((0, 4), (0, 0), (0, 0), (12, 12), 8, (0, 16)),
    ("bf16", 1): _Held((2, 0), (6, 0), (0, 0), (4, 4), 8, (0, 20)),
    ("bf16", 2): _Held((2, 0), (6, 0), (0, 0), (0, 0), 8, (0, 20)),
    ("bf16", 3): _Held((0, 2), (0, 0), (0, 0), (10, 10), 8, (0, 20)),
}
"""The same with optimiser state offloaded: the host holds master weights, moments, and float32 gradients twice (as they
add up and as they are applied). Device and host together are measured on a CPU; how they divide is read from
DeepSpeed's source, and only a card can show it."""
CHECKPOINT_BYTES_PER_PARAM = 12
"""float32 master weights and two moments."""
USABLE_FRACTION = 0.9
"""Share of a device that may be planned for; the rest is context, workspaces and fragmentation."""
MAX_MICRO_BATCH_TOKENS = 65_536
"""More tokens in one forward pass than this gain no speed."""
MIN_MICRO_BATCH = 8
"""A micro-batch smaller than this wastes the device; rather recompute activations or go one ZeRO stage up."""
WORKSPACE_BYTES = 256 * 2**20
"""Kernels' workspaces and the allocator's slack."""


class DoesNotFitError(UserError):
    """A model that fits no device of this size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak bytes on one rank during a step."""

    weights: int
    """What the forward pass reads."""
    gradients: int
    optimiser: int
    """Master weights and moments."""
    buffers: int
    """Flattened gradients and gathered weights."""
    activations: int
    """Kept for the backward pass, or the working set of one recomputed block if larger."""
    workspace: int = WORKSPACE_BYTES
    host: int = 0
    """Offloaded: in the memory of the host, not of the device, and not in `total`."""
    checkpoint_copy: int = 0
    """In the memory of the host, too: the state as it is written to disk while training goes on; 0 where it waits."""

    @property
    def states(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimiser + self.buffers

    @property
    def on_host(self) -> int:
        """Everything in the host's memory."""
        return self.host + self.checkpoint_copy

    @property
    def total(self) -> int:
        """Everything on the device."""
        return self.states + self.activations + self.workspace


def memory_estimate(
    config: ModelConfig,
    *,
    zero_stage: int,
    world_size: int,
    micro_batch: int,
    precision: Precision,
    activation_checkpointing: bool,
    on_cpu: bool = False,
    offload_optimiser: bool = False,
    offload_weights: bool = False,
) -> MemoryEstimate:
    """Estimate the peak bytes of one rank.

    Args:
        on_cpu: there the attention of short sequences keeps its scores.
        offload_optimiser: master weights and moments live in host memory; ZeRO 1 to 3.
        offload_weights: so do the weights between their uses; ZeRO 3.
    """
    num_params = param_count(config).total
    held = (OFFLOADED if offload_optimiser else HELD)[precision, zero_stage]
    if offload_weights:
        host = (held.host[0], held.host[1] + held.weights[1])
        held = held._replace(weights=(0, 0), host=host)

    def on_one_rank(part: tuple[int, int]) -> int:
        return num_params * part[0] + num_params * part[1] // world_size

    buffers = held.buffers[world_size > 1] * min(num_params, MAX_BUFFER_VALUES)
    buffers += held.bucket * min(num_params, MAX_BUCKET_VALUES)
    return MemoryEstimate(
        weights=on_one_rank(held.weights),
        gradients=on_one_rank(held.gradients),
        optimiser=on_one_rank(held.optimiser),
        buffers=buffers,
        activations=micro_batch * activation_bytes_per_image(config, precision, activation_checkpointing, on_cpu),
        host=on_one_rank(held.host),
        checkpoint_copy=CHECKPOINT_BYTES_PER_PARAM * num_params // world_size,
    )


def activation_bytes_per_image(
    config: ModelConfig, precision: Precision, activation_checkpointing: bool, on_cpu: bool = False
) -> int:
    """Peak bytes of one image between its forward and its backward pass: what is kept, and one recomputed block."""
    kept = kept_bytes_per_image(config, precision, activation_checkpointing, on_cpu)
    return kept + max(_block_bytes(config, precision, on_cpu)) if activation_checkpointing else kept


def kept_bytes_per_image(
    config: ModelConfig, precision: Precision, activation_checkpointing: bool, on_cpu: bool = False
) -> int:
    """Bytes that one image's forward pass keeps for the backward pass; half of its tokens are scored."""
    element = 4 if precision == "fp32" else 2
    tokens, scored = config.num_tokens, config.num_tokens // 2
    head_width = 0 if config.head.is_linear else config.head.width
    pixels = config.channels * config.image_size**2
    # The image and the mask in the weights' precision, the embedding before and after its norm, the trunk's and the
    # head's last norms before and after, and the prediction's error in float32.
    ends = (pixels + tokens**2 + 2 * tokens * config.width) * element
    ends += scored * (2 * (config.width + head_width) * element + 4 * config.patch_dim)
    if activation_checkpointing:
        inputs = config.depth * tokens * config.width + config.head.depth * scored * head_width
        return inputs * element + ends
    block, head_block = _block_bytes(config, precision, on_cpu)
    skipped = (tokens - scored) * 10 * config.width * element  # the last block's MLP sees scored tokens only
    return config.depth * block - skipped + config.head.depth * head_block + ends


def _block_bytes(config: ModelConfig, precision: Precision, on_cpu: bool) -> tuple[int, int]:
    """What a block of the trunk and a block of the head keep.

    The trunk's: its input, the first norm's output, q, k, v, and the attention's output (6 d); the sum, the second
    norm's output, and the MLP before and after GELU (10 d); the attention's row sums in float32, or its whole weights.
    The head's: the MLP's part.
    """
    element = 4 if precision == "fp32" else 2
    is_dense = on_cpu and config.num_tokens <= DENSE_ATTENTION_TOKENS[precision]
    per_head = config.num_tokens * element if is_dense else 4
    trunk = config.num_tokens * (16 * config.width * element + per_head * config.num_heads)
    head = config.num_tokens // 2 * 10 * config.head.width * element if config.head.depth else 0
    return trunk, head


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """How a run uses its devices."""

    zero_stage: int
    micro_batch: int
    """Most images per forward pass and rank."""
    activation_checkpointing: bool
    offload_optimiser: bool
    offload_weights: bool
    """Keep weights in host memory between their uses."""
    estimate: MemoryEstimate
    """Of one rank."""


class _Setting(NamedTuple):
    """What the rule tries."""

    zero_stage: int
    activation_checkpointing: bool
    offload_optimiser: bool
    offload_weights: bool


def _settings(precision: Precision, may_offload: bool) -> list[_Setting]:
    """All settings, the best first, as `execution_plan` says."""
    first = 0 if precision == "fp32" else 1
    on_device = [
        _Setting(stage, recompute, False, False)
        for stages in (range(first, 3), (3,))
        for recompute in (False, True)
        for stage in stages
    ]
    on_host = [
        _Setting(stage, recompute, True, weights)
        for stages, weights in ((range(1, 3), False), ((3,), False), ((3,), True))
        for recompute in (False, True)
        for stage in stages
    ]
    return on_device + on_host if may_offload else on_device


def execution_plan(
    config: ModelConfig,
    optimiser: OptimiserSection,
    runtime: RuntimeConfig,
    *,
    world_size: int,
    device_bytes: int,
    host_bytes: int | None = None,
    on_cpu: bool = False,
) -> ExecutionPlan:
    """Choose what `runtime` leaves open.

    The rule: take the first setting that fits, each with its largest micro-batch. Stored activations come before
    recomputed ones (a third more FLOPs), and among each the lower ZeRO stage (less communication; 0 for fp32, 1 for
    bf16, whose master weights need it, and 2); stage 3, slower, comes next. Offloading comes last, first of optimiser
    state in the same order (every step then moves gradients and weights over the bus, and the host updates them at the
    speed of its memory), then of the weights, too; without being told only where the host's memory is known and
    suffices, and never on a CPU, whose memory is the host's. Checkpoints are copied aside where that memory is not
    known or suffices. A micro-batch below 8 counts as not fitting while there is something left to try.

    Args:
        host_bytes: a rank's share of its host's memory, for what is offloaded and for the copy of a checkpoint; None
            where it is not known.

    Raises:
        DoesNotFitError: nothing fits.
    """
    precision = optimiser.precision
    may_offload = runtime.offload_optimiser is True or (host_bytes is not None and not on_cpu)
    settings = [
        setting
        for setting in _settings(precision, may_offload)
        if all(getattr(runtime, name) in ("auto", value) for name, value in setting._asdict().items())
    ]
    if not settings:
        raise DoesNotFitError(
            f"no setting has zero_stage {runtime.zero_stage} in {precision}, offload_optimiser "
            f"{runtime.offload_optimiser} and offload_weights {runtime.offload_weights}; offloading needs zero_stage 1 "
            "to 3, of the weights 3 and of both"
        )
    per_rank = -(-optimiser.batch_size // world_size)
    for enough in (min(MIN_MICRO_BATCH, per_rank), 1):
        for setting, copies in itertools.product(settings, (True, False)):
            if runtime.checkpoint_copy not in ("auto", copies):
                continue
            empty = memory_estimate(
                config, world_size=world_size, micro_batch=0, precision=precision, on_cpu=on_cpu, **setting._asdict()
            )
            empty = empty if copies else dataclasses.replace(empty, checkpoint_copy=0)
            per_image = activation_bytes_per_image(config, precision, setting.activation_checkpointing, on_cpu)
            room = int(_bytes_left(empty, device_bytes, host_bytes, on_cpu) // per_image)
            if runtime.micro_batch == "auto":
                most = min(room, per_rank, max(1, MAX_MICRO_BATCH_TOKENS // config.num_tokens))
                chosen, fits = even_share(per_rank, most), most >= enough
            else:
                chosen, fits = runtime.micro_batch, runtime.micro_batch <= room
            if fits:
                return ExecutionPlan(
                    micro_batch=chosen,
                    estimate=dataclasses.replace(empty, activations=chosen * per_image),
                    **setting._asdict(),
                )
    raise DoesNotFitError(
        f"{config.name} does not fit {device_bytes / 2**30:.0f} GiB per rank with {world_size} ranks and this setting; "
        "use more ranks, or leave zero_stage, micro_batch, activation_checkpointing, offloading and checkpoint_copy on "
        "auto"
    )


def _bytes_left(empty: MemoryEstimate, device_bytes: int, host_bytes: int | None, on_cpu: bool) -> float:
    """Bytes of the device for activations; negative where the host cannot hold its part."""
    if host_bytes is not None and not on_cpu and empty.on_host > USABLE_FRACTION * host_bytes:
        return -1.0
    return USABLE_FRACTION * device_bytes - (empty.on_host if on_cpu else 0) - empty.total


def even_share(per_rank: int, most: int) -> int:
    """Images per pass when a rank's images go in the fewest equal passes of at most `most`; even, so pairs stay."""
    if most < 2:
        return max(0, most)
    num_passes = -(-per_rank // most)
    while (share := 2 * -(-per_rank // (2 * num_passes))) > most:
        num_passes += 1
    return share


def host_bytes() -> int:
    """Memory of this host that is available now (Linux), bytes."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")
