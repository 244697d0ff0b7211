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
    """The state of a streamed fit in one file, so that a killed job loses at most an epoch.

    `key` names everything the state depends on; a file with another key is ignored.
    """

    def __init__(self, path: Path, key: str):
        self._path = path
        self._key = key

    def save(self, stacks: Sequence[HeadStack], optimisers: Sequence[StackedAdamW], epochs_done: int) -> None:
        """Write aside, then rename."""
        state = {
            "key": self._key,
            "epochs_done": epochs_done,
            "stacks": [stack.state_dict() for stack in stacks],
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".aside")
        torch.save(state, aside)
        aside.replace(self._path)

    def load(self, stacks: Sequence[HeadStack], optimisers: Sequence[StackedAdamW]) -> int:
        """Restore and return the number of epochs done; 0 when there is nothing to go on from."""
        if not self._path.exists():
            return 0
        state = torch.load(self._path, map_location="cpu", weights_only=True)
        if state["key"] != self._key:
            return 0
        for stack, values in zip(stacks, state["stacks"], strict=True):
            stack.load_state_dict(values)
        for optimiser, values in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        return int(state["epochs_done"])

    def clear(self) -> None:
        """Remove the file: the task is done."""
        self._path.unlink(missing_ok=True)


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
        if isinstance(source, StreamedTokens):
            whole = source.select(sets)
            if trained:
                found += self._train(whole, sets, trained, self.progress)
        else:
            whole = source.pooled().select(sets)
            if "linear" in trained:
                found += self._train(whole, sets, ["linear"], None)
            if "attentive" in trained:
                for part in batched(range(len(sets)), source.sets_at_once(len(sets))):
                    some = [sets[i] for i in part]
                    found += self._train(source.select(some), some, ["attentive"], None)
        if "knn" in self.section.kinds:
            found += self._neighbours(whole, sets)
        return found

    def _train(
        self, selection: Selection, sets: Sequence[BlockSet], kinds: Sequence[str], progress: ProbeProgress | None
    ) -> list[Candidate]:
        section, fit = self.section, self.split.fit
        stacks = self._stacks(selection, len(sets), kinds)
        num_steps = section.epochs * math.ceil(len(fit) / section.batch_size)
        optimisers = [StackedAdamW(stack, num_steps=num_steps) for stack in stacks]
        epochs_done = progress.load(stacks, optimisers) if progress else 0
        if not epochs_done:
            for tokens, _, _ in selection.batches(fit, section.batch_size):
                for stack in stacks:
                    stack.observe(tokens)
            for stack in stacks:
                sums, squares, count = stack.statistics()
                self.group.sum_(sums)
                self.group.sum_(squares)
                stack.freeze(sums, squares, self.group.sum_and_any(count, False)[0])
        for epoch in range(epochs_done, section.epochs):
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(fit)
            for tokens, labels, batch_size in selection.batches(order, section.batch_size, epoch):
                for stack, optimiser in zip(stacks, optimisers, strict=True):
                    stack.loss(tokens, labels, batch_size).backward()
                    for parameter in stack.parameters():
                        assert parameter.grad is not None
                        self.group.sum_(parameter.grad)
                    optimiser.step()
            if progress and self.group.is_first:
                progress.save(stacks, optimisers, epoch + 1)
        return self._measure(selection, sets, stacks)

    def _stacks(self, selection: Selection, num_sets: int, kinds: Sequence[str]) -> list[HeadStack]:
        tokens, _, _ = next(selection.batches(self.split.fit[:1], 1))
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
        for tokens, labels, _ in selection.batches(held, self.section.batch_size):
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
            means = torch.cat([tokens.float().mean(2) for tokens, _, _ in batches], dim=1)
            labels = torch.cat([labels for _, labels, _ in batches])
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
