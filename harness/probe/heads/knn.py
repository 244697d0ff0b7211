"""k nearest neighbours on mean-pooled frozen features: no training, one choice (k and blocks) on the hold-out.

Votes are weighted by exp(cosine / 0.07), as in DINO's evaluation (Caron et al., arXiv 2104.14294, appendix). The search
is exact and goes block by block: each rank compares all queries with its own images, and only the nearest of each rank
are put together, so that no rank ever holds the features of another.

Data sets hold images twice, under different labels even. So all products have one shape, which gives equal vectors
equal cosines wherever they stand, and of equally near images the first comes first: ranks do not change the answer.
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
BANK_BLOCK = 8192
"""Images of a rank compared at a time, at most; a power of two, as are smaller blocks."""


class NeighbourBank:
    """Labelled vectors, standardised by the mean and deviation of all ranks' vectors, compared by cosine."""

    def __init__(
        self,
        vectors: Tensor,
        labels: Tensor,
        images: Tensor,
        mean: Tensor,
        variance: Tensor,
        num_classes: int,
        group: Group,
    ) -> None:
        """Take vectors (n, d), labels and numbers (n,) of this rank's images; mean and variance (d,) are of all."""
        (self.size,) = group.sum_counts(len(labels))
        """Images of all ranks."""
        # of all ranks' images: however many ranks share them, products keep their shape
        self._block = min(BANK_BLOCK, 1 << (self.size - 1).bit_length())
        self._mean, self._rstd = mean, (variance + 1e-6).rsqrt()
        self._bank = functional.pad(self._unit(vectors), (0, 0, 0, -len(vectors) % self._block))
        # one number says which image it is and what it shows; the first image has the least
        self._tags = (images * num_classes + labels).to(vectors.device)
        self._num_classes = num_classes
        self._group = group

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
        padded[:] = queries[-1:] if len(queries) else 0
        padded[: len(queries)] = queries
        everyone = self._group.concatenate(padded).flatten(0, 1)
        in_one_shape = functional.pad(everyone, (0, 0, 0, QUERIES - len(everyone)))
        cosine = everyone.new_full((len(everyone), k), -torch.inf)
        tags = torch.zeros(len(everyone), k, dtype=torch.int64, device=everyone.device)
        for start in range(0, len(self._bank), self._block):
            named = self._tags[start : start + self._block]
            found = (in_one_shape @ self._bank[start : start + self._block].mT)[: len(everyone), : len(named)]
            near, of_near = _first(found, named.expand(len(everyone), -1), k)
            cosine, tags = _first(torch.cat([cosine, near], dim=1), torch.cat([tags, of_near], dim=1), k)
        first = self._group.rank * room
        mine = slice(first, first + len(queries))
        cosine, tags = (self._group.concatenate(each)[:, mine].transpose(0, 1).flatten(1) for each in (cosine, tags))
        cosine, tags = _first(cosine, tags, k)
        return cosine, tags % self._num_classes


def _first(cosine: Tensor, tags: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest cosines of each row of (m, n) with their tags, by falling cosine; of equal ones by tag."""
    found, places = cosine.topk(min(k + 1, cosine.shape[1]), dim=1)
    kept = _in_order(found[:, :k], tags.gather(1, places[:, :k]))
    if found.shape[1] > k and (is_tied := found[:, k - 1] == found[:, k]).any():  # which of them topk took is chance
        for part, exact in zip(kept, _in_order(cosine[is_tied], tags[is_tied]), strict=True):
            part[is_tied] = exact[:, :k]
    return kept


def _in_order(cosine: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Both (m, n), each row by falling cosine, then by tag."""
    tags, by_tag = tags.sort(dim=1)
    cosine, by_cosine = cosine.gather(1, by_tag).sort(dim=1, descending=True, stable=True)
    return cosine, tags.gather(1, by_cosine)
