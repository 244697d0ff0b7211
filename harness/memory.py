"""Memory of one rank, and the rule that chooses ZeRO stage, micro-batch and activation checkpointing from it.

Torch is not imported here: the planner prints these numbers before anything runs. Bytes per parameter follow from what
DeepSpeed 0.19 keeps (W: number of ranks):

| precision, stage | weights | gradients | master and moments |
|---|---|---|---|
| fp32, 0 | 4 | 4 | 8 |
| fp32, 1 | 4 | 4 + 4/W in the step | 12/W |
| fp32, 2 | 4 | 4/W | 12/W |
| fp32, 3 | 4/W | 4/W | 12/W |
| bf16, 1 | 2 | 4 (float32 accumulation, whole on every rank) | 12/W |
| bf16, 2 | 2 | 4/W | 12/W |
| bf16, 3 | 2/W | 4/W | 12/W |

and stages 1 to 3 reduce through buckets. Activations are counted from what the backward pass of a block keeps.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from aim.config import ModelConfig
from aim.cost import param_count
from aim.errors import UserError

Precision = Literal["fp32", "bf16"]

MAX_BUCKET_VALUES = 200_000_000
"""Largest reduction bucket (`harness.engine`)."""
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
    """Accumulated gradients."""
    optimiser: int
    """Master weights and moments."""
    buckets: int
    """Reduction and gathering buffers."""
    activations: int
    """Kept for the backward pass, or the working set of one recomputed block if larger."""
    workspace: int = WORKSPACE_BYTES
    """Kernels' workspaces and slack."""

    @property
    def states(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimiser + self.buckets

    @property
    def total(self) -> int:
        """Everything."""
        return self.states + self.activations + self.workspace


def memory_estimate(
    config: ModelConfig,
    *,
    zero_stage: int,
    world_size: int,
    micro_batch: int,
    precision: Precision,
    activation_checkpointing: bool,
) -> MemoryEstimate:
    """Estimate the peak bytes of one rank.

    Args:
        config: the model.
        zero_stage: 0 to 3.
        world_size: ranks that share the states.
        micro_batch: images per forward pass.
        precision: of weights and activations.
        activation_checkpointing: keep only every block's input.
    """
    num_params = param_count(config).total
    element = 4 if precision == "fp32" else 2
    shared = world_size
    if zero_stage == 0:
        weights, gradients, optimiser = 4 * num_params, 4 * num_params, 8 * num_params
    else:
        weights = element * num_params // (shared if zero_stage == 3 else 1)
        gradients = 4 * num_params // (1 if zero_stage == 1 else shared)
        optimiser = 12 * num_params // shared
    bucket = min(num_params, MAX_BUCKET_VALUES)
    buckets = 0 if zero_stage == 0 else 4 * bucket + 4 * num_params // shared
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimiser=optimiser,
        buckets=buckets,
        activations=micro_batch * activation_bytes_per_image(config, precision, activation_checkpointing),
    )


def activation_bytes_per_image(config: ModelConfig, precision: Precision, activation_checkpointing: bool) -> int:
    """Bytes that one image's forward pass keeps for the backward pass (half of the tokens are scored)."""
    element = 4 if precision == "fp32" else 2
    tokens, scored = config.num_tokens, config.num_tokens // 2
    # A trunk block keeps its input, both norms' outputs, q, k, v, the attention's output, the sum before the MLP (8 d),
    # and the MLP's inner values before and after GELU (8 d); the attention's row sums are float32.
    block = tokens * (16 * config.width * element + 4 * config.num_heads)
    head_block = scored * 10 * config.head.width * element
    # Loss: prediction, target, difference, square in float32; embedding: the convolution's and the norm's outputs.
    ends = scored * 6 * config.patch_dim * 4 + tokens * (config.patch_dim * 4 + 3 * config.width * element)
    if not activation_checkpointing:
        return config.depth * block + config.head.depth * head_block + ends
    inputs = config.depth * tokens * config.width + config.head.depth * scored * config.head.width
    return inputs * element + max(block, head_block if config.head.depth else 0) + ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """How a run uses its devices."""

    zero_stage: int
    """DeepSpeed ZeRO stage."""
    micro_batch: int
    """Most images per forward pass and rank."""
    activation_checkpointing: bool
    """Recompute activations."""
    estimate: MemoryEstimate
    """Of one rank."""


def execution_plan(
    config: ModelConfig,
    *,
    batch_size: int,
    world_size: int,
    precision: Precision,
    device_bytes: int,
    zero_stage: Literal["auto"] | int = "auto",
    micro_batch: Literal["auto"] | int = "auto",
    activation_checkpointing: Literal["auto"] | bool = "auto",
) -> ExecutionPlan:
    """Choose what is not fixed.

    The rule: take the first that fits of (stage, recompute), stages from the lowest (least communication; 0 for fp32,
    1 for bf16, whose master weights need it), stored activations before recomputed ones, each with its largest
    micro-batch. A micro-batch below 8 counts as not fitting while there is something left to try.

    Raises:
        DoesNotFitError: nothing fits.
    """
    first = 0 if precision == "fp32" else 1
    stages = range(first, 4) if zero_stage == "auto" else [zero_stage]
    recompute = [False, True] if activation_checkpointing == "auto" else [activation_checkpointing]
    per_rank = -(-batch_size // world_size)
    limit = USABLE_FRACTION * device_bytes

    for enough in (min(MIN_MICRO_BATCH, per_rank), 1):
        for stage in stages:
            for checkpointing in recompute:
                empty = memory_estimate(
                    config,
                    zero_stage=stage,
                    world_size=world_size,
                    micro_batch=0,
                    precision=precision,
                    activation_checkpointing=checkpointing,
                )
                per_image = activation_bytes_per_image(config, precision, checkpointing)
                room = int((limit - empty.total) // per_image)
                if micro_batch == "auto":
                    most = min(room, per_rank, max(1, MAX_MICRO_BATCH_TOKENS // config.num_tokens))
                    chosen = _even_share(per_rank, most)
                else:
                    chosen = micro_batch
                if enough <= chosen <= room or (micro_batch != "auto" and chosen <= room):
                    activations = chosen * per_image
                    return ExecutionPlan(
                        zero_stage=stage,
                        micro_batch=chosen,
                        activation_checkpointing=checkpointing,
                        estimate=dataclasses.replace(empty, activations=activations),
                    )
    raise DoesNotFitError(
        f"{config.name} does not fit {device_bytes / 2**30:.0f} GiB per rank with {world_size} ranks and this setting; "
        "use more ranks, or leave zero_stage, micro_batch and activation_checkpointing on auto"
    )


def _even_share(per_rank: int, most: int) -> int:
    """Largest equal share of a rank's images that is not above `most`, even where it can be (pairs stay together)."""
    if most < 1:
        return 0
    share = -(-per_rank // -(-per_rank // most))
    return share + 1 if share % 2 and share < most else share


def host_bytes() -> int:
    """Memory of this host that is available now (Linux), bytes."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable")
