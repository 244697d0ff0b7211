"""Train every candidate probe of one task and measure each on the hold-out; nothing here sees the test split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features import BlockSet, CachedTokens, Selection, StreamedTokens, batched
from aimscale.harness.probe.files import Pause
from aimscale.harness.probe.heads import STACKS, HeadStack, Setting, StackedAdamW
from aimscale.harness.probe.knn import NeighbourVotes
from aimscale.harness.probe.progress import ProbeProgress
from aimscale.harness.run.config import ProbeSection

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

    @property
    def everything(self) -> np.ndarray:
        """Indices of both parts, ascending."""
        return np.sort(np.concatenate([self.fit, self.held]))


@dataclass(frozen=True, kw_only=True)
class Team:
    """Heads of one kind that train together: every block set with every setting."""

    kind: str
    """`linear` or `attentive`."""
    sets: tuple[BlockSet, ...]
    """Block sets."""
    settings: tuple[Setting, ...]
    """Optimiser settings."""

    def rows(self, tokens: Tensor, sets: Sequence[BlockSet]) -> Tensor:
        """Its part (S', B, N, d) of the tokens (S, B, N, d) of `sets`."""
        if tuple(sets) == self.sets:
            return tokens
        return tokens[[list(sets).index(blocks) for blocks in self.sets]]


def grid(section: ProbeSection) -> tuple[Setting, ...]:
    """Every learning rate with every weight decay."""
    return tuple(Setting(lr=lr, weight_decay=wd) for lr, wd in product(section.lrs, section.weight_decays))


def best(candidates: Sequence[Candidate], kind: str, blocks: BlockSet | None = None) -> Candidate:
    """The highest hold-out accuracy of a kind, ties by hold-out loss, then by order; optionally for one block set."""
    pool = [c for c in candidates if c.kind == kind and blocks in (None, c.blocks)]
    return max(pool, key=lambda c: (c.holdout_top1, -c.holdout_loss))


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
    pause: Pause = lambda: None
    """Called after every save."""

    def candidates(self, source: CachedTokens | StreamedTokens, sets: Sequence[BlockSet]) -> list[Candidate]:
        """Every kind x block set x (learning rate, weight decay), trained on the fit part.

        With cached tokens the linear heads train on pooled tokens and the attentive ones a few block sets at a time;
        with streamed tokens all heads of all kinds train on each batch, so that the backbone runs once an epoch.
        """
        kinds: list[str] = [kind for kind in self.section.kinds if kind in STACKS]
        found: list[Candidate] = []
        if isinstance(source, StreamedTokens):
            for some in self._groups(sets, kinds, source.width, len(sets)) if kinds else ():
                part = "_".join("-".join(map(str, blocks)) for blocks in (some[0], some[-1]))
                teams = [Team(kind=kind, sets=tuple(some), settings=grid(self.section)) for kind in kinds]
                selection = source.select(some)
                stacks = self._train(selection, some, teams, self.split.fit, part)
                found += self._measure(selection, some, teams, stacks)
        else:
            for kind in kinds:
                at_once = source.sets_at_once(len(sets)) if kind == "attentive" else len(sets)
                tokens = source if kind == "attentive" else source.pooled
                for some in self._groups(sets, [kind], source.width, at_once):
                    teams = [Team(kind=kind, sets=tuple(some), settings=grid(self.section))]
                    selection = tokens.select(some)
                    stacks = self._train(selection, some, teams, self.split.fit)
                    found += self._measure(selection, some, teams, stacks)
        if "knn" in self.section.kinds:
            found += self._neighbours(_pooled(source).select(sets), sets)
        return found

    def refit(self, source: CachedTokens | StreamedTokens, chosen: Sequence[Candidate]) -> list[Candidate]:
        """The same candidates, in their order, trained (k-NN: filled) once more on the whole training split.

        What the hold-out said of them stays theirs: it is what they were chosen by.
        """
        teams = []
        for kind in dict.fromkeys(candidate.kind for candidate in chosen if candidate.kind in STACKS):
            alike = [candidate for candidate in chosen if candidate.kind == kind]
            settings = tuple(dict.fromkeys(candidate.setting for candidate in alike if candidate.setting))
            blocks = tuple(dict.fromkeys(candidate.blocks for candidate in alike))
            teams.append(Team(kind=kind, sets=blocks, settings=settings))
        heads: dict[tuple[str, BlockSet, Setting | None], HeadStack] = {}
        # where tokens are streamed the backbone runs once an epoch for all of them, and every epoch is saved
        streamed = isinstance(source, StreamedTokens)
        for some in [teams] if streamed else [[team] for team in teams]:
            sets = list(dict.fromkeys(blocks for team in some for blocks in team.sets))
            tokens = source if any(team.kind == "attentive" for team in some) else _pooled(source)
            if not some:
                continue
            part = "refit" if streamed else None
            stacks = self._train(tokens.select(sets), sets, some, self.split.everything, part)
            heads |= {
                (team.kind, blocks, setting): stack.select(s, g)
                for team, stack in zip(some, stacks, strict=True)
                for s, blocks in enumerate(team.sets)
                for g, setting in enumerate(team.settings)
            }
        near = [candidate for candidate in chosen if candidate.kind == "knn"]
        banks = self._banks(source, dict.fromkeys(candidate.blocks for candidate in near)) if near else {}
        again = []
        for candidate in chosen:
            if candidate.num_neighbours is None:
                head = heads[candidate.kind, candidate.blocks, candidate.setting]
                again.append(replace(candidate, scorer=_head_scorer(head), head=head))
            else:
                scorer = _vote_scorer(banks[candidate.blocks], candidate.num_neighbours)
                again.append(replace(candidate, scorer=scorer))
        return again

    def _groups(self, sets: Sequence[BlockSet], kinds: Sequence[str], width: int, at_once: int) -> list[list[BlockSet]]:
        """The sets in groups of at most `at_once` whose heads and optimiser state stay within `HEADS_GB` together."""
        num_params = sum(STACKS[kind].num_params(width, self.split.num_classes) for kind in kinds)
        # a value, its gradient and two moments, 4 bytes each
        fitting = int(HEADS_GB * 1e9 / (16 * num_params * len(grid(self.section))))
        return [[sets[i] for i in part] for part in batched(range(len(sets)), max(1, min(at_once, fitting)))]

    def _train(
        self,
        selection: Selection,
        sets: Sequence[BlockSet],
        teams: Sequence[Team],
        images: np.ndarray,
        part: str | None = None,
    ) -> list[HeadStack]:
        """Train a stack a team on these images; a named part is saved after every epoch and goes on from there."""
        section = self.section
        stacks = self._stacks(selection, teams)
        num_steps = section.epochs * math.ceil(len(images) / section.batch_size)
        optimisers = [StackedAdamW(stack, num_steps=num_steps) for stack in stacks]
        progress = self.progress if part else None
        saved = progress.load(str(part)) if progress else None
        if saved:
            for stack, values in zip(stacks, saved["stacks"], strict=True):
                stack.load_state_dict(values)
            for optimiser, values in zip(optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(values)
        else:
            self._observe(selection, sets, teams, stacks, images)
        for epoch in range(saved["epochs_done"] if saved else 0, section.epochs):
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(images)
            for chunk in selection.batches(order, section.batch_size, epoch):
                for team, stack, optimiser in zip(teams, stacks, optimisers, strict=True):
                    tokens = team.rows(chunk.tokens, sets)
                    stack.loss(tokens, chunk.labels, chunk.batch_size).backward()
                    if chunk.ends_batch:
                        self._sum_gradients(stack)
                        optimiser.step()
            if progress and part:
                if self.group.is_first:
                    state = {
                        "epochs_done": epoch + 1,
                        "stacks": [stack.state_dict() for stack in stacks],
                        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                    }
                    progress.save(part, state)
                self.pause()
        return stacks

    def _observe(
        self,
        selection: Selection,
        sets: Sequence[BlockSet],
        teams: Sequence[Team],
        stacks: Sequence[HeadStack],
        images: np.ndarray,
    ) -> None:
        """Give the stacks the statistics of these images, of all ranks."""
        for chunk in selection.batches(images, self.section.batch_size):
            for team, stack in zip(teams, stacks, strict=True):
                stack.observe(team.rows(chunk.tokens, sets))
        for stack in stacks:
            sums, squares, count = stack.statistics()
            self.group.sum_tensor(sums)
            self.group.sum_tensor(squares)
            stack.freeze(sums, squares, self.group.sum_counts(count)[0])

    def _sum_gradients(self, stack: HeadStack) -> None:
        for parameter in stack.parameters():
            assert parameter.grad is not None
            self.group.sum_tensor(parameter.grad)

    def _stacks(self, selection: Selection, teams: Sequence[Team]) -> list[HeadStack]:
        tokens = next(selection.batches(self.split.fit[:1], 1)).tokens
        return [
            STACKS[team.kind](
                num_sets=len(team.sets),
                settings=team.settings,
                width=tokens.shape[3],
                num_classes=self.split.num_classes,
                num_heads=self.num_heads,
                generator=torch.Generator().manual_seed(self.seed),
                device=tokens.device,
            )
            for team in teams
        ]

    @torch.no_grad()
    def _measure(
        self, selection: Selection, sets: Sequence[BlockSet], teams: Sequence[Team], stacks: Sequence[HeadStack]
    ) -> list[Candidate]:
        """Hold-out accuracy and loss of every head of the stacks."""
        held = self.split.held
        correct = [
            stack.mean.new_zeros(len(team.sets), len(team.settings)) for team, stack in zip(teams, stacks, strict=True)
        ]
        losses = [total.clone() for total in correct]
        for chunk in selection.batches(held, self.section.batch_size):
            labels = chunk.labels
            for team, stack, right, loss in zip(teams, stacks, correct, losses, strict=True):
                logits = stack(team.rows(chunk.tokens, sets))
                right += (logits.argmax(3) == labels[None, :, None]).sum(1)
                targets = labels[None, :, None].expand(logits.shape[:3])
                loss += functional.cross_entropy(logits.movedim(3, 1), targets, reduction="none").sum(1)
        for total in correct + losses:
            self.group.sum_tensor(total)
        return [
            Candidate(
                kind=team.kind,
                blocks=blocks,
                setting=setting,
                num_neighbours=None,
                holdout_top1=float(right[s, g]) / len(held),
                holdout_loss=float(loss[s, g]) / len(held),
                scorer=_head_scorer(head),
                head=head,
            )
            for team, stack, right, loss in zip(teams, stacks, correct, losses, strict=True)
            for s, blocks in enumerate(team.sets)
            for g, setting in enumerate(team.settings)
            for head in [stack.select(s, g)]
        ]

    @torch.no_grad()
    def _vectors(self, pooled: Selection, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean-pooled vectors (S, n, d) and labels (n,) of these images, ascending, all of them on every rank."""
        batches = list(pooled.batches(indices, self.section.batch_size))
        means = torch.cat([chunk.tokens.float().mean(2) for chunk in batches], dim=1)
        labels = torch.cat([chunk.labels for chunk in batches])
        parts = self.group.gather((means.cpu(), labels.cpu()))
        # back into ascending order of images, which ranks hold in turns
        owned = np.concatenate([indices[indices % len(parts) == rank] for rank in range(len(parts))])
        places = torch.as_tensor(np.argsort(owned))
        everything = torch.cat([part[0] for part in parts], dim=1)[:, places]
        return everything.to(means.device), torch.cat([part[1] for part in parts])[places].to(means.device)

    def _banks(self, source: CachedTokens | StreamedTokens, sets: Iterable[BlockSet]) -> dict[BlockSet, NeighbourVotes]:
        """Banks of the whole training split."""
        sets = list(sets)
        vectors, labels = self._vectors(_pooled(source).select(sets), self.split.everything)
        return {
            blocks: NeighbourVotes(stored, labels, self.split.num_classes)
            for blocks, stored in zip(sets, vectors, strict=True)
        }

    @torch.no_grad()
    def _neighbours(self, pooled: Selection, sets: Sequence[BlockSet]) -> list[Candidate]:
        """k-NN for every block set and k, filled with the fit part."""
        bank, fit_labels = self._vectors(pooled, self.split.fit)
        queries, held_labels = self._vectors(pooled, self.split.held)
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


def _pooled(source: CachedTokens | StreamedTokens) -> CachedTokens | StreamedTokens:
    """Mean over tokens as one token where the tokens are cached; a stream is pooled as it comes."""
    return source.pooled if isinstance(source, CachedTokens) else source


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
