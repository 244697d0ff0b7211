"""Faster forms of two operations that PyTorch runs slowly on a CPU; equal to PyTorch's own but for rounding.

**Float32 linear layers.** PyTorch multiplies float32 matrices with Intel's MKL, which on AMD processors leaves AVX-512
unused. oneDNN, which ships in the same wheel and which PyTorch uses for bfloat16, takes it: 2.3 times the rate on Zen 5
(270 against 118 GFLOP/s a core), 1.1 times on Zen 4, where weight gradients lose. So both are timed once per machine.
No public function leads to oneDNN, so the operator that PyTorch's own compiler calls is used where it exists.

**Attention over a few hundred tokens in bfloat16.** PyTorch's fused kernel is made for long sequences, and its bfloat16
backward pass for none: whole score matrices through two batched products take a fifth of its time at 64 tokens (torch
2.13). In float32 they are slower by up to 8 % of a whole step, so the fused kernel stays.

CUDA, other dtypes and compiled graphs never come here. `torch.backends.mkldnn.flags(enabled=False)` switches the linear
layers back.
"""

from __future__ import annotations

import functools
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aimscale.aim.cost import DENSE_ATTENTION_TOKENS
from aimscale.aim.machine import cpu_name, measured_once

CLEARLY = 1.15
"""oneDNN is taken where it is this much faster: a smaller gain, which noise may hide, is not worth other bits."""
MIN_LINEAR_FLOPS = 4e6
"""A smaller product takes longer to hand to oneDNN than it gains."""
MIN_WEIGHT_VALUES = 100_000
"""With several threads the gradient of a smaller weight is faster in MKL: one thread alone transposes for oneDNN."""
MAX_DENSE_TOKENS = {torch.float32: DENSE_ATTENTION_TOKENS["fp32"], torch.bfloat16: DENSE_ATTENTION_TOKENS["bf16"]}


class Linear(nn.Linear):
    """`torch.nn.Linear`, by oneDNN where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` of (..., in), (out, in) and (out,), by oneDNN where that is faster."""
    num_flops = 2 * x.numel() * len(weight)
    if num_flops < MIN_LINEAR_FLOPS or x.device.type != "cpu" or not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], len(weight))


def float32_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Product of two float32 matrices (m, k) and (k, n) on the CPU by the faster library of the two."""
    return _multiply(left, right.t()) if choice().products else left @ right


class Choice(NamedTuple):
    """Which float32 products oneDNN takes."""

    products: bool
    """Those of the forward pass and of the gradients of inputs."""
    weight_gradients: bool
    """Those of two transposed operands."""


def choice() -> Choice:
    """What was measured for this processor, torch and number of threads, at first use."""
    return _choice(torch.get_num_threads())


@functools.cache
def _choice(num_threads: int) -> Choice:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return Choice(products=False, weight_gradients=False)
    key = [cpu_name(), torch.__version__, num_threads]
    return Choice(*measured_once("float32-products", key, lambda: list(_measure())))


@torch.no_grad()
def _measure(side: int = 512, tries: int = 15) -> Choice:
    """Time both libraries alternately; the best of each counts, since other processes only make it worse."""
    left, right = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0)).unbind()
    ways = (
        lambda: left @ right.t(),
        lambda: _multiply(left, right),
        lambda: left.t() @ right,
        lambda: _multiply(left.t(), right.t()),
    )
    best = [float("inf")] * len(ways)
    for _ in range(tries):
        for index, way in enumerate(ways):
            started = time.perf_counter()
            way()
            best[index] = min(best[index], time.perf_counter() - started)
    return Choice(products=best[0] > CLEARLY * best[1], weight_gradients=best[2] > CLEARLY * best[3])


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of (B, heads, N, head dim) tensors; `mask`, added to the scores, broadcasts to (B, heads, N, N)."""
    batch, heads, num_tokens, head_dim = query.shape
    is_here = query.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_autocast()
    if not is_here or num_tokens > MAX_DENSE_TOKENS.get(query.dtype, 0):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    query, key, value = (part.reshape(batch * heads, num_tokens, head_dim) for part in (query, key, value))
    if mask is None:
        scores = torch.bmm(query * scale, key.transpose(1, 2))
    else:
        added = mask.expand(batch, heads, num_tokens, num_tokens).reshape(batch * heads, num_tokens, num_tokens)
        scores = torch.baddbmm(added, query, key.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), value).view(batch, heads, num_tokens, head_dim)


class _OneDnnLinear(torch.autograd.Function):
    """x (M, in), weight (out, in) and bias (out,) or None -> (M, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        weight_gradient = None
        if for_weight:
            is_small = torch.get_num_threads() > 1 and weight.numel() < MIN_WEIGHT_VALUES
            by_mkl = is_small or not choice().weight_gradients
            weight_gradient = gradient.t() @ x if by_mkl else _multiply(gradient.t(), x.t())
        return (
            _multiply(gradient, weight.t()) if for_x else None,
            weight_gradient,
            gradient.sum(0) if for_bias else None,
        )


def _multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """(m, k) times (n, k) transposed, plus (n,)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return out


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # before what cannot be compiled
        and x.dtype == weight.dtype == torch.float32
        and choice().products
        and bool(torch.backends.mkldnn.enabled)
        and not _is_autocast()
    )


def _is_autocast() -> bool:
    return torch.is_autocast_enabled("cpu")
