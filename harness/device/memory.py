"""Memory of one rank: its model and a step, and the free memory of its host.

Torch is not imported here: the planner prints these numbers before anything runs. They follow steps of the real engine
on fake tensors (`harness.rehearsal`; tests/harness/rehearsal/test_formula.py compares them); activations are counted
from what the backward pass of a block needs. tests/harness/device/test_memory.py measures processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import psutil

from aimscale.aim.config import MLP_RATIO, ModelConfig
from aimscale.aim.cost import largest_param, matrix_sizes, param_count

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]

ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
"""Bytes of a value."""
MAX_BUCKET_VALUES = 50_000_000
"""Values of a reduction bucket where no parameter has more: 200 MB messages are long enough for any network."""
MAX_GATHERED_VALUES = 1_000_000_000
"""Maximum values that DeepSpeed keeps gathered at ZeRO 3."""


class _Held(NamedTuple):
    """Bytes per parameter of one rank; pairs are those on every rank and those shared over ranks."""

    states: tuple[int, int]
    """Weights and optimiser states; also gradients at ZeRO 3, and at ZeRO 1 in bf16, where they are allocated once."""
    gradients: tuple[int, int]
    """Gradients accumulated over micro-batches."""
    bucket: int
    """Reduction buckets and a copy of one that is sent, per value of the bucket (`bucket_values`)."""
    new: int = 0
    """A gradient while it is computed and added, per value of the largest parameter."""
    gathered: int = 0
    """Weights gathered at ZeRO 3, for at most MAX_GATHERED_VALUES parameters and a matrix that is fetched below it."""
    message: tuple[int, int] = (0, 0)
    """Scratch memory of gloo on a CPU, per parameter and per value of the bucket, measured; NCCL's is fixed."""


HELD = {
    ("fp32", 0): _Held((12, 0), (4, 0), 0, new=4, message=(4, 0)),
    ("fp32", 1): _Held((4, 12), (4, 0), 8, new=4),
    ("fp32", 2): _Held((4, 12), (0, 4), 8, new=4),
    ("fp32", 3): _Held((0, 20), (0, 0), 8, gathered=4, message=(0, 8)),
    ("bf16", 1): _Held((6, 12), (0, 0), 0, new=6, message=(8, 0)),
    ("bf16", 2): _Held((2, 12), (0, 4), 8, new=2, message=(0, 4)),
    ("bf16", 3): _Held((0, 18), (0, 0), 8, gathered=2, message=(0, 8)),
}
"""Bytes per parameter by precision and ZeRO stage, as rehearsed steps hold them (tests/harness/rehearsal)."""
CHECKPOINT_BYTES_PER_PARAM = 12
"""Bytes per parameter of a checkpoint: float32 master weights and two moments."""
EVAL_TOKENS = 16_384
"""Tokens per forward pass of an evaluation."""
WORKSPACE_BYTES = 256 * 2**20
"""Bytes for kernels' workspaces and the allocator's slack."""


def bucket_values(config: ModelConfig) -> int:
    """Return the values of a reduction bucket, which has room for every parameter.

    A larger one DeepSpeed would reduce in place, while backward passes already reuse its gradient's memory.
    """
    return max(largest_param(config), min(param_count(config).total, MAX_BUCKET_VALUES))


