"""Search for the best heads of one task: which to train, which to keep; the test split is used in the last step alone.

The hold-out judges heads that learn from the other images; the chosen ones then learn from all images, together, as if
each were trained alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from aimscale.harness.probe.features.extraction import Features, PooledFeatures, batched, own_indices
from aimscale.harness.probe.features.images import Task
from aimscale.harness.probe.features.moments import averages
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


def search_heads(
    training: HeadTraining, kinds: Sequence[str], sets: Sequence[BlockSet], last: BlockSet
) -> list[Candidate]:
    """Train every head of the grid kinds x block sets x values, by all ranks together, judged by the hold-out; the grid
    grows if a choice is at its end.

    The best of each kind, and the best on the block set `last`, come with heads that learnt from all images.
    """
    # the initial grid: strengths of L2 of solved heads, learning rates of trained ones
    asked = L2S if isinstance(training.source, PooledFeatures) else training.task.section.lrs
    found: dict[tuple[str, BlockSet, float], Candidate] = {}
    more_kinds, more_sets, values = list(kinds), list(sets), list(asked)
    while more_sets:
        for each in _judged(training, more_kinds, more_sets, values):
            found.setdefault((each.kind, each.blocks, each.value), each)
        candidates = [*found.values()]
        chosen = [best(candidates, kind, blocks) for kind in kinds for blocks in (None, last)]
        grown = [
            (each, value) for each in chosen for value in next_values(asked, tried_values(candidates, each), each.value)
        ]
        more_kinds = [kind for kind in kinds if any(each.kind == kind for each, _ in grown)]
        more_sets = list(dict.fromkeys(each.blocks for each in candidates for one, _ in grown if each is one))
        values = sorted({value for _, value in grown})
    return _with_heads(training, candidates, chosen)


def _judged(
    training: HeadTraining, kinds: Sequence[str], sets: Sequence[BlockSet], values: Sequence[float]
) -> list[Candidate]:
    """Measure heads of these settings; in rounds if the heads of all sets do not fit into memory."""
    task, source = training.task, training.source
    memory_bytes = task.group.min_over_ranks(task.group.memory_bytes())
    is_solved = isinstance(source, PooledFeatures)
    one_set = bytes_per_set(kinds, len(values), source.width, task.num_classes, is_solved=is_solved)
    found = []
    for some in batched(range(len(sets)), sets_per_round(one_set, task.group.world_size, memory_bytes)):
        grids = [(kind, {sets[i]: values for i in some}) for kind in kinds]
        found += training.measure(training.train(grids, with_holdout=False))
    return found


def _with_heads(
    training: HeadTraining, candidates: Sequence[Candidate], chosen: Sequence[Candidate]
) -> list[Candidate]:
    """Train the chosen candidates on all images."""
    chosen = [each for each in candidates if any(each is one for one in chosen)]
    # a stack for each, so that no head's rounding depends on another
    trained = training.train([(each.kind, {each.blocks: [each.value]}) for each in chosen], with_holdout=True)
    mine = {(stack.kind, blocks): stack.to("cpu") for stack in trained.stacks for blocks in stack.grid}
    parts = training.task.group.gather(mine)
    everyone = {key: head.to(training.device) for part in parts for key, head in part.items()}
    return [replace(each, head=everyone[each.kind, each.blocks]) if each in chosen else each for each in candidates]


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
