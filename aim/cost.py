"""Parameters and FLOPs of a configuration, in closed form: exact, instant, without torch.

d is the trunk's width, L its depth, N the tokens of an image, o the values of a patch, D and n the pixel head's width
and depth. A multiply-add counts as two FLOPs; norms, activations and softmax count as none, as in PyTorch's
`FlopCounterMode`, which the tests compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from aimscale.aim.config import MLP_RATIO, ModelConfig

TRAIN_OVER_FORWARD = 3
"""FLOPs of a training step over those of its forward pass. A backward pass multiplies twice as often: once for the
gradients of inputs, once for those of weights. (Images need no gradient, so at most 1 % is counted that is not
executed.)"""

NUM_QUERIES = 32
"""Number of queries of the efficient probe, as on its authors' benchmark."""


@dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Trainable parameters by part."""

    preprocessor: int
    """Patch embedding and its norm."""
    trunk: int
    """Blocks and the last norm."""
    head: int
    """Pixel head, and the mask token of a masked model: the part that is discarded after pre-training."""

    @property
    def total(self) -> int:
        """Sum over the parts."""
        return self.preprocessor + self.trunk + self.head


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Forward FLOPs of one image by part."""

    patch_embed: float
    trunk: float
    """Blocks, attention included."""
    head: float

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass."""
        return self.patch_embed + self.trunk + self.head

    @property
    def train(self) -> float:
        """FLOPs of a forward and a backward pass."""
        return TRAIN_OVER_FORWARD * self.forward


def param_count(config: ModelConfig) -> ParamCount:
    """Count the parameters; equal to the released models' own for preprocessor and trunk."""
    d, o = config.width, config.patch_dim
    head = config.head
    if head.is_linear:
        head_params = d * o + o
    else:
        norms_per_block = 2 if head.ln_residual or head.num_heads else 1
        block = _matrix_params(head.width, has_attention=bool(head.num_heads)) + norms_per_block * 2 * head.width
        head_params = (d + 1) * head.width + head.depth * block + 2 * head.width + (head.width + 1) * o
    if config.masked is not None:
        head_params += d
    trunk = config.depth * (_matrix_params(d, has_attention=True) + 4 * d) + 2 * d
    if config.qk_norm:
        trunk += config.depth * 4 * config.head_dim
        head_params += head.depth * 4 * (head.width // head.num_heads) if head.num_heads else 0
    return ParamCount(preprocessor=d * (o + 3), trunk=trunk, head=head_params)


def matrix_sizes(config: ModelConfig) -> list[int]:
    """List the values of each matrix in the order of the model's parameters."""
    d, o, head = config.width, config.patch_dim, config.head
    mlp = [MLP_RATIO * head.width**2] * 2
    block = [3 * head.width**2, head.width**2, *mlp] if head.num_heads else mlp
    in_head = [d * o] if head.is_linear else [d * head.width, *head.depth * block, head.width * o]
    return [d * o, *config.depth * [3 * d**2, d**2, MLP_RATIO * d**2, MLP_RATIO * d**2], *in_head]


def largest_param(config: ModelConfig) -> int:
    """Count the values of the largest parameter."""
    return max(matrix_sizes(config))


def flops_per_image(config: ModelConfig) -> FlopCount:
    """Count FLOPs by the published convention: every token passes through every layer and the whole head.

    This is the C of the scaling laws, comparable between implementations.
    """
    num_tokens, d, o, head = config.num_tokens, config.width, config.patch_dim, config.head
    if head.is_linear:
        head_flops = 2 * num_tokens * d * o
    else:
        block = _block_flops(num_tokens, head.width, has_attention=bool(head.num_heads))
        head_flops = 2 * num_tokens * head.width * (d + o) + head.depth * block
    trunk = config.depth * _block_flops(num_tokens, d, has_attention=True)
    return FlopCount(patch_embed=2 * num_tokens * o * d, trunk=trunk, head=head_flops)


def executed_flops_per_image(config: ModelConfig, scored_tokens: float) -> FlopCount:
    """Count the FLOPs that `AIM.forward` executes: the numerator of MFU.

    Behind the last attention only the `scored_tokens` of an image (`mean_scored_tokens`) go on: through the MLP of that
    block and what follows it.
    """
    published, head = flops_per_image(config), config.head
    skipped = config.num_tokens - scored_tokens
    if head.num_heads:
        skipped_params = mlp_params(head.width) + head.width * config.patch_dim
        return replace(published, head=published.head - skipped * 2 * skipped_params)
    trunk = published.trunk - skipped * 2 * mlp_params(config.width)
    return replace(published, trunk=trunk, head=published.head * scored_tokens / config.num_tokens)


def mean_scored_tokens(config: ModelConfig, prefix: str) -> float:
    """Return the mean number of scored tokens of an image; `prefix` is that of the objective."""
    if config.masked is not None:
        return config.num_masked
    return config.num_tokens - 1 if prefix == "none" else config.num_tokens / 2


def mlp_params(width: int) -> int:
    """Count the parameters of the matrices of an MLP (`aim.layers.MLP`); each is multiplied with every token once."""
    return 2 * MLP_RATIO * width**2


def _matrix_params(width: int, *, has_attention: bool) -> int:
    """Count the parameters of the matrices of a block: those of its attention, if any, and the MLP."""
    return (4 * width**2 if has_attention else 0) + mlp_params(width)


def _block_flops(num_tokens: int, width: int, *, has_attention: bool) -> int:
    """Count the FLOPs of a block: its matrices times every token, and the scores and weighted sums of its attention."""
    products = num_tokens * _matrix_params(width, has_attention=has_attention)
    return 2 * (products + (2 * num_tokens**2 * width if has_attention else 0))


def num_queries(width: int) -> int:
    """Return the number of queries of an efficient probe, which divides the width."""
    return math.gcd(NUM_QUERIES, width)
