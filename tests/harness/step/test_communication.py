"""Nothing stands between backward and update but DeepSpeed's own, and gradients travel in float32."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aimscale.aim.config import model_config
from aimscale.aim.cost import param_count
from aimscale.harness.bench.train import random_batches
from aimscale.harness.data.stream.loader import count_targets, next_step
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.engine import Engine

CONFIG = model_config("w32-d2", image_size=16, patch_size=4)
BATCH, NUM_MICRO, NUM_STEPS = 8, 2, 3
CASES = [("fp32", 0), ("bf16", 1), ("fp32", 1), ("bf16", 2), ("bf16", 3)]
WAIT = "aten::_local_scalar_dense"
Ranks = Callable[..., list[Any]]


class Counting(TorchDispatchMode):
    """Notes collectives, and values that the host waits for, with whose they are: `deepspeed`, or a file of ours."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []
        self.num_gradients, self.is_in_step = 0, False
        self.parameters = list(engine.module.parameters())
        for parameter in self.parameters:  # behind DeepSpeed's own hooks
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, _: Tensor) -> None:
        self.num_gradients += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" or func._schema.name == WAIT:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.calls.append(
                {
                    "name": func._schema.name,
                    "numel": max(each.numel() for each in tensors),
                    "bytes": max(each.nbytes for each in tensors),
                    "is_late": self.num_gradients == NUM_MICRO * len(self.parameters),
                    "is_in_step": self.is_in_step,
                    "owner": owner(),
                }
            )
        return func(*args, **(kwargs or {}))


def owner() -> str:
    """Whose code asks for the operation that is dispatched now."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "deepspeed" in path.parts:
            return "deepspeed"
        if "aimscale" in path.parts:
            return path.name
        frame = frame.f_back  # type: ignore[assignment]
    return "nobody"


def count_a_step(group: Group, cases: list[tuple[str, int]]) -> list[list[dict[str, Any]]]:
    """Train as the loop does, and give what the last step sends and waits for."""
    found = []
    for precision, stage in cases:
        optimiser = OptimiserSection(batch_size=BATCH * group.world_size, precision=precision)  # type: ignore[arg-type]
        engine = Engine(CONFIG, optimiser, EngineOptions(zero_stage=stage), group)
        counting = Counting(engine)
        loaded = (random_batches(CONFIG, BATCH, BATCH // NUM_MICRO) for _ in range(NUM_STEPS + 1))
        with contextlib.ExitStack() as last:
            for position in range(NUM_STEPS):
                if position == NUM_STEPS - 1:  # ZeRO 3 knows by now what is used when
                    counting.num_gradients = 0
                    last.enter_context(counting)
                settings = {"num_tokens": CONFIG.num_tokens, "max_bad_fraction": 0.5}
                step = next_step(group, loaded, **settings, num_images=position, num_bad=0)
                counting.is_in_step = True
                engine.step(step.micro_batches, num_targets=step.num_targets, lr=1e-3)
                counting.is_in_step = False
        found.append(counting.calls)
        engine.close()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_adds_nothing_of_ours_behind_the_backward_pass(world_size: int, in_group: Ranks) -> None:
    cases = CASES[:2] if world_size == 1 else CASES
    found, *_ = in_group(count_a_step, cases, world_size=world_size)
    for (precision, stage), calls in zip(cases, found, strict=True):
        case = (world_size, precision, stage)
        before, inside = ([call for call in calls if call["is_in_step"] == is_in_step] for is_in_step in (False, True))
        # The counts of the step are all that is ours.
        assert [call["bytes"] for call in before if call["name"] != WAIT] == [40] * (world_size > 1), case
        ours = Counter(call["owner"] for call in inside if call["is_late"] and call["owner"] != "deepspeed")
        assert ours == ({"engine.py": 1} if stage == 0 else {}), (case, "the norm of `GuardedAdamW` alone")
        sent = sum(call["bytes"] for call in inside if "reduce" in call["name"] and call["numel"] > 1)
        backwards = NUM_MICRO if stage >= 2 else 1
        assert sent == (world_size > 1) * backwards * 4 * param_count(CONFIG).total, (case, "gradients in float32")


def first_norms(group: Group) -> list[float]:
    """The first gradient's norm in bf16 at stages 1 to 3."""
    step = random_batches(CONFIG, BATCH, BATCH)
    num_targets = group.world_size * count_targets(step, CONFIG.num_tokens)
    norms = []
    for stage in (1, 2, 3):
        engine = Engine(CONFIG, OptimiserSection(precision="bf16"), EngineOptions(zero_stage=stage), group)
        norms.append(float(engine.step(step, num_targets=num_targets, lr=1e-3).grad_norm))
    return norms


def test_gradients_are_averaged_in_float32(in_group: Ranks) -> None:
    """Ranks that all have the same images have one gradient; a third of it in bf16 would be another."""
    alone, three = (in_group(first_norms, world_size=world_size)[0] for world_size in (1, 3))
    assert three == pytest.approx([alone[0]] * 3, rel=1e-6)
