"""No gradient is reduced outside the bucket, where DeepSpeed frees it before it is reduced.

On a GPU reductions run on a stream of their own, behind the backward pass. Here they are delayed on a CPU until the
main stream next waits for that stream, which CUDA allows, and read and write memory that they do not keep alive.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from aimscale.aim.config import ModelConfig, model_config
from aimscale.harness.bench.train import random_batches
from aimscale.harness.data.stream.loader import count_targets
from aimscale.harness.device import memory
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.distributed.group import Group, Placement, import_deepspeed
from aimscale.harness.rehearsal.fake import FakeStore
from aimscale.harness.rehearsal.step import rehearse
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.engine import Engine

CONFIG = model_config("w256-d4", image_size=32, patch_size=8)
STAGES = [("bf16", 2), ("fp32", 2), ("fp32", 1)]


def alias(tensor: Tensor) -> Tensor:
    """View a contiguous tensor's memory without keeping it alive, as a kernel in a queue does."""
    assert tensor.is_contiguous()
    memory_of = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory_of, dtype=tensor.dtype).view(tensor.shape)


@contextmanager
def late_reductions() -> Iterator[list[int]]:
    """Delay DeepSpeed's reductions of ZeRO 1 and 2; yields how many values each of them had."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    queue: list[Callable[[], Any]] = []
    sizes: list[int] = []
    average, copy = DeepSpeedZeroOptimizer.average_tensor, DeepSpeedZeroOptimizer.copy_grads_in_partition
    epilogue = DeepSpeedZeroOptimizer._clear_previous_reduced_grads

    def wait() -> None:
        for action in queue:
            action()
        queue.clear()

    def average_late(self: Any, tensor: Tensor, dtype: torch.dtype) -> None:
        wait()  # as `average_tensor` makes the main stream do, before it queues another reduction
        bucket, view = self.ipg_buckets[dtype], alias(tensor)
        params = list(bucket.params)
        sizes.append(tensor.numel())

        def reduce() -> None:
            filled, bucket.params = bucket.params, params
            average(self, view, dtype)
            bucket.params = filled

        queue.append(reduce)

    def copy_late(self: Any, param: Any, group_idx: int) -> None:
        if param.grad is None:
            return copy(self, param, group_idx)
        source = alias(param.grad.view(-1))
        copy(self, param, group_idx)
        if param.grad is not None:
            target = param.grad.view(-1)
            queue.append(lambda: target.copy_(source))

    def synchronise(self: Any) -> None:
        wait()  # the device is synchronised where this is called, at the end of a backward pass
        epilogue(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedZeroOptimizer, "average_tensor", average_late)
        patch.setattr(DeepSpeedZeroOptimizer, "copy_grads_in_partition", copy_late)
        patch.setattr(DeepSpeedZeroOptimizer, "_clear_previous_reduced_grads", synchronise)
        yield sizes


def masters(group: Group, precision: str, stage: int) -> Tensor:
    """Master weights of this rank after two steps of two micro-batches."""
    optimiser = OptimiserSection(batch_size=16, precision=precision)  # type: ignore[arg-type]
    engine = Engine(CONFIG, optimiser, EngineOptions(zero_stage=stage), group)
    step = random_batches(CONFIG, 8, 4)
    for _ in range(2):
        engine.step(step, num_targets=2 * count_targets(step, CONFIG.num_tokens), lr=1e-3)
    return torch.cat([each.detach().flatten().clone() for each in engine.optimiser_tensors()])


def compare_late(rank: int) -> None:
    """Take the same steps with reductions at once and late, as one rank of two in a fake group."""
    memory.MAX_BUCKET_VALUES = 100_000  # less than the largest matrix has
    torch.set_num_threads(1)
    os.environ["WORLD_SIZE"] = "2"
    import_deepspeed()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    placement = Placement(rank=0, world_size=2, local_rank=0, address="127.0.0.1", port=1)
    group = Group(placement, torch.device("cpu"), None)
    for precision, stage in STAGES:
        expected = masters(group, precision, stage)
        with late_reductions() as sizes:
            found = masters(group, precision, stage)
        assert len(sizes) > 8, "several reductions in each backward pass"
        assert torch.equal(found, expected), (precision, stage)


def test_late_reductions_give_the_same_bits(in_processes: Callable[..., list[int]]) -> None:
    """In a process of its own: glibc ends one whose freed memory is written to."""
    assert in_processes(compare_late) == [0]


def oversized(model: ModelConfig, precision: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each gradient of a rehearsed step on 8 ranks is larger than the bucket."""
    import_deepspeed()
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    found: list[bool] = []
    for owner in (stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3):
        real = owner.reduce_independent_p_g_buckets_and_remove_grads

        def note(self: Any, param: Any, *args: Any, real: Any = real) -> None:
            found.append(getattr(param, "ds_numel", param.numel()) > self.reduce_bucket_size)
            real(self, param, *args)

        monkeypatch.setattr(owner, "reduce_independent_p_g_buckets_and_remove_grads", note)
    where: dict[str, Any] = {"precision": precision, "world_size": 8, "micro_batches": (2,)}
    rehearse.__wrapped__(model, options=EngineOptions(zero_stage=stage), prefix="paired", on_gpu=True, **where)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "head", "stage"), [("aim-3B", "proportional", 2), ("aim-7B", "released", 2), ("aim-7B", "released", 3)]
)
def test_no_gradient_of_a_large_model_is_larger_than_the_bucket(
    size: str, head: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_config(size, head_rule=head)  # type: ignore[arg-type]
    found = oversized(model, "bf16", stage, monkeypatch)
    assert len(found) > 2 * 200, "every gradient of two steps"
    assert sum(found) == 0
