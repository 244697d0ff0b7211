"""How long a checkpoint stops training while its copy is written, and how long without a copy; alone or by torchrun.

python tests/experiments/checkpoint.py rung-384 /tmp
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from aimscale.aim.config import model_config
from aimscale.harness.bench.train import random_batches
from aimscale.harness.device.distributed import find_placement, start_group, stop_group
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.checkpoint import load_checkpoint
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.feed import count_targets
from aimscale.harness.step.saving import CheckpointWriter


def main(size: str, disk: Path) -> None:
    config = model_config(size, image_size=32, patch_size=4)
    group = start_group(find_placement(), "auto")
    optimiser = OptimiserSection(batch_size=2 * group.world_size, precision="bf16")
    engine = Engine(config, optimiser, EngineOptions(zero_stage=1), group)
    step = random_batches(config, 2, 2)
    num_targets = group.world_size * count_targets(step, config.num_tokens)

    def step_s() -> float:
        started = time.perf_counter()
        engine.step(step, num_targets=num_targets, lr=1e-3).loss_sum.item()
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory(dir=disk) as name:
        folder = Path(group.from_first(name))
        alone_s = min(step_s() for _ in range(4))
        beside = CheckpointWriter(engine, group, lambda: None)
        beside.poll()
        group.wait()
        started = time.perf_counter()
        beside.save(folder / "beside", run_id="", images_seen=2, branch=None, progress={}, keep=[])
        stall_s, steps = time.perf_counter() - started, []
        while beside.is_under_way(folder / "beside"):
            steps.append(step_s())
            beside.poll()
        write_s = time.perf_counter() - started
        beside.finish()
        waiting = CheckpointWriter(engine, group, lambda: None, copies=False)
        group.wait()
        started = time.perf_counter()
        waiting.save(folder / "waiting", run_id="", images_seen=2, branch=None, progress={}, keep=[folder / "beside"])
        waiting.finish()
        wait_s, started = time.perf_counter() - started, time.perf_counter()
        load_checkpoint(folder / "beside", engine, group)
        load_s = time.perf_counter() - started
        size_gb = sum(path.stat().st_size for path in (folder / "beside").iterdir()) / 1e9
        for writer in (beside, waiting):
            writer.close()
        group.wait()
    print(
        f"{size_gb:.3f} GB, {group.world_size} rank(s): training stops for {stall_s:.3f} s, {wait_s:.2f} s without a "
        f"copy ({100 * stall_s / wait_s:.1f} %); written in {write_s:.2f} s, in which a step takes "
        f"{statistics.median(steps or [alone_s]) / alone_s:.2f} times as long; loaded in {load_s:.2f} s"
    )
    stop_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
