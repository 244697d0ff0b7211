"""The parts of an AIM: patch embedding, positions, blocks, trunk and pixel head, and the scales of their weights.

Module names follow the released state dict. Weights may be bfloat16: PyTorch's layer-norm kernels then still compute in
float32 and round once, at their output.

Two parametrisations say how initial weights, learning rates and attention scale with the width. `standard` is the
paper's: xavier-uniform matrices, one learning rate, attention scaled by 1 / sqrt(head dim). `mup` is the maximal-update
parametrisation for Adam (Yang et al., "Tensor Programs V", arXiv 2203.03466, Table 3, Definition 4.1 and Appendix D.2),
under which a learning rate found on a narrow model carries over to a wide one:

| matrix | reads | initial scale | learning rate |
|---|---|---|---|
| input (patch embedding) | pixels, a constant number | constant | constant |
| hidden | a width | width^-1/2 | 1 / width |
| output (last layer of the head) | a width | 0 | 1 / width |

and attention is scaled by 1 / head dim. Biases and norms have a constant rate. Decoupled weight decay multiplies
weights by 1 - rate x decay, so the decay grows as the rate shrinks and the product stays constant. At the base
widths below the two agree, but for the output's start. Widths are covered; depth is not (assumption: the ladder's depth
grows slowly enough). No factor enters the forward pass but attention's, so weights keep their released meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimscale.aim.config import MLP_RATIO, ModelConfig

BASE_WIDTH = 256
"""Trunk width (rung-256) at which `mup` equals `standard`."""
BASE_HEAD_WIDTH = 336
"""Pixel-head width at which they agree: rung-256's under the `proportional` rule."""
BASE_HEAD_DIM = 64
"""Attention head dimension at which they agree: that of every rung from rung-128 on."""
BASE_DIM_IN_HEAD = 16
"""Attention head dimension at which they agree in a transformer head: rung-256's."""


@dataclass(frozen=True, kw_only=True)
class MatrixScale:
    """Initial scale and learning-rate factor of one matrix."""

    init_bound: float
    """Bound of the initial values, which are uniform on [-bound, bound]."""
    lr_scale: float


def attention_scale(config: ModelConfig, *, in_head: bool = False) -> float:
    """Return the factor on the product of query and key, in the trunk or in a transformer head."""
    dim, base = config.head_dim, BASE_HEAD_DIM
    if in_head:
        dim, base = config.head.width // (config.head.num_heads or 1), BASE_DIM_IN_HEAD
    return math.sqrt(base) / dim if config.parametrisation == "mup" else 1 / math.sqrt(dim)


def matrix_scale(config: ModelConfig, name: str, fan_in: int, fan_out: int) -> MatrixScale:
    """Return the scales of the matrix that a module's `name` holds (`fan_out` x `fan_in`)."""
    into, out_of = _growth(config, name)
    xavier_at_base = math.sqrt(6 / (fan_in / into + fan_out / out_of))
    starts_at_zero = config.parametrisation == "mup" and name == "pixel_head.proj_out"
    return MatrixScale(init_bound=0.0 if starts_at_zero else xavier_at_base / math.sqrt(into), lr_scale=1 / into)


def _growth(config: ModelConfig, name: str) -> tuple[float, float]:
    """Return how many times wider a matrix's input and output are than at the base width."""
    if config.parametrisation == "standard":
        return 1.0, 1.0
    trunk, head = config.width / BASE_WIDTH, config.head.width / BASE_HEAD_WIDTH
    if name == "preprocessor.patchifier.proj":
        return 1.0, trunk
    if name == "pixel_head.proj_in":
        return trunk, head
    if name == "pixel_head.proj_out":
        return (trunk if config.head.is_linear else head), 1.0
    return (head, head) if name.startswith("pixel_head.") else (trunk, trunk)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into raster patches (B, N, o) whose values run over row, column, channel."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


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


class Preprocessor(nn.Module):
    """Embedding of images (B, C, H, W) to tokens (B, N, d) in sequence order, with fixed positions."""

    order: Tensor
    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patchifier = Patchifier(config.channels, config.patch_size, config.width, config.norm_eps)
        self.register_buffer("order", torch.empty(config.num_tokens, dtype=torch.int64), persistent=False)
        self.register_buffer("positions", torch.empty(config.num_tokens, config.width), persistent=False)

    def patches(self, images: Tensor) -> Tensor:
        """Cut images into patches (B, N, o) in sequence order, in their own precision."""
        raster = patchify(images, self.config.patch_size)
        return raster if self.config.patch_order == "raster" else raster.index_select(1, self.order)

    def embed(self, patches: Tensor, hide: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Embed patches (B, N, o) in sequence order; `hide` may replace some tokens before positions are added."""
        tokens: Tensor = self.patchifier(patches)
        return (hide(tokens) if hide else tokens) + self.positions

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches of images."""
        return self.embed(self.patches(images))


class Trunk(nn.Module):
    """The transformer and its last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.post_trunk_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.recompute = False

    def forward(self, x: Tensor, mask: Tensor | None, token_indices: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, d) to normed tokens (B, N, d), or with flat indices `token_indices` (M,) to those alone,
        (M, d).

        `mask` is added to the attention scores; None lets every token attend to all.
        """
        out: Tensor = self.post_trunk_norm(_run_all(self.blocks, x, mask, token_indices, recompute=self.recompute))
        return out


class PixelHead(nn.Module):
    """Head that predicts the pixels of patches, token by token or by transformer blocks over all tokens."""

    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        head = config.head
        self.num_tokens = config.num_tokens
        self.proj_in = None if head.is_linear else nn.Linear(config.width, head.width)
        self.blocks = nn.ModuleList(
            Block(config, in_head=True) if head.num_heads else HeadBlock(config) for _ in range(head.depth)
        )
        self.norm = None if head.is_linear else nn.LayerNorm(head.width, eps=config.norm_eps)
        self.proj_out = nn.Linear(head.width, config.patch_dim)
        self.register_buffer("positions", torch.empty(config.num_tokens, head.width), persistent=False)
        self.recompute = False

    def forward(self, x: Tensor, token_indices: Tensor, mask: Tensor | None) -> Tensor:
        """Predict patches (M, o) at flat indices `token_indices` (M,) from their tokens (M, d) alone.

        A transformer head takes all tokens (B, N, d) and the trunk's `mask`.
        """
        if self.proj_in is not None and self.norm is not None:
            x = self.proj_in(x)
            if self.config.head.num_heads:
                x = _run_all(self.blocks, x + self.positions, mask, token_indices, recompute=self.recompute)
            else:
                x = x + self.positions[token_indices % self.num_tokens]
                for block in self.blocks:
                    x = run_block(block, x, recompute=self.recompute)
            x = self.norm(x)
        out: Tensor = self.proj_out(x)
        return out


def _run_all(
    blocks: nn.ModuleList, x: Tensor, mask: Tensor | None, token_indices: Tensor | None, *, recompute: bool
) -> Tensor:
    """Run transformer blocks, (B, N, d) to (B, N, d), or with flat indices `token_indices` (M,) to (M, d)."""
    *first, last = blocks
    for block in first:
        x = run_block(block, x, mask, recompute=recompute)
    return run_block(last, x, mask, token_indices, recompute=recompute)


def run_block(module: Callable[..., Tensor], *args: Tensor | None, recompute: bool) -> Tensor:
    """Call a block, storing its activations or, with `recompute`, only its input."""
    if recompute and torch.is_grad_enabled():
        out: Tensor = checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
        return out
    return module(*args)
