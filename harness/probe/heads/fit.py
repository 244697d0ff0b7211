"""Search for the best heads of one task: which to train, which to keep; the test split is used in the last step alone.

The hold-out judges heads that learn from the other images; the chosen ones then learn from all images, together, as if
each were trained alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from aimscale.harness.probe.features.images import Task
from aimscale.harness.probe.features.moments import averages
from aimscale.harness.probe.features.sources import Features, PooledFeatures, batched, own_indices
from aimscale.harness.probe.features.tasks import L2S, BlockSet, bytes_per_set, sets_per_round
from aimscale.harness.probe.heads.scores import (
    Candidate,
    Predictions,
    best,
    gather_predictions,
    next_values,
    to_predictions,
    tried_values,
)
from aimscale.harness.probe.heads.training import HeadTraining

TEST_BATCH = 64
"""Number of test images at a time."""


@dataclass(frozen=True, kw_only=True)
class HeadSearch:
    """Search among every kind x block set x value of a grid, by all ranks together."""

    training: HeadTraining
    kinds: Sequence[str]
    sets: Sequence[BlockSet]
    """Block sets that are tried."""
    last: BlockSet
    """Block set whose best head is kept too."""

    def candidates(self) -> list[Candidate]:
        """Train every head of the grid, judged by the hold-out; the grid grows if a choice is at its end.

        The best of each kind, and the best on the block set `last`, come with heads that learnt from all images.
        """
        # the initial grid: strengths of L2 of solved heads, learning rates of trained ones
        is_solved = isinstance(self.training.source, PooledFeatures)
        asked = L2S if is_solved else self.training.task.section.lrs
        found: list[Candidate] = []
        kinds, sets, values = list(self.kinds), list(self.sets), list(asked)
        while sets:
            known = {(each.kind, each.blocks, each.value) for each in found}
            judged = self._judge(kinds, sets, values, is_solved=is_solved)
            found += [each for each in judged if (each.kind, each.blocks, each.value) not in known]
            kinds, sets, values = self._grown(found, asked)
        return self._with_heads(found)

    def _judge(
        self, kinds: Sequence[str], sets: Sequence[BlockSet], values: Sequence[float], *, is_solved: bool
    ) -> list[Candidate]:
        """Measure heads of these settings; in rounds if the heads of all sets do not fit into memory."""
        task, found = self.training.task, []
        memory_bytes = task.group.min_over_ranks(task.group.memory_bytes())
        width = self.training.source.width
        one_set = bytes_per_set(kinds, len(values), width, task.num_classes, is_solved=is_solved)
        for some in batched(range(len(sets)), sets_per_round(one_set, task.group.world_size, memory_bytes)):
            grids = [(kind, {sets[i]: values for i in some}) for kind in kinds]
            found += self.training.measure(self.training.train(grids, with_holdout=False))
        return found

    def _with_heads(self, found: list[Candidate]) -> list[Candidate]:
        """Train the chosen candidates on all images."""
        chosen = self._chosen(found)
        # a stack for each, so that no head's rounding depends on another
        trained = self.training.train([(each.kind, {each.blocks: [each.value]}) for each in chosen], with_holdout=True)
        mine = {(stack.kind, blocks): stack.to("cpu") for stack in trained.stacks for blocks in stack.grid}
        group, device = self.training.task.group, self.training.device
        everyone = {key: head.to(device) for part in group.gather(mine) for key, head in part.items()}
        return [replace(each, head=everyone[each.kind, each.blocks]) if each in chosen else each for each in found]

    def _chosen(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Return the best of each kind, and the best on the block set `last`."""
        chosen = [best(found, kind, blocks) for kind in self.kinds for blocks in (None, self.last)]
        return [each for each in found if any(each is one for one in chosen)]

    def _grown(
        self, found: Sequence[Candidate], asked: Sequence[float]
    ) -> tuple[list[str], list[BlockSet], list[float]]:
        """Return kinds, block sets and values by which the grid grows: those whose choice is at its end."""
        more = [
            (each, value)
            for each in self._chosen(found)
            for value in next_values(asked, tried_values(found, each), each.value)
        ]
        kinds = [kind for kind in self.kinds if any(each.kind == kind for each, _ in more)]
        return kinds, list(dict.fromkeys(each.blocks for each, _ in more)), sorted({value for _, value in more})


@torch.no_grad()
def predict_test_split(features: Features, candidates: Sequence[Candidate], task: Task) -> list[Predictions]:
    """Predict the test split with each candidate's head; the ranks share its images."""
    own = own_indices(range(len(task.test)), task.group)
    chunks = list(batched(own, TEST_BATCH))
    parts: list[list[Predictions]] = [[] for _ in candidates]
    for chunk, outputs in zip(chunks, features.parts(chunks), strict=True):
        for candidate, part in zip(candidates, parts, strict=True):
            assert candidate.head is not None
            scores = candidate.head(averages(outputs, [candidate.blocks]))[0, :, 0]
            part.append(to_predictions(scores, task.test.labels[chunk]))
    return [gather_predictions(own, part, len(task.test), task.group) for part in parts]
