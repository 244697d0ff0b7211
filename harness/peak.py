"""The matrix-multiplication rate of this device: the peak against which MFU is stated.

A data sheet's peak is reached by no program; what the best matrix product reaches here and now is the honest limit.
Measured once per run directory, device and precision, and kept in `provenance.json`.
"""

from __future__ import annotations

import dataclasses
import json
import time

import torch

from harness.provenance import cpu_name
from harness.rundir import RunDir

GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
NUM_TRIES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """A measured matrix-multiplication rate."""

    device: str
    """Device model."""
    precision: str
    """fp32 or bf16."""
    num_threads: int
    """Torch threads (CPU)."""
    gemm_side: int
    """n of the n x n x n product."""
    flops_per_s: float
    """2 n^3 over the best time of some tries, one device."""


def device_name(device: torch.device) -> str:
    """Model name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def measure_peak(device: torch.device, precision: str, side: int | None = None) -> Peak:
    """Time square matrix products on a device."""
    side = side or GEMM_SIDE[device.type]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(NUM_TRIES):
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return Peak(
        device=device_name(device),
        precision=precision,
        num_threads=torch.get_num_threads(),
        gemm_side=side,
        flops_per_s=2 * side**3 / best,
    )


def known_peak(run: RunDir, device: torch.device, precision: str) -> Peak:
    """The peak from an earlier start of this run on the same device, else a new measurement."""
    try:
        starts = json.loads(run.provenance.read_text())["starts"]
    except FileNotFoundError:
        starts = []
    wanted = (device_name(device), precision, torch.get_num_threads())
    for start in reversed(starts):
        if "peak" in start:
            peak = Peak(**start["peak"])
            if (peak.device, peak.precision, peak.num_threads) == wanted:
                return peak
    return measure_peak(device, precision)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
