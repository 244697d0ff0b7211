"""Training of every candidate head of one task, and their evaluation on the hold-out; the test split is not used here.

The hold-out judges heads that learn from the other images; for the chosen settings, heads are kept that learn from all
images, as if trained alone. On tokens that the backbone must compute again, both train at once, as two copies of each
head; on kept features, only the chosen ones train again.

Heads are divided among ranks by block set. Every rank computes the tokens of its images and gets those of the others,
so that no head, gradient or moment is on two ranks and no gradient is exchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from aimscale.harness.probe.features.extraction import (
    Features,
    PooledFeatures,
    SplitFeatures,
    StreamedTokens,
    averages,
    batched,
    own_indices,
)
from aimscale.harness.probe.features.images import Task
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
from aimscale.harness.probe.heads.stacks import STACKS, HeadStack, LinearStack, StackedAdamW

WORKING_GB = 1.0
"""Memory of a rank for the tokens that heads train on at a time, if these are more than `MICRO_BATCH` images."""
MICRO_BATCH = 64
"""Minimum number of images, over all ranks, whose tokens are computed at a time."""
TEST_BATCH = 64
"""Number of test images at a time."""


class MicroBatch(NamedTuple):
    """Micro-batch: some images of a batch."""

    images: list[int]
    """Images of all ranks."""
    counts: tuple[int, ...]
    """Number of images of the whole batch that each copy of the heads learns from."""
    ends_batch: bool = False
    """Whether the optimiser steps after this micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Heads that train together."""

    source: Features
    """Features that the heads read."""
    own: list[BlockSet]
    """Block sets of this rank."""
    learns: tuple[np.ndarray, ...]
    """Whether each copy of the heads learns from an image, bool (n,) per copy."""
    micro_size: int
    """Number of images of all ranks at a time."""
    stacks: dict[str, HeadStack]
    """Kind -> heads on this rank's block sets."""


