"""k nearest neighbours on mean-pooled frozen features: no training, one choice (k and blocks) on the hold-out.

Votes are weighted by exp(cosine / 0.07), as in DINO's evaluation (Caron et al., arXiv 2104.14294, appendix). The search
is exact and goes block by block: each rank compares all queries with its own images, and only the nearest of each rank
are put together, so that no rank ever holds the features of another. Which of equally near images counts is chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.extraction import Pause, PooledFeatures, SplitFeatures, share
from aimscale.harness.probe.features.images import LabelledImages
from aimscale.harness.probe.features.moments import averages
from aimscale.harness.probe.features.sizes import BlockSet
from aimscale.harness.probe.heads.fit import Candidate, Split
from aimscale.harness.probe.heads.scores import Answers, answers, together

TEMPERATURE = 0.07
"""Of the votes' weights."""
NUM_NEIGHBOURS = (1, 5, 10, 20, 50)
"""k tried; those above the number of images are left out."""
QUERIES = 1024
"""Queries of all ranks at a time."""
BANK_BLOCK = 8192
"""Images of a rank compared at a time; also images whose blocks are averaged at a time."""


class NeighbourBank:
    """Labelled vectors, standardised by the mean and deviation of all ranks' vectors, compared by cosine."""

    def __init__(
        self, vectors: Tensor, labels: Tensor, mean: Tensor, variance: Tensor, num_classes: int, group: Group
    ) -> None:
        """Take vectors (n, d) and labels (n,) of this rank's images; mean and variance (d,) are of all."""
        self._mean, self._rstd = mean, (variance + 1e-6).rsqrt()
        self._bank, self._labels = self._unit(vectors), labels.to(vectors.device)
        self._num_classes, self._group = num_classes, group
        (size,) = group.sum_counts(len(labels))
        self.candidates = tuple(k for k in NUM_NEIGHBOURS if k <= size)
        """The k that this bank can serve."""

    def _unit(self, vectors: Tensor) -> Tensor:
        return functional.normalize((vectors - self._mean) * self._rstd, dim=1)

    def votes(self, vectors: Tensor, ks: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Weighted votes for this rank's queries (m, d), a stretch at a time; all ranks call this together.

        Yields:
            The stretch of the queries, and votes (len(ks), stretch, K).
        """
        step = max(1, QUERIES // self._group.world_size)
        for start in range(0, max(self._group.gather(len(vectors))), step):
            own = self._unit(vectors[start : start + step])
            padded = functional.pad(own, (0, 0, 0, step - len(own)))  # all ranks exchange as many
            cosine, labels = (near[: len(own)] for near in self._nearest(padded, max(ks)))
            if not len(own):
                continue
            # relative to the nearest one: the same ranking, no overflow
            weights = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
            votes = torch.zeros(len(ks), len(own), self._num_classes, device=vectors.device)
            for row, k in zip(votes, ks, strict=True):
                row.scatter_add_(1, labels[:, :k], weights[:, :k])
            yield slice(start, start + len(own)), votes

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines and labels (m, k) of the k images of all ranks nearest to this rank's queries (m, d)."""
        everyone = self._group.concatenate(queries).flatten(0, 1)
        cosine = everyone.new_full((len(everyone), k), -torch.inf)
        labels = torch.zeros(len(everyone), k, dtype=torch.int64, device=everyone.device)
        for bank, named in zip(self._bank.split(BANK_BLOCK), self._labels.split(BANK_BLOCK), strict=True):
            found = everyone @ bank.mT
            cosine, labels = _first([cosine, found], [labels, named.expand(len(everyone), -1)], k)
        if self._group.world_size == 1:
            return cosine, labels
        first = self._group.rank * len(queries)
        mine = slice(first, first + len(queries))
        cosines, named = (list(self._group.concatenate(each)[:, mine]) for each in (cosine, labels))
        return _first(cosines, named, k)


def _first(cosines: Sequence[Tensor], labels: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k greatest cosines of each row of some (m, n), nearest first, with their labels."""
    found, places = torch.cat(list(cosines), dim=1).topk(k, dim=1)
    return found, torch.cat(list(labels), dim=1).gather(1, places)


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """k-NN on the pooled features of one training split; all ranks call its methods together."""

    features: SplitFeatures
    """Of the training split."""
    split: Split
    group: Group
    pause: Pause = lambda: None

    @torch.no_grad()
    def candidates(self, sets: Sequence[BlockSet]) -> list[Candidate]:
        """Hold-out accuracy of every block set and k, with the fit part as the bank."""
        held = share(self.split.held.tolist(), self.group)
        labels = self.split.labels[held]
        found = []
        for blocks in sets:
            bank = self._bank(blocks, everything=False)
            right = [0] * len(bank.candidates)
            for rows, votes in bank.votes(self._vectors(self.features.pooled, held, blocks), bank.candidates):
                named = votes.argmax(2).cpu() == labels[rows]
                right = [total + int(count) for total, count in zip(right, named.sum(1), strict=True)]
            for k, total in zip(bank.candidates, self.group.sum_counts(*right), strict=True):
                top1 = total / len(self.split.held)
                found.append(
                    Candidate(kind="knn", blocks=blocks, lr=None, num_neighbours=k, holdout_top1=top1, holdout_loss=0.0)
                )
            self.pause()
        return found

    @torch.no_grad()
    def answers(self, chosen: Candidate, pooled: PooledFeatures, images: LabelledImages) -> Answers:
        """What a candidate says about another split, with the whole training split as the bank."""
        assert chosen.num_neighbours is not None
        own = share(range(len(images)), self.group)
        bank = self._bank(chosen.blocks, everything=True)
        parts = [
            answers(votes[0], images.labels[own][rows])
            for rows, votes in bank.votes(self._vectors(pooled, own, chosen.blocks), (chosen.num_neighbours,))
        ]
        return together(own, parts, len(images), self.group)

    def _bank(self, blocks: BlockSet, *, everything: bool) -> NeighbourBank:
        own = share((self.split.everything if everything else self.split.fit).tolist(), self.group)
        fit, held = self.features.of_pooled
        (mean,), (variance,) = (fit + held if everything else fit).of_sets([blocks])
        vectors = self._vectors(self.features.pooled, own, blocks)
        return NeighbourBank(vectors, self.split.labels[own], mean, variance, self.split.num_classes, self.group)

    def _vectors(self, pooled: PooledFeatures, images: Sequence[int], blocks: BlockSet) -> Tensor:
        """Averages float32 (n, d) of some of this rank's images."""
        rows = torch.as_tensor(images, dtype=torch.int64) // self.group.world_size
        return torch.cat([averages(pooled.rows(part), [blocks])[0] for part in rows.split(BANK_BLOCK)])
