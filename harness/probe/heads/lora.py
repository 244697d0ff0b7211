"""LoRA adaptation (rank 8; AIM paper, Table 8): the third protocol on a probe's tasks, and not a frozen feature.

Low-rank updates of the trunk's query, value and output projections (`aim.lora`) train together with an attentive head
on the fixed block set (the last six), once for every point of the grid; the hold-out chooses, the chosen point trains
once more on the whole training split, and the test split is scored once. Optimiser, schedule and views are those of the
probes. The head standardises by the statistics of the unadapted features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aimscale.aim.lora import add_lora
from aimscale.aim.model import AIM
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.extraction import batched, share
from aimscale.harness.probe.features.images import LabelledImages
from aimscale.harness.probe.features.moments import Moments
from aimscale.harness.probe.features.sizes import BlockSet, number_of_steps
from aimscale.harness.probe.files import Pause
from aimscale.harness.probe.heads.fit import Split, grid
from aimscale.harness.probe.heads.progress import ProbeProgress, StepSaver
from aimscale.harness.probe.heads.scores import Answers, answers
from aimscale.harness.probe.heads.stacks import CLIP_NORM, AttentiveStack, Setting, learning_rate
from aimscale.harness.run.config import ProbeSection

RANK = 8
"""Of the updates (paper, Table 8)."""
MICRO_BATCH = 32
"""Images whose activations are held at a time."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """The chosen adaptation."""

    setting: Setting
    holdout_top1: float
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
    progress: ProbeProgress | None = None,
    pause: Pause = lambda: None,
) -> Adapted:
    """Adapt copies of `model`, which itself is left alone; all ranks call this together.

    With `progress` training is saved by time, and a call after a killed one goes on from there to the same numbers;
    `pause` is called after every save and may raise to stop there.
    """

    def adaptation(setting: Setting) -> _Adaptation:
        return _Adaptation(model, setting, section, split.num_classes, train, blocks, seed, group)

    done: dict[str, Any] = group.from_first((progress.load("lora") if progress and group.is_first else None) or {})
    points: list[float] = done.get("points", [])
    settings = grid(section)
    for index, setting in enumerate(settings[len(points) :], start=len(points)):
        one = adaptation(setting)
        one.train(split.fit, f"lora-{index}", progress, pause)
        points.append(one.holdout_top1(split.held))
        if progress and group.is_first:
            progress.save("lora", {"points": points})
        pause()
    winner = points.index(max(points))
    chosen = adaptation(settings[winner])
    chosen.train(split.everything, "lora-chosen", progress, pause)
    return Adapted(
        setting=settings[winner],
        holdout_top1=points[winner],
        grid=list(zip(settings, points, strict=True)),
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
        num_classes: int,
        train: LabelledImages,
        blocks: BlockSet,
        seed: int,
        group: Group,
    ):
        self.setting = setting
        self._section, self._train_images = section, train
        self._blocks, self._seed, self._group = blocks, seed, group
        self._model = copy.deepcopy(model).float()
        self._model.set_activation_checkpointing(True)
        updates = add_lora(self._model, rank=RANK, seed=seed)
        self._device = updates[0].device
        self._head = AttentiveStack(
            num_sets=1,
            settings=(setting,),
            width=model.config.width,
            num_classes=num_classes,
            num_heads=model.config.num_heads,
            generator=torch.Generator().manual_seed(seed),
            device=self._device,
        )
        self.trained: list[nn.Parameter] = [*updates, *self._head.parameters()]

    def state(self) -> dict[str, Any]:
        """What was trained, and the statistics that the head standardises by."""
        return {"trained": [parameter.detach().cpu() for parameter in self.trained], "head": self._head.state_dict()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self._head.load_state_dict(state["head"])
        for parameter, value in zip(self.trained, state["trained"], strict=True):
            parameter.copy_(value)

    def train(self, images: np.ndarray, part: str, progress: ProbeProgress | None, pause: Pause) -> None:
        """All steps on these images, or those that a saved part still lacks."""
        section = self._section
        optimiser = torch.optim.AdamW(self.trained, betas=(0.9, 0.999), weight_decay=self.setting.weight_decay)
        saver = StepSaver(progress, part, self._group, is_shared=True)
        step = 0
        if saved := saver.load():
            step = saved[0]
            self.load_state(saved[1]["state"])
            optimiser.load_state_dict(saved[1]["optimiser"])
        else:
            self._observe(images)
        per_epoch, num_steps = math.ceil(len(images) / section.batch_size), number_of_steps(section, len(images))
        for epoch in range(step // per_epoch, math.ceil(num_steps / per_epoch)):
            order = np.random.default_rng([self._seed, 1, epoch]).permutation(images)
            first, last = (section.batch_size * (at - epoch * per_epoch) for at in (step, num_steps))
            for _ in self._batches(order[first:last], epoch):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(self.setting.lr, step, num_steps)
                torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
                optimiser.step()
                step += 1
                if step == num_steps or saver.is_due():
                    saver.save(step, {"state": self.state(), "optimiser": optimiser.state_dict()})
                    pause()

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

    def holdout_top1(self, held: np.ndarray) -> float:
        """Accuracy on the hold-out."""
        given = self.answers(self._train_images, held)
        return float((given.predicted == self._train_images.labels[torch.as_tensor(held)]).float().mean())

    @torch.no_grad()
    def answers(self, images: LabelledImages, indices: np.ndarray) -> Answers:
        """What the adapted model says about some images, in their order, on every rank."""
        predicted = torch.zeros(len(images), dtype=torch.int64, device=self._device)
        in_top5 = torch.zeros(len(images), dtype=torch.int64, device=self._device)
        for chunk, decoded in images.ahead(batched(share(indices.tolist(), self._group), MICRO_BATCH)):
            scores = self._head(self._tokens(decoded))[0, :, 0]
            part = answers(scores, images.labels[chunk])
            predicted[chunk], in_top5[chunk] = part.predicted.to(self._device), part.in_top5.long().to(self._device)
        rows = torch.as_tensor(indices)
        return Answers(
            self._group.sum_tensor(predicted).cpu()[rows], self._group.sum_tensor(in_top5).cpu()[rows].bool()
        )

    def _tokens(self, images: Tensor) -> Tensor:
        """Averaged tokens (1, B, N, d)."""
        return self._model.features(images.to(self._device), self._blocks).mean(0, keepdim=True)
