"""Train every candidate probe of one task and measure each on the hold-out; nothing here sees the test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness.config import ProbeSection
from harness.distributed import Group
from harness.probe_features import BlockSet, CachedTokens, Selection, StreamedTokens, batched
from harness.probe_heads import STACKS, HeadStack, Setting, StackedAdamW
from harness.probe_knn import NeighbourVotes

HEADS_GB = 8.0
"""Heads that train together, with gradients and optimiser state; more block sets train group by group."""

Scorer = Callable[[Tensor], Tensor]
"""Averaged tokens (1, B, N, d) -> class scores (B, K)."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One trained probe."""

    kind: str
    """`linear`, `attentive` or `knn`."""
    blocks: BlockSet
    """Blocks whose outputs it averages."""
    setting: Setting | None
    """Its optimiser setting; None for k-NN."""
    num_neighbours: int | None
    """k of k-NN."""
    holdout_top1: float
    """Accuracy on the hold-out."""
    holdout_loss: float
    """Cross-entropy on the hold-out (0 for k-NN, which has none)."""
    scorer: Scorer
    """Scores new tokens."""
    head: HeadStack | None = None
    """The trained head, alone in its stack; None for k-NN."""


@dataclass(frozen=True)
class Split:
    """The training split cut in two."""

    labels: Tensor
    """Of all training images (n,)."""
    fit: np.ndarray
    """Indices trained on, ascending."""
    held: np.ndarray
    """Indices of the hold-out, ascending."""
    num_classes: int
    """K."""


def grid(section: ProbeSection) -> tuple[Setting, ...]:
    """Every learning rate with every weight decay."""
    return tuple(Setting(lr=lr, weight_decay=wd) for lr, wd in product(section.lrs, section.weight_decays))


def best(candidates: Sequence[Candidate], kind: str, blocks: BlockSet | None = None) -> Candidate:
    """The highest hold-out accuracy of a kind, ties by hold-out loss, then by order; optionally for one block set."""
    pool = [c for c in candidates if c.kind == kind and blocks in (None, c.blocks)]
    return max(pool, key=lambda c: (c.holdout_top1, -c.holdout_loss))


