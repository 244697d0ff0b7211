"""k nearest neighbours on mean-pooled frozen features: no training, one choice (k and blocks) on the hold-out.

The definition is that of the field (Caron et al., arXiv 2104.14294, appendix): cosines of the raw vectors, without
centring or standardisation, and votes weighted by exp(cosine / 0.07). The search is exact and goes block by block: each
rank compares all queries with its own images, and only the nearest of each rank are merged, so that no rank holds the
features of another. Ties between equally near images are broken arbitrarily.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.extraction import PooledFeatures, SplitFeatures, batched, own_indices
from aimscale.harness.probe.features.images import Task
from aimscale.harness.probe.features.moments import averages
from aimscale.harness.probe.features.tasks import BlockSet
from aimscale.harness.probe.heads.scores import Candidate, Predictions, gather_predictions, to_predictions

TEMPERATURE = 0.07
"""Temperature of the votes' weights."""
NUM_NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
"""Values of k that are tried; those above the number of images are left out."""
QUERIES = 1024
"""Number of queries of all ranks at a time."""
BANK_BLOCK = 8192
"""Number of a rank's images that are compared at a time; also of images whose blocks are averaged at a time."""
BANKS_SHARE = 0.2
"""Share of a rank's memory for the vectors of several block sets, which are averaged in one pass over all features."""


def neighbour_votes(
    bank: Tensor, labels: Tensor, queries: Tensor, ks: tuple[int, ...], num_classes: int, group: Group
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weighted votes of the nearest of all ranks' images for this rank's queries, a slice at a time.

    All ranks call this together.

    Args:
        bank: unit vectors (n, d) of this rank's images.
        labels: labels of these images (n,).
        queries: unit vectors (m, d).

    Yields:
        The slice of the queries, and votes (len(ks), slice length, K).
    """
    step = max(1, QUERIES // group.world_size)
    for start in range(0, max(group.all_gather_object(len(queries))), step):
        chunk = queries[start : start + step]
        padded = functional.pad(chunk, (0, 0, 0, step - len(chunk)))  # all ranks exchange equally many
        cosine, named = (near[: len(chunk)] for near in _nearest(bank, labels, padded, max(ks), group))
        if not len(chunk):
            continue
        # relative to the nearest one: the same ranking, no overflow
        weights = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
        votes = torch.zeros(len(ks), len(chunk), num_classes, device=queries.device)
        for row, k in zip(votes, ks, strict=True):
            row.scatter_add_(1, named[:, :k], weights[:, :k])
        yield slice(start, start + len(chunk)), votes


def _nearest(bank: Tensor, labels: Tensor, queries: Tensor, k: int, group: Group) -> tuple[Tensor, Tensor]:
    """Return cosines and labels (m, k) of the k images of all ranks nearest to this rank's queries (m, d)."""
    everyone = group.all_gather(queries).flatten(0, 1)
    cosine = everyone.new_full((len(everyone), k), -torch.inf)
    named = torch.zeros(len(everyone), k, dtype=torch.int64, device=everyone.device)
    for part, of_part in zip(bank.split(BANK_BLOCK), labels.split(BANK_BLOCK), strict=True):
        similarity = everyone @ part.mT
        cosine, named = _first([cosine, similarity], [named, of_part.expand(len(everyone), -1)], k)
    if group.world_size == 1:
        return cosine, named
    first = group.rank * len(queries)
    cosines, of_all = (list(group.all_gather(each)[:, first : first + len(queries)]) for each in (cosine, named))
    return _first(cosines, of_all, k)


def _first(cosines: Sequence[Tensor], labels: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the k greatest cosines of each row, nearest first, with their labels."""
    nearest, places = torch.cat(list(cosines), dim=1).topk(k, dim=1)
    return nearest, torch.cat(list(labels), dim=1).gather(1, places)


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """k-NN on the pooled features of one training split; all ranks call its methods together."""

    task: Task
    features: SplitFeatures
    """Features of the training split."""

    @torch.no_grad()
    def candidates(self, sets: Sequence[BlockSet]) -> list[Candidate]:
        """Measure the hold-out accuracy of every block set and k, with the fit part as the bank."""
        held = own_indices(self.task.held.tolist(), self.task.group)
        ks = tuple(k for k in NUM_NEIGHBOURS if k <= len(self.task.fit))
        candidates: list[Candidate] = []
        all_votes = self._votes(sets, self.task.fit, self.features.pooled, held, ks)
        for number, (blocks, of_set) in enumerate(zip(sets, all_votes, strict=True), start=1):
            right = [0] * len(ks)
            for rows, votes in of_set:
                named = votes.argmax(2).cpu() == self.task.train.labels[held][rows]
                right = [total + int(count) for total, count in zip(right, named.sum(1), strict=True)]
            candidates += [
                Candidate(
                    kind="knn", blocks=blocks, value=k, holdout_top1=total / len(self.task.held), holdout_loss=0.0
                )
                for k, total in zip(ks, self.task.group.sum_counts(*right), strict=True)
            ]
            self.task.report_progress("k-NN", number, len(sets), "block sets")
        return candidates

    @torch.no_grad()
    def predict(self, chosen: Candidate, pooled: PooledFeatures) -> Predictions:
        """Predict the test split with a candidate, with the whole training split as the bank."""
        images, ks = self.task.test, (int(chosen.value),)
        indices = own_indices(range(len(images)), self.task.group)
        parts = [
            to_predictions(votes[0], images.labels[indices][rows])
            for of_set in self._votes([chosen.blocks], self.task.everything, pooled, indices, ks)
            for rows, votes in of_set
        ]
        return gather_predictions(indices, parts, len(images), self.task.group)

    def _votes(
        self,
        sets: Sequence[BlockSet],
        bank: np.ndarray,
        pooled: PooledFeatures,
        queries: Sequence[int],
        ks: Sequence[int],
    ) -> Iterator[Iterator[tuple[slice, Tensor]]]:
        """Yield for each block set the votes of training images for this rank's queries."""
        task, indices = self.task, own_indices(bank.tolist(), self.task.group)
        set_bytes = 4 * pooled.width * max(1, len(indices) + len(queries))
        num_sets = max(1, int(BANKS_SHARE * task.group.memory_bytes() / set_bytes))
        for numbers in batched(range(len(sets)), num_sets):
            some = [sets[number] for number in numbers]
            banks, of_queries = self._units(self.features.pooled, indices, some), self._units(pooled, queries, some)
            for vectors, asked in zip(banks, of_queries, strict=True):
                labels = task.train.labels[indices].to(vectors.device)
                yield neighbour_votes(vectors, labels, asked, tuple(ks), task.num_classes, task.group)

    def _units(self, of: PooledFeatures, images: Sequence[int], sets: Sequence[BlockSet]) -> list[Tensor]:
        """Average features over each block set, in one pass over them, to unit vectors (n, d)."""
        rows = torch.as_tensor(images, dtype=torch.int64) // self.task.group.world_size
        units: list[list[Tensor]] = [[] for _ in sets]
        for part in rows.split(BANK_BLOCK):
            vectors = of.rows(part)
            for parts, blocks in zip(units, sets, strict=True):  # each by itself: a joint product would round otherwise
                parts.append(functional.normalize(averages(vectors, [blocks])[0], dim=1))
        return [torch.cat(parts) for parts in units]
