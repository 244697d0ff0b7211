"""Parameters and FLOPs of a configuration, in closed form: exact, instant, without torch.

d is the trunk's width, L its depth, N the tokens of an image, o the values of a patch, D and n the pixel head's width
and depth. A multiply-add counts as two FLOPs; norms, activations and softmax count as none, as in PyTorch's
`FlopCounterMode`, which the tests compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from aimscale.aim.config import ModelConfig

TRAIN_OVER_FORWARD = 3
"""A backward pass multiplies twice as often as the forward pass: gradients of inputs and of weights. (Images need no
gradient, so at most 1 % is counted that is not executed.)"""

NUM_QUERIES = 32
"""Of the efficient probe, as its authors' board uses it."""


@dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Trainable parameters by part."""

    preprocessor: int
    """Patch embedding and its norm."""
    trunk: int
    """Blocks and the last norm."""
    head: int
    """Pixel head, and the mask token of a masked model: all that is thrown away after pre-training."""

    @property
    def total(self) -> int:
        """All of them."""
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
        block = (12 if head.num_heads else 8) * head.width**2 + norms_per_block * 2 * head.width
        head_params = (d + 1) * head.width + head.depth * block + 2 * head.width + (head.width + 1) * o
    if config.masked is not None:
        head_params += d
    return ParamCount(preprocessor=d * (o + 3), trunk=config.depth * (12 * d**2 + 4 * d) + 2 * d, head=head_params)


def flops_per_image(config: ModelConfig) -> FlopCount:
    """Count FLOPs by the published convention: every token passes through every layer and the whole head.

    This is the C of the scaling laws, comparable between implementations.
    """
    num_tokens, d, o, head = config.num_tokens, config.width, config.patch_dim, config.head
    if head.is_linear:
        head_flops = 2 * num_tokens * d * o
    else:
        block = _block_flops(num_tokens, head.width) if head.num_heads else 16 * num_tokens * head.width**2
        head_flops = 2 * num_tokens * head.width * (d + o) + head.depth * block
    return FlopCount(
        patch_embed=2 * num_tokens * o * d, trunk=config.depth * _block_flops(num_tokens, d), head=head_flops
    )


def executed_flops_per_image(config: ModelConfig, scored_tokens: float) -> FlopCount:
    """Count the FLOPs that `AIM.forward` executes, the numerator of MFU.

    Behind the last attention only the `scored_tokens` of an image (`mean_scored_tokens`) go on: through the MLP of that
    block and what follows it.
    """
    published, head = flops_per_image(config), config.head
    skipped = config.num_tokens - scored_tokens
    if head.num_heads:
        return replace(published, head=published.head - skipped * 2 * head.width * (8 * head.width + config.patch_dim))
    trunk = published.trunk - skipped * 2 * 8 * config.width**2
    return replace(published, trunk=trunk, head=published.head * scored_tokens / config.num_tokens)


def mean_scored_tokens(config: ModelConfig, prefix: str) -> float:
    """Scored tokens of an image on average: the masked ones, or by `objective.prefix` half or all but one of them."""
    if config.masked is not None:
        return config.num_masked
    return config.num_tokens - 1 if prefix == "none" else config.num_tokens / 2


def _block_flops(num_tokens: int, width: int) -> int:
    """Of a transformer block."""
    return 2 * (12 * num_tokens * width**2 + 2 * num_tokens**2 * width)


def num_queries(width: int) -> int:
    """Queries of an efficient probe: `NUM_QUERIES`, or for a narrow trunk as many of them as divide its width."""
    return math.gcd(NUM_QUERIES, width)
