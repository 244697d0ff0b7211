"""Faster forms of two operations that PyTorch runs slowly on a CPU; equal to PyTorch's own but for rounding.

**Float32 linear layers.** PyTorch multiplies float32 matrices with Intel's MKL, which on AMD processors leaves AVX-512
unused. oneDNN, which ships in the same wheel and which PyTorch uses for bfloat16, takes it: 2.3 times the rate here
(270 against 118 GFLOP/s a core of an EPYC with AVX-512). No public function leads there, so the operator that
PyTorch's own compiler calls is used where it exists.

**Attention over a few hundred tokens in bfloat16.** PyTorch's fused kernel is made for long sequences, and its bfloat16
backward pass for none: whole score matrices through two batched products take a fifth of its time at 64 tokens (torch
2.13). In float32 they are slower by up to 8 % of a whole step, so the fused kernel stays.

CUDA, other dtypes and compiled graphs never come here. `torch.backends.mkldnn.flags(enabled=False)` switches the linear
layers back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from aimscale.aim.cost import DENSE_ATTENTION_TOKENS

MIN_LINEAR_FLOPS = 4e6
"""A smaller product takes longer to hand to oneDNN than it gains."""
MIN_WEIGHT_VALUES = 100_000
"""With several threads the gradient of a smaller weight is faster in MKL: one thread alone transposes for oneDNN."""
MAX_DENSE_TOKENS = {
    torch.float32: DENSE_ATTENTION_TOKENS["fp32"],
    torch.bfloat16: DENSE_ATTENTION_TOKENS["bf16"],
}


class Linear(nn.Linear):
    """`torch.nn.Linear`, by oneDNN where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        num_flops = 2 * input.numel() * self.out_features
        if num_flops < MIN_LINEAR_FLOPS or input.device.type != "cpu" or not _takes_onednn(input, self.weight):
            return super().forward(input)
        out: Tensor = _OneDnnLinear.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
        return out.view(*input.shape[:-1], self.out_features)


def float32_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Product of two float32 matrices (m, k) and (k, n) on the CPU by the faster library of the two."""
    return _multiply(left, right.t()) if onednn_is_faster() else left @ right


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, which MKL does not use there, and PyTorch has the operator."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo") as file:
            return "AuthenticAMD" in file.read(1 << 12)
    except OSError:
        return False


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
            by_mkl = torch.get_num_threads() > 1 and weight.numel() < MIN_WEIGHT_VALUES
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
        x.dtype == weight.dtype == torch.float32
        and onednn_is_faster()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.compiler.is_compiling()
        and not _is_autocast()
    )


def _is_autocast() -> bool:
    return torch.is_autocast_enabled("cpu")
