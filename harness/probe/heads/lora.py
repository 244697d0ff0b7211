"""LoRA adaptation (rank 8; AIM paper, Table 8): the third protocol on a probe's tasks, and not a frozen feature.

Low-rank updates of the backbone (`aim.probes`) train together with an attentive head on the fixed block set (the last
six), once for every learning rate. The hold-out chooses the rate, which trains once more on the whole training split.
Optimiser, schedule and views are those of the probes; the head standardises by the statistics of unadapted features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from aimscale.aim.model import AIM
from aimscale.aim.probes import add_lora
from aimscale.harness.probe.features.extraction import batched, own_indices
from aimscale.harness.probe.features.images import LabelledImages, Task
from aimscale.harness.probe.features.moments import Moments
from aimscale.harness.probe.features.tasks import BlockSet, number_of_steps
from aimscale.harness.probe.heads.scores import (
    Candidate,
    Predictions,
    best,
    gather_predictions,
    next_values,
    to_predictions,
)
from aimscale.harness.probe.heads.stacks import CLIP_NORM, WEIGHT_DECAY, AttentiveStack, learning_rate

RANK = 8
"""Rank of the updates (paper, Table 8)."""
MICRO_BATCH = 32
"""Number of images whose activations are held at a time."""


def adapt(model: AIM, task: Task, blocks: BlockSet) -> tuple[list[Candidate], Predictions, int]:
    """Adapt copies of `model`; all ranks call this together. Returns candidates of all learning rates, predictions of
    the best on the test split, and its number of trained values."""

    def adapted(lr: float, images: np.ndarray) -> _Adaptation:
        one = _Adaptation(model, task, blocks)
        one.train(images, lr)
        return one

    labels, candidates = task.train.labels[task.held], []
    more: list[float] = list(task.section.lrs)
    while more:
        for lr in more:
            predicted = adapted(lr, task.fit).predict(task.train, task.held).predicted[task.held]
            top1 = float((predicted == labels).float().mean())
            candidates.append(Candidate(kind="lora", blocks=blocks, value=lr, holdout_top1=top1, holdout_loss=0.0))
        chosen_lr = best(candidates, "lora").value
        more = next_values(task.section.lrs, [each.value for each in candidates], chosen_lr)
    chosen = adapted(chosen_lr, task.everything)
    predictions = chosen.predict(task.test, np.arange(len(task.test)))
    return candidates, predictions, sum(parameter.numel() for parameter in chosen.trained)


class _Adaptation:
    """Adapted copy of a model with its head."""

    def __init__(self, model: AIM, task: Task, blocks: BlockSet):
        self._task, self._blocks = task, blocks
        self._model = copy.deepcopy(model).float()
        self._model.set_activation_checkpointing(True)
        updates = add_lora(self._model, rank=RANK, seed=task.seed)
        self._device = updates[0].device
        self._head = AttentiveStack(
            grid={blocks: task.section.lrs[:1]},  # one head
            width=model.config.width,
            num_classes=task.num_classes,
            num_heads=model.config.num_heads,
            generator=torch.Generator().manual_seed(task.seed),
            device=self._device,
        )
        self.trained: list[nn.Parameter] = [*updates, *self._head.parameters()]

    def train(self, images: np.ndarray, lr: float) -> None:
        """Take all steps on these images, at this peak of the learning rate."""
        optimiser = torch.optim.AdamW(self.trained, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY)
        self._observe(images)
        num_steps = number_of_steps(self._task.section, len(images))
        step, epoch = 0, 0
        while step < num_steps:
            order = np.random.default_rng([self._task.seed, 1, epoch]).permutation(images)
            for _ in self._batches(order[: (num_steps - step) * self._task.section.batch_size], epoch):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(lr, step, num_steps)
                torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
                optimiser.step()
                step += 1
                self._task.report_progress(f"LoRA at learning rate {lr:g}", step, num_steps, "steps")
            epoch += 1

    @torch.no_grad()
    def _observe(self, images: np.ndarray) -> None:
        """Standardise the head by the statistics of the unadapted features of these images."""
        first = self._tokens(self._task.train.images(images[:MICRO_BATCH].tolist()))
        moments = Moments.around(first.float().mean((1, 2)))
        for _, decoded in self._task.train.ahead(batched(own_indices(images.tolist(), self._task.group), MICRO_BATCH)):
            moments.add(self._tokens(decoded).flatten(1, 2))
        mean, variance = moments.over_ranks(self._task.group).set_statistics([(0,)])
        self._head.standardise_by(mean, variance)

    def _batches(self, order: np.ndarray, epoch: int) -> Iterator[None]:
        """Accumulate the gradients of one batch after the other, summed over micro-batches and ranks."""
        parts = list(batched(order, self._task.section.batch_size))
        chunks = [list(batched(own_indices(part, self._task.group), MICRO_BATCH)) for part in parts]
        decoded = self._task.train.ahead((chunk for indices in chunks for chunk in indices), epoch)
        for part, indices in zip(parts, chunks, strict=True):
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            for _ in indices:
                chunk, images = next(decoded)
                labels = self._task.train.labels[torch.as_tensor(chunk)].to(self._device)
                self._head.losses(self._tokens(images), labels, 1 / len(part)).sum().backward()
            for parameter in self.trained:
                assert parameter.grad is not None
                self._task.group.sum_tensor(parameter.grad)
            yield

    @torch.no_grad()
    def predict(self, images: LabelledImages, indices: np.ndarray) -> Predictions:
        """Predict some images of a split with the adapted model, on every rank."""
        indices_here = own_indices(indices.tolist(), self._task.group)
        parts = [
            to_predictions(self._head(self._tokens(decoded))[0, :, 0], images.labels[chunk])
            for chunk, decoded in images.ahead(batched(indices_here, MICRO_BATCH))
        ]
        return gather_predictions(indices_here, parts, len(images), self._task.group)

    def _tokens(self, images: Tensor) -> Tensor:
        """Compute averaged tokens (1, B, N, d)."""
        is_causal = self._task.section.attention == "causal"
        return self._model.features(images.to(self._device), self._blocks, is_causal=is_causal).mean(0, keepdim=True)
