"""Speed and memory of devices from data sheets and stated assumptions; torch is not imported."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from typing import NamedTuple

from aimscale.harness.device.memory import free_host_bytes
from aimscale.harness.run.provenance import cpu_name


class GpuSpec(NamedTuple):
    """Data sheet of a GPU."""

    tflops: float
    """Dense bf16 TFLOP/s, summed in float32. TF32, in which GPUs multiply float32 (`start_group`), is half of it."""
    memory_gb: float
    """Memory that its driver reports, GB, rounded down."""
    bandwidth_gb: float
    """Bandwidth of its memory, GB/s."""
    watts: float
    """Most power that it may take."""
    is_linked: bool = True
    """Whether NVLink or its like joins all GPUs of a node; a bridge joins two."""

    @property
    def reached_tflops(self) -> float:
        """Speed of large matrix products, TFLOP/s: the clock that the power allows, not the data sheet's.

        A line through an RTX 3090 (1.04 times its 71 TFLOP/s at 350 W) and an H100 (0.71 times 990 at 700 W).
        """
        return self.tflops * max(0.6, 1.10 - 0.275 * self.tflops / self.watts)


GPUS = {
    "A100": GpuSpec(312, 42, 1555, 400),
    **dict.fromkeys(("A100 80GB", "A100L"), GpuSpec(312, 85, 2039, 400)),
    "A30": GpuSpec(165, 25, 933, 165, False),
    "A40": GpuSpec(149.7, 48, 696, 300, False),
    "A10": GpuSpec(125, 24, 600, 150, False),
    "A6000": GpuSpec(154.8, 51, 768, 300, False),
    "RTX 6000 Ada": GpuSpec(364.25, 51, 960, 300, False),
    "RTX 3090": GpuSpec(71.2, 25, 936, 350, False),
    "RTX 4090": GpuSpec(165.2, 25, 1008, 450, False),
    "RTX 5090": GpuSpec(209.5, 34, 1792, 575, False),
    "RTX PRO 6000": GpuSpec(503.8, 102, 1792, 600, False),
    "RTX PRO 6000 Max Q": GpuSpec(438.9, 102, 1792, 300, False),
    "H100 PCIe": GpuSpec(756.5, 85, 2039, 350, False),
    "H100 NVL": GpuSpec(835.5, 99, 3938, 400, False),
    "H100": GpuSpec(989.5, 85, 3350, 700),
    "GH200": GpuSpec(989.5, 102, 4000, 900),
    "H200 NVL": GpuSpec(835.5, 150, 4800, 600),
    "H200": GpuSpec(989.5, 150, 4800, 700),
    "L40S": GpuSpec(362.05, 48, 864, 350, False),
    "L40": GpuSpec(181.05, 48, 864, 300, False),
    "L4": GpuSpec(121, 24, 300, 72, False),
    "B200": GpuSpec(2250, 190, 8000, 1000),
    "GB200": GpuSpec(2500, 196, 8000, 1200),
    "MI300X": GpuSpec(1307.4, 205, 5300, 750),
}
"""Data sheets by name; the longest name whose words are all in a device's name counts. From the vendors' sheets of 2020
to 2025; NVIDIA's print twice as many FLOP/s, with sparsity, from the H100 on. SXM modules have the plain name."""
UNKNOWN_TFLOPS = 100.0
"""Assumption: peak of a GPU of this machine that is not in the table, TFLOP/s."""
CORE_TFLOPS = 0.1
"""Assumption: peak of one CPU core, TFLOP/s: 16 lanes, a multiply-add each, at 3 GHz. (A core of an AMD EPYC of 2022
reached 0.095 in float32, and of 2024 0.26.)"""
CORE_MEMORY_BYTES = 4 * 10**9
"""Assumption: memory of a cluster's node for each of its cores."""
MFU = 0.40
"""Assumption: share of its peak at which a core trains, or the user's program a device; GPUs have a roofline
(`harness.device.roofline`). On one core, sizes from rung-64 up reached it; smaller ones take up to four times as long,
and `plan` measures them."""
DECODED_PER_S = 1100.0
"""Assumption: JPEGs of 500 x 375 px per second that one loader process decodes and crops to 224 px; measured on one
core of an AMD EPYC of 2022 (docs/evidence.md)."""
LIST_TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device of a run, and the cores that load images for it."""

    name: str
    is_gpu: bool
    why: str
    """Reason for this device, shown to the user."""
    memory_bytes: int
    peak_tflops: float | None = None
    """Peak set by the user, for every precision; null: the data sheet's, or `CORE_TFLOPS`."""
    cores: int | None = None
    """Cores that load images for it; null if unknown."""

    def flops_per_s(self, precision: str) -> float:
        """Return the dense peak at a precision; float32 products on a GPU are TF32, as the trainer sets it."""
        nominal = None if self.peak_tflops else nominal_flops_per_s(self.name, precision)
        return nominal or 1e12 * (self.peak_tflops or CORE_TFLOPS)


def device_here(*, wants_cpu: bool) -> Device:
    """Return this machine's GPU; or one of its cores if there is no GPU, or none is wanted or visible."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    gpus = [] if wants_cpu or is_hidden else gpus_here()
    name, num_bytes = gpus[0] if gpus else (cpu_name(), free_host_bytes())
    is_unknown = bool(gpus) and find_gpu(name) is None
    origin = "of this machine" if gpus else "one core of this machine, with no GPU here or asked for"
    return Device(
        name=name,
        is_gpu=bool(gpus),
        why=f"{origin}; its peak is unknown, set cost.peak_tflops" if is_unknown else origin,
        memory_bytes=num_bytes,
        peak_tflops=UNKNOWN_TFLOPS if is_unknown else None,
        cores=max(1, len(os.sched_getaffinity(0)) // max(1, len(gpus))),
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


def find_gpu(name: str) -> GpuSpec | None:
    """Return the data sheet of a GPU by its name from a driver or Slurm; None if unknown or a MIG slice."""
    words = set(re.split(r"[\s_-]+", name.lower()))
    if any(word == "mig" or re.match(r"\d+g\.", word) for word in words):
        return None
    matches = [each for each in GPUS if words.issuperset(each.lower().split())]
    return GPUS[max(matches, key=len)] if matches else None


def gpu_spec(device: Device) -> GpuSpec:
    """Return the data sheet of a GPU, at the peak that the user states; one without has the proportions of an H100."""
    spec = find_gpu(device.name)
    factor = (
        (device.peak_tflops or UNKNOWN_TFLOPS) / (spec or GPUS["H100"]).tflops if device.peak_tflops or not spec else 1
    )
    like = spec or GPUS["H100"]._replace(bandwidth_gb=factor * GPUS["H100"].bandwidth_gb)
    return like._replace(tflops=factor * like.tflops, watts=factor * like.watts)


def has_fast_link(name: str) -> bool:
    """Return whether the GPUs of a node, by the name of one, are joined by more than PCIe; unknown ones and CPUs are
    taken to be."""
    spec = find_gpu(name)
    return spec is None or (spec.is_linked and "pcie" not in name.lower())


def nominal_flops_per_s(name: str, precision: str) -> float | None:
    """Return the data sheet's dense peak of a GPU at a precision; None if it is unknown."""
    spec = find_gpu(name)
    return spec and spec.tflops * 1e12 / (2 if precision == "fp32" else 1)
