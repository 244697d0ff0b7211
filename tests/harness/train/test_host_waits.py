"""The host reads losses and norms at lines and checkpoints alone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import train_in

from aimscale.harness.log.record import Recorder
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.step.engine import Engine
from aimscale.harness.train.run import Trainer


class Waits(TorchDispatchMode):
    """Counts values that the host asks for, by the file of aimscale or DeepSpeed that asks.

    On a GPU each waits for all that was given to it before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frame: Any = sys._getframe(1)
            while frame and not {"aimscale", "deepspeed"} & {*Path(frame.f_code.co_filename).parts}:
                frame = frame.f_back
            self.asked[Path(frame.f_code.co_filename).name if frame else "nobody"] += 1
        return func(*args, **(kwargs or {}))


def train_watched(rank: int, path: Path, out: Path) -> None:
    """Train, and write what the host waited for, and how often it took a step and read losses."""
    waits, events = Waits(), []

    def note(owner: Any, name: str, event: str) -> None:
        real = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return real(*args, **kwargs)

        setattr(owner, name, noted)

    note(Engine, "step", "step")
    note(Recorder, "_read", "read")
    walk = Trainer.run_segments

    def watched(self: Trainer) -> None:
        with waits:
            walk(self)
        (out / str(rank)).write_text(json.dumps({"asked": waits.asked, "events": events}))

    Trainer.run_segments = watched  # type: ignore[method-assign]
    train_in(rank, path)


def test_steps_between_lines_wait_for_no_loss_and_no_norm(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], in_processes: Callable[..., list[int]]
) -> None:
    runtime = {"checkpoint_every_images": None, "checkpoint_every_min": None, "log_every_steps": 4}
    config = tiny_config(runtime, budgets=[128], schedule={"kind": "cosine", "warmup_images": 16})
    run = RunDir.create(tmp_path / "run", config)
    assert in_processes(train_watched, run.path, tmp_path, world_size=2) == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert {"run.py", "record.py", "engine.py"}.isdisjoint(found["asked"]), found["asked"]
        assert Counter(found["events"]) == {"step": 16, "read": 4}
