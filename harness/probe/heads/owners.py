"""Heads are divided among ranks by block set: every rank sends the averages of its images to the sets' owners.

Each rank then trains its own heads on whole batches: no head, gradient or moment stands on two ranks, so that the
memory and the work of a grid are divided by their number, and no gradient travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.blocks import averages
from aimscale.harness.probe.features.sizes import BlockSet


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """Which sets each rank owns, turn by turn: each turn is what its owner holds in memory at a time."""

    turns: tuple[tuple[tuple[BlockSet, ...], ...], ...]
    """turns[t][r]: sets that rank r takes in turn t, perhaps none."""
    group: Group

    @classmethod
    def divide(cls, sets: Sequence[BlockSet], per_turn: int, group: Group) -> Ownership:
        """Neighbouring sets to each rank, at most `per_turn` of them in a turn."""
        parts = [[sets[i] for i in part] for part in np.array_split(np.arange(len(sets)), group.world_size)]
        num_turns = -(-max(len(part) for part in parts) // per_turn)
        return cls(
            turns=tuple(
                tuple(tuple(part[turn * per_turn : (turn + 1) * per_turn]) for part in parts)
                for turn in range(num_turns)
            ),
            group=group,
        )

    def own(self, turn: int) -> tuple[BlockSet, ...]:
        """Sets of this rank in a turn."""
        return self.turns[turn][self.group.rank]

    def deliver(self, outputs: Tensor, images: Sequence[int], turn: int) -> Tensor:
        """Give block outputs of this rank's part of some images, get its own sets' averages of all of them.

        Args:
            outputs: (L, b, N, d) of those images i of the list with i mod world_size == rank, in the list's order.
            images: of all ranks.
            turn: whose sets.

        Returns:
            (S, B, N, d), images in the list's order.
        """
        by_rank = self.turns[turn]
        wanted = [blocks for sets in by_rank for blocks in sets]
        averaged = averages(outputs, wanted)
        if self.group.world_size == 1:
            return averaged
        rank_of = np.asarray(images) % self.group.world_size
        per_rank = np.bincount(rank_of, minlength=self.group.world_size)
        values = outputs.shape[2] * outputs.shape[3]
        own = by_rank[self.group.rank]
        received = self.group.exchange(
            averaged.flatten(),
            [len(sets) * outputs.shape[1] * values for sets in by_rank],
            [len(own) * int(count) * values for count in per_rank],
        )
        parts = [
            part.view(len(own), int(count), *outputs.shape[2:]) for part, count in zip(received, per_rank, strict=True)
        ]
        # from the order of ranks back into that of the list
        order = torch.from_numpy(np.argsort(np.argsort(rank_of, kind="stable"), kind="stable"))
        return torch.cat(parts, dim=1).index_select(1, order.to(outputs.device))
