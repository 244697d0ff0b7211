"""The device that a sweep is priced on, and what feeds it; torch is imported only to measure a processor once.

It is the one that `cost.device` names; else an H100, where a `slurm` section asks for GPUs; else this machine's GPU;
else this machine's processor.
"""

from __future__ import annotations

import functools
import os
import subprocess
from dataclasses import dataclass, replace

import psutil

from aimscale.harness.device.sheets import nominal_flops_per_s, remember, remembered
from aimscale.harness.run.provenance import cpu_name
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError

ASSUMED = "H100"
LIST_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of a run, and what loads for it."""

    name: str
    is_gpu: bool
    why: str
    """Why this one, for the reader."""
    memory_bytes: int = 80 * 10**9
    peak_tflops: float | None = None
    """As given, for every precision; null: the data sheet's, or of a processor what is measured."""
    cores: int | None = None
    """That load for it; null where nothing says how many."""
    decoded_per_s: float | None = None
    """Photographs that a loader process decodes and crops a second, where that was measured here (`aimscale bench
    data`); null: `DECODED_PER_S`, an assumption."""

    def flops_per_s(self, precision: str) -> float:
        """Dense peak at a precision; float32 products on a GPU are TF32, as the trainer sets it."""
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        return nominal_flops_per_s(self.name, precision) or _measured_flops_per_s(precision)


def planned_device(sweep: Sweep, wants_cpu: bool = False) -> Device:
    """The device of a sweep.

    Args:
        wants_cpu: all its runs ask for the processor.

    Raises:
        SweepError: `cost.device` is no known GPU, and its peak is not given.
    """
    cost, slurm = sweep.file.cost, sweep.file.slurm
    on_slurm = "slurm" in sweep.file.model_fields_set
    cores = slurm.cpus_per_task if on_slurm else None
    if cost.device is not None:
        if cost.peak_tflops is None and nominal_flops_per_s(cost.device, "bf16") is None:
            raise SweepError(f"{sweep.source}: no data sheet of cost.device '{cost.device}'; give cost.peak_tflops")
        found = Device(name=cost.device, is_gpu="cpu" not in cost.device.lower(), why="cost.device", cores=cores)
    elif on_slurm and slurm.gpus and not wants_cpu:
        found = Device(name=ASSUMED, is_gpu=True, why="assumed, since there is a slurm section", cores=cores)
    else:
        gpus = [] if on_slurm or wants_cpu else gpus_here()
        name, num_bytes = gpus[0] if gpus else (cpu_name(), psutil.virtual_memory().total)
        found = Device(
            name=name,
            is_gpu=bool(gpus),
            why="of this machine" if gpus else "one core of this machine, with no GPU here or asked for",
            memory_bytes=num_bytes,
            cores=max(1, len(os.sched_getaffinity(0)) // max(1, len(gpus))),
            decoded_per_s=remembered("decoded_per_s"),
        )
    memory_bytes = found.memory_bytes if cost.memory_gb is None else round(cost.memory_gb * 1e9)
    return replace(found, peak_tflops=cost.peak_tflops, memory_bytes=memory_bytes)


def gpus_here() -> list[tuple[str, int]]:
    """Name and bytes of the NVIDIA GPUs that the driver lists; none where CUDA_VISIBLE_DEVICES hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=LIST_TIMEOUT_S, check=True
        )
        pairs = [line.rsplit(",", 1) for line in listed.stdout.splitlines() if line.strip()]
        return [(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in pairs]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


@functools.cache
def _measured_flops_per_s(precision: str) -> float:
    """Of one core: as remembered, else measured in about a second; other processes make it only too small."""
    if known := remembered(f"{precision}_flops_per_s"):
        return known
    import torch

    from aimscale.harness.device.peak import measure_peak

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure_peak(torch.device("cpu"), precision).flops_per_s
    finally:
        torch.set_num_threads(before)
    remember(f"{precision}_flops_per_s", found)
    return found
