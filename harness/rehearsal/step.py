"""Rehearsal of one step: what its tensors occupy, by phase and part, and every collective, at any world size.

`StepTracker` records both, whether the tensors and ranks are real or fake.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aimscale.aim.config import ModelConfig
from aimscale.harness.data.stream.loader import count_targets
from aimscale.harness.data.stream.stream import Batch, masks
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.device.memory import Precision, whole_values
from aimscale.harness.rehearsal.fake import fake_rank
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.checkpoint import copied_model
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.saving import checkpoint_shard

Phase = Literal["set-up", "forward", "backward", "update", "point"]
Part = Literal["weights", "gradients", "optimiser", "activations", "buffers"]
PARTS: tuple[Part, ...] = get_args(Part)

_COMPUTING = ("torch.autograd.graph", "deepspeed.runtime.zero.linear")
"""Modules, beside the model's, that call operators whose results are activations."""
MAX_MICRO_BATCHES = 3
"""Number of micro-batches that a rehearsed step has at most: all between the first and the last are alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All calls of one collective in one phase of a step."""

    phase: Phase
    name: str
    """Name of torch's operator."""
    count: int
    num_bytes: int
    """Bytes of what this rank gives or of what it gets, whichever is more, in all calls together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """Bytes of one phase of a step, or of the copy of the weights at a point of the curve, by part."""

    phase: Phase
    peak: dict[Part, int]
    """Bytes when they are most."""
    held: dict[Part, int]
    """Bytes at the end of the phase."""


class StepTracker(TorchDispatchMode):
    """Dispatch mode that records storages, each once, from when they appear to when they vanish, and collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: Phase = "set-up"
        self.micro_batch = 0
        self.calls: list[tuple[Phase, int, str, int]] = []
        """Collectives: phase, micro-batch, name and bytes."""
        self._events: list[tuple[Phase, int, int]] = []  # phase, number of the storage, bytes (negative: freed)
        self._begin = 0
        self._parts: list[Part] = []
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and record what it allocates or sends."""
        if func is torch.ops.prim.device.default:  # how a fake tensor answers where it is
            return args[0].fake_device
        if func.namespace == "c10d":
            sizes = (sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)) for arg in args)
            self.calls.append((self.phase, self.micro_batch, func.overloadpacket.__name__.strip("_"), max(sizes)))
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and (getattr(leaf, "fake_device", None) or leaf.device).type != "meta":
                self._record(leaf.untyped_storage())
        return out

    def _record(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._numbers:
            number, num_bytes = len(self._parts), storage.nbytes()
            self._numbers[storage] = number
            self._parts.append(self._part_by_caller())
            self._events.append((self.phase, number, num_bytes))
            forget = weakref.finalize(storage, lambda: self._events.append((self.phase, number, -num_bytes)))
            forget.atexit = False

    def _part_by_caller(self) -> Part:
        """Take what the model and autograd allocate for activations, and everything else for buffers."""
        frame: Any = sys._getframe(3)
        while frame is not None and self.phase in ("forward", "backward"):
            module = frame.f_globals.get("__name__", "")
            if module in _COMPUTING or module.startswith("aimscale.aim."):
                return "activations"
            if module.startswith("deepspeed."):
                break
            frame = frame.f_back
        return "buffers"

    def assign(self, tensors: Iterable[Tensor], part: Part) -> None:
        """Assign the storages of tensors to a part, from when they appeared."""
        for tensor in tensors:
            number = self._numbers.get(tensor.untyped_storage())
            if number is not None:
                self._parts[number] = part

    def begin_step(self) -> None:
        """Leave the steps so far out of what is summed up."""
        self._begin, self.micro_batch = len(self._events), 0
        self.calls.clear()

    def memory(self) -> tuple[PhaseMemory, ...]:
        """Sum up the bytes of each phase, in the order in which phases ended."""
        now: collections.Counter[Part] = collections.Counter()
        peaks: dict[Phase, dict[Part, int]] = {}
        held: dict[Phase, dict[Part, int]] = {}
        for index, (phase, number, num_bytes) in enumerate(self._events):
            now[self._parts[number]] += num_bytes
            if index >= self._begin:
                if now.total() > sum(peaks.get(phase, {}).values()):
                    peaks[phase] = dict(now)
                held.pop(phase, None)
                held[phase] = dict(now)
        return tuple(PhaseMemory(phase=phase, peak=peaks[phase], held=held[phase]) for phase in held)

    def collectives(self, repeats: int = 1) -> tuple[Collective, ...]:
        """Sum up the collectives of each phase; those of the second micro-batch count `repeats` times."""
        totals: dict[tuple[Phase, str], Collective] = {}
        for phase, micro_batch, name, num_bytes in self.calls:
            times = repeats if micro_batch == 1 and phase != "update" else 1
            collective = totals.get((phase, name), Collective(phase=phase, name=name, count=0, num_bytes=0))
            count, total = collective.count + times, collective.num_bytes + times * num_bytes
            totals[phase, name] = dataclasses.replace(collective, count=count, num_bytes=total)
        return tuple(totals.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Memory and collectives of one step on one rank."""

    phases: tuple[PhaseMemory, ...]
    collectives: tuple[Collective, ...]
    checkpoint_bytes: int
    """Bytes of the rank's share of a checkpoint, which its host's memory holds until they are written."""

    def peak_bytes(self, *, point: bool = False) -> int:
        """Return the most bytes that tensors occupy in the step, or while a point of the curve copies the weights."""
        return max(sum(each.peak.values()) for each in self.phases if (each.phase == "point") is point)


