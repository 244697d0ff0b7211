"""k nearest neighbours on mean-pooled frozen features: no training, one choice (k and blocks) on the hold-out.

Votes weighted by exp(cosine / 0.07), as in DINO's evaluation (Caron et al., arXiv 2104.14294, appendix).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 0.07
"""Of the votes' weights."""
NUM_NEIGHBOURS = (1, 5, 10, 20, 50)
"""k tried; those above the number of images are left out."""
CHUNK = 1024
"""Queries at a time."""


class NeighbourVotes:
    """A bank of labelled vectors, standardised by its own mean and deviation, compared by cosine."""

    def __init__(self, vectors: Tensor, labels: Tensor, num_classes: int):
        """Store vectors (n, d) and labels (n,)."""
        self._mean = vectors.mean(0)
        self._rstd = (vectors.var(0, unbiased=False) + 1e-6).rsqrt()
        self._bank = self._unit(vectors)
        self._labels = labels
        self._num_classes = num_classes

    def _unit(self, vectors: Tensor) -> Tensor:
        return functional.normalize((vectors - self._mean) * self._rstd, dim=1)

    def candidates(self) -> tuple[int, ...]:
        """The k that this bank can serve."""
        return tuple(k for k in NUM_NEIGHBOURS if k <= len(self._labels))

    def votes(self, vectors: Tensor, ks: tuple[int, ...]) -> Tensor:
        """Weighted votes (len(ks), m, K) for vectors (m, d)."""
        out = torch.zeros(len(ks), len(vectors), self._num_classes, device=vectors.device)
        for start in range(0, len(vectors), CHUNK):
            cosine, nearest = (self._unit(vectors[start : start + CHUNK]) @ self._bank.mT).topk(max(ks), dim=1)
            # relative to the nearest one: the same ranking, no overflow
            weights = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
            for row, k in zip(out, ks, strict=True):
                row[start : start + CHUNK].scatter_add_(1, self._labels[nearest[:, :k]], weights[:, :k])
        return out