class ProbeProgress:
    """The state of a streamed fit, a file per group of block sets, so that a killed job loses at most an epoch.

    `key` names everything the state depends on; a file with another key is ignored.
    """

    def __init__(self, folder: Path, task: str, key: str):
        self._folder = folder
        self._task = task
        self._key = key

    def _path(self, sets: Sequence[BlockSet]) -> Path:
        name = "_".join("-".join(map(str, blocks)) for blocks in (sets[0], sets[-1]))
        return self._folder / f"{self._task}.{name}.partial.pt"

    def save(
        self,
        sets: Sequence[BlockSet],
        stacks: Sequence[HeadStack],
        optimisers: Sequence[StackedAdamW],
        epochs_done: int,
    ) -> None:
        """Write aside, then rename."""
        state = {
            "key": self._key,
            "epochs_done": epochs_done,
            "stacks": [stack.state_dict() for stack in stacks],
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(sets)
        aside = path.with_suffix(".aside")
        torch.save(state, aside)
        aside.replace(path)

    def load(self, sets: Sequence[BlockSet], stacks: Sequence[HeadStack], optimisers: Sequence[StackedAdamW]) -> int:
        """Restore and return the number of epochs done; 0 when there is nothing to go on from."""
        path = self._path(sets)
        if not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["key"] != self._key:
            return 0
        for stack, values in zip(stacks, state["stacks"], strict=True):
            stack.load_state_dict(values)
        for optimiser, values in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        return int(state["epochs_done"])

    def clear(self) -> None:
        """Remove the files: the task is done."""
        for path in self._folder.glob(f"{self._task}.*.partial.*"):
            path.unlink()


@dataclass(frozen=True, kw_only=True)
class GridFit:
    """How the candidates of one task are trained."""

    split: Split
    """Which training images are fitted and which held out."""
    section: ProbeSection
    """Kinds, grid, epochs, batch size."""
    num_heads: int
    """Heads of the attentive probe."""
    seed: int
    """Draws the heads' start and the order of images."""
    group: Group
    """The ranks that share the work; the result does not depend on them but for the order of sums."""
    progress: ProbeProgress | None = None
    """Where a streamed fit saves its state after every epoch, to go on from there."""

    def candidates(self, source: CachedTokens | StreamedTokens, sets: Sequence[BlockSet]) -> list[Candidate]:
        """Every kind x block set x (learning rate, weight decay).

        With cached tokens the linear heads train on pooled tokens and the attentive ones a few block sets at a time;
        with streamed tokens all heads of all kinds train on each batch, so that the backbone runs once an epoch.
        """
        trained: list[str] = [kind for kind in self.section.kinds if kind in STACKS]
        found: list[Candidate] = []
        pooled: CachedTokens | StreamedTokens = source
        if isinstance(source, StreamedTokens):
            for some in self._groups(sets, trained, source.width, len(sets)) if trained else ():
                found += self._train(source.select(some), some, trained, self.progress)
        else:
            pooled = source.pooled()
            if "linear" in trained:
                for some in self._groups(sets, ["linear"], source.width, len(sets)):
                    found += self._train(pooled.select(some), some, ["linear"], None)
            if "attentive" in trained:
                for some in self._groups(sets, ["attentive"], source.width, source.sets_at_once(len(sets))):
                    found += self._train(source.select(some), some, ["attentive"], None)
        if "knn" in self.section.kinds:
            found += self._neighbours(pooled.select(sets), sets)
        return found

    def _groups(self, sets: Sequence[BlockSet], kinds: Sequence[str], width: int, at_once: int) -> list[list[BlockSet]]:
        """The sets in groups of at most `at_once` whose heads and optimiser state stay within `HEADS_GB` together."""
        num_params = sum(STACKS[kind].num_params(width, self.split.num_classes) for kind in kinds)
        # a value, its gradient and two moments, 4 bytes each
        fitting = int(HEADS_GB * 1e9 / (16 * num_params * len(grid(self.section))))
        return [[sets[i] for i in part] for part in batched(range(len(sets)), max(1, min(at_once, fitting)))]

    def _train(
        self, selection: Selection, sets: Sequence[BlockSet], kinds: Sequence[str], progress: ProbeProgress | None
    ) -> list[Candidate]:
        section, fit = self.section, self.split.fit
        stacks = self._stacks(selection, len(sets), kinds)
        num_steps = section.epochs * math.ceil(len(fit) / section.batch_size)
        optimisers = [StackedAdamW(stack, num_steps=num_steps) for stack in stacks]
        epochs_done = progress.load(sets, stacks, optimisers) if progress else 0
        if not epochs_done:
            for chunk in selection.batches(fit, section.batch_size):
                for stack in stacks:
                    stack.observe(chunk.tokens)
            for stack in stacks:
                sums, squares, count = stack.statistics()
                self.group.sum_(sums)
                self.group.sum_(squares)
                stack.freeze(sums, squares, self.group.sum_and_any(count, False)[0])
        for epoch in range(epochs_done, section.epochs):
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(fit)
            for chunk in selection.batches(order, section.batch_size, epoch):
                for stack, optimiser in zip(stacks, optimisers, strict=True):
                    stack.loss(chunk.tokens, chunk.labels, chunk.batch_size).backward()
                    if chunk.ends_batch:
                        self._sum_gradients(stack)
                        optimiser.step()
            if progress and self.group.is_first:
                progress.save(sets, stacks, optimisers, epoch + 1)
        return self._measure(selection, sets, stacks)

    def _sum_gradients(self, stack: HeadStack) -> None:
        for parameter in stack.parameters():
            assert parameter.grad is not None
            self.group.sum_(parameter.grad)

    def _stacks(self, selection: Selection, num_sets: int, kinds: Sequence[str]) -> list[HeadStack]:
        tokens = next(selection.batches(self.split.fit[:1], 1)).tokens
        return [
            STACKS[kind](
                num_sets=num_sets,
                settings=grid(self.section),
                width=tokens.shape[3],
                num_classes=self.split.num_classes,
                num_heads=self.num_heads,
                generator=torch.Generator().manual_seed(self.seed),
                device=tokens.device,
            )
            for kind in kinds
        ]

    @torch.no_grad()
    def _measure(self, selection: Selection, sets: Sequence[BlockSet], stacks: Sequence[HeadStack]) -> list[Candidate]:
        """Hold-out accuracy and loss of every head of the stacks."""
        held = self.split.held
        correct = [stack.mean.new_zeros(len(sets), len(stack.settings)) for stack in stacks]
        losses = [total.clone() for total in correct]
        for tokens, labels, _, _ in selection.batches(held, self.section.batch_size):
            for stack, right, loss in zip(stacks, correct, losses, strict=True):
                logits = stack(tokens)
                right += (logits.argmax(3) == labels[None, :, None]).sum(1)
                targets = labels[None, :, None].expand(logits.shape[:3])
                loss += functional.cross_entropy(logits.movedim(3, 1), targets, reduction="none").sum(1)
        for total in correct + losses:
            self.group.sum_(total)
        return [
            Candidate(
                kind=stack.kind,
                blocks=blocks,
                setting=setting,
                num_neighbours=None,
                holdout_top1=float(right[s, g]) / len(held),
                holdout_loss=float(loss[s, g]) / len(held),
                scorer=_head_scorer(head),
                head=head,
            )
            for stack, right, loss in zip(stacks, correct, losses, strict=True)
            for s, blocks in enumerate(sets)
            for g, setting in enumerate(stack.settings)
            for head in [stack.only(s, g)]
        ]

    @torch.no_grad()
    def _neighbours(self, pooled: Selection, sets: Sequence[BlockSet]) -> list[Candidate]:
        """k-NN for every block set and k; every rank holds the whole bank of pooled vectors."""

        def vectors(indices: np.ndarray) -> tuple[Tensor, Tensor]:
            batches = list(pooled.batches(indices, self.section.batch_size))
            means = torch.cat([chunk.tokens.float().mean(2) for chunk in batches], dim=1)
            labels = torch.cat([chunk.labels for chunk in batches])
            parts = self.group.gather((means.cpu(), labels.cpu()))
            # back into ascending order of images, which ranks hold in turns
            owned = np.concatenate([indices[indices % len(parts) == rank] for rank in range(len(parts))])
            places = torch.as_tensor(np.argsort(owned))
            everything = torch.cat([part[0] for part in parts], dim=1)[:, places]
            return everything.to(means.device), torch.cat([part[1] for part in parts])[places].to(means.device)

        bank, fit_labels = vectors(self.split.fit)
        queries, held_labels = vectors(self.split.held)
        found = []
        for blocks, stored, asked in zip(sets, bank, queries, strict=True):
            neighbours = NeighbourVotes(stored, fit_labels, self.split.num_classes)
            ks = neighbours.candidates()
            for k, votes in zip(ks, neighbours.votes(asked, ks), strict=True):
                found.append(
                    Candidate(
                        kind="knn",
                        blocks=blocks,
                        setting=None,
                        num_neighbours=k,
                        holdout_top1=float((votes.argmax(1) == held_labels).float().mean()),
                        holdout_loss=0.0,
                        scorer=_vote_scorer(neighbours, k),
                    )
                )
        return found


def _head_scorer(head: HeadStack) -> Scorer:
    @torch.no_grad()
    def scorer(tokens: Tensor) -> Tensor:
        return head(tokens)[0, :, 0]

    return scorer


def _vote_scorer(neighbours: NeighbourVotes, k: int) -> Scorer:
    @torch.no_grad()
    def scorer(tokens: Tensor) -> Tensor:
        return neighbours.votes(tokens[0].float().mean(1), (k,))[0]

    return scorer
