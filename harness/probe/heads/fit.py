"""Train every candidate head of one task and measure each on the hold-out; nothing here sees the test split.

One training over the whole split does both. Every head is there twice: one copy learns from the images that are
not held out, and the hold-out judges it; the other learns from all images, as if alone, and is kept if its setting
wins. So nothing is trained again after the choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.extraction import Features, SplitFeatures, batched, share
from aimscale.harness.probe.features.sizes import COPIES, BlockSet, number_of_steps, sets_per_round
from aimscale.harness.probe.files import Pause
from aimscale.harness.probe.heads.owners import Ownership
from aimscale.harness.probe.heads.progress import ProbeProgress, StepSaver
from aimscale.harness.probe.heads.stacks import STACKS, HeadStack, Setting, StackedAdamW
from aimscale.harness.run.config import ProbeSection

WORKING_GB = 1.0
"""Averaged tokens of a rank's heads at a time."""
MICRO_BATCH = 64
"""Images of all ranks whose tokens are computed at a time, at least, on up to four ranks; in proportion on more."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trained probe."""

    kind: str
    """`linear`, `attentive` or `knn`."""
    blocks: BlockSet
    """Blocks whose outputs it averages."""
    setting: Setting | None
    """Its optimiser setting; None for k-NN."""
    num_neighbours: int | None = None
    """k of k-NN."""
    holdout_top1: float
    holdout_loss: float
    """Cross-entropy on the hold-out (0 for k-NN, which has none)."""
    head: HeadStack | None = None
    """The head that learned from all images, alone in its stack, of those that were chosen."""


@dataclass(frozen=True)
class Split:
    """The training split cut in two."""

    labels: Tensor
    """Of all training images (n,)."""
    fit: np.ndarray
    """Indices that those heads learn from which the hold-out judges, ascending."""
    held: np.ndarray
    """Indices of the hold-out, ascending."""
    num_classes: int

    @functools.cached_property
    def everything(self) -> np.ndarray:
        """Indices of both parts, ascending."""
        return np.sort(np.concatenate([self.fit, self.held]))

    @functools.cached_property
    def is_fit(self) -> np.ndarray:
        """Of each image, whether it is not held out."""
        return np.isin(np.arange(len(self.labels)), self.fit)


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


def grid(section: ProbeSection) -> tuple[Setting, ...]:
    """Every learning rate with every weight decay."""
    return tuple(Setting(lr=lr, weight_decay=wd) for lr, wd in product(section.lrs, section.weight_decays))


def best(candidates: Sequence[Candidate], kind: str, blocks: BlockSet | None = None) -> Candidate:
    """The highest hold-out accuracy of a kind, ties by hold-out loss, then by order; optionally for one block set."""
    pool = [c for c in candidates if c.kind == kind and blocks in (None, c.blocks)]
    return max(pool, key=lambda c: (c.holdout_top1, -c.holdout_loss))


