"""What is predicted, from what, and which predictions are scored (paper, sections 3.1 and 3.2).

An image is a sequence of N patches in the model's order. The first S patches are its prefix, 1 <= S <= N - 1: they see
each other both ways, later patches see what is before them. The token at position k predicts patch k + 1, and only
patches outside the prefix are scored, so the scored positions are S - 1 .. N - 2: N - S of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_EPS = 1e-6
"""Added to a patch's variance, so that a flat patch has the target 0."""


def prefix_causal_mask(prefix_len: Tensor, num_tokens: int) -> Tensor:
    """Which key each query may see: all of the prefix, and everything up to itself.

    Args:
        prefix_len: int64 (B,), S of each image.
        num_tokens: N.

    Returns:
        bool (B, 1, N, N), indexed by image, head (broadcast), query, key; True means "attend".
    """
    position = torch.arange(num_tokens, device=prefix_len.device)
    causal = position[None, :] <= position[:, None]
    in_prefix = position[None, :] < prefix_len[:, None]
    return (causal[None] | in_prefix[:, None, :])[:, None]


def scored_positions(prefix_len: Tensor, num_tokens: int) -> Tensor:
    """Flat indices b * N + k of the tokens whose prediction is scored, int64 (sum of N - S,).

    The target of such a token is the patch at flat index b * N + k + 1.
    """
    position = torch.arange(num_tokens, device=prefix_len.device)
    scored = (position[None, :] >= prefix_len[:, None] - 1) & (position[None, :] < num_tokens - 1)
    return scored.flatten().nonzero().squeeze(1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into raster patches (B, N, o) whose values run over row, column, channel."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """Put square-grid raster patches (B, N, o) back into images (B, C, H, W): the inverse of `patchify`."""
    batch, num_tokens, _ = patches.shape
    grid = round(num_tokens**0.5)
    cut = patches.reshape(batch, grid, grid, patch_size, patch_size, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, grid * patch_size, grid * patch_size)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased variance + eps, its root) of each patch (..., o): two of (..., 1)."""
    mean = patches.mean(dim=-1, keepdim=True)
    # torch.var_mean takes ten times as long on a CPU (256 patches of 192 values: 0.32 against 0.03 ms)
    variance = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return mean, (variance + VARIANCE_EPS).sqrt()


def normalise_patches(patches: Tensor) -> Tensor:
    """Standardise each patch (..., o) by its own mean and standard deviation."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std
