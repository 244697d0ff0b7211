"""Profiles of training steps: torch's trace of every rank, and on a GPU a snapshot of its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from aimscale.harness.distributed.group import Group

SKIPPED_STEPS = 5
"""Steps before those of a profile: they compile and allocate."""
MAX_MEMORY_EVENTS = 100_000
"""Number of allocations that a snapshot of memory goes back."""


@contextlib.contextmanager
def profiled_steps(folder: Path, num_steps: int | None, group: Group) -> Iterator[Callable[[], None]]:
    """Profile so many steps of the block, or none; yields what all ranks call after each step.

    Each rank writes `rank-<number>.json.gz`, a trace for ui.perfetto.dev, into `folder`, and on a GPU
    `rank-<number>.memory.pickle`, for pytorch.org/memory_viz.
    """
    if num_steps is None:
        yield lambda: None
        return
    folder.mkdir(exist_ok=True)
    is_cuda = group.device.type == "cuda"

    def save(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / f"rank-{group.rank}.json.gz"))
        if is_cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"rank-{group.rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    if is_cuda:
        torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
    schedule = torch.profiler.schedule(skip_first=SKIPPED_STEPS, wait=0, warmup=1, active=num_steps, repeat=1)
    last = SKIPPED_STEPS + 1 + num_steps
    with torch.profiler.profile(schedule=schedule, on_trace_ready=save) as profile:

        def after_step() -> None:
            if profile.step_num < last:
                profile.step()
                if profile.step_num == last:
                    group.barrier()  # here and not in the next step's collectives, whose time is short

        yield after_step
