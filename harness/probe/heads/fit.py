"""Train every candidate head of one task and measure each on the hold-out; nothing here sees the test split.

One training over the whole split does both. Every head is there twice: one copy learns from the images that are
not held out, and the hold-out judges it; the other learns from all images, as if alone, and is kept if its setting
wins. So nothing is trained again after the choice.

Heads are divided among ranks by block set. Every rank computes the tokens of its images and gets those of the others,
so that no head, gradient or moment stands on two ranks and no gradient travels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from aimscale.harness.probe.features.extraction import Features, SplitFeatures, averages, batched, share
from aimscale.harness.probe.features.images import Task
from aimscale.harness.probe.features.tasks import COPIES, BlockSet, number_of_steps, sets_per_round
from aimscale.harness.probe.heads.scores import Answers, Candidate, answers, best, together
from aimscale.harness.probe.heads.stacks import STACKS, HeadStack, StackedAdamW

WORKING_GB = 1.0
"""Of a rank, for the tokens that heads train on at a time, where these are more than `MICRO_BATCH` images."""
MICRO_BATCH = 64
"""Images of all ranks whose tokens are computed at a time, at least."""
TEST_BATCH = 64
"""Test images at a time."""


class Micro(NamedTuple):
    """Some images of a batch."""

    images: list[int]
    """Of all ranks."""
    batch_size: int
    """Images of the whole batch."""
    num_fit: int
    """Those of the whole batch that are not held out."""
    ends_batch: bool
    """Whether the optimiser steps after them."""


@dataclass(frozen=True, kw_only=True)
class GridFit:
    """How the heads of one task are trained, by all ranks together."""

    task: Task
    num_heads: int
    """Heads of the attentive probe."""
    features: SplitFeatures
    """Of the training split."""

    def candidates(
        self, source: Features, kinds: Sequence[str], sets: Sequence[BlockSet], last: BlockSet
    ) -> list[Candidate]:
        """Every kind x block set x learning rate, judged by the hold-out, all from one stream of batches.

        The best of each kind, and the best on the block set `last`, come with their heads. Where the heads of all sets
        do not fit the ranks together, they train in rounds.
        """
        group = self.task.group
        memory_bytes = group.from_first(group.memory_bytes)
        at_once = sets_per_round(
            self.task.section, kinds, source.width, self.task.num_classes, group.world_size, memory_bytes
        )
        found: list[Candidate] = []
        for some in batched(range(len(sets)), at_once):
            own = [sets[i] for i in np.array_split(some, group.world_size)[group.rank]]
            stacks = self.heads(source, kinds, own)
            self._train(source, stacks, own)
            found += self._measure(source, stacks, own)
            wanted = _best_numbers(found, kinds, last)
            mine = {number: head for number in wanted if (head := _head_of(found[number], stacks, own)) is not None}
            heads = {number: head.to(self._device) for each in group.gather(mine) for number, head in each.items()}
            found = [
                replace(each, head=heads.get(number, each.head) if number in wanted else None)
                for number, each in enumerate(found)
            ]
        return found

    @property
    def _device(self) -> torch.device:
        return self.features.of_pooled[0].centre.device

    def heads(self, source: Features, kinds: Sequence[str], own: Sequence[BlockSet]) -> dict[str, HeadStack]:
        """Kind -> untrained heads on some block sets, standardised by the statistics of what they will learn from."""
        stacks: dict[str, HeadStack] = {}
        for kind in kinds if own else ():
            stacks[kind] = STACKS[kind](
                num_sets=len(own),
                lrs=self.task.section.lrs,
                num_copies=COPIES,
                width=source.width,
                num_classes=self.task.num_classes,
                num_heads=self.num_heads,
                generator=torch.Generator().manual_seed(self.task.seed),
                device=self._device,
            )
            fit, held = self.features.of_pooled if kind == "linear" else self.features.of_tokens
            judged, kept = fit.of_sets(own), (fit + held).of_sets(own)
            stacks[kind].standardise_by(*(torch.stack(pair, dim=1) for pair in zip(judged, kept, strict=True)))
        return stacks

    def _train(self, source: Features, stacks: dict[str, HeadStack], own: Sequence[BlockSet]) -> None:
        """All steps on the training split."""
        num_steps = number_of_steps(self.task.section, len(self.task.train.labels))
        optimisers = [StackedAdamW(stack, num_steps=num_steps) for stack in stacks.values()]
        for micro, outputs in self._batches(source, num_steps):
            tokens = self._tokens(outputs, micro.images, own)
            labels, weights = self._labels(micro), self._weights(micro)
            for stack in stacks.values():
                stack.loss(tokens, labels, weights).backward()
            if micro.ends_batch:
                for optimiser in optimisers:
                    optimiser.step()
                self.task.pause()

    def _batches(self, source: Features, num_steps: int) -> Iterator[tuple[Micro, Tensor]]:
        """This rank's outputs of each micro-batch of that many batches."""
        size, left, epoch = self._micro_size(source), num_steps, 0
        while left:
            order = np.random.default_rng([self.task.seed, 1, epoch]).permutation(self.task.everything)
            batches = list(batched(order, self.task.section.batch_size))[:left]
            plan = [
                Micro(micro, len(batch), int(self.task.is_fit[batch].sum()), number == len(parts))
                for batch in batches
                for parts in [list(batched(batch, size))]
                for number, micro in enumerate(parts, start=1)
            ]
            yield from self._outputs(source, plan, epoch)
            left, epoch = left - len(batches), epoch + 1

    def _outputs(
        self, source: Features, plan: Sequence[Micro], epoch: int | None = None
    ) -> Iterator[tuple[Micro, Tensor]]:
        own = (share(micro.images, self.task.group) for micro in plan)
        return zip(plan, source.parts(own, epoch), strict=True)

    def _micro_size(self, source: Features) -> int:
        """Images of all ranks at a time: what the working memory takes, or `MICRO_BATCH` where that is less."""
        one = 4 * source.num_blocks * source.num_tokens * source.width
        return max(MICRO_BATCH, int(WORKING_GB * 1e9 / 4 / one))

    def _tokens(self, outputs: Tensor, images: Sequence[int], own: Sequence[BlockSet]) -> Tensor:
        """Averages (S, B, N, d) over this rank's block sets for images of all ranks, in their order.

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
            order = torch.from_numpy(np.argsort(np.argsort(rank_of, kind="stable"), kind="stable"))
            outputs = by_rank.index_select(1, order.to(outputs.device))
        return averages(outputs, own)

    def _labels(self, micro: Micro) -> Tensor:
        return self.task.train.labels[torch.as_tensor(micro.images)].to(self._device)

    def _weights(self, micro: Micro) -> Tensor:
        """(2, B): of images in the loss of heads that the hold-out judges, and of those that are kept."""
        is_fit = torch.from_numpy(self.task.is_fit[micro.images]).float()
        # no image but held-out ones: such a step moves the judged heads by their momentum alone
        judged = is_fit / max(1, micro.num_fit)
        return torch.stack([judged, torch.full_like(judged, 1 / micro.batch_size)]).to(self._device)

    @torch.no_grad()
    def _measure(self, source: Features, stacks: dict[str, HeadStack], own: Sequence[BlockSet]) -> list[Candidate]:
        """Hold-out accuracy and loss of every head, of all ranks, in the order of kinds, sets and learning rates."""
        held, lrs = self.task.held, self.task.section.lrs
        totals = {
            kind: stack.mean.new_zeros(2, len(own), len(lrs), dtype=torch.float64) for kind, stack in stacks.items()
        }
        plan = [Micro(images, len(held), 0, False) for images in batched(held, self._micro_size(source))]
        for micro, outputs in self._outputs(source, plan):
            labels, tokens = self._labels(micro), self._tokens(outputs, micro.images, own)
            for kind, stack in stacks.items():
                logits = stack(tokens)[:, :, : len(lrs)]  # of the first copy
                targets = labels[None, :, None].expand(logits.shape[:3])
                losses = functional.cross_entropy(logits.movedim(3, 1), targets, reduction="none")
                totals[kind][0] += (logits.argmax(3) == targets).sum(1)
                totals[kind][1] += losses.double().sum(1)
            self.task.pause()
        mine = [
            Candidate(kind=kind, blocks=blocks, lr=lr, holdout_top1=top1 / len(held), holdout_loss=loss / len(held))
            for kind, (right, losses) in ((kind, total.tolist()) for kind, total in totals.items())
            for blocks, *of_set in zip(own, right, losses, strict=True)
            for lr, top1, loss in zip(lrs, *of_set, strict=True)
        ]
        everyone = [each for part in self.task.group.gather(mine) for each in part]
        return sorted(everyone, key=lambda each: list(STACKS).index(each.kind))  # stable: ranks hold neighbouring sets


def _best_numbers(candidates: Sequence[Candidate], kinds: Sequence[str], last: BlockSet) -> set[int]:
    """Positions of the best of each kind, and of the best on the block set `last` where that is among them."""
    has_last = any(candidate.blocks == last for candidate in candidates)
    wanted = [best(candidates, kind, blocks) for kind in kinds for blocks in ((None, last) if has_last else (None,))]
    return {number for number, candidate in enumerate(candidates) if any(candidate is each for each in wanted)}


def _head_of(candidate: Candidate, stacks: dict[str, HeadStack], own: Sequence[BlockSet]) -> HeadStack | None:
    """A candidate's head on the host, if it is in these stacks."""
    stack = stacks.get(candidate.kind)
    if stack is None or candidate.blocks not in own or candidate.lr is None:
        return None
    return stack.select(own.index(candidate.blocks), stack.lrs.index(candidate.lr)).to("cpu")


@torch.no_grad()
def answers_of_heads(features: Features, candidates: Sequence[Candidate], task: Task) -> list[Answers]:
    """What each candidate's head says about the test split; the ranks share its images."""
    own = share(range(len(task.test)), task.group)
    chunks = list(batched(own, TEST_BATCH))
    parts: list[list[Answers]] = [[] for _ in candidates]
    for chunk, outputs in zip(chunks, features.parts(chunks), strict=True):
        for candidate, part in zip(candidates, parts, strict=True):
            assert candidate.head is not None
            scores = candidate.head(averages(outputs, [candidate.blocks]))[0, :, 0]
            part.append(answers(scores, task.test.labels[chunk]))
    return [together(own, part, len(task.test), task.group) for part in parts]
