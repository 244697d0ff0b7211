"""Rehearsal of one step: peak memory by phase and part, and every collective, at any world size."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from aimscale.aim.config import ModelConfig
from aimscale.harness.data.stream.stream import Batch, masks
from aimscale.harness.device.memory import Precision
from aimscale.harness.rehearsal.fake import fake_rank
from aimscale.harness.rehearsal.tracker import Collective, Phase, PhaseMemory, StepTracker
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.checkpoint import copied_model
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine, tensors_in
from aimscale.harness.step.feed import count_targets
from aimscale.harness.step.saving import own_share

MAX_MICRO_BATCHES = 3
"""Number of micro-batches that a rehearsed step has at most: all between the first and the last are alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Memory and collectives of one step on one rank."""

    phases: tuple[PhaseMemory, ...]
    collectives: tuple[Collective, ...]
    checkpoint_bytes: int
    """Bytes of the rank's share of a checkpoint, which its host's memory holds until they are written."""
    cpu_s: float
    """CPU time of the rehearsal, s."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes that tensors occupy at any time of the step."""
        return max(sum(phase.peak.values()) for phase in self.phases if phase.phase != "point")

    @property
    def copy_peak_bytes(self) -> int:
        """Most bytes while a point of the curve copies the weights."""
        return sum(self.phases[-1].peak.values())

    @property
    def held_bytes(self) -> int:
        """Bytes that they occupy between steps."""
        return sum(self.phases[-1].held.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """Everything on which the memory and the collectives of a step depend."""

    model: ModelConfig
    precision: Precision
    zero_stage: int
    activation_checkpointing: bool
    world_size: int
    micro_batches: tuple[int, ...]
    """Images of each forward pass."""
    prefix: str
    """`objective.prefix` of the run."""
    on_gpu: bool
    """Whether attention keeps what a GPU's fused kernel does, or what a CPU does."""


@functools.cache
def rehearse(shape: StepShape) -> Rehearsal:
    """Step the engine as a rank of a group, on tensors without values, and return what it holds and sends."""
    started, tracker = time.process_time(), StepTracker()
    # The first, the middle ones, each like the others, and the last.
    sizes = shape.micro_batches
    chosen = [*sizes[: MAX_MICRO_BATCHES - 1], *sizes[MAX_MICRO_BATCHES - 1 :][-1:]]
    optimiser = OptimiserSection(precision=shape.precision)
    options = EngineOptions(zero_stage=shape.zero_stage, activation_checkpointing=shape.activation_checkpointing)
    with (
        fake_rank(fullest_rank(shape.zero_stage, shape.world_size), shape.world_size, on_gpu=shape.on_gpu) as group,
        tracker,
    ):
        engine = Engine(shape.model, optimiser, options, group)
        track_step(tracker, engine, [example_batch(shape.model, each, shape.prefix) for each in chosen])
        checkpoint_bytes = sum(values.nbytes for values in own_share(engine).values())
        track_copy(tracker, engine)
        phases, collectives = tracker.memory(), tracker.collectives(max(1, len(sizes) - 2))
    cpu_s = time.process_time() - started
    return Rehearsal(phases=phases, collectives=collectives, checkpoint_bytes=checkpoint_bytes, cpu_s=cpu_s)


def fullest_rank(zero_stage: int, world_size: int) -> int:
    """Return the rank whose peak is highest: the last one up to ZeRO 2, since the backward pass reduces the parameters
    of the last share first, while all activations are there; at ZeRO 3 all are alike, and the first sets their order.
    """
    return 0 if zero_stage == 3 else world_size - 1


def track_step(tracker: StepTracker, engine: Engine, batches: list[Batch]) -> None:
    """Record a step whose every buffer is allocated already; ranks may be real or fake."""
    optimizer, parameters = engine._optimizer, list(engine.module.parameters())
    weights = parameters + [getattr(each, "ds_tensor", None) for each in parameters]
    for parameter in parameters:
        parameter.register_hook(lambda grad: tracker.assign([grad], "gradients"))

    def enter(phase: Phase) -> None:
        named = [value for name, value in vars(optimizer).items() if "grad" in name]
        tracker.assign(tensors_in(named), "gradients")
        tracker.phase = phase

    def forward(*args: Any) -> None:
        tracker.micro_batch += tracker.phase == "backward"
        enter("forward")

    def entering(phase: Phase, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            enter(phase)
            return method(*args, **kwargs)

        return call

    engine.module.register_forward_pre_hook(forward)
    engine._engine.backward = entering("backward", engine._engine.backward)
    engine._engine.step = entering("update", engine._engine.step)
    num_targets = engine.group.world_size * count_targets(batches, engine.config.num_tokens)
    for step in (batches[-1:], batches):
        tracker.begin_step()
        engine.step(step, num_targets=num_targets, lr=1e-3)
        tracker.assign(tensors_in([engine.optimiser_tensors(), list(engine.adamw.state.values())]), "optimiser")
        tracker.assign(tensors_in(weights), "weights")
        if engine.options.zero_stage == 3:  # it knows the order of weights now; later steps gather them ahead
            optimizer.parameter_offload.get_param_coordinator().reset_step()
    enter("update")


def track_copy(tracker: StepTracker, engine: Engine) -> None:
    """Record how a point of the curve copies the weights before it measures them."""
    tracker.phase = "point"
    dtype = next(engine.module.parameters()).dtype
    tracker.assign(copied_model(engine, engine.group, dtype).parameters(), "weights")


def example_batch(config: ModelConfig, num_images: int, prefix: str) -> Batch:
    """Make images whose prefixes are as long as those of a run are on average."""
    positions = np.arange(num_images)
    if config.masked is not None:
        prefix_lengths = masks(0, positions, config)
    elif prefix == "none":
        prefix_lengths = np.ones_like(positions)
    else:
        prefix_lengths = np.full_like(positions, config.num_tokens // 2)
    shape = (num_images, config.channels, config.image_size, config.image_size)
    return Batch(
        images=torch.empty(shape, dtype=torch.uint8),
        prefix_lengths=torch.from_numpy(prefix_lengths),
        positions=torch.from_numpy(positions),
    )
