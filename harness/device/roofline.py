"""Time of a training step on a GPU by a roofline over its operations, in closed form; torch is not imported.

Each kernel takes the longer of its arithmetic and its memory traffic, at the shares of the data sheet's rates that
kernels reach; the host takes some time to start each, while those before it run. The constants were fitted to timm's
measured speeds of vision transformers on an RTX 3090 alone and hold on four other GPUs (`tests/harness/device`). No
step of aimscale was timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from aimscale.aim.config import MLP_RATIO, ModelConfig
from aimscale.aim.cost import param_count
from aimscale.harness.device.execution import ExecutionPlan, images_per_rank
from aimscale.harness.device.speed import GpuSpec

MEMORY_SHARE = 0.65
"""Share of a GPU's nominal bandwidth that kernels reach which do little arithmetic."""
MASKED_ATTENTION_SHARE = 0.35
"""Assumption: speed of the memory-efficient attention kernel with a dense mask, over that of a matrix product."""
BACKWARD_BYTES, BACKWARD_ATTENTION = 1.4, 2.5
"""Memory traffic and attention FLOPs of a backward pass, over those of the forward pass."""
LAUNCH_S = 8e-6
"""Assumption: time of the host per kernel that PyTorch and autograd start one by one."""
KERNELS_PER_BLOCK, COMPILED_KERNELS_PER_BLOCK, UPDATE_KERNELS_PER_BLOCK = 35, 22, 15
"""Number of kernels for each block of trunk and head: forward and backward, as rehearsed steps start them; assumption:
compiled; and in an update."""
OPTIMISER_BYTES = 46
"""Bytes that an update moves per parameter of a rank: gradient, its norm and clipping, AdamW, and the copies."""
NVLINK_BYTES_PER_S, PCIE_BYTES_PER_S, NETWORK_BYTES_PER_S = 200e9, 12e9, 20e9
"""Assumption: rate at which gradients are reduced inside a node, and for each of its GPUs between nodes: NCCL's rings
share the adapters of a node."""
OVERLAPPED = 0.5
"""Assumption: share of the backward pass behind which gradients are reduced."""


class Kernel(NamedTuple):
    """Work of some kernels of one kind on a pass over some images."""

    kind: Literal["product", "attention", "memory"]
    flops: float
    num_bytes: float


def linear(num_tokens: float, fan_in: int, fan_out: int, element: int) -> Kernel:
    """Count the product of tokens with a weight matrix."""
    num_bytes = element * (num_tokens * (fan_in + fan_out) + fan_in * fan_out)
    return Kernel("product", 2.0 * num_tokens * fan_in * fan_out, num_bytes)


def block_kernels(
    num_images: float,
    num_tokens: int,
    width: int,
    *,
    element: int,
    stream: int,
    is_compiled: bool,
    mlp_share: float = 1,
) -> Iterator[Kernel]:
    """Count a transformer block's forward pass.

    Args:
        element: bytes of an activation.
        stream: bytes of an element of the residual stream; more than `element` under autocast, which then casts the
            inputs of products by kernels of their own unless they are compiled.
        mlp_share: share of the tokens that enter the MLP.
    """
    tokens = num_images * num_tokens
    scored = mlp_share * tokens
    yield linear(tokens, width, 3 * width, element)
    yield Kernel("attention", 4.0 * tokens * num_tokens * width, 4 * element * tokens * width)
    yield linear(tokens, width, width, element)
    yield linear(scored, width, MLP_RATIO * width, element)
    yield linear(scored, MLP_RATIO * width, width, element)
    # LayerNorm and residual sum, fused if compiled; GELU; the copy that joins the heads again
    norm_and_sum = 2 * (stream + element) if is_compiled else 4 * stream + element
    if stream != element and not is_compiled:
        norm_and_sum += stream + element
    yield Kernel("memory", 0.0, width * (tokens + scored) * norm_and_sum)
    yield Kernel("memory", 0.0, width * (2 * MLP_RATIO * scored + 2 * tokens) * element)


