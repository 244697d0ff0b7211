"""The memory estimate against measured steps."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from trainers import start_ranks
from variants import VARIANTS

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.cost import mean_scored_tokens
from aimscale.aim.model import AIM
from aimscale.harness.bench.train import random_batches
from aimscale.harness.data.stream.loader import count_targets
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.device.memory import WORKSPACE_BYTES, free_host_bytes, held_bytes, kept_bytes_per_image
from aimscale.harness.distributed.group import find_placement, start_group, stop_group
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.engine import Engine


def kept_bytes(config: ModelConfig, precision: str, activation_checkpointing: bool, prefix: str) -> float:
    """Bytes per image that autograd keeps, weights and constants left out."""
    model = AIM(config).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    model.set_activation_checkpointing(activation_checkpointing)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    (batch,) = random_batches(config, 8, 8)
    prefix_lengths = torch.ones_like(batch.prefix_lengths) if prefix == "none" else batch.prefix_lengths
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch.images, prefix_lengths)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 8


CASES = [
    *itertools.product(
        [("rung-64", 32, 4), ("rung-128", 112, 14)], ["fp32", "bf16"], [False, True],
        [{}, {"prefix": "none"}, {"masked": 0.75, "head_kind": "transformer"}],
    ),
    *((("w64-d3", 32, 4), "fp32", False, options) for options in VARIANTS),
]  # fmt: skip


@pytest.mark.parametrize(("geometry", "precision", "recomputes", "options"), CASES, ids=str)
def test_kept_activations_are_within_ten_percent(
    geometry: tuple[str, int, int], precision: str, recomputes: bool, options: dict
) -> None:
    size, side, patch = geometry
    prefix = options.get("prefix", "paired")
    model = {name: value for name, value in options.items() if name != "prefix"}
    config = model_config(size, image_size=side, patch_size=patch, **model)
    measured = kept_bytes(config, precision, recomputes, prefix)
    scored = mean_scored_tokens(config, prefix)
    estimate = kept_bytes_per_image(config, precision, recomputes, scored)  # type: ignore[arg-type]
    if precision == "bf16" and not recomputes:  # whole score matrices, on a CPU alone
        num_heads = config.depth * config.num_heads + config.head.depth * (config.head.num_heads or 0)
        estimate += 2 * num_heads * config.num_tokens**2
    assert estimate == pytest.approx(measured, rel=0.1)


BIG = model_config("w640-d4", image_size=32, patch_size=8)


def status_bytes(field: str) -> int:
    """A field of this process's status: `VmHWM` is its peak of resident memory, `RssFile` its pages of mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def peak_bytes(reset: bool = False) -> int:
    """Peak resident memory but for pages of libraries, which a fork touches one by one; `reset` starts a new peak."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmHWM") - status_bytes("RssFile")


def measure_step(rank: int, out: Path, precision: str, stage: int) -> None:
    torch.set_num_threads(1)
    group = start_group(find_placement(), "cpu")
    Engine(model_config("w16-d2", image_size=16, patch_size=4), OptimiserSection(precision="fp32"),
           EngineOptions(zero_stage=0), group)  # fmt: skip  # imports are no part of the model
    before = peak_bytes(reset=True)
    optimiser = OptimiserSection(batch_size=16, precision=precision)  # type: ignore[arg-type]
    engine = Engine(BIG, optimiser, EngineOptions(zero_stage=stage), group)
    peak_bytes(reset=True)
    step = random_batches(BIG, 16 // group.world_size, 16)
    for _ in range(2):
        engine.step(step, num_targets=group.world_size * count_targets(step, BIG.num_tokens), lr=1e-3)
    if rank == 0:
        out.write_text(json.dumps(peak_bytes() - before))
    stop_group()


def measured_peak(out: Path, precision: str, stage: int, world_size: int) -> int:
    """Bytes of `measure_step` in processes of its own."""
    ranks = start_ranks([sys.executable, __file__, str(out), precision, str(stage)], world_size)
    assert [process.wait() for process in ranks] == [0] * world_size
    return int(json.loads(out.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "stage", "world_size"), [("fp32", 0, 1), ("fp32", 2, 2), ("bf16", 1, 2), ("bf16", 3, 2)]
)
def test_the_peak_of_a_step_is_within_ten_percent_of_the_estimate(
    precision: str, stage: int, world_size: int, tmp_path: Path
) -> None:
    where = {"zero_stage": stage, "world_size": world_size, "is_gpu": False}
    held = held_bytes(BIG, precision, **where)  # type: ignore[arg-type]
    per_image = kept_bytes_per_image(BIG, precision, False, BIG.num_tokens / 2)  # type: ignore[arg-type]
    expected = held - WORKSPACE_BYTES + 16 // world_size * per_image
    measured = measured_peak(tmp_path / "bytes", precision, stage, world_size)
    if measured < expected / 1.1:  # on a busy machine buffers may never live together; the peak is the most seen
        measured = max(measured, measured_peak(tmp_path / "bytes", precision, stage, world_size))
    assert expected == pytest.approx(measured, rel=0.1)


if __name__ == "__main__":  # a fresh process: the heap that a test run leaves behind would be counted or used again
    measure_step(int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    os._exit(0)  # as the forks of `in_processes` end: gloo's threads may outlive the interpreter


@pytest.mark.parametrize(
    ("line", "base", "names"),
    [
        ("0::/job/step", "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job/step",
            "sys/fs/cgroup/memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_the_tightest_control_group_counts_as_the_hosts_memory(
    tmp_path: Path, line: str, base: str, names: tuple[str, str, str]
) -> None:
    assert free_host_bytes(tmp_path) == pytest.approx(free_host_bytes(Path("/nowhere")), rel=0.2), "no groups at all"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:pids:/\n{line}\n")
    for folder, limit, used, pages in (
        ("job/step", "max", 1, 0),
        ("job", 10 << 20, 4 << 20, 1 << 20),
        (".", "x", 1, 0),
    ):
        group = tmp_path / base / folder
        group.mkdir(parents=True, exist_ok=True)
        values = {names[0]: limit, names[1]: used, "memory.stat": f"anon 5\n{names[2]} {pages}"}
        for name, value in values.items():
            (group / name).write_text(f"{value}\n")
    assert free_host_bytes(tmp_path) == 7 << 20
    (tmp_path / base / "job" / names[1]).write_text(f"{20 << 20}\n")
    assert free_host_bytes(tmp_path) == 0
