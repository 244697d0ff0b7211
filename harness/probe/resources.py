"""What probing used: time, memory and device memory, as written beside the results."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from aimscale.harness.device.distributed import Group


class Resources:
    """Counts from its making on."""

    def __init__(self, group: Group):
        self._group = group
        self._started = time.monotonic()
        self._cpu_started = time.process_time()
        if group.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(group.device)

    def so_far(self) -> dict[str, Any]:
        """`wall_s`, `cpu_s` of all ranks, and peak bytes of the rank that needs most: of its process and its device."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        on_device = torch.cuda.max_memory_allocated(self._group.device) if self._group.device.type == "cuda" else 0
        used = self._group.gather((peak, on_device, time.process_time() - self._cpu_started))
        return {
            "wall_s": time.monotonic() - self._started,
            "cpu_s": sum(each[2] for each in used),
            "peak_process_bytes": max(each[0] for each in used),
            "peak_device_bytes": max(each[1] for each in used),
        }
