"""k nearest neighbours on mean-pooled frozen features: no training, one choice (k and blocks) on the hold-out.

Votes are weighted by exp(cosine / 0.07), as in DINO's evaluation (Caron et al., arXiv 2104.14294, appendix). The search
is exact and goes block by block: each rank compares all queries with its own images, and only the nearest of each rank
are put together, so that no rank ever holds the features of another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from aimscale.harness.device.distributed import Group

TEMPERATURE = 0.07
"""Of the votes' weights."""
NUM_NEIGHBOURS = (1, 5, 10, 20, 50)
"""k tried; those above the number of images are left out."""
QUERIES = 1024
"""Queries of all ranks at a time."""
BANK_BLOCK = 65_536
"""Images of a rank compared at a time."""


class NeighbourBank:
    """Labelled vectors, standardised by the mean and deviation of all ranks' vectors, compared by cosine."""

    def __init__(
        self, vectors: Tensor, labels: Tensor, mean: Tensor, variance: Tensor, num_classes: int, group: Group
    ) -> None:
        """Take this rank's vectors (n, d) with labels (n,); mean and variance (d,) are those of all ranks."""
        self._mean, self._rstd = mean, (variance + 1e-6).rsqrt()
        self._bank = self._unit(vectors)
        self._labels = labels.to(vectors.device)
        self._num_classes = num_classes
        self._group = group
        (self.size,) = group.sum_counts(len(labels))
        """Images of all ranks."""

    def _unit(self, vectors: Tensor) -> Tensor:
        return functional.normalize((vectors - self._mean) * self._rstd, dim=1)

    def candidates(self) -> tuple[int, ...]:
        """The k that this bank can serve."""
        return tuple(k for k in NUM_NEIGHBOURS if k <= self.size)

    def votes(self, vectors: Tensor, ks: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Weighted votes for this rank's queries (m, d), a stretch at a time; all ranks call this together.

        Yields:
            The stretch of the queries, and votes (len(ks), stretch, K).
        """
        most = max(self._group.gather(len(vectors)))
        step = max(1, QUERIES // self._group.world_size)
        for start in range(0, most, step):
            own = vectors[start : start + step]
            cosine, labels = self._nearest(self._unit(own), min(step, most), max(ks))
            if not len(own):
                continue
            # relative to the nearest one: the same ranking, no overflow
            weights = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
            votes = torch.zeros(len(ks), len(own), self._num_classes, device=vectors.device)
            for row, k in zip(votes, ks, strict=True):
                row.scatter_add_(1, labels[:, :k], weights[:, :k])
            yield slice(start, start + len(own)), votes

    def _nearest(self, queries: Tensor, room: int, k: int) -> tuple[Tensor, Tensor]:
        """Cosines and labels (m, k) of the k nearest of all ranks' images, nearest first."""
        padded = queries.new_zeros(room, queries.shape[1])
        padded[: len(queries)] = queries
        everyone = self._group.concatenate(padded).flatten(0, 1)
        cosine = everyone.new_full((len(everyone), k), -torch.inf)
        labels = torch.zeros(len(everyone), k, dtype=torch.int64, device=everyone.device)
        for start in range(0, len(self._bank), BANK_BLOCK):
            block = self._bank[start : start + BANK_BLOCK]
            found, nearest = (everyone @ block.mT).topk(min(k, len(block)), dim=1)
            both = torch.cat([cosine, found], dim=1)
            names = torch.cat([labels, self._labels[start + nearest]], dim=1)
            cosine, places = both.topk(k, dim=1)
            labels = names.gather(1, places)
        first = self._group.rank * room
        mine = slice(first, first + len(queries))
        if self._group.world_size == 1:
            return cosine[mine], labels[mine]
        all_cosine = self._group.concatenate(cosine)[:, mine].transpose(0, 1).flatten(1)
        all_labels = self._group.concatenate(labels)[:, mine].transpose(0, 1).flatten(1)
        cosine, places = all_cosine.topk(k, dim=1)
        return cosine, all_labels.gather(1, places)
