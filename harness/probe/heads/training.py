"""Training of heads on one source of features, and the search for the best of them.

The hold-out judges heads that learn from the other images; the chosen ones then learn from all images, together, as if
each were trained alone. The test split is used in the last step alone. Heads are divided among ranks by block set:
every rank sends the averages of its images' tokens over a block set to the rank that owns it, so that no head, gradient
or moment is on two ranks and no gradient is exchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.probe.features.extraction import Features, PooledFeatures, SplitFeatures, batched, own_indices
from aimscale.harness.probe.features.images import Task
from aimscale.harness.probe.features.moments import averages, owned_averages
from aimscale.harness.probe.features.tasks import L2S, BlockSet, bytes_per_set, number_of_steps, sets_per_round
from aimscale.harness.probe.heads.logistic import MAX_CHANNELS, MIN_IMAGES_PER_CHANNEL, solve
from aimscale.harness.probe.heads.scores import (
    Candidate,
    Predictions,
    best,
    gather_predictions,
    next_values,
    to_predictions,
    tried_values,
)
from aimscale.harness.probe.heads.stacks import STACKS, HeadStack, LinearStack, StackedAdamW, cross_entropies

TEST_BATCH = 64
"""Number of test images at a time."""
WORKING_GB = 1.0
"""Memory of a rank for the tokens that heads train on at a time, if these are more than `MICRO_BATCH` images."""
MICRO_BATCH = 64
"""Minimum number of images, over all ranks, whose tokens are computed at a time; one a rank if there are more ranks."""

Grid = tuple[str, Mapping[BlockSet, Sequence[float]]]
"""Heads of one stack: their kind, and the values (rates, or strengths of L2) on each block set, equally many."""


class MicroBatch(NamedTuple):
    """Micro-batch: some images of a batch."""

    images: list[int]
    """Images of all ranks."""
    weight: float = 1.0
    """Weight of each image in the loss."""
    ends_batch: bool = False
    """Whether the optimiser steps after this micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Heads that train together on some images."""

    owned: list[list[BlockSet]]
    """Block sets of every rank."""
    stacks: list[HeadStack]
    """Heads on this rank's block sets."""
    is_learnt: np.ndarray
    """Whether the heads learn from each training image, bool (n,)."""
    micro_size: int
    """Number of images of all ranks at a time."""


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Training of heads of one task, by all ranks together."""

    task: Task
    num_heads: int
    """Number of heads of the attentive probe."""
    features: SplitFeatures
    """Features of the training split."""
    source: Features
    """Those of them that the heads read."""
    unsolved: list[str] = field(default_factory=list)
    """Kinds of heads that were solved and did not reach their optimum."""

    @property
    def device(self) -> torch.device:
        """Device of the heads."""
        return self.features.pooled_moments[0].centre.device

    def train(self, grids: Sequence[Grid], *, with_holdout: bool) -> Round:
        """Train heads on the images to fit, or on all training images."""
        sets = list(dict.fromkeys(blocks for _, grid in grids for blocks in grid))
        owned = [[sets[i] for i in share] for share in np.array_split(range(len(sets)), self.task.group.world_size)]
        num_values = sum(len(next(iter(grid.values()))) for _, grid in grids)
        this = Round(
            owned=owned,
            stacks=self.stacks(grids, owned[self.task.group.rank], with_holdout=with_holdout),
            is_learnt=self.task.is_fit | with_holdout,
            micro_size=self._micro_size(len(sets), len(owned[0]), num_values),
        )
        if isinstance(self.source, PooledFeatures):
            for stack in this.stacks:
                self._solve(this, stack)
        else:
            self._train(this)
        return this

    def stacks(self, grids: Sequence[Grid], sets: Sequence[BlockSet], *, with_holdout: bool) -> list[HeadStack]:
        """Make untrained heads on some block sets, standardised by the statistics of what they will learn from."""
        stacks: list[HeadStack] = []
        for kind, grid in grids:
            own_grid = {blocks: grid[blocks] for blocks in sets if blocks in grid}
            # a rank without sets has no heads; if heads are solved, an empty stack, since it joins in all passes
            if not own_grid and not isinstance(self.source, PooledFeatures):
                continue
            stack = STACKS[kind](
                grid=own_grid,
                width=self.source.width,
                num_classes=self.task.num_classes,
                num_heads=self.num_heads,
                generator=torch.Generator().manual_seed(self.task.seed),
                device=self.device,
            )
            fit, held = self.features.pooled_moments if kind == "linear" else self.features.token_moments
            stack.standardise_by(*(fit + held if with_holdout else fit).set_statistics(list(own_grid)))
            stacks.append(stack)
        return stacks

    def _micro_size(self, num_sets: int, num_own: int, num_values: int) -> int:
        """Return how many images of all ranks a rank has memory for: the outputs and averages of its own ones, and the
        averages of all on its block sets, or the logits."""
        source, ranks = self.source, self.task.group.world_size
        tokens = source.num_tokens * source.width * ((source.num_blocks + num_sets) / ranks + num_own)
        most = WORKING_GB * 1e9 / 16 / max(tokens, num_own * num_values * self.task.num_classes)
        return max(MICRO_BATCH, ranks, int(most))

    def _train(self, this: Round) -> None:
        """Take all steps on the training split."""
        num_steps = number_of_steps(self.task.section, len(self.task.train.labels))
        optimisers = [StackedAdamW(stack, num_steps=num_steps) for stack in this.stacks]
        what, done = f"{' and '.join(dict.fromkeys(stack.kind for stack in this.stacks))} heads", 0
        for epoch, plan in self._epochs(this, num_steps):
            for micro, averaged, labels in self._averages(this, plan, epoch):
                for stack in this.stacks:
                    stack.losses(self._select(averaged, this, stack), labels, micro.weight).sum().backward()
                if micro.ends_batch:
                    for optimiser in optimisers:
                        optimiser.step()
                    done += 1
                    self.task.report_progress(what, done, num_steps, "steps")

    def _epochs(self, this: Round, num_steps: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Plan `num_steps` batches, epoch by epoch, without images that are not learnt from."""
        steps_left, epoch = num_steps, 0
        while steps_left:
            order = np.random.default_rng([self.task.seed, 1, epoch]).permutation(self.task.everything)
            plan, batches = [], list(batched(order, self.task.section.batch_size))[:steps_left]
            for batch in batches:
                learnt = [image for image in batch if this.is_learnt[image]]
                # in a batch of held-out images alone, the step moves the heads by their momentum
                parts = list(batched(learnt or batch[:1], this.micro_size))
                weight = 1 / len(learnt) if learnt else 0.0
                plan += [MicroBatch(part, weight, number == len(parts)) for number, part in enumerate(parts, 1)]
            yield epoch, plan
            steps_left, epoch = steps_left - len(batches), epoch + 1

    def _solve(self, this: Round, stack: HeadStack) -> None:
        """Find the optimum of a stack on the images that the heads learn from."""
        assert isinstance(stack, LinearStack)
        images = np.flatnonzero(this.is_learnt)
        plan = [MicroBatch(part, 1 / len(images)) for part in batched(images, this.micro_size)]
        num_passes = itertools.count(1)

        def losses() -> Tensor:
            total = torch.zeros(stack.shape, dtype=torch.float64, device=self.device)
            for micro, averaged, labels in self._averages(this, plan):
                per_head = stack.losses(self._select(averaged, this, stack), labels, micro.weight)
                per_head.sum().backward()
                total += per_head.detach()
            self.task.report_progress("linear heads", next(num_passes), None, "passes")
            return total

        covariance = None
        num_sets, width = stack.mean.shape
        if width <= min(MAX_CHANNELS, len(images) / MIN_IMAGES_PER_CHANNEL):
            covariance = stack.mean.new_zeros(num_sets, width, width)
            for _, averaged, _ in self._averages(this, plan):
                tokens = self._select(averaged, this, stack)
                vectors = (tokens[:, :, 0] - stack.mean[:, None]) * stack.rstd[:, None]
                covariance += vectors.mT @ vectors / len(images)
        if not solve(stack, covariance, losses, lambda is_done: not any(self.task.group.sum_counts(int(not is_done)))):
            self.unsolved.append(stack.kind)

    @torch.no_grad()
    def measure(self, this: Round) -> list[Candidate]:
        """Measure hold-out accuracy and loss of every head, of all ranks, in the order of kinds, sets and values."""
        held = self.task.held
        totals = [torch.zeros(2, *stack.shape, dtype=torch.float64, device=self.device) for stack in this.stacks]
        plan = [MicroBatch(images) for images in batched(held, this.micro_size)]
        for _, averaged, labels in self._averages(this, plan):
            for stack, total in zip(this.stacks, totals, strict=True):
                logits = stack(self._select(averaged, this, stack))
                total[0] += (logits.argmax(3) == labels[:, None]).sum(1)
                total[1] += cross_entropies(logits, labels).double().sum(1)
            self.task.report_progress()
        mine = [
            Candidate(
                kind=stack.kind,
                blocks=blocks,
                value=value,
                holdout_top1=top1 / len(held),
                holdout_loss=loss / len(held),
            )
            for stack, total in zip(this.stacks, totals, strict=True)
            for (blocks, values), *of_set in zip(stack.grid.items(), *total.tolist(), strict=True)
            for value, top1, loss in zip(values, *of_set, strict=True)
        ]
        everyone = [candidate for part in self.task.group.all_gather_object(mine) for candidate in part]
        return sorted(
            everyone, key=lambda candidate: list(STACKS).index(candidate.kind)
        )  # stable: ranks hold neighbouring sets

    def _averages(
        self, this: Round, plan: Sequence[MicroBatch], epoch: int | None = None
    ) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """Yield each micro-batch with the averages of its images' tokens over this rank's block sets, (S, B, N, d), and
        their labels (B,); every rank computes the tokens of some images."""
        group, owners = self.task.group, [self.source.owners(micro.images) for micro in plan]
        images_here = (
            np.asarray(micro.images)[of == group.rank].tolist() for micro, of in zip(plan, owners, strict=True)
        )
        for micro, of, outputs in zip(plan, owners, self.source.parts(images_here, epoch), strict=True):
            labels = self.task.train.labels[torch.as_tensor(micro.images)].to(self.device)
            yield micro, owned_averages(outputs, of, this.owned, group), labels

    def _select(self, averaged: Tensor, this: Round, stack: HeadStack) -> Tensor:
        """Select the averages that a stack reads among those on this rank's block sets."""
        sets = this.owned[self.task.group.rank]
        return averaged if len(stack.grid) == len(sets) else averaged[[sets.index(blocks) for blocks in stack.grid]]


