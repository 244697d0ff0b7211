"""The matrix-multiplication rate of this device: the peak against which MFU is stated.

A data sheet's peak is reached by no program; what the best matrix product reaches here is the honest limit. Another
process can only make a measurement too small, so the largest counts: it is kept for this host, device, precision and
number of threads under `$AIMSCALE_CACHE` (by default `~/.cache/aimscale`), and every start measures again for a moment.
Runs side by side then state their MFU against the same peak.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from pathlib import Path

import torch

from aimscale.aim.cpu_kernels import float32_matmul
from aimscale.harness.run.files import cache_folder, write_json
from aimscale.harness.run.provenance import cpu_name

GEMM_SIDE = {"cpu": 512, "cuda": 8192}
"""n on a CPU: as fast as 2048, and short enough to finish between two interruptions by other processes (measured on a
busy machine: 264 GFLOP/s at 512, 28 at 1024, 7 at 2048)."""
MIN_TRIES = 10
MAX_TRIES = 100
MAX_SECONDS = 1.0
"""Tries go on until the best has not grown in `MIN_TRIES` tries, but no longer than this."""
EXPIRY_S = 30 * 24 * 3600
"""A remembered peak is forgotten after this: drivers and libraries change."""


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
    """2 n^3 over the best time of all tries, one device."""


def device_name(device: torch.device) -> str:
    """Model name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def measure_peak(device: torch.device, precision: str, side: int | None = None) -> Peak:
    """Time square matrix products on a device, by the fastest library that training uses there."""
    side = side or GEMM_SIDE[device.type]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    multiply = float32_matmul if (device.type, precision) == ("cpu", "fp32") else torch.mm
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    best, tries_since, began = float("inf"), 0, time.perf_counter()
    for _ in range(MAX_TRIES):
        _wait(device)
        started = time.perf_counter()
        multiply(left, right)
        _wait(device)
        took = time.perf_counter() - started
        best, tries_since = (took, 0) if took < 0.99 * best else (min(best, took), tries_since + 1)
        if tries_since >= MIN_TRIES or time.perf_counter() - began > MAX_SECONDS:
            break
    return Peak(
        device=device_name(device),
        precision=precision,
        num_threads=torch.get_num_threads() if device.type == "cpu" else 1,
        gemm_side=side,
        flops_per_s=2 * side**3 / best,
    )


def known_peak(device: torch.device, precision: str) -> Peak:
    """The largest peak that this host has shown for a device, precision and number of threads; measures once more."""
    now = measure_peak(device, precision)
    path = cache_folder() / "peaks.json"
    key = json.dumps([socket.gethostname(), now.device, precision, now.num_threads, now.gemm_side, torch.__version__])
    entries = _read(path)
    seen = entries.get(key)
    if seen is not None and seen["flops_per_s"] >= now.flops_per_s:
        return dataclasses.replace(now, flops_per_s=seen["flops_per_s"])
    entries[key] = {"flops_per_s": now.flops_per_s, "time": time.time()}
    with contextlib.suppress(OSError):  # a home that cannot be written only costs the agreement
        write_json(path, entries, durable=False)
    return now


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Entries that have not expired; none where the file is missing or damaged."""
    try:
        return {
            key: {"flops_per_s": float(entry["flops_per_s"]), "time": float(entry["time"])}
            for key, entry in json.loads(path.read_text()).items()
            if 0 <= time.time() - entry["time"] < EXPIRY_S
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