@dataclass(frozen=True, kw_only=True)
class GridFit:
    """How the heads of one task are trained, by all ranks together."""

    split: Split
    """Which training images are fitted and which held out."""
    section: ProbeSection
    """Kinds, grid, epochs or iterations, batch size."""
    num_heads: int
    """Heads of the attentive probe."""
    seed: int
    """Draws the heads' start and the order of images."""
    features: SplitFeatures
    """Of the training split."""
    device: torch.device
    group: Group
    """The ranks that share the work; the result does not depend on them but for rounding."""
    progress: ProbeProgress | None = None
    """Where training saves its state, to go on from there."""
    pause: Pause = lambda: None
    """Called after every save."""

    def candidates(
        self, source: Features, kinds: Sequence[str], sets: Sequence[BlockSet], last: BlockSet
    ) -> list[Candidate]:
        """Every kind x block set x setting, judged by the hold-out, all from one stream of batches.

        The best of each kind, and the best on the block set `last`, come with their heads.
        """
        memory_bytes = self.group.from_first(self.group.memory_bytes())
        at_once = sets_per_round(
            self.section, kinds, source.width, self.split.num_classes, self.group.world_size, memory_bytes
        )
        rounds = list(batched(range(len(sets)), at_once))
        found: list[Candidate] = []
        for number, some in enumerate(rounds, start=1):
            trained = self._train(
                source, kinds, [sets[i] for i in some], f"{'-'.join(kinds)}-{number}-of-{len(rounds)}"
            )
            found += self._measure(source, trained)
            wanted = _best_numbers(found, kinds, last)
            found = [
                each if number in wanted else replace(each, head=None)
                for number, each in enumerate(self._with_heads(found, trained, wanted))
            ]
        return found

    def _train(self, source: Features, kinds: Sequence[str], sets: Sequence[BlockSet], part: str) -> _Trained:
        """Train every kind x set x setting on the training split, saving now and then as `part`."""
        trained = self._heads(source, kinds, sets)
        num_steps = number_of_steps(self.section, len(self.split.labels))
        optimisers = [[StackedAdamW(stack, num_steps=num_steps) for stack in turn.values()] for turn in trained.turns]
        stacks = [stack for turn in trained.turns for stack in turn.values()]
        flat = [optimiser for turn in optimisers for optimiser in turn]
        saver = StepSaver(self.progress, part, self.group)
        saved = saver.load()
        step = saved[0] if saved else 0
        if saved:
            for stack, values in zip(stacks, saved[1]["stacks"], strict=True):
                stack.load_state_dict(values)
            for optimiser, values in zip(flat, saved[1]["optimisers"], strict=True):
                optimiser.load_state_dict(values)
        for micro, outputs in self._batches(source, step, num_steps):
            trained.backward(outputs, micro, self._labels(micro), self._weights(micro))
            if not micro.ends_batch:
                continue
            for optimiser in flat:
                optimiser.step()
            step += 1
            if step == num_steps or saver.is_due():
                state = {
                    "stacks": [stack.state_dict() for stack in stacks],
                    "optimisers": [optimiser.state_dict() for optimiser in flat],
                }
                saver.save(step, state)
                self.pause()
        return trained

    def _batches(self, source: Features, step: int, num_steps: int) -> Iterator[tuple[Micro, Tensor]]:
        """The rest of the training after `step` steps: this rank's outputs of each micro-batch."""
        images = self.split.everything
        per_epoch = math.ceil(len(images) / self.section.batch_size)
        size = self._micro_size(source)
        for epoch in range(step // per_epoch, math.ceil(num_steps / per_epoch)):
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(images)
            batches = list(batched(order, self.section.batch_size))
            first = step - epoch * per_epoch if epoch == step // per_epoch else 0
            plan = [
                Micro(micro, len(batch), int(self.split.is_fit[batch].sum()), number == len(parts))
                for batch in batches[first : num_steps - epoch * per_epoch]
                for parts in [list(batched(batch, size))]
                for number, micro in enumerate(parts, start=1)
            ]
            yield from self._outputs(source, plan, epoch)

    def _outputs(
        self, source: Features, plan: Sequence[Micro], epoch: int | None = None
    ) -> Iterator[tuple[Micro, Tensor]]:
        own = (share(micro.images, self.group) for micro in plan)
        return zip(plan, source.parts(own, epoch), strict=True)

    def _micro_size(self, source: Features) -> int:
        """Images of all ranks at a time: what the working memory takes, or `MICRO_BATCH` where that is less."""
        one = 4 * source.num_blocks * source.num_tokens * source.width
        return max(MICRO_BATCH * max(1, self.group.world_size // 4), int(WORKING_GB * 1e9 / 4 / one))

    def _labels(self, micro: Micro) -> Tensor:
        return self.split.labels[torch.as_tensor(micro.images)].to(self.device)

    def _weights(self, micro: Micro) -> Tensor:
        """(2, B): of images in the loss of heads that the hold-out judges, and of those that are kept."""
        is_fit = torch.from_numpy(self.split.is_fit[micro.images]).float()
        # no image but held-out ones: such a step moves the judged heads by their momentum alone
        judged = is_fit / max(1, micro.num_fit)
        return torch.stack([judged, torch.full_like(judged, 1 / micro.batch_size)]).to(self.device)

    def _heads(self, source: Features, kinds: Sequence[str], sets: Sequence[BlockSet]) -> _Trained:
        """This rank's untrained heads, standardised by the statistics of what they will be trained on."""
        one = 4 * self._micro_size(source) * source.num_tokens * source.width
        ownership = Ownership.divide(sets, max(1, int(WORKING_GB * 1e9 / one)), self.group)
        turns: list[dict[str, HeadStack]] = []
        for turn in range(len(ownership.turns)):
            own = ownership.own(turn)
            stacks: dict[str, HeadStack] = {}
            for kind in kinds if own else ():
                stacks[kind] = STACKS[kind](
                    num_sets=len(own),
                    settings=grid(self.section),
                    num_copies=COPIES,
                    width=source.width,
                    num_classes=self.split.num_classes,
                    num_heads=self.num_heads,
                    generator=torch.Generator().manual_seed(self.seed),
                    device=self.device,
                )
                fit, held = self.features.of_pooled if kind == "linear" else self.features.of_tokens
                judged, kept = fit.of_sets(own), (fit + held).of_sets(own)
                stacks[kind].standardise_by(*(torch.stack(pair, dim=1) for pair in zip(judged, kept, strict=True)))
            turns.append(stacks)
        return _Trained(ownership=ownership, turns=turns)

    @torch.no_grad()
    def _measure(self, source: Features, trained: _Trained) -> list[Candidate]:
        """Hold-out accuracy and loss of every head, of all ranks, in the order of kinds, sets and settings."""
        held = self.split.held
        totals = [
            {
                kind: stack.mean.new_zeros(2, len(stack.mean), len(stack.settings), dtype=torch.float64)
                for kind, stack in turn.items()
            }
            for turn in trained.turns
        ]
        plan = [Micro(images, len(held), 0, False) for images in batched(held, self._micro_size(source))]
        for micro, outputs in self._outputs(source, plan):
            labels = self._labels(micro)
            for turn, tokens in trained.deliveries(outputs, micro):
                for kind, stack in trained.turns[turn].items():
                    logits = stack(tokens)[:, :, : len(stack.settings)]  # of the first copy
                    targets = labels[None, :, None].expand(logits.shape[:3])
                    losses = functional.cross_entropy(logits.movedim(3, 1), targets, reduction="none")
                    totals[turn][kind][0] += (logits.argmax(3) == targets).sum(1)
                    totals[turn][kind][1] += losses.double().sum(1)
        own = [
            (kind, blocks, setting, *(float(value) / len(held) for value in total[:, s, g]))
            for turn, kinds in enumerate(totals)
            for kind, total in kinds.items()
            for s, blocks in enumerate(trained.ownership.own(turn))
            for g, setting in enumerate(trained.turns[turn][kind].settings)
        ]
        everyone = [each for part in self.group.gather(own) for each in part]
        everyone.sort(key=lambda each: list(STACKS).index(each[0]))  # stable: ranks hold neighbouring sets
        return [
            Candidate(kind=kind, blocks=blocks, setting=setting, holdout_top1=top1, holdout_loss=loss)
            for kind, blocks, setting, top1, loss in everyone
        ]

    def _with_heads(self, candidates: Sequence[Candidate], trained: _Trained, wanted: set[int]) -> list[Candidate]:
        """The candidates, of which those with a wanted number and a head in `trained` get it from its owner."""
        own = {
            number: head.to("cpu")
            for number, candidate in enumerate(candidates)
            if number in wanted and (head := trained.head_of(candidate)) is not None
        }
        heads = {number: head for part in self.group.gather(own) for number, head in part.items()}
        return [
            replace(candidate, head=heads[number].to(self.device)) if number in heads else candidate
            for number, candidate in enumerate(candidates)
        ]


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """This rank's heads, turn by turn."""

    ownership: Ownership
    """Which sets they read."""
    turns: list[dict[str, HeadStack]]
    """Kind -> stack, of each turn; empty where the rank owns nothing in it."""

    def deliveries(self, outputs: Tensor, micro: Micro) -> Iterator[tuple[int, Tensor]]:
        """Each turn with the tokens (S, B, N, d) of its heads; all ranks take all turns."""
        for turn in range(len(self.turns)):
            yield turn, self.ownership.deliver(outputs, micro.images, turn)

    def backward(self, outputs: Tensor, micro: Micro, labels: Tensor, weights: Tensor) -> None:
        """Add the gradients of a micro-batch."""
        for turn, tokens in self.deliveries(outputs, micro):
            for stack in self.turns[turn].values():
                stack.loss(tokens, labels, weights).backward()

    def head_of(self, candidate: Candidate) -> HeadStack | None:
        """A candidate's head, if this rank has it."""
        for turn, stacks in enumerate(self.turns):
            own, stack = self.ownership.own(turn), stacks.get(candidate.kind)
            if candidate.blocks in own and stack is not None and candidate.setting in stack.settings:
                return stack.select(own.index(candidate.blocks), stack.settings.index(candidate.setting))
        return None


def _best_numbers(candidates: Sequence[Candidate], kinds: Sequence[str], last: BlockSet) -> set[int]:
    """Positions of the best of each kind, and of the best on the block set `last` where that is among them."""
    has_last = any(candidate.blocks == last for candidate in candidates)
    wanted = [best(candidates, kind, blocks) for kind in kinds for blocks in ((None, last) if has_last else (None,))]
    return {number for number, candidate in enumerate(candidates) if any(candidate is each for each in wanted)}
