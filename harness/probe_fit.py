"""Train every candidate probe of one task and measure each on the hold-out; nothing here sees the test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harness.config import ProbeSection
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


@dataclass(frozen=True)
class Split:
    """The training split cut in two."""

    labels: Tensor
    """Of all training images (n,)."""
    fit: np.ndarray
    """Indices trained on."""
    held: np.ndarray
    """Indices of the hold-out."""
    num_classes: int
    """K."""


def best(candidates: Sequence[Candidate], kind: str, blocks: BlockSet | None = None) -> Candidate:
    """The highest hold-out accuracy of a kind, ties by hold-out loss, then by order; optionally for one block set."""
    pool = [c for c in candidates if c.kind == kind and blocks in (None, c.blocks)]
    return max(pool, key=lambda c: (c.holdout_top1, -c.holdout_loss))


def fit_candidates(
    source: CachedTokens | StreamedTokens,
    split: Split,
    section: ProbeSection,
    sets: Sequence[BlockSet],
    *,
    num_heads: int,
    seed: int,
) -> list[Candidate]:
    """Every kind x block set x (learning rate, weight decay) of a task.

    With cached tokens the linear heads train on pooled tokens and the attentive ones a few block sets at a time; with
    streamed tokens all heads of all kinds train on each batch, so that the backbone runs once an epoch.
    """
    trained: list[str] = [kind for kind in section.kinds if kind in STACKS]
    if isinstance(source, StreamedTokens):
        whole = source.select(sets)
        candidates = _train_group(whole, sets, trained, split, section, num_heads, seed) if trained else []
    else:
        whole = source.pooled().select(sets)
        candidates = []
        if "linear" in trained:
            candidates += _train_group(whole, sets, ["linear"], split, section, num_heads, seed)
        if "attentive" in trained:
            for chunk in batched_sets(sets, source.sets_at_once(len(sets))):
                candidates += _train_group(source.select(chunk), chunk, ["attentive"], split, section, num_heads, seed)
    if "knn" in section.kinds:
        candidates += _neighbours(whole, sets, split, section.batch_size)
    return candidates


def batched_sets(sets: Sequence[BlockSet], size: int) -> list[Sequence[BlockSet]]:
    """The sets in groups of `size`."""
    return [[sets[i] for i in part] for part in batched(range(len(sets)), size)]


def _train_group(
    selection: Selection,
    sets: Sequence[BlockSet],
    kinds: Sequence[str],
    split: Split,
    section: ProbeSection,
    num_heads: int,
    seed: int,
) -> list[Candidate]:
    settings = tuple(Setting(lr=lr, weight_decay=wd) for lr, wd in product(section.lrs, section.weight_decays))
    stacks: list[HeadStack] = []
    for tokens, _ in selection.batches(split.fit, section.batch_size):
        if not stacks:
            stacks = [
                STACKS[kind](
                    num_sets=len(sets),
                    settings=settings,
                    width=tokens.shape[3],
                    num_classes=split.num_classes,
                    num_heads=num_heads,
                    generator=torch.Generator().manual_seed(seed),
                    device=tokens.device,
                )
                for kind in kinds
            ]
        for stack in stacks:
            stack.observe(tokens)
    num_steps = section.epochs * math.ceil(len(split.fit) / section.batch_size)
    for stack in stacks:
        stack.freeze(*stack.statistics())
    optimisers = [StackedAdamW(stack, num_steps=num_steps) for stack in stacks]
    for epoch in range(section.epochs):
        order = np.random.default_rng([seed, 1, epoch]).permutation(split.fit)
        for tokens, labels in selection.batches(order, section.batch_size):
            for stack, optimiser in zip(stacks, optimisers, strict=True):
                stack.loss(tokens, labels, len(labels)).backward()
                optimiser.step()
    return _measure(selection, sets, stacks, split, section.batch_size)


@torch.no_grad()
def _measure(
    selection: Selection, sets: Sequence[BlockSet], stacks: Sequence[HeadStack], split: Split, batch_size: int
) -> list[Candidate]:
    """Hold-out accuracy and loss of every head of the stacks."""
    correct = [torch.zeros(stack.rstd.shape[0], len(stack.settings)) for stack in stacks]
    losses = [total.clone() for total in correct]
    for tokens, labels in selection.batches(split.held, batch_size):
        for stack, right, loss in zip(stacks, correct, losses, strict=True):
            logits = stack(tokens)
            right += (logits.argmax(3) == labels[None, :, None]).sum(1).cpu()
            targets = labels[None, :, None].expand(logits.shape[:3])
            loss += functional.cross_entropy(logits.movedim(3, 1), targets, reduction="none").sum(1).cpu()
    return [
        Candidate(
            kind=stack.kind,
            blocks=blocks,
            setting=setting,
            num_neighbours=None,
            holdout_top1=float(right[s, g]) / len(split.held),
            holdout_loss=float(loss[s, g]) / len(split.held),
            scorer=_head_scorer(stack.only(s, g)),
        )
        for stack, right, loss in zip(stacks, correct, losses, strict=True)
        for s, blocks in enumerate(sets)
        for g, setting in enumerate(stack.settings)
    ]


def _head_scorer(head: HeadStack) -> Scorer:
    @torch.no_grad()
    def scorer(tokens: Tensor) -> Tensor:
        return head(tokens)[0, :, 0]

    return scorer


@torch.no_grad()
def _neighbours(pooled: Selection, sets: Sequence[BlockSet], split: Split, batch_size: int) -> list[Candidate]:
    """k-NN for every block set and k."""

    def vectors(indices: np.ndarray) -> Tensor:
        return torch.cat([tokens.float().mean(2) for tokens, _ in pooled.batches(indices, batch_size)], dim=1)

    bank, queries = vectors(split.fit), vectors(split.held)
    fit_labels = split.labels[torch.as_tensor(split.fit)].to(bank.device)
    held_labels = split.labels[torch.as_tensor(split.held)].to(bank.device)
    candidates = []
    for blocks, stored, asked in zip(sets, bank, queries, strict=True):
        neighbours = NeighbourVotes(stored, fit_labels, split.num_classes)
        ks = neighbours.candidates()
        for k, votes in zip(ks, neighbours.votes(asked, ks), strict=True):
            candidates.append(
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
    return candidates


def _vote_scorer(neighbours: NeighbourVotes, k: int) -> Scorer:
    @torch.no_grad()
    def scorer(tokens: Tensor) -> Tensor:
        return neighbours.votes(tokens[0].float().mean(1), (k,))[0]

    return scorer