def model_kernels(
    config: ModelConfig, num_images: float, scored_tokens: float, *, element: int, is_compiled: bool
) -> Iterator[Kernel]:
    """Count the forward pass of `AIM.forward`, which goes on with scored tokens alone behind the last attention."""
    num_tokens, width, head = config.num_tokens, config.width, config.head
    tokens, share = num_images * num_tokens, scored_tokens / num_tokens
    how = {"element": element, "stream": element, "is_compiled": is_compiled}
    yield linear(tokens, config.patch_dim, width, element)
    yield Kernel("memory", 0.0, tokens * (6 * width * element + 40 * config.patch_dim))  # float32 pixels and targets
    for number in range(config.depth):
        is_last = number + 1 == config.depth and not head.num_heads
        yield from block_kernels(num_images, num_tokens, width, **how, mlp_share=share if is_last else 1)  # type: ignore[arg-type]
    tokens *= 1 if head.num_heads else share
    if head.is_linear:
        yield linear(tokens, width, config.patch_dim, element)
        return
    yield linear(tokens, width, head.width, element)
    for number in range(head.depth):
        if head.num_heads:
            scored = share if number + 1 == head.depth else 1
            yield from block_kernels(num_images, num_tokens, head.width, **how, mlp_share=scored)  # type: ignore[arg-type]
        else:
            yield linear(tokens, head.width, MLP_RATIO * head.width, element)
            yield linear(tokens, MLP_RATIO * head.width, head.width, element)
            yield Kernel("memory", 0.0, tokens * head.width * element * (4 + 2 * MLP_RATIO))
    yield linear(tokens * (share if head.num_heads else 1), head.width, config.patch_dim, element)


def pass_s(
    kernels: Iterable[Kernel],
    gpu: GpuSpec,
    *,
    element: int,
    is_masked: bool,
    with_backward: bool,
    recompute: bool = False,
) -> float:
    """Return the time that a GPU computes a forward pass, s, and with it the backward pass, before which it may be
    recomputed."""
    peak = gpu.reached_tflops * 1e12 * (0.5 if element == 4 else 1)
    forward = backward = 0.0
    for kind, flops, num_bytes in kernels:
        rate = peak * (MASKED_ATTENTION_SHARE if kind == "attention" and is_masked else 1)
        times = flops / rate, num_bytes / (MEMORY_SHARE * gpu.bandwidth_gb * 1e9)
        forward += max(times)
        if kind == "product":
            backward += 2 * max(times)
        elif kind == "attention":
            backward += BACKWARD_ATTENTION * max(times)
        else:
            backward += BACKWARD_BYTES * times[1]
    return forward * (1 + recompute) + backward * with_backward


def step_s(
    config: ModelConfig,
    plan: ExecutionPlan,
    gpu: GpuSpec,
    *,
    batch_size: int,
    scored_tokens: float,
    element: int,
    num_devices: int,
    devices_per_node: int,
    is_compiled: bool,
) -> float:
    """Return the time of a training step, s, with its images ready.

    Args:
        element: bytes of a weight of the forward pass: 2 in bf16, 4 in fp32.
        is_compiled: whether blocks are compiled.
    """
    num_images = images_per_rank(batch_size, num_devices)
    num_passes = -(-num_images // plan.micro_batch)
    kernels = model_kernels(config, num_images / num_passes, scored_tokens, element=element, is_compiled=is_compiled)
    computed = pass_s(
        kernels,
        gpu,
        element=element,
        is_masked=config.masked is None,
        with_backward=True,
        recompute=plan.activation_checkpointing,
    )
    per_block = COMPILED_KERNELS_PER_BLOCK if is_compiled else KERNELS_PER_BLOCK
    num_blocks = config.depth + config.head.depth
    launched = LAUNCH_S * per_block * num_blocks
    params = param_count(config).total
    sent_s = reduced_s = 0.0
    if num_devices > 1:
        rate = NVLINK_BYTES_PER_S if gpu.is_linked else PCIE_BYTES_PER_S
        if num_devices > devices_per_node:
            rate = min(rate, NETWORK_BYTES_PER_S * devices_per_node)
        rate *= num_devices / (num_devices - 1)
        # float32 gradients: each part once at ZeRO 3, there and back below; and weights, before each pass at ZeRO 3
        reduced_s = (4 if plan.zero_stage == 3 else 8) * params / rate
        sent_s = element * params * (2 * num_passes if plan.zero_stage == 3 else 1) / rate
        if plan.zero_stage == 3:  # the next layer's weights are on their way meanwhile
            sent_s = max(0.0, sent_s - OVERLAPPED * num_passes * computed)
    num_reductions = num_passes if plan.zero_stage > 1 else 1
    passes_s = num_passes * max(computed, launched)
    passes_s += num_reductions * max(0.0, reduced_s - OVERLAPPED * computed)
    shared = num_devices if plan.zero_stage else 1
    updated_s = OPTIMISER_BYTES * params / shared / (MEMORY_SHARE * gpu.bandwidth_gb * 1e9)
    return passes_s + sent_s + max(updated_s, LAUNCH_S * UPDATE_KERNELS_PER_BLOCK * num_blocks)