@dataclass(frozen=True, kw_only=True)
class GridFit:
    """Training of the heads of one task, by all ranks together."""

    task: Task
    num_heads: int
    """Number of heads of the attentive probe."""
    features: SplitFeatures
    """Features of the training split."""

    def candidates(
        self, source: Features, kinds: Sequence[str], sets: Sequence[BlockSet], last: BlockSet
    ) -> list[Candidate]:
        """Train every kind x block set x value of the grid, judged by the hold-out; the grid grows if a choice is at
        its end.

        The best of each kind, and the best on the block set `last`, come with their heads. If a pass runs the backbone,
        the copies that are kept train beside those that are judged; else only the chosen ones are trained.
        """
        is_costly = isinstance(source, StreamedTokens)
        learns = (self.task.is_fit, np.ones_like(self.task.is_fit))
        # the initial grid: strengths of L2 of solved heads, learning rates of trained ones
        asked = L2S if isinstance(source, PooledFeatures) else self.task.section.lrs
        found: list[Candidate] = []
        more = list(kinds), list(sets), list(asked)
        while more[1]:
            found = self._search(source, *more, learns if is_costly else learns[:1], found, last)
            more = _grown(found, kinds, last, asked)
        for number in () if is_costly else sorted(_best_numbers(found, kinds, last)):
            each = found[number]
            kept = self._trained(source, [each.kind], [each.blocks], [each.value], learns[1:])
            heads = self.task.group.gather(_head_of(each, kept))
            found[number] = replace(each, head=next(head.to(self._device) for head in heads if head is not None))
        return found

    def _search(
        self,
        source: Features,
        kinds: Sequence[str],
        sets: Sequence[BlockSet],
        grid: Sequence[float],
        learns: tuple[np.ndarray, ...],
        found: list[Candidate],
        last: BlockSet,
    ) -> list[Candidate]:
        """Add candidates of these settings to those found; in rounds if the heads of all sets do not fit into
        memory."""
        group = self.task.group
        memory_bytes = group.min_over_ranks(group.memory_bytes())
        num_values, is_solved = len(grid) * len(learns), isinstance(source, PooledFeatures)
        one_set = bytes_per_set(kinds, num_values, source.width, self.task.num_classes, is_solved=is_solved)
        at_once = sets_per_round(one_set, group.world_size, memory_bytes)
        for some in batched(range(len(sets)), at_once):
            done = self._trained(source, kinds, [sets[i] for i in some], grid, learns)
            known = {(each.kind, each.blocks, each.value) for each in found}
            found = found + [each for each in self._measure(done) if (each.kind, each.blocks, each.value) not in known]
            if len(learns) == 1:
                continue
            wanted = _best_numbers(found, kinds, last)
            mine = {number: head for number in wanted if (head := _head_of(found[number], done)) is not None}
            heads = {number: head.to(self._device) for each in group.gather(mine) for number, head in each.items()}
            found = [
                replace(each, head=heads.get(number, each.head) if each.kind not in kinds or number in wanted else None)
                for number, each in enumerate(found)
            ]
        return found

    @property
    def _device(self) -> torch.device:
        return self.features.pooled_moments[0].centre.device

    def _trained(
        self,
        source: Features,
        kinds: Sequence[str],
        sets: Sequence[BlockSet],
        grid: Sequence[float],
        learns: tuple[np.ndarray, ...],
    ) -> Round:
        """Train heads of these kinds and values on block sets, which the ranks divide; one copy for each of
        `learns`."""
        group, num_values = self.task.group, len(kinds) * len(grid) * len(learns)
        shares = np.array_split(range(len(sets)), group.world_size)
        logits = len(shares[0]) * num_values * self.task.num_classes
        one = 4 * max(source.num_blocks * source.num_tokens * source.width, logits)
        own = [sets[i] for i in shares[group.rank]]
        this = Round(
            source=source,
            own=own,
            learns=learns,
            micro_size=max(MICRO_BATCH, int(WORKING_GB * 1e9 / 4 / one)),
            stacks=self.heads(source, kinds, own, grid, learns),
        )
        if isinstance(source, PooledFeatures):
            self._solve(this)
        else:
            self._train(this)
        return this

    def heads(
        self,
        source: Features,
        kinds: Sequence[str],
        own: Sequence[BlockSet],
        grid: Sequence[float],
        learns: Sequence[np.ndarray],
    ) -> dict[str, HeadStack]:
        """Make untrained heads on some block sets, by kind, standardised by the statistics of what they will learn
        from."""
        stacks: dict[str, HeadStack] = {}
        # a rank without sets has no heads; if heads are solved, an empty stack, since it joins in all passes
        for kind in kinds if own or isinstance(source, PooledFeatures) else ():
            stacks[kind] = STACKS[kind](
                num_sets=len(own),
                grid=tuple(grid),
                num_copies=len(learns),
                width=source.width,
                num_classes=self.task.num_classes,
                num_heads=self.num_heads,
                generator=torch.Generator().manual_seed(self.task.seed),
                device=self._device,
            )
            fit, held = self.features.pooled_moments if kind == "linear" else self.features.token_moments
            statistics = [(fit + held if copy.all() else fit).set_statistics(own) for copy in learns]
            stacks[kind].standardise_by(*(torch.stack(each, dim=1) for each in zip(*statistics, strict=True)))
        return stacks

    def _train(self, this: Round) -> None:
        """Take all steps on the training split."""
        num_steps = number_of_steps(self.task.section, len(self.task.train.labels))
        optimisers = [StackedAdamW(stack, num_steps=num_steps) for stack in this.stacks.values()]
        what, done = f"{' and '.join(this.stacks)} heads", 0
        for micro, outputs in self._batches(this, num_steps):
            tokens = self._tokens(outputs, micro.images, this.own)
            labels, weights = self._labels(micro), self._weights(this, micro)
            for stack in this.stacks.values():
                stack.losses(tokens, labels, weights).sum().backward()
            if micro.ends_batch:
                for optimiser in optimisers:
                    optimiser.step()
                done += 1
                self.task.report_progress(what, done, num_steps, "steps")

    def _batches(self, this: Round, num_steps: int) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Yield this rank's outputs of each micro-batch of `num_steps` batches, without images that no copy learns
        from."""
        is_read, left, epoch = np.any(this.learns, axis=0), num_steps, 0
        while left:
            order = np.random.default_rng([self.task.seed, 1, epoch]).permutation(self.task.everything)
            plan, batches = [], list(batched(order, self.task.section.batch_size))[:left]
            for batch in batches:
                counts = tuple(int(copy[batch].sum()) for copy in this.learns)
                # in a batch of held-out images alone, the step moves the heads by their momentum
                parts = list(batched([image for image in batch if is_read[image]] or batch[:1], this.micro_size))
                plan += [MicroBatch(part, counts, number == len(parts)) for number, part in enumerate(parts, start=1)]
            yield from self._outputs(this.source, plan, epoch)
            left, epoch = left - len(batches), epoch + 1

    def _solve(self, this: Round) -> None:
        """Find the optimum on the images that the heads, one copy of each, learn from."""
        (stack,), (learns,) = this.stacks.values(), this.learns
        assert isinstance(stack, LinearStack)
        images = np.flatnonzero(learns)
        plan = [MicroBatch(part, (len(images),)) for part in batched(images, this.micro_size)]
        num_passes = itertools.count(1)

        def losses() -> Tensor:
            total = stack.mean.new_zeros(len(this.own), len(stack.grid), dtype=torch.float64)
            for micro, outputs in self._outputs(this.source, plan):
                tokens = self._tokens(outputs, micro.images, this.own)
                found = stack.losses(tokens, self._labels(micro), self._weights(this, micro))
                found.sum().backward()
                total += found.detach()
            self.task.report_progress("linear heads", next(num_passes), None, "passes")
            return total

        covariance = None
        if stack.mean.shape[2] <= min(MAX_CHANNELS, len(images) / MIN_IMAGES_PER_CHANNEL):
            covariance = stack.mean.new_zeros(len(this.own), *2 * stack.mean.shape[2:])
            for micro, outputs in self._outputs(this.source, plan):
                vectors = (self._tokens(outputs, micro.images, this.own)[:, :, 0] - stack.mean) * stack.rstd
                covariance += vectors.mT @ vectors / len(images)
        solve(stack, covariance, losses, lambda is_done: not any(self.task.group.sum_counts(int(not is_done))))

    def _outputs(
        self, source: Features, plan: Sequence[MicroBatch], epoch: int | None = None
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Yield each micro-batch with this rank's outputs."""
        own = (own_indices(micro.images, self.task.group) for micro in plan)
        return zip(plan, source.parts(own, epoch), strict=True)

    def _tokens(self, outputs: Tensor, images: Sequence[int], own: Sequence[BlockSet]) -> Tensor:
        """Average tokens over this rank's block sets, (S, B, N, d), for images of all ranks, in their order.

        Args:
            outputs: (L, b, N, d) of those images i with i mod world_size == rank, in the same order.
        """
        if self.task.group.world_size > 1:
            rank_of = np.asarray(images) % self.task.group.world_size
            per_rank = np.bincount(rank_of, minlength=self.task.group.world_size)
            padded = outputs.new_zeros(len(outputs), per_rank.max(), *outputs.shape[2:])
            padded[:, : outputs.shape[1]] = outputs
            # as bytes: not every backend moves bfloat16
            parts = self.task.group.concatenate(padded.view(torch.uint8)).view(outputs.dtype)
            by_rank = torch.cat([part[:, :count] for part, count in zip(parts, per_rank, strict=True)], dim=1)
            del parts  # each copy is gigabytes for a large model
            order = torch.from_numpy(np.argsort(np.argsort(rank_of, kind="stable"), kind="stable"))
            outputs = by_rank.index_select(1, order.to(by_rank.device))
        return averages(outputs, own)

    def _labels(self, micro: MicroBatch) -> Tensor:
        """Return the labels of a micro-batch."""
        return self.task.train.labels[torch.as_tensor(micro.images)].to(self._device)

    def _weights(self, this: Round, micro: MicroBatch) -> Tensor:
        """Return the weights (C, B) of images in the loss of each copy."""
        shares = [copy[micro.images] / max(1, count) for copy, count in zip(this.learns, micro.counts, strict=True)]
        return torch.from_numpy(np.array(shares, dtype=np.float32)).to(self._device)

    @torch.no_grad()
    def _measure(self, this: Round) -> list[Candidate]:
        """Measure hold-out accuracy and loss of every head, of all ranks, in the order of kinds, sets and the grid."""
        held = self.task.held
        totals = {
            kind: stack.mean.new_zeros(2, len(this.own), len(stack.grid), dtype=torch.float64)
            for kind, stack in this.stacks.items()
        }
        plan = [MicroBatch(images, ()) for images in batched(held, this.micro_size)]
        for micro, outputs in self._outputs(this.source, plan):
            labels, tokens = self._labels(micro), self._tokens(outputs, micro.images, this.own)
            for kind, stack in this.stacks.items():
                logits = stack(tokens)[:, :, : len(stack.grid)]  # of the first copy
                targets = labels[None, :, None].expand(logits.shape[:3])
                losses = functional.cross_entropy(logits.movedim(3, 1), targets, reduction="none")
                totals[kind][0] += (logits.argmax(3) == targets).sum(1)
                totals[kind][1] += losses.double().sum(1)
            self.task.report_progress()
        mine = [
            Candidate(
                kind=kind, blocks=blocks, value=value, holdout_top1=top1 / len(held), holdout_loss=loss / len(held)
            )
            for kind, (right, losses) in ((kind, total.tolist()) for kind, total in totals.items())
            for blocks, *of_set in zip(this.own, right, losses, strict=True)
            for value, top1, loss in zip(this.stacks[kind].grid, *of_set, strict=True)
        ]
        everyone = [each for part in self.task.group.gather(mine) for each in part]
        return sorted(everyone, key=lambda each: list(STACKS).index(each.kind))  # stable: ranks hold neighbouring sets


