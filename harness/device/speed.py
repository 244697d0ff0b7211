"""Speed of devices: data sheets, the peak measured here against which MFU is stated, and remembered times of runs.

MFU is usually stated against a data sheet's peak, which no program reaches; the rate of the best matrix product here is
the honest limit. Other processes can only make a measurement too small. Torch is imported only to measure.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import executed_flops_per_image, flops_per_image
from aimscale.aim.errors import UserError
from aimscale.harness.device.memory import free_host_bytes
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.files import cache_folder, read_object, write_json
from aimscale.harness.run.provenance import cpu_name
from aimscale.harness.run.section import config_digest

if TYPE_CHECKING:
    import torch


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


GEMM_SIDE = {"cpu": 512, "cuda": 8192}
"""Side n of the measured product. On a CPU it is as fast as 2048, and short enough to finish between two interruptions
by other processes (measured on a busy machine: 264 GFLOP/s at 512, 28 at 1024, 7 at 2048)."""
MEASURED_S = 0.2
"""Time of the measurement."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """A measured matrix-multiplication rate."""

    device: str
    precision: str
    """Precision, fp32 or bf16."""
    num_threads: int
    gemm_side: int
    """n of the n x n x n product."""
    flops_per_s: float
    """2 n^3 over the best time of all tries, one device."""
    nominal_flops_per_s: float | None = None
    """The data sheet's dense peak; null for a device that `GPUS` lacks, such as a CPU."""


def utilisation(
    config: ModelConfig, peak: Peak, *, images_per_s: float, scored_tokens: float, world_size: int
) -> dict[str, float | None]:
    """Compute model FLOPs utilisation (MFU) in two ways, each a fraction.

    `mfu_published`: FLOPs of the published formula over the nominal peak, as others state it; it also credits skipped
    work, and is null without a nominal peak. `mfu`: executed FLOPs over the measured peak.

    Args:
        images_per_s: training throughput of all devices.
        scored_tokens: mean per image.
    """
    rate, nominal = images_per_s / world_size, peak.nominal_flops_per_s
    return {
        "mfu_published": nominal and rate * flops_per_image(config).train / nominal,
        "mfu": rate * executed_flops_per_image(config, scored_tokens).train / peak.flops_per_s,
    }


def device_name(device: torch.device) -> str:
    """Return the model name of a device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def measure_peak(device: torch.device, precision: str) -> Peak:
    """Measure a device's peak: the best time of a square matrix product."""
    import torch

    from aimscale.aim.model import DTYPES

    side = GEMM_SIDE[device.type]
    dtype = DTYPES[precision]
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    best, stop = float("inf"), time.perf_counter() + MEASURED_S
    while time.perf_counter() < stop:
        wait()
        started = time.perf_counter()
        torch.mm(left, right)
        wait()
        best = min(best, time.perf_counter() - started)
    return Peak(
        device=device_name(device),
        precision=precision,
        num_threads=torch.get_num_threads() if device.type == "cpu" else 1,
        gemm_side=side,
        flops_per_s=2 * side**3 / best,
        nominal_flops_per_s=nominal_flops_per_s(device_name(device), precision),
    )


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times of one shape of run on a core, while all cores are busy, s."""

    start_s: float
    """From the start of the program to its first step."""
    step_s: float
    """A step of training, its images loaded and its share of a log line."""
    budget_s: float
    """Saving a budget, and the way back to the trunk."""
    evaluation_start_s: float
    """From the start of the program that evaluates to its first budget."""
    validation_s: float
    """Validation of an image with one prefix."""
    feature_s: float
    """A labelled image through the frozen backbone, decoded."""
    pair_s: float
    """Comparison of two images by k-NN."""
    is_measured: bool = True
    """Whether this shape was measured; else a smaller one was, and its times count in proportion to FLOPs."""


def remembered(config: RunConfig) -> Clock | None:
    """Return the times of a run's shape that were measured here last; None if none were."""
    with contextlib.suppress(UserError, OSError, ValidationError):
        if (value := read_object(cache_folder() / "clock" / f"{shape_digest(config)}.json")) is not None:
            return TypeAdapter(Clock).validate_python(value)
    return None


def remember(config: RunConfig, clock: Clock) -> None:
    """Keep the times of a run's shape; a cache that cannot be written keeps nothing."""
    with contextlib.suppress(OSError):
        write_json(cache_folder() / "clock" / f"{shape_digest(config)}.json", asdict(clock), durable=False)


def shape_digest(config: RunConfig) -> str:
    """Return what identifies the machine and everything of a run that its times depend on."""
    training, runtime = config.training, config.runtime
    shape = training.model_dump(mode="json", exclude={"seed": True, "schedule": True, "optimiser": {"lr_peak"}})
    evaluation = config.evaluation.model_dump(mode="json", exclude={"budgets"})
    how = runtime.model_dump(mode="json", include={"num_threads", "num_workers", "micro_batch", "log_every_steps"})
    return config_digest("clock", {"training": shape, "evaluation": evaluation, "runtime": how, "where": _where()})


@functools.cache
def _where() -> Mapping[str, Any]:
    machine: dict[str, Any] = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    for name in ("torch", "deepspeed", "aimscale"):
        with contextlib.suppress(PackageNotFoundError):
            machine[name] = version(name)
    return machine
