"""What a checkpoint costs: how long training stands still, how long writing takes beside it, and reading it again."""

from __future__ import annotations

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
    """Save once while steps go on, and load; `folder` is on the disk in question.

    Returns:
        `bytes`; `stall_s`: until training may go on; `write_s`: until the checkpoint is published; `load_s`.
    """
    group = start_group(find_placement(), device)
    optimiser = OptimiserSection(batch_size=2, precision=precision)
    try:
        engine = Engine(config, optimiser, EngineOptions(zero_stage=0 if precision == "fp32" else 1), group)
        writer = CheckpointWriter(engine, group, lambda: None)
        step = random_batches(config, 2, 2)

        def one_step() -> None:
            engine.step(step, num_targets=count_targets(step, config.num_tokens), lr=1e-3).loss_sum.item()

        one_step()
        with tempfile.TemporaryDirectory(dir=folder) as name:
            final = Path(name) / "saved"
            started = time.perf_counter()
            writer.save(final, run_id="bench", images_seen=2, branch=None, progress={}, keep=())
            one_step()
            stalled = time.perf_counter()
            one_step()
            step_s = time.perf_counter() - stalled
            writer.finish()
            written = time.perf_counter()
            size = sum(path.stat().st_size for path in final.iterdir())
            before = time.perf_counter()
            load_checkpoint(final, engine, group)
            load_s = time.perf_counter() - before
        writer.close()
        engine.close()
    finally:
        stop_group()
    return {
        "size": config.name,
        "bytes": size,
        "stall_s": max(0.0, stalled - started - step_s),
        "write_s": written - started,
        "load_s": load_s,
    }