@functools.cache
def rehearse(
    model: ModelConfig,
    *,
    precision: Precision,
    options: EngineOptions,
    world_size: int,
    micro_batches: tuple[int, ...],
    prefix: str,
    on_gpu: bool,
) -> Rehearsal:
    """Step the engine as a rank of a group, on tensors without values, and return what it holds and sends.

    Args:
        micro_batches: images of each forward pass.
        prefix: `objective.prefix` of the run.
        on_gpu: whether attention keeps what a GPU's fused kernel does, or what a CPU does.
    """
    # The first, the middle ones, each like the others, and the last.
    chosen = [*micro_batches[: MAX_MICRO_BATCHES - 1], *micro_batches[MAX_MICRO_BATCHES - 1 :][-1:]]
    rank, tracker = fullest_rank(model, precision, options.zero_stage, world_size), StepTracker()
    with fake_rank(rank, world_size, on_gpu=on_gpu) as group, tracker:
        engine = Engine(model, OptimiserSection(precision=precision), options, group)
        track_step(tracker, engine, [example_batch(model, each, prefix) for each in chosen])
        checkpoint_bytes = sum(values.nbytes for values in checkpoint_shard(engine).values())
        track_copy(tracker, engine)
        collectives = tracker.collectives(max(1, len(micro_batches) - 2))
        return Rehearsal(phases=tracker.memory(), collectives=collectives, checkpoint_bytes=checkpoint_bytes)


def fullest_rank(model: ModelConfig, precision: Precision, zero_stage: int, world_size: int) -> int:
    """Return the rank whose peak is highest.

    At ZeRO 3 all are alike, and the first sets their order. Below, the last rank's gradients come first, while all
    activations are there; only float32 gradients, copied as whole matrices at ZeRO 1 and 2, may weigh more elsewhere.
    """
    if precision == "fp32" and zero_stage in (1, 2):
        sizes = whole_values(model, world_size)
        return max(range(world_size), key=lambda rank: (sizes[rank], rank))
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

    def call(phase: Phase, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        enter(phase)
        return method(*args, **kwargs)

    engine.module.register_forward_pre_hook(forward)
    engine._engine.backward = functools.partial(call, "backward", engine._engine.backward)
    engine._engine.step = functools.partial(call, "update", engine._engine.step)
    num_targets = engine.group.world_size * count_targets(batches, engine.config.num_tokens)
    for step in (batches[-1:], batches):
        tracker.begin_step()
        engine.step(step, num_targets=num_targets, lr=1e-3, is_frozen=engine.options.freezes_backbone)
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
    prefix_lengths: Any = np.full_like(positions, 1 if prefix == "none" else config.num_tokens // 2)
    if config.masked is not None:
        prefix_lengths = masks(0, positions, config)
    return Batch(
        images=torch.empty(num_images, config.channels, config.image_size, config.image_size, dtype=torch.uint8),
        prefix_lengths=torch.from_numpy(prefix_lengths),
        positions=torch.from_numpy(positions),
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside nested lists and dictionaries, gradients included."""
    if isinstance(value, Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