def held_bytes(
    config: ModelConfig,
    precision: Precision,
    *,
    zero_stage: int,
    world_size: int,
    is_gpu: bool = True,
    accumulates: bool = False,
) -> int:
    """Return the most bytes that one rank holds during a step, without the activations of its micro-batch.

    Args:
        accumulates: whether the step has several micro-batches.
    """
    num_params, held = param_count(config).total, HELD[precision, zero_stage]
    total = sum(each[0] * num_params + each[1] * num_params // world_size for each in (held.states, held.gradients))
    in_bucket, largest = bucket_values(config), largest_param(config)
    total += held.bucket * in_bucket + held.new * largest
    total += held.gathered * min(num_params, MAX_GATHERED_VALUES + MLP_RATIO * config.width**2)
    if (precision, zero_stage) == ("bf16", 3) and largest > MAX_BUCKET_VALUES:
        total -= 2 * (in_bucket - MAX_BUCKET_VALUES)  # no copy is made of a bucket that one matrix fills
    if precision == "fp32" and zero_stage in (1, 2):
        whole = max(whole_values(config, world_size))  # float32 gradients are copied, and added at ZeRO 2, as a whole
        extra = whole - in_bucket if zero_stage == 1 else (1 + accumulates) * whole - num_params // world_size
        total += 4 * max(0, extra)
    if not is_gpu and world_size > 1:
        total += held.message[0] * num_params + held.message[1] * in_bucket
    return total + WORKSPACE_BYTES


def whole_values(config: ModelConfig, world_size: int) -> list[int]:
    """Count the values of all matrices of which ZeRO 1 and 2 give a rank a part, for every rank."""
    ends = list(itertools.accumulate(matrix_sizes(config)))
    share, out = ends[-1] / world_size, [0] * world_size
    for size, end in zip(matrix_sizes(config), ends, strict=True):
        for rank in range(int((end - size) / share), min(world_size, math.ceil(end / share))):
            out[rank] += size
    return out


def waiting_bytes(
    config: ModelConfig, precision: Precision, *, zero_stage: int, world_size: int, activations: int
) -> int:
    """Return the part of `held_bytes` that a step of one micro-batch never holds.

    Its gradients appear while its activations vanish: layer by layer, and on the rank that holds the last layers first.
    """
    num_params, held = param_count(config).total, HELD[precision, zero_stage]
    gradients = held.gradients[0] * num_params + held.gradients[1] * num_params // world_size
    share = 1 / world_size if zero_stage else 1.0
    at_once = max(activations, (1 - share) * activations + share * sum(held.gradients) * num_params)
    return int(activations + gradients - at_once)


def kept_bytes_per_image(
    config: ModelConfig, precision: Precision, activation_checkpointing: bool, scored_tokens: float
) -> int:
    """Return the bytes that one image's forward pass stores for the backward pass.

    Args:
        scored_tokens: tokens of an image whose prediction is scored (`aim.cost.mean_scored_tokens`).
    """
    element = ELEMENT_BYTES[precision]
    tokens, scored = config.num_tokens, math.ceil(scored_tokens)
    # An MLP head sees scored tokens only, and so do the MLP of the block before it or, in a transformer head, the last.
    into_head, last_width = (tokens, config.head.width) if config.head.num_heads else (scored, config.width)
    pixels = config.channels * config.image_size**2
    # The image and the mask in the weights' precision, the embedding before and after its norm, and the trunk's last
    # norm before and after.
    ends = (pixels + (tokens**2 if config.masked is None else 0) + 2 * tokens * config.width) * element
    ends += 2 * into_head * config.width * element
    if activation_checkpointing:  # blocks keep their inputs
        block, head_block, skipped = tokens * config.width * element, into_head * config.head.width * element, 0
    else:
        block, head_block = _block_bytes(config, precision, scored)
        skipped = (tokens - scored) * _kept_by_mlp(last_width) * element
    return config.depth * block - skipped + ends + _head_bytes(config, precision, scored, head_block)


def peak_bytes_per_image(
    config: ModelConfig, precision: Precision, activation_checkpointing: bool, scored_tokens: float
) -> int:
    """Return the peak bytes of one image in the backward pass: what is stored, and one recomputed block.

    A block of the trunk is recomputed when the head's part is gone.
    """
    kept = kept_bytes_per_image(config, precision, activation_checkpointing, scored_tokens)
    if not activation_checkpointing:
        return kept
    scored = math.ceil(scored_tokens)
    block, head_block = _block_bytes(config, precision, scored)
    into_head = config.num_tokens if config.head.num_heads else scored
    head_input = into_head * config.head.width * ELEMENT_BYTES[precision]
    return max(kept + head_block, kept - _head_bytes(config, precision, scored, head_input) + block)


def _head_bytes(config: ModelConfig, precision: Precision, scored: int, block: int) -> int:
    """Return the bytes that the head stores for the backward pass, `block` in each of its blocks.

    Besides them: its last norm before and after, and the prediction's error in float32.
    """
    width = 0 if config.head.is_linear else config.head.width
    norm = 2 * scored * width * ELEMENT_BYTES[precision]
    return config.head.depth * block + norm + 4 * scored * config.patch_dim


def copy_bytes(config: ModelConfig, precision: Precision) -> int:
    """Return the bytes that a copy of the weights takes while it is made: its own, and the largest one in float32."""
    return param_count(config).total * ELEMENT_BYTES[precision] + 4 * largest_param(config)


def measuring_bytes(config: ModelConfig, precision: Precision) -> int:
    """Return the bytes on one rank, beside what training holds, while it measures during training: a copy of the
    weights, and a forward pass."""
    element, tokens = ELEMENT_BYTES[precision], config.num_tokens
    block = max(_block_bytes(config, precision, tokens))
    sequence = block + 8 * config.channels * config.image_size**2 + element * tokens**2
    return copy_bytes(config, precision) + max(1, EVAL_TOKENS // tokens) * sequence


def _block_bytes(config: ModelConfig, precision: Precision, scored: int) -> tuple[int, int]:
    """Return the bytes that a block of the trunk and a block of the head store for the backward pass.

    The trunk's: its input, the first norm's output, q, k, v, and the attention's output (6 d); its MLP's part; the
    attention's row sums in float32; with QK-norm also normalised q and k, and their means and deviations. The head's:
    the same, or the MLP's part alone. The score matrices that a CPU stores in bfloat16 are not counted: a GPU stores
    none.
    """
    element, head = ELEMENT_BYTES[precision], config.head
    of_width, of_head = (8, 20) if config.qk_norm else (6, 4)
    per_token, in_head = (of_width * width + _kept_by_mlp(width) for width in (config.width, head.width))
    backbone = config.num_tokens * (per_token * element + of_head * config.num_heads)
    if head.num_heads:
        return backbone, config.num_tokens * (in_head * element + of_head * head.num_heads)
    return backbone, scored * _kept_by_mlp(head.width) * element if head.depth else 0


def _kept_by_mlp(width: int) -> int:
    """Count the values per token that an MLP stores: its input, the norm's output, and around GELU."""
    return 2 * width + 2 * MLP_RATIO * width


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for reuse, in pieces of up to 32 MB (its bound) and 256 MB in all.

    By default it returns large pieces to the kernel at once, and every step allocates its tensors anew: page faults
    were a third to a half of a probe's CPU time, and a sixth of a training step's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries lack it
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 256 << 20)  # M_TRIM_THRESHOLD


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of a GPU's tensors, or on a CPU of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_host_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process can still get: the host's, or its container's or job's if that has less.

    Every control group around the process (version 1 or 2) limits it; file pages that the kernel would drop count as
    free.
    """
    free = [psutil.virtual_memory().available]
    for folder, limit, used, pages in _memory_groups(root):
        with contextlib.suppress(OSError, ValueError, KeyError):  # not there, or "max"
            most = int((folder / limit).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free.append(most - int((folder / used).read_text()) + int(stat[pages]))
    return max(0, min(free))


def _memory_groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield the control groups around this process: limit, usage, and file pages in `memory.stat`."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                base = root / "sys/fs/cgroup/memory"
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            elif not controllers:
                base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            else:
                continue
            cgroup = base / path.lstrip("/")
            yield from ((folder, *names) for folder in (cgroup, *cgroup.parents) if folder.is_relative_to(base))
