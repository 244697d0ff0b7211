"""The parts of an AIM: patch embedding, positions, transformer block, residual MLP.

Module names follow the released state dict. Weights may be bfloat16: PyTorch's layer-norm kernels then still compute in
float32 and round once, at their output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimscale.aim.config import MLP_RATIO, ModelConfig
from aimscale.aim.mup import attention_scale


def sincos_positions(grid: int, width: int) -> Tensor:
    """Compute fixed 2-D sin-cos positions, float32 (grid * grid, width), in raster order.

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos] of the
    coordinate times omega_i = 10000^(-i / (width / 4)).
    """
    quarter = width // 4
    # float64: 16-bit frequencies or float32 products would shift the fast channels
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = one_axis[None, :, :].expand(grid, grid, -1)
    row = one_axis[:, None, :].expand(grid, grid, -1)
    return torch.cat([column, row], dim=2).reshape(grid * grid, width).float()


class PatchProjection(nn.Conv2d):
    """Patch embedding of the released models: a convolution with stride = kernel, as one matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (..., o), cut by `patchify`, to (..., d)."""
        by_row_column_channel = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.to(self.weight.dtype), by_row_column_channel, self.bias)


class Patchifier(nn.Module):
    """Patch embedding and its norm: patches (B, N, o) -> tokens (B, N, d)."""

    def __init__(self, channels: int, patch_size: int, width: int, norm_eps: float) -> None:
        super().__init__()
        self.proj = PatchProjection(channels, width, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed every patch."""
        tokens: Tensor = self.norm(self.proj(patches))
        return tokens


class MaskToken(nn.Module):
    """Learned token in the place of every hidden patch; initialised to 0, and without weight decay, like a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, is_visible: Tensor) -> Tensor:
        """Replace the tokens (B, N, d) that are not visible, bool (B, N), by the mask token."""
        return torch.where(is_visible[:, :, None], x, self.token)


def keeps_scores(heads: Tensor) -> bool:
    """Return whether attention materialises its score matrices, of queries, keys and values `heads`."""
    return heads.device.type == "cpu" and heads.dtype == torch.bfloat16


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend by materialised score matrices.

    On a CPU in bfloat16 the fused kernel takes three times as long (64 tokens, torch 2.13), most of it backwards.
    """
    scores = query @ key.transpose(-2, -1) * scale
    return (scores if mask is None else scores + mask).softmax(dim=-1) @ value


class Attention(nn.Module):
    """Multi-head self-attention without biases; rows of `qkv` are queries, keys, values.

    With `qk_norm_eps`, queries and keys of each head are normalised (Dehghani et al., arXiv 2302.05442).
    """

    def __init__(self, width: int, num_heads: int, scale: float, qk_norm_eps: float | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = (
            nn.Identity() if qk_norm_eps is None else nn.LayerNorm(width // num_heads, eps=qk_norm_eps) for _ in "qk"
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mix tokens (B, N, d); `mask`, broadcastable to (B, heads, N, N), is added to the scores."""
        batch, num_tokens, width = x.shape
        qkv = self.qkv(x).view(batch, num_tokens, 3, self.num_heads, width // self.num_heads)
        heads = qkv.permute(2, 0, 3, 1, 4)
        is_whole = keeps_scores(heads)
        query, key, value = heads.contiguous() if is_whole else heads
        query, key = self.q_norm(query), self.k_norm(key)
        # A dense mask: these products are N / (6 d + N) of a block's FLOPs (2.7 % in aim-600M), of which a kernel that
        # skips masked parts could save a third.
        if is_whole:
            mixed = _attend_whole(query, key, value, mask, self.scale)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, num_tokens, width))
        return out


class MLP(nn.Module):
    """MLP of linear, exact-erf GELU and linear, without biases; its parameters and FLOPs are counted in `aim.cost`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width, bias=False)
        self.fc2 = nn.Linear(MLP_RATIO * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block, of the backbone or of a transformer head."""

    def __init__(self, config: ModelConfig, *, in_head: bool = False) -> None:
        super().__init__()
        width, num_heads = config.width, config.num_heads
        if in_head:
            width, num_heads = config.head.width, config.head.num_heads or 1
        self.norm_1 = nn.LayerNorm(width, eps=config.norm_eps)
        qk_norm_eps = config.norm_eps if config.qk_norm else None
        self.attn = Attention(width, num_heads, attention_scale(config, in_head=in_head), qk_norm_eps)
        self.norm_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, mask: Tensor | None, token_indices: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, d) to (B, N, d); or, with flat indices `token_indices` (M,), to those tokens alone, (M, d).

        Everything after the attention works token by token, so the last block can skip tokens whose outputs are not
        used.
        """
        x = x + self.attn(self.norm_1(x), mask)
        if token_indices is not None:
            x = x.flatten(0, 1).index_select(0, token_indices)
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class HeadBlock(nn.Module):
    """Residual MLP block of the pixel head; the authors' trainer also adds LayerNorm(x), see `ln_residual`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.head.width
        self.norm_1 = nn.LayerNorm(width, eps=config.norm_eps) if config.head.ln_residual else None
        self.norm_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        if self.norm_1 is not None:
            x = x + self.norm_1(x)
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out
