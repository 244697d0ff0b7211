"""LoRA adaptation (rank 8; AIM paper, Table 8): the third protocol on a probe's tasks, and not a frozen feature.

Low-rank updates of all linears of the trunk train together with an attentive head on the fixed block set (the last
six), once for every point of the grid; the hold-out chooses, the test split is scored once. The paper gives the rank
alone: optimiser, schedule and views are those of the probes. The head standardises by the statistics of the
unadapted features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from aim.lora import add_lora
from aim.model import AIM
from harness.config import ProbeSection
from harness.distributed import Group
from harness.probe_features import BlockSet, LabelledImages, batched, share
from harness.probe_fit import Split, grid
from harness.probe_heads import CLIP_NORM, AttentiveStack, Setting, learning_rate
from harness.probe_score import Answers, answers

RANK = 8
"""Of the updates (paper, Table 8)."""
MICRO_BATCH = 32
"""Images whose activations are held at a time."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """The chosen adaptation."""

    setting: Setting
    """Its point of the grid."""
    holdout_top1: float
    """Accuracy on the hold-out."""
    grid: list[tuple[Setting, float]]
    """Every point with its hold-out accuracy."""
    given: Answers
    """Answers on the test split."""
    num_trained: int
    """Trained parameters: updates and head."""


def adapt(
    model: AIM,
    section: ProbeSection,
    split: Split,
    train: LabelledImages,
    test: LabelledImages,
    *,
    blocks: BlockSet,
    seed: int,
    group: Group,
) -> Adapted:
    """Adapt copies of `model`, which itself is left alone; all ranks call this together."""
    points: list[tuple[Setting, float]] = []
    chosen: _Adaptation | None = None
    for setting in grid(section):
        adaptation = _Adaptation(model, setting, section, split, train, blocks, seed, group)
        adaptation.train()
        accuracy = adaptation.holdout_top1()
        if chosen is None or accuracy > max(top1 for _, top1 in points):
            chosen = adaptation
        points.append((setting, accuracy))
    assert chosen is not None
    return Adapted(
        setting=chosen.setting,
        holdout_top1=max(top1 for _, top1 in points),
        grid=points,
        given=chosen.answers(test, np.arange(len(test))),
        num_trained=sum(parameter.numel() for parameter in chosen.trained),
    )


class _Adaptation:
    """One adapted copy of a model with its head."""

    def __init__(
        self,
        model: AIM,
        setting: Setting,
        section: ProbeSection,
        split: Split,
        train: LabelledImages,
        blocks: BlockSet,
        seed: int,
        group: Group,
    ):
        self.setting = setting
        self._section, self._split, self._train_images = section, split, train
        self._blocks, self._seed, self._group = blocks, seed, group
        self._model = copy.deepcopy(model).float()
        self._model.set_activation_checkpointing(True)
        updates = add_lora(self._model, rank=RANK, seed=seed)
        self._device = updates[0].device
        self._head = AttentiveStack(
            num_sets=1,
            settings=(setting,),
            width=model.config.width,
            num_classes=split.num_classes,
            num_heads=model.config.num_heads,
            generator=torch.Generator().manual_seed(seed),
            device=self._device,
        )
        self.trained: list[nn.Parameter] = [*updates, *self._head.parameters()]

    def train(self) -> None:
        """All epochs."""
        section, fit = self._section, self._split.fit
        with torch.no_grad():
            for chunk in batched(share(fit.tolist(), self._group), MICRO_BATCH):
                self._head.observe(self._tokens(self._train_images.images(chunk)))
        sums, squares, count = self._head.statistics()
        self._group.sum_(sums)
        self._group.sum_(squares)
        self._head.freeze(sums, squares, self._group.sum_and_any(count, False)[0])
        optimiser = torch.optim.AdamW(self.trained, betas=(0.9, 0.999), weight_decay=self.setting.weight_decay)
        num_steps, step = section.epochs * math.ceil(len(fit) / section.batch_size), 0
        for epoch in range(section.epochs):
            order = np.random.default_rng([self._seed, 1, epoch]).permutation(fit)
            for part in batched(order, section.batch_size):
                self._accumulate(part, epoch)
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(self.setting.lr, step, num_steps)
                torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
                optimiser.step()
                step += 1

    def holdout_top1(self) -> float:
        """Accuracy on the hold-out."""
        held = self._split.held
        given = self.answers(self._train_images, held)
        return float((given.predicted == self._train_images.labels[torch.as_tensor(held)]).float().mean())

    @torch.no_grad()
    def answers(self, images: LabelledImages, indices: np.ndarray) -> Answers:
        """What the adapted model says about some images, in their order, on every rank."""
        predicted = torch.zeros(len(images), dtype=torch.int64, device=self._device)
        in_top5 = torch.zeros(len(images), dtype=torch.int64, device=self._device)
        for chunk in batched(share(indices.tolist(), self._group), MICRO_BATCH):
            scores = self._head(self._tokens(images.images(chunk)))[0, :, 0]
            part = answers(scores, images.labels[chunk])
            predicted[chunk], in_top5[chunk] = part.predicted.to(self._device), part.in_top5.long().to(self._device)
        rows = torch.as_tensor(indices)
        return Answers(self._group.sum_(predicted).cpu()[rows], self._group.sum_(in_top5).cpu()[rows].bool())

    def _tokens(self, images: Tensor) -> Tensor:
        """Averaged tokens (1, B, N, d)."""
        return self._model.features(images.to(self._device), self._blocks).mean(0, keepdim=True)

    def _accumulate(self, part: Sequence[int], epoch: int) -> None:
        """Gradients of one batch, summed over micro-batches and ranks."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        for chunk in batched(share(part, self._group), MICRO_BATCH):
            labels = self._train_images.labels[chunk].to(self._device)
            tokens = self._tokens(self._train_images.images(chunk, epoch))
            self._head.loss(tokens, labels, len(part)).backward()
        for parameter in self.trained:
            assert parameter.grad is not None
            self._group.sum_(parameter.grad)
