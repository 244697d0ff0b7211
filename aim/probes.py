"""The released attentive probe, a head on frozen features.

It reads the mean of raw block outputs (`AIM.features(...).mean(0)`), bidirectional and without the trunk's last norm,
and standardises channels by a batch norm without weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