def search_heads(
    training: HeadTraining, kinds: Sequence[str], sets: Sequence[BlockSet], last: BlockSet
) -> list[Candidate]:
    """Train every head of the grid kinds x block sets x values, by all ranks together, judged by the hold-out; the grid
    grows if a choice is at its end.

    The best of each kind, and the best on the block set `last`, come with heads that learnt from all images.
    """
    # the initial grid: strengths of L2 of solved heads, learning rates of trained ones
    asked = L2S if isinstance(training.source, PooledFeatures) else training.task.section.lrs
    unique: dict[tuple[str, BlockSet, float], Candidate] = {}
    more_kinds, more_sets, values = list(kinds), list(sets), list(asked)
    while more_sets:
        for candidate in _judged(training, more_kinds, more_sets, values):
            unique.setdefault((candidate.kind, candidate.blocks, candidate.value), candidate)
        candidates = [*unique.values()]
        chosen = [best(candidates, kind, blocks) for kind in kinds for blocks in (None, last)]
        grown = [
            (candidate, value)
            for candidate in chosen
            for value in next_values(asked, tried_values(candidates, candidate), candidate.value)
        ]
        more_kinds = [kind for kind in kinds if any(candidate.kind == kind for candidate, _ in grown)]
        more_sets = list(
            dict.fromkeys(candidate.blocks for candidate in candidates for one, _ in grown if candidate is one)
        )
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
    candidates = []
    for some in batched(range(len(sets)), sets_per_round(one_set, task.group.world_size, memory_bytes)):
        grids = [(kind, {sets[i]: values for i in some}) for kind in kinds]
        candidates += training.measure(training.train(grids, with_holdout=False))
    return candidates


