"""What a checkpoint costs: how long training stands still, beside the time that it would stand still without a copy."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from aimscale.aim.config import ModelConfig
from aimscale.harness.bench.train import random_batches
from aimscale.harness.device.distributed import find_placement, start_group, stop_group
from aimscale.harness.device.memory import Precision
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.checkpoint import load_checkpoint
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.feed import count_targets
from aimscale.harness.step.saving import CheckpointWriter


def run(config: ModelConfig, *, precision: Precision, device: str, folder: Path) -> dict[str, Any]:
    """Save once while steps go on and once while they wait, and load; `folder` is on the disk in question.

    All ranks call this together, each with its share of the state.

    Returns:
        `bytes`; `stall_s`: what the save takes of training's time; `write_s`: until the checkpoint is published;
        `slowdown`: how much longer steps take until then (on a CPU they share its cores with the writer); `wait_s`: one
        save for which training waits; `stall`: `stall_s` over `wait_s`; `load_s`. Of this rank.
    """
    group = start_group(find_placement(), device)
    optimiser = OptimiserSection(batch_size=2 * group.world_size, precision=precision)
    try:
        engine = Engine(config, optimiser, EngineOptions(zero_stage=0 if precision == "fp32" else 1), group)
        step = random_batches(config, 2, 2)
        num_targets = group.world_size * count_targets(step, config.num_tokens)

        def one_step() -> float:
            started = time.perf_counter()
            engine.step(step, num_targets=num_targets, lr=1e-3).loss_sum.item()
            return time.perf_counter() - started

        def save(writer: CheckpointWriter, path: Path) -> None:
            kept = list(path.parent.iterdir())
            writer.save(path, run_id="bench", images_seen=2, branch=None, progress={}, keep=kept)

        with tempfile.TemporaryDirectory(dir=folder) as name:
            there = Path(group.from_first(name))
            beside = CheckpointWriter(engine, group, lambda: None)
            beside.poll()
            alone_s = min(one_step() for _ in range(4))
            group.wait()
            started = time.perf_counter()
            save(beside, there / "beside")
            stall_s = time.perf_counter() - started
            steps = []
            while beside.is_under_way(there / "beside"):
                steps.append(one_step())
                beside.poll()
            write_s = time.perf_counter() - started
            beside.finish()  # it removes other checkpoints in the background, and would the next one
            waiting = CheckpointWriter(engine, group, lambda: None, copies=False)
            group.wait()
            started = time.perf_counter()
            save(waiting, there / "waiting")
            waiting.finish()
            wait_s = time.perf_counter() - started
            size = sum(path.stat().st_size for path in (there / "beside").iterdir())
            started = time.perf_counter()
            load_checkpoint(there / "beside", engine, group)
            load_s = time.perf_counter() - started
            for writer in (beside, waiting):
                writer.close()
            group.wait()
        engine.close()
    finally:
        stop_group()
    return {
        "size": config.name,
        "world_size": group.world_size,
        "bytes": size,
        "stall_s": stall_s,
        "stall": stall_s / wait_s,
        "write_s": write_s,
        "slowdown": statistics.median(steps) / alone_s,
        "wait_s": wait_s,
        "load_s": load_s,
    }