def _best_numbers(candidates: Sequence[Candidate], kinds: Sequence[str], last: BlockSet) -> set[int]:
    """Return the positions of the best of each kind, and of the best on the block set `last` if it was tried."""
    has_last = any(candidate.blocks == last for candidate in candidates)
    wanted = [best(candidates, kind, blocks) for kind in kinds for blocks in ((None, last) if has_last else (None,))]
    return {number for number, candidate in enumerate(candidates) if any(candidate is each for each in wanted)}


def _grown(
    found: Sequence[Candidate], kinds: Sequence[str], last: BlockSet, asked: Sequence[float]
) -> tuple[list[str], list[BlockSet], list[float]]:
    """Return kinds, block sets and values by which the grid grows: those whose choice is at its end."""
    chosen = [found[number] for number in sorted(_best_numbers(found, kinds, last))]
    more = [(each, value) for each in chosen for value in next_values(asked, tried_values(found, each), each.value)]
    sets = dict.fromkeys(each.blocks for each, _ in more)
    return (
        [kind for kind in kinds if any(each.kind == kind for each, _ in more)],
        list(sets),
        sorted({v for _, v in more}),
    )


def _head_of(candidate: Candidate, this: Round) -> HeadStack | None:
    """Return a candidate's head on the host, if it is one of these."""
    stack = this.stacks.get(candidate.kind)
    if stack is None or candidate.blocks not in this.own or candidate.value not in stack.grid:
        return None
    return stack.select(this.own.index(candidate.blocks), stack.grid.index(candidate.value)).to("cpu")


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
