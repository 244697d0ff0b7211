"""What devices do, by their data sheets and by what was measured on this machine; torch is not imported."""

from __future__ import annotations

import contextlib
import re

from aimscale.aim.errors import UserError
from aimscale.harness.run.files import cache_folder, read_object, write_json
from aimscale.harness.run.provenance import cpu_name

NOMINAL_TFLOPS = {
    **{"A100": 312, "A30": 165, "A40": 149.7, "A10": 125},
    **{"H100 PCIe": 756.5, "H100 NVL": 835.5, "H100": 989.5, "GH200": 989.5, "H200 NVL": 835.5, "H200": 989.5},
    **{"L40S": 362.05, "L40": 181.05, "L4": 121, "GB200": 2500, "B200": 2250},
}
"""Dense bf16 TFLOP/s of cards whose name holds the key, the longest key first, from NVIDIA's data sheets of 2021 to
2024, which print twice as much, with sparsity, from the H100 on. SXM cards bear the plain name. TF32, which float32
products take on a card (`start_group`), is half of it on all of them."""
DECODED_PER_S = 1100.0
"""Assumption: JPEGs of 500 x 375 px that a loader process decodes and crops to 224 px a second; measured on one core of
an AMD EPYC of 2022 (docs/benchmarks.md)."""


def nominal_flops_per_s(name: str, precision: str) -> float | None:
    """The data sheet's dense peak of a device by its model name; None where it is not known, as for a slice (MIG)."""
    if "MIG" in name:
        return None
    for key in sorted(NOMINAL_TFLOPS, key=len, reverse=True):
        if re.search(rf"\b{key}\b", name.replace("-", " ")):
            return NOMINAL_TFLOPS[key] * 1e12 / (2 if precision == "fp32" else 1)
    return None


def remember(what: str, rate: float) -> None:
    """Keep a rate that was measured on this kind of processor, unless a higher one is known."""
    path = cache_folder() / "rates.json"
    with contextlib.suppress(OSError):  # a cache that cannot be written is no mistake
        rates = _rates()
        mine = rates.setdefault(cpu_name(), {})
        if rate > (remembered(what) or 0.0):
            mine[what] = rate
            write_json(path, rates, durable=False)


def remembered(what: str) -> float | None:
    """That rate; None where it was never measured here."""
    mine = _rates().get(cpu_name())
    found = mine.get(what) if isinstance(mine, dict) else None
    return found if isinstance(found, float) and 0 < found < 1e18 else None


def _rates() -> dict[str, dict[str, float]]:
    with contextlib.suppress(UserError):
        return read_object(cache_folder() / "rates.json") or {}
    return {}