def _with_heads(
    training: HeadTraining, candidates: Sequence[Candidate], chosen: Sequence[Candidate]
) -> list[Candidate]:
    """Train the chosen candidates on all images."""
    chosen = [each for each in candidates if any(each is one for one in chosen)]
    # a stack for each, so that no head's rounding depends on another
    trained = training.train([(each.kind, {each.blocks: [each.value]}) for each in chosen], with_holdout=True)
    mine = {(stack.kind, blocks): stack.to("cpu") for stack in trained.stacks for blocks in stack.grid}
    # One rank's heads at a time: if they were gathered, every rank would hold the largest part once for each rank.
    parts = (training.task.group.broadcast(mine, rank) for rank, sets in enumerate(trained.owned) if sets)
    everyone = {key: head.to(training.device) for part in parts for key, head in part.items()}
    return [replace(each, head=everyone[each.kind, each.blocks]) if each in chosen else each for each in candidates]


@torch.no_grad()
def predict_test_split(features: Features, candidates: Sequence[Candidate], task: Task) -> list[Predictions]:
    """Predict the test split with each candidate's head; the ranks share its images."""
    indices = own_indices(range(len(task.test)), task.group)
    chunks = list(batched(indices, TEST_BATCH))
    parts: list[list[Predictions]] = [[] for _ in candidates]
    for chunk, outputs in zip(chunks, features.parts(chunks), strict=True):
        for candidate, part in zip(candidates, parts, strict=True):
            assert candidate.head is not None
            scores = candidate.head(averages(outputs, [candidate.blocks]))[0, :, 0]
            part.append(to_predictions(scores, task.test.labels[chunk]))
    return [gather_predictions(indices, part, len(task.test), task.group) for part in parts]
