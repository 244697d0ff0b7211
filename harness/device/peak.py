"""Peaks against which MFU is stated: a data sheet's, and the matrix-multiplication rate measured on this device.

MFU is usually stated against a data sheet's peak, which no program reaches; the rate of the best matrix product here is
the honest limit. Other processes can only make a measurement too small.
"""

from __future__ import annotations

import dataclasses
import time

import torch

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import executed_flops_per_image, flops_per_image
from aimscale.harness.device.gpu_specs import nominal_flops_per_s
from aimscale.harness.device.precision import DTYPES
from aimscale.harness.run.provenance import cpu_name

GEMM_SIDE = {"cpu": 512, "cuda": 8192}
"""Side n of the measured product. On a CPU it is as fast as 2048, and short enough to finish between two interruptions
by other processes (measured on a busy machine: 264 GFLOP/s at 512, 28 at 1024, 7 at 2048)."""
MEASURED_S = 0.2
"""Time of the measurement."""


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def measure_peak(device: torch.device, precision: str) -> Peak:
    """Measure a device's peak: the best time of a square matrix product."""
    side = GEMM_SIDE[device.type]
    dtype = DTYPES[precision]
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    best, stop = float("inf"), time.perf_counter() + MEASURED_S
    while time.perf_counter() < stop:
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return Peak(
        device=device_name(device),
        precision=precision,
        num_threads=torch.get_num_threads() if device.type == "cpu" else 1,
        gemm_side=side,
        flops_per_s=2 * side**3 / best,
        nominal_flops_per_s=nominal_flops_per_s(device_name(device), precision),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
