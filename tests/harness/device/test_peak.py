"""The peaks, and MFU against them."""

from __future__ import annotations

import dataclasses

import pytest

from aimscale.aim.config import model_config
from aimscale.harness.device.speed import Peak, nominal_flops_per_s, utilisation

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [(H100, 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA GH200 480GB", 989.5),
     ("NVIDIA H200", 989.5), ("NVIDIA L40S", 362.05), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500)],
)  # fmt: skip
def test_a_known_card_has_its_data_sheets_peak(name: str, tflops: float) -> None:
    assert nominal_flops_per_s(name, "bf16") == tflops * 1e12
    assert nominal_flops_per_s(name, "fp32") == tflops * 1e12 / 2
    for other in ("NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert nominal_flops_per_s(other, "bf16") is None


def test_utilisation_names_its_flops_and_its_peak() -> None:
    model = model_config("aim-600M", image_size=224, patch_size=14, head_rule="released")
    # 262 images/s a card are 45 % of 989.5 TFLOP/s by the paper's sizes; 0.81 of that is executed.
    peak = Peak(
        device=H100, precision="bf16", num_threads=1, gemm_side=8, flops_per_s=794e12, nominal_flops_per_s=989.5e12
    )
    found = utilisation(model, peak, images_per_s=8 * 262, scored_tokens=128, world_size=8)
    assert found["mfu_published"] == pytest.approx(0.45, rel=0.01)
    assert found["mfu"] == pytest.approx(0.81 * 0.45 * 989.5 / 794, rel=0.01)
    unknown = dataclasses.replace(peak, nominal_flops_per_s=None)
    nameless = utilisation(model, unknown, images_per_s=8 * 262, scored_tokens=128, world_size=8)
    assert nameless == {"mfu_published": None, "mfu": found["mfu"]}
