"""Rehearsed steps against the steps of real ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trainers import start_ranks

from aimscale.aim.config import model_config
from aimscale.harness.data.images import IMAGE_MEAN, IMAGE_STD, normalise
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.distributed.group import Group, find_placement, start_group, stop_group
from aimscale.harness.rehearsal.fake import fake_rank
from aimscale.harness.rehearsal.step import StepTracker, example_batch, fullest_rank, track_copy, track_step
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.saving import CheckpointWriter, checkpoint_shard

CONFIG = model_config("w96-d3", image_size=32, patch_size=4)
MICRO_BATCHES = [4, 4, 4]
NUMBERS = 100
"""Bytes of single numbers, such as a loss, which the first engine of a process keeps a little longer or shorter."""
LET_GO_S = 0.2
"""Time in which gloo's thread lets a message go, also on a busy machine, s."""
PEAK_TOLERANCE = 0.01
"""Relative error of a peak: on a busy machine gloo's thread may hold a message it has sent a little longer."""


class TrackerUnderGloo(StepTracker):
    """Tracker that leaves out the copy by which gloo, which has no reduce-scatter, reduces a message and takes a part,
    and that ends a phase once gloo's thread has let go what it sent.

    The copy appears where gloo splits it; NCCL makes none.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "phase" and dist.is_initialized() and dist.get_backend() == "gloo":
            time.sleep(LET_GO_S)
        super().__setattr__(name, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.split.Tensor and args[0].untyped_storage() not in self._numbers:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def observe(precision: str, stage: int, recomputes: bool, *, group: Any, out: Path | None = None) -> dict[str, Any]:
    """Memory of every phase, every call of a collective in one step, and bytes of a checkpoint, of one rank."""
    options = EngineOptions(zero_stage=stage, activation_checkpointing=recomputes)
    tracker = TrackerUnderGloo()
    with tracker:
        engine = Engine(CONFIG, OptimiserSection(precision=precision), options, group)
        track_step(tracker, engine, [example_batch(CONFIG, each, "paired") for each in MICRO_BATCHES])
        checkpoint = sum(values.nbytes for values in checkpoint_shard(engine).values())
        track_copy(tracker, engine)
    if out is not None:
        checkpoint = checkpoint_bytes(engine, group, out)
    phases, calls = [dataclasses.asdict(each) for each in tracker.memory()], list(tracker.calls)
    engine.close()
    return json.loads(json.dumps({"phases": phases, "calls": calls, "checkpoint": checkpoint}))


def checkpoint_bytes(engine: Engine, group: Group, folder: Path) -> int:
    """Bytes of the values in this rank's file of a checkpoint."""
    writer = CheckpointWriter(engine, group)
    writer.save(folder / "1", run_id="r", images_seen=1, branch=None, progress={}, keep=())
    writer.finish()
    writer.close()
    path = folder / "1" / f"part-{group.rank:05d}-of-{group.world_size:05d}.safetensors"
    return path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")


def observe_fake(world_size: int, *setting: Any) -> dict[str, Any]:
    with fake_rank(fullest_rank(CONFIG, setting[0], setting[1], world_size), world_size, on_gpu=False) as group:
        return observe(*setting, group=group)


def observe_real(world_size: int, settings: list[Any], out: Path) -> list[dict[str, Any]]:
    """The same settings on real ranks, in processes of their own."""
    ranks = start_ranks([sys.executable, __file__, str(out), json.dumps(settings)], world_size)
    assert [process.wait() for process in ranks] == [0] * world_size
    return json.loads(out.read_text())


def main(out: Path, settings: list[Any]) -> None:
    torch.set_num_threads(1)
    group = start_group(find_placement(), "cpu")
    found = [
        observe(*setting, group=group, out=out.parent / f"checkpoint-{number}")
        for number, setting in enumerate(settings)
    ]
    gathered = group.all_gather_object(found)
    if group.is_first:
        ranks = [fullest_rank(CONFIG, precision, stage, group.world_size) for precision, stage, _ in settings]
        out.write_text(json.dumps([gathered[rank][number] for number, rank in enumerate(ranks)]))
    stop_group()


ALL = [
    (precision, stage, recomputes)
    for stage, precision, recomputes in itertools.product((0, 1, 2), ("fp32", "bf16"), (False, True))
    if (precision, stage) != ("bf16", 0)
]
# A second engine at ZeRO 3 in a process holds more than the first, so each has its own.
GROUPS = [ALL, *([(precision, 3, recomputes)] for precision in ("fp32", "bf16") for recomputes in (False, True))]


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, [("bf16", 2, False)]),
        pytest.param(2, [("bf16", 3, False)], marks=pytest.mark.slow),
        pytest.param(4, [("bf16", 1, True), ("bf16", 2, False)], marks=pytest.mark.slow),
        *(pytest.param(*each, marks=pytest.mark.grid) for each in itertools.product((1, 2, 4), GROUPS)),
    ],
)
def test_fake_ranks_hold_and_send_what_real_ones_do(world_size: int, settings: list[Any], tmp_path: Path) -> None:
    for setting, real in zip(settings, observe_real(world_size, settings, tmp_path / "real"), strict=True):
        fake = observe_fake(world_size, *setting)
        assert fake["calls"] == real["calls"], setting
        assert "broadcast" not in {name for _, _, name, _ in fake["calls"]}, "by which first steps agree on an order"
        assert fake["checkpoint"] == real["checkpoint"], setting
        assert [each["phase"] for each in fake["phases"]] == ["forward", "backward", "update", "point"]
        for mine, theirs in zip(fake["phases"], real["phases"], strict=True):
            ours, most = sum(mine["peak"].values()), sum(theirs["peak"].values())
            assert ours == pytest.approx(most, rel=PEAK_TOLERANCE), (setting, mine, theirs)
            for part, num_bytes in theirs["held"].items():
                assert mine["held"][part] == pytest.approx(num_bytes, abs=NUMBERS), (setting, part, mine, theirs)


if __name__ == "__main__":  # a rank of `observe_real`
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    os._exit(0)  # gloo's threads may outlive the interpreter


def test_a_rehearsal_leaves_no_fake_tensor_to_its_process() -> None:
    """Statistics of images are kept once they are on a device: by fake ones, later images stayed as they were."""
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with fake_rank(0, 1, on_gpu=False):
        normalise(images)
    black = -torch.tensor(IMAGE_MEAN) / torch.tensor(IMAGE_STD)
    torch.testing.assert_close(normalise(images), black.view(1, 3, 1, 1).expand(1, 3, 2, 2))
