"""The roofline against measured speeds of vision transformers, and its operations against those of a rehearsed step."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aimscale.aim.config import model_config
from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.harness.device import roofline
from aimscale.harness.device.execution import ExecutionPlan
from aimscale.harness.device.roofline import Kernel
from aimscale.harness.device.speed import GPUS, GpuSpec, find_gpu

ROWS = [line for line in (Path(__file__).parent / "vit_speed.csv").read_text().splitlines() if line[0] != "#"]
CALIBRATED = "RTX 3090"
"""GPU to which the constants were fitted; the others were not looked at."""


def of_vit(row: dict[str, Any]) -> Iterator[Kernel]:
    """Count the operations of timm's ViT: a class token, no mask; before torch 2 its attention kept the scores."""
    batch, width, patch_size = int(row["batch"]), int(row["width"]), int(row["patch_size"])
    num_tokens = (int(row["image_size"]) // patch_size) ** 2 + 1
    yield roofline.linear(batch * num_tokens, 3 * patch_size**2, width, 2)
    yield Kernel("memory", 0.0, batch * num_tokens * (12 * width + 30 * patch_size**2))
    how = {"element": 2, "stream": 2 if row["precision"] == "bf16" else 4, "is_compiled": row["compiled"] == "1"}
    for kernel in int(row["depth"]) * list(roofline.block_kernels(batch, num_tokens, width, **how)):  # type: ignore[arg-type]
        if kernel.kind == "attention" and int(row["torch"]) < 200:
            scores = batch * int(row["num_heads"]) * num_tokens**2
            yield from 2 * [Kernel("product", kernel.flops / 2, 2 * scores)]
            yield Kernel("memory", 0.0, 24 * scores)  # scaled, softmax in float32, and back
        else:
            yield kernel


def expected_s(row: dict[str, Any], gpu: GpuSpec) -> float:
    is_training = row["mode"] == "train"
    taken_s = roofline.pass_s(of_vit(row), gpu, element=2, is_masked=False, with_backward=is_training)
    update = roofline.OPTIMISER_BYTES * 1e6 * float(row["params_m"]) / (roofline.MEMORY_SHARE * gpu.bandwidth_gb * 1e9)
    return taken_s + is_training * update


def test_it_tells_measured_speeds_of_gpus_that_it_was_not_fitted_to() -> None:
    """Median within 25 % on each GPU, forward and training, compiled or not, and at each of four sizes."""
    errors: dict[tuple[str, ...], list[float]] = {}
    for row in csv.DictReader(ROWS):
        gpu = find_gpu(row["device"])
        assert gpu is not None
        ratio = expected_s(row, gpu) * float(row["images_per_s"]) / int(row["batch"])
        setting = row["device"], row["torch"], row["mode"], row["precision"], row["compiled"]
        errors.setdefault(setting, []).append(abs(ratio - 1))
        errors.setdefault(("size", row["width"]), []).append(abs(ratio - 1))
    medians = {key: statistics.median(each) for key, each in errors.items()}
    assert len(medians) == 10 + 6
    assert max(medians.values()) < 0.25, medians
    assert statistics.median(each for key, part in errors.items() if CALIBRATED not in key for each in part) < 0.15


@pytest.mark.parametrize("head", [{}, {"head_kind": "transformer"}, {"head_depth": 0}])
@pytest.mark.parametrize("size", ["rung-64", "aim-600M"])
def test_its_operations_have_the_flops_that_are_executed(size: str, head: dict[str, Any]) -> None:
    config = model_config(size, **head)
    scored = mean_scored_tokens(config, "uniform")
    kernels = roofline.model_kernels(config, 8, scored, element=2, is_compiled=True)
    assert sum(each.flops for each in kernels) == pytest.approx(8 * executed_flops_per_image(config, scored).forward)


def test_more_devices_recomputation_and_slow_links_cost_what_they_should() -> None:
    config, scored = model_config("aim-1B"), 128.0
    plan = {"zero_stage": 2, "micro_batch": 64, "memory_bytes": 0, "measures": False, "half_micro_batch": 0}

    def step_s(gpu: str = "H100", devices: int = 8, per_node: int = 8, *, recompute: bool = False) -> float:
        chosen = ExecutionPlan(**plan, activation_checkpointing=recompute)  # type: ignore[arg-type]
        where = {"num_devices": devices, "devices_per_node": per_node}
        how: dict[str, Any] = {"batch_size": 4096, "scored_tokens": scored, "element": 2, "is_compiled": True}
        return roofline.step_s(config, chosen, GPUS[gpu], **how, **where)

    assert 1 < 8 * step_s() / step_s(devices=1) < 1.1, "gradients are reduced behind the backward pass"
    assert 1.25 < step_s(recompute=True) / step_s() < 1.35, "one of four passes"
    assert step_s(devices=16, per_node=1) > 1.5 * step_s(devices=16, per_node=8), "one adapter for each node"
    assert step_s("H100 PCIe") > 1.3 * step_s(), "without NVLink, at half of the power"


@pytest.mark.fork
def test_a_rehearsed_step_starts_as_many_kernels() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    from aimscale.harness.rehearsal.fake import fake_rank
    from aimscale.harness.rehearsal.step import StepTracker, example_batch, track_step
    from aimscale.harness.run.config import OptimiserSection
    from aimscale.harness.step.engine import Engine, EngineOptions

    views = (
        "view detach t transpose expand _unsafe_view unsqueeze squeeze permute slice select as_strided narrow alias "
    )
    views += "split unbind empty empty_like is_pinned _local_scalar_dense device"

    class Counting(TorchDispatchMode):
        counts = dict.fromkeys(("forward", "backward", "update"), 0)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.counts[tracker.phase] += func.overloadpacket.__name__ not in views.split()
            return func(*args, **(kwargs or {}))

    config, tracker = model_config("rung-384"), StepTracker()
    batches = [example_batch(config, 8, "uniform")]
    with fake_rank(7, 8, on_gpu=True) as group, tracker:
        options = EngineOptions(zero_stage=2, activation_checkpointing=False)
        engine = Engine(config, OptimiserSection(precision="bf16"), options, group)
        track_step(tracker, engine, batches)
        with Counting() as found:
            engine.step(batches, num_targets=8 * 8 * 128, lr=1e-3)
    num_blocks = config.depth + config.head.depth
    passes = found.counts["forward"] + found.counts["backward"]
    assert passes / num_blocks == pytest.approx(roofline.KERNELS_PER_BLOCK, rel=0.15)
    assert found.counts["update"] / num_blocks == pytest.approx(roofline.UPDATE_KERNELS_PER_BLOCK, rel=0.25)
