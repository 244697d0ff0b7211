"""`runtime.profile`: a trace of a few steps, and what held memory during them, in the run directory's `profile/`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from aimscale.harness.device.distributed import Group


class StepProfiler:
    """Records the steps `first` to `last` of this start, the first being 1; told of every step by `before_step`."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None, group: Group) -> None:
        """`steps` None records nothing."""
        self._folder, self._group = folder, group
        self._first, self._last = steps or (0, -1)
        self._num_steps = 0
        self._profile: profile | None = None

    def before_step(self) -> None:
        """A step begins, the one before is over."""
        self._num_steps += 1
        if self._num_steps == self._first:
            self._start()
        elif self._num_steps == self._last + 1:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything was and is not written yet."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.__exit__(None, None, None)  # waits for the device
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self._group.rank}-steps{self._first}-{self._last}"
        recorded.export_chrome_trace(str(self._folder / f"trace-{name}.json.gz"))
        if self._group.device.type == "cuda":  # for pytorch.org/memory_viz
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            table = recorded.key_averages(group_by_input_shape=True).table(sort_by="self_cpu_memory_usage")
            (self._folder / f"memory-{name}.txt").write_text(table)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._group.device.type == "cuda":
            torch.cuda.memory._record_memory_history()
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.__enter__()
