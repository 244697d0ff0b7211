"""LoRA adaptation (rank 8; AIM paper, Table 8): the third protocol on a probe's tasks, and not a frozen feature.

Low-rank updates of the trunk's query, value and output projections (`aim.lora`) train together with an attentive head
on the fixed block set (the last six), once for every learning rate; the hold-out chooses, the chosen one trains
once more on the whole training split, and the test split is scored once. Optimiser, schedule and views are those of the
probes. The head standardises by the statistics of the unadapted features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from aimscale.aim.lora import add_lora
from aimscale.aim.model import AIM
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.extraction import Pause, batched, share
from aimscale.harness.probe.features.images import LabelledImages
from aimscale.harness.probe.features.moments import Moments
from aimscale.harness.probe.features.sizes import BlockSet, number_of_steps
from aimscale.harness.probe.heads.fit import Split
from aimscale.harness.probe.heads.scores import Answers, answers, together
from aimscale.harness.probe.heads.stacks import CLIP_NORM, WEIGHT_DECAY, AttentiveStack, learning_rate
from aimscale.harness.run.config import ProbeSection

RANK = 8
"""Of the updates (paper, Table 8)."""
MICRO_BATCH = 32
"""Images whose activations are held at a time."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """The chosen adaptation."""

    lr: float
    holdout_top1: float
    grid: list[tuple[float, float]]
    """Every learning rate with its hold-out accuracy."""
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
    pause: Pause = lambda: None,
) -> Adapted:
    """Adapt copies of `model`, which itself is left alone; all ranks call this together."""

    def adapted(lr: float, images: np.ndarray) -> _Adaptation:
        one = _Adaptation(model, section, split.num_classes, train, blocks, seed, group)
        one.train(images, lr, pause)
        return one

    held = torch.as_tensor(split.held)
    points = [
        float((adapted(lr, split.fit).answers(train, split.held).predicted[held] == split.labels[held]).float().mean())
        for lr in section.lrs
    ]
    winner = points.index(max(points))
    chosen = adapted(section.lrs[winner], split.everything)
    return Adapted(
        lr=section.lrs[winner],
        holdout_top1=points[winner],
        grid=list(zip(section.lrs, points, strict=True)),
        given=chosen.answers(test, np.arange(len(test))),
        num_trained=sum(parameter.numel() for parameter in chosen.trained),
    )


class _Adaptation:
    """One adapted copy of a model with its head."""

    def __init__(
        self,
        model: AIM,
        section: ProbeSection,
        num_classes: int,
        train: LabelledImages,
        blocks: BlockSet,
        seed: int,
        group: Group,
    ):
        self._section, self._train_images = section, train
        self._blocks, self._seed, self._group = blocks, seed, group
        self._model = copy.deepcopy(model).float()
        self._model.set_activation_checkpointing(True)
        updates = add_lora(self._model, rank=RANK, seed=seed)
        self._device = updates[0].device
        self._head = AttentiveStack(
            num_sets=1,
            lrs=section.lrs[:1],  # one head
            width=model.config.width,
            num_classes=num_classes,
            num_heads=model.config.num_heads,
            generator=torch.Generator().manual_seed(seed),
            device=self._device,
        )
        self.trained: list[nn.Parameter] = [*updates, *self._head.parameters()]

    def train(self, images: np.ndarray, lr: float, pause: Pause) -> None:
        """All steps on these images, at this peak of the learning rate."""
        optimiser = torch.optim.AdamW(self.trained, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY)
        self._observe(images)
        num_steps = number_of_steps(self._section, len(images))
        step, epoch = 0, 0
        while step < num_steps:
            order = np.random.default_rng([self._seed, 1, epoch]).permutation(images)
            for _ in self._batches(order[: (num_steps - step) * self._section.batch_size], epoch):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(lr, step, num_steps)
                torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
                optimiser.step()
                step += 1
                pause()
            epoch += 1

    @torch.no_grad()
    def _observe(self, images: np.ndarray) -> None:
        """Give the head the statistics of the unadapted features of these images."""
        first = self._tokens(self._train_images.images(images[:MICRO_BATCH].tolist()))
        moments = Moments.about(first.float().mean((1, 2)))
        for _, decoded in self._train_images.ahead(batched(share(images.tolist(), self._group), MICRO_BATCH)):
            moments.add(self._tokens(decoded).flatten(1, 2))
        mean, variance = moments.over_ranks(self._group).of_sets([(0,)])
        self._head.standardise_by(mean[:, None], variance[:, None])

    def _batches(self, order: np.ndarray, epoch: int) -> Iterator[None]:
        """Accumulate the gradients of one batch after the other, summed over micro-batches and ranks."""
        parts = list(batched(order, self._section.batch_size))
        chunks = [list(batched(share(part, self._group), MICRO_BATCH)) for part in parts]
        decoded = self._train_images.ahead((chunk for own in chunks for chunk in own), epoch)
        for part, own in zip(parts, chunks, strict=True):
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            for _ in own:
                chunk, images = next(decoded)
                labels = self._train_images.labels[torch.as_tensor(chunk)].to(self._device)
                weights = torch.full((1, len(chunk)), 1 / len(part), device=self._device)
                self._head.loss(self._tokens(images), labels, weights).backward()
            for parameter in self.trained:
                assert parameter.grad is not None
                self._group.sum_tensor(parameter.grad)
            yield

    @torch.no_grad()
    def answers(self, images: LabelledImages, indices: np.ndarray) -> Answers:
        """What the adapted model says about some images of a split, on every rank."""
        own = share(indices.tolist(), self._group)
        parts = [
            answers(self._head(self._tokens(decoded))[0, :, 0], images.labels[chunk])
            for chunk, decoded in images.ahead(batched(own, MICRO_BATCH))
        ]
        return together(own, parts, len(images), self._group)

    def _tokens(self, images: Tensor) -> Tensor:
        """Averaged tokens (1, B, N, d)."""
        return self._model.features(images.to(self._device), self._blocks).mean(0, keepdim=True)
