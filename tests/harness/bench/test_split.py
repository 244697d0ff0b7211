"""A step's time goes to computing, to communication that nothing hides, and to the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from aimscale.harness.bench.split import NUM_STEPS, shares_of, step_shares
from aimscale.harness.device.distributed import Group


def test_kernels_of_a_card_are_told_apart() -> None:
    def event(name: str, start: float, end: float, *, is_on_gpu: bool = True, is_annotation: bool = False) -> object:
        device = DeviceType.CUDA if is_on_gpu else DeviceType.CPU
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=is_annotation)

    events = [
        event("gemm", 20, 30),
        event("gemm", 0, 10),
        event("gelu", 5, 10),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 5, 25),
        event("ncclDevKernel_AllGather_RING_LL", 50, 60),
        event("nccl:all_gather", 48, 60, is_annotation=True),
        event("Optimizer.step#AdamW.step", 0, 100, is_annotation=True),
        event("cudaLaunchKernel", 0, 100, is_on_gpu=False),
    ]
    found = shares_of(events, 100.0, on_gpu=True)
    assert found == pytest.approx({"compute": 0.2, "exposed_communication": 0.2, "other": 0.6})


LATE_S = 0.25


def split_steps(group: Group) -> list[dict[str, float]]:
    """The second rank is late at one all-reduce; the first waits for it, or computes meanwhile."""
    left, values = torch.randn(256, 256), torch.ones(1000)
    found = []

    def take_step(*, hides: bool) -> None:
        if group.rank == 1:
            time.sleep(LATE_S)
        work = torch.distributed.all_reduce(values, async_op=True)
        until = time.perf_counter() + 1.5 * LATE_S
        while hides and group.rank == 0 and time.perf_counter() < until:
            left @ left
        work.wait()

    for hides in (False, True):
        started = time.perf_counter()
        shares = step_shares(lambda hides=hides: take_step(hides=hides), group.device)
        step_s = (time.perf_counter() - started) / NUM_STEPS
        found.append({name: share * step_s for name, share in shares.items()})
    return found


def test_a_wait_for_another_rank_is_communication_unless_something_is_computed(
    in_group: Callable[..., list[Any]],
) -> None:
    (waits, hides), (late, _) = in_group(split_steps, world_size=2)
    assert waits["exposed_communication"] > 0.8 * LATE_S > 5 * waits["compute"]
    assert late["other"] > 0.8 * LATE_S > 2 * late["exposed_communication"]
    assert hides["exposed_communication"] < 0.2 * LATE_S < hides["compute"]
