"""Which blocks and k a k-NN probe takes, by the hold-out, and what it then says about the test split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.blocks import averages
from aimscale.harness.probe.features.extraction import SplitFeatures, share
from aimscale.harness.probe.features.images import LabelledImages
from aimscale.harness.probe.features.pooled import PooledFeatures
from aimscale.harness.probe.features.sizes import BlockSet
from aimscale.harness.probe.heads.fit import Candidate, Split
from aimscale.harness.probe.heads.knn import NeighbourBank
from aimscale.harness.probe.heads.scores import Answers, answers, together

ROWS = 8192
"""Images whose blocks are averaged at a time."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """k-NN on the pooled features of one training split; all ranks call its methods together."""

    features: SplitFeatures
    """Of the training split."""
    split: Split
    group: Group

    @torch.no_grad()
    def candidates(self, sets: Sequence[BlockSet]) -> list[Candidate]:
        """Hold-out accuracy of every block set and k, with the fit part as the bank."""
        held = share(self.split.held.tolist(), self.group)
        labels = self.split.labels[held]
        found = []
        for blocks in sets:
            bank = self._bank(blocks, everything=False)
            ks = bank.candidates()
            right = [0] * len(ks)
            for rows, votes in bank.votes(self._vectors(self.features.pooled, held, blocks), ks):
                named = votes.argmax(2).cpu() == labels[rows]
                right = [total + int(count) for total, count in zip(right, named.sum(1), strict=True)]
            for k, total in zip(ks, self.group.sum_counts(*right), strict=True):
                top1 = total / len(self.split.held)
                found.append(
                    Candidate(
                        kind="knn", blocks=blocks, setting=None, num_neighbours=k, holdout_top1=top1, holdout_loss=0.0
                    )
                )
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
        return together(parts, len(images), self.group)

    def _bank(self, blocks: BlockSet, *, everything: bool) -> NeighbourBank:
        own = share((self.split.everything if everything else self.split.fit).tolist(), self.group)
        fit, held = self.features.of_pooled
        (mean,), (variance,) = (fit + held if everything else fit).of_sets([blocks])
        return NeighbourBank(
            self._vectors(self.features.pooled, own, blocks),
            self.split.labels[own],
            torch.as_tensor(own),
            mean,
            variance,
            self.split.num_classes,
            self.group,
        )

    def _vectors(self, pooled: PooledFeatures, images: Sequence[int], blocks: BlockSet) -> torch.Tensor:
        """Averages float32 (n, d) of some of this rank's images."""
        rows = torch.as_tensor(images, dtype=torch.int64) // self.group.world_size
        return torch.cat([averages(pooled.rows(part), [blocks])[0] for part in rows.split(ROWS)])
