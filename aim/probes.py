"""What evaluation adds to a frozen model: the released attentive probe, and LoRA.

The probe reads the mean of raw block outputs (`AIM.features(...).mean(0)`), bidirectional and without the trunk's last
norm, and standardises channels by a batch norm without weights.

LoRA adapts the trunk by low-rank updates of its matrices (Hu et al., arXiv 2106.09685; AIM paper, Table 8). An adapted
projection computes W x + (alpha / rank) B A x with W frozen, A (rank, in) drawn at random and B (out, rank) zero, so
that adaptation starts from the model itself. As in the authors' code, alpha is 1, and the query, the value and the
output projection of every attention are adapted, the key and the MLP are not: 6.3M parameters at 7B and rank 8, the
paper's 0.1 %. Released names stay as they are; an adapted layer only adds its `lora_a` and `lora_b`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimscale.aim.model import AIM, generator_for

BATCH_NORM_EPS = 1e-6
QUERY_STD = 0.02
"""Standard deviation of a learned query's initial values, as in the authors' code and in that of efficient probing."""


class AttentiveProbe(nn.Module):
    """Attention pooling with one learned query, then a linear classifier.

    Names and semantics are those of the released `head.*`: keys and values without bias, no projection of the query or
    of the output, as many attention heads as the trunk has. 2 d^2 + d + K d parameters (K more with `bias`).
    """

    def __init__(self, width: int, num_heads: int, num_classes: int, *, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.bn = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS)
        self.cls_token = nn.Parameter(QUERY_STD * torch.randn(1, 1, width))
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, num_classes, bias=bias)
        nn.init.xavier_uniform_(self.k.weight)
        nn.init.xavier_uniform_(self.v.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, N, d) to logits (B, K)."""
        batch, _, width = features.shape
        tokens = self.bn(features.transpose(1, 2)).transpose(1, 2)

        def heads(x: Tensor) -> Tensor:
            return x.view(len(x), -1, self.num_heads, width // self.num_heads).transpose(1, 2)

        query = heads(self.cls_token).expand(batch, -1, -1, -1)
        pooled = F.scaled_dot_product_attention(query, heads(self.k(tokens)), heads(self.v(tokens)))
        logits: Tensor = self.linear(pooled.transpose(1, 2).reshape(batch, width))
        return logits


TARGETS = ("attn.qkv", "attn.proj")
"""Layers of a block that are adapted; of `qkv`, the rows of query and value."""
ALPHA = 1.0
"""Scale of the updates times their rank."""


class LoRALinear(nn.Linear):
    """Bias-free linear layer that shares its frozen weight with the layer it replaces.

    Its outputs are split into `of` equal parts; each part listed in `parts` gets a low-rank update of its own.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    _parts: tuple[int, ...]
    _of: int

    def __init__(
        self, frozen: nn.Linear, rank: int, generator: torch.Generator, *, parts: tuple[int, ...] = (0,), of: int = 1
    ) -> None:
        assert frozen.bias is None, "the trunk's linears have no bias"
        super().__init__(frozen.in_features, frozen.out_features, bias=False, device="meta")
        self.weight = frozen.weight
        self.weight.requires_grad_(False)
        self._parts, self._of = parts, of
        bound = 1 / math.sqrt(frozen.in_features)
        start = torch.empty(len(parts), rank, frozen.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(start.to(frozen.weight))
        self.lora_b = nn.Parameter(frozen.weight.new_zeros(len(parts), frozen.out_features // of, rank))

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        updates = {
            part: F.linear(F.linear(input, a), b) * (ALPHA / len(a))
            for part, a, b in zip(self._parts, self.lora_a, self.lora_b, strict=True)
        }
        outputs = F.linear(input, self.weight).chunk(self._of, dim=-1)
        return torch.cat([out + updates[part] if part in updates else out for part, out in enumerate(outputs)], dim=-1)


def add_lora(model: AIM, *, rank: int = 8, seed: int = 0) -> list[nn.Parameter]:
    """Freeze a model in place and adapt query, value and output projection of every block of its trunk.

    Args:
        model: any AIM; preprocessor, norms and pixel head are frozen as they are.
        rank: rank of the updates (paper: 8).
        seed: seed of A.

    Returns:
        The new parameters, the only ones that train.
    """
    model.requires_grad_(False)
    added: list[nn.Parameter] = []
    for index, block in enumerate(model.trunk.blocks):
        for target in TARGETS:
            name = f"trunk.blocks.{index}.{target}"
            linear = block.get_submodule(target)
            assert isinstance(linear, nn.Linear)
            parts, of = ((0, 2), 3) if target == "attn.qkv" else ((0,), 1)
            adapted = LoRALinear(linear, rank, generator_for(seed, name), parts=parts, of=of)
            block.set_submodule(target, adapted)
            added += [adapted.lora_a, adapted.lora_b]
    return added
