"""Speed and memory of devices, from data sheets and measurements; torch is imported only to measure a core."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
from dataclasses import dataclass

from aimscale.aim.errors import UserError
from aimscale.harness.device.execution import CORE_MFU, GPU_MFU, Pace
from aimscale.harness.device.memory import free_host_bytes
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.files import cache_folder, read_object, write_json
from aimscale.harness.run.provenance import cpu_name

NOMINAL_TFLOPS = {
    **{"A100": 312, "A30": 165, "A40": 149.7, "A10": 125},
    **{"H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.5, "GH200": 989.5, "H200 NVL": 835.5, "H200": 989.5},
    **{"L40S": 362.05, "L40": 181.05, "L4": 121, "GB200": 2500, "B200": 2250},
}
"""Dense bf16 TFLOP/s by GPU name; the longest key contained in a name counts. From NVIDIA's data sheets of 2021 to
2024, which print twice as much, with sparsity, from the H100 on. SXM modules have the plain name. TF32, in which GPUs
multiply float32 (`start_group`), is half of it on all of them."""
DECODED_PER_S = 1100.0
"""Assumption: JPEGs of 500 x 375 px per second that one loader process decodes and crops to 224 px; measured on one
core of an AMD EPYC of 2022 (docs/benchmarks.md)."""


LIST_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device of a run, and the cores that load images for it."""

    name: str
    is_gpu: bool
    why: str
    """Reason for this device, shown to the user."""
    memory_bytes: int = 85 * 10**9
    """Memory; by default that of an H100 or A100 of 80 GB (79 GiB)."""
    peak_tflops: float | None = None
    """Peak set by the user, for every precision; null: the data sheet's, or for a CPU the measured one."""
    cores: int | None = None
    """Cores that load images for it; null if unknown."""
    decoded_per_s: float | None = None
    """Photographs that a loader process decodes and crops per second, if measured on this machine (`aimscale bench
    data`); null: `DECODED_PER_S`, an assumption."""

    def flops_per_s(self, precision: str) -> float:
        """Return the dense peak at a precision; float32 products on a GPU are TF32, as the trainer sets it."""
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        return nominal_flops_per_s(self.name, precision) or _measured_flops_per_s(precision)

    @property
    def mfu(self) -> float:
        """Share of its peak that training is assumed to execute in large passes."""
        return GPU_MFU if self.is_gpu else CORE_MFU

    def pace(self, config: RunConfig, *, ranks_per_node: int) -> Pace:
        """Return how fast a rank of a run trains on it."""
        cores = None if self.is_gpu else config.runtime.num_threads
        peak = (cores or 1) * self.flops_per_s(config.training.optimiser.precision)
        return Pace(flops_per_s=self.mfu * peak, cores=cores, ranks_per_node=ranks_per_node)


def device_here(*, wants_cpu: bool) -> Device:
    """Return this machine's GPU; or one of its cores if there is no GPU, or none is wanted or visible."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    gpus = [] if wants_cpu or is_hidden else gpus_here()
    name, num_bytes = gpus[0] if gpus else (cpu_name(), free_host_bytes())
    return Device(
        name=name,
        is_gpu=bool(gpus),
        why="of this machine" if gpus else "one core of this machine, with no GPU here or asked for",
        memory_bytes=num_bytes,
        cores=max(1, len(os.sched_getaffinity(0)) // max(1, len(gpus))),
        decoded_per_s=stored_rate("decoded_per_s"),
    )


def gpus_here() -> list[tuple[str, int]]:
    """List name and bytes of the NVIDIA GPUs that the driver reports, whatever torch sees."""
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=LIST_TIMEOUT_S, check=True
        )
        pairs = [line.rsplit(",", 1) for line in listed.stdout.splitlines() if line.strip()]
        return [(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in pairs]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def nominal_flops_per_s(name: str, precision: str) -> float | None:
    """Return the data sheet's dense peak of a device by its model name; None if unknown, as for a MIG slice."""
    if "MIG" in name:
        return None
    for key in sorted(NOMINAL_TFLOPS, key=len, reverse=True):
        if re.search(rf"\b{key}\b", name.replace("-", " ")):
            return NOMINAL_TFLOPS[key] * 1e12 / (2 if precision == "fp32" else 1)
    return None


def store_rate(what: str, rate: float) -> None:
    """Store a rate that was measured on this kind of processor, unless a higher one is stored."""
    path = cache_folder() / "rates.json"
    with contextlib.suppress(OSError):  # a cache that cannot be written is no error
        rates = _rates()
        mine = rates.setdefault(cpu_name(), {})
        if rate > (stored_rate(what) or 0.0):
            mine[what] = rate
            write_json(path, rates, durable=False)


def stored_rate(what: str) -> float | None:
    """Return that rate; None if it was never measured on this kind of processor."""
    mine = _rates().get(cpu_name())
    found = mine.get(what) if isinstance(mine, dict) else None
    return found if isinstance(found, float) and 0 < found < 1e18 else None


def _rates() -> dict[str, dict[str, float]]:
    with contextlib.suppress(UserError):
        return read_object(cache_folder() / "rates.json") or {}
    return {}


@functools.cache
def _measured_flops_per_s(precision: str) -> float:
    """Return the measured peak of one core: as stored, else measured in about a second; other processes only make it
    too small."""
    if known := stored_rate(f"{precision}_flops_per_s"):
        return known
    import torch

    from aimscale.harness.device.peak import measure_peak

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure_peak(torch.device("cpu"), precision).flops_per_s
    finally:
        torch.set_num_threads(before)
    store_rate(f"{precision}_flops_per_s", found)
    return found
