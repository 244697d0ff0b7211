"""Record of what the tensors of a step occupy, and of its collectives, whether the tensors are real or fake."""

from __future__ import annotations

import collections
import dataclasses
import sys
import weakref
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Phase = Literal["set-up", "forward", "backward", "update", "point"]
Part = Literal["weights", "gradients", "optimiser", "activations", "buffers"]
PARTS: tuple[Part, ...] = get_args(Part)

_COMPUTING = ("torch.autograd.graph", "deepspeed.runtime.zero.linear")
"""Modules, beside the model's, that call operators whose results are activations."""


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
            sizes = [
                sum(each.numel() * each.element_size() for each in tree_leaves(arg) if isinstance(each, Tensor))
                for arg in args
            ]
            self.calls.append((self.phase, self.micro_batch, func.overloadpacket.__name__.strip("_"), max(sizes)))
        out = func(*args, **(kwargs or {}))
        for each in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(each, Tensor) and (getattr(each, "fake_device", None) or each.device).type != "meta":
                self._record(each.untyped_storage())
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
        counts: collections.Counter[tuple[Phase, str]] = collections.Counter()
        sizes: collections.Counter[tuple[Phase, str]] = collections.Counter()
        for phase, micro_batch, name, num_bytes in self.calls:
            times = repeats if micro_batch == 1 and phase != "update" else 1
            counts[phase, name] += times
            sizes[phase, name] += times * num_bytes
        return tuple(
            Collective(phase=phase, name=name, count=count, num_bytes=sizes[phase, name])
            for (phase, name), count in counts.items()
        )
