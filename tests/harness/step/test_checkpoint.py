"""A checkpoint written by any ranks and stage is read by any other; a failed write costs nothing."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.data.stream.draws import Batch
from aimscale.harness.device.distributed import Group, find_placement, start_group, stop_group
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step import saving
from aimscale.harness.step.checkpoint import CheckpointError, complete_checkpoints, load_checkpoint
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.saving import CheckpointWriter, save_weights

CONFIG = model_config("w32-d2", image_size=16, patch_size=4)
Run = Callable[..., list[int]]


def make_engine(group: Group, stage: int, precision: str = "fp32") -> Engine:
    optimiser = OptimiserSection(batch_size=8, precision=precision)  # type: ignore[arg-type]
    return Engine(CONFIG, optimiser, EngineOptions(zero_stage=stage), group)


def train(engine: Engine, group: Group, start: int, stop: int) -> list[float]:
    """Losses of steps start..stop-1, on images that depend on the step alone."""
    losses = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 16, 16, generator=generator)
        prefix_len = torch.randint(1, 16, (8,), generator=generator)
        mine = torch.arange(8).tensor_split(group.world_size)[group.rank]
        batch = Batch(images=images[mine], given=prefix_len[mine], positions=mine)
        num_targets = int((16 - prefix_len).sum())
        outcome = engine.step([batch], num_targets=num_targets, lr=1e-2)
        losses.append(group.sum_tensor(outcome.loss_sum.clone()).item() / num_targets)
    return losses


def save(path: Path, engine: Engine, group: Group, images_seen: int = 40) -> None:
    """Begin a checkpoint and wait for it; those beside it stay."""
    writer = CheckpointWriter(engine, group)
    begin(writer, path, images_seen)
    try:
        writer.finish()
    finally:
        writer.close()


def begin(writer: CheckpointWriter, path: Path, images_seen: int = 40) -> None:
    writer.save(
        path,
        run_id="r",
        images_seen=images_seen,
        branch=None,
        progress={"images_done": images_seen},
        keep=path.parent.iterdir(),
    )


def write_all(rank: int, folder: Path, cases: list[tuple[int, str]]) -> None:
    """Train three steps, save, and note the losses of three more."""
    torch.set_num_threads(1)
    group = start_group(find_placement(), "cpu")
    for stage, precision in cases:
        engine = make_engine(group, stage, precision)
        train(engine, group, 0, 3)
        name = f"{group.world_size}-{stage}-{precision}"
        save(folder / name, engine, group)
        losses = train(engine, group, 3, 6)
        save_weights(folder / f"{name}.safetensors", engine, group)
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(losses))
    stop_group()


def read_all(rank: int, folder: Path, cases: list[tuple[int, str]]) -> None:
    """Every stage goes on from one of another stage and world size, and exactly so from its own."""
    torch.set_num_threads(1)
    group = start_group(find_placement(), "cpu")
    for stage, precision in cases:
        own, following = f"{group.world_size}-{stage}-{precision}", max((stage + 1) % 4, precision == "bf16")
        for source in (own, f"{3 - group.world_size}-{following:d}-{precision}"):
            is_own = source == own
            engine = make_engine(group, stage, precision)
            train(engine, group, 20, 21)  # what was there before must not matter
            manifest = load_checkpoint(folder / source, engine, group)
            assert manifest.adam_step == 3
            losses = train(engine, group, 3, 6)
            expected = json.loads((folder / f"{source}.json").read_text())
            if is_own:
                assert losses == expected, (source, stage)
                save_weights(folder / "again.safetensors", engine, group)
                if rank == 0:
                    same = (folder / "again.safetensors").read_bytes() == (
                        folder / f"{source}.safetensors"
                    ).read_bytes()
                    assert same, (source, stage)
            else:
                tolerance = 1e-5 if precision == "fp32" else 2e-2
                assert losses == pytest.approx(expected, rel=tolerance), (source, stage)
    stop_group()


@pytest.mark.slow
def test_any_ranks_and_stage_go_on_from_any_checkpoint(tmp_path: Path, in_processes: Run) -> None:
    fp32 = [(stage, "fp32") for stage in (0, 1, 2, 3)]
    bf16 = [(stage, "bf16") for stage in (1, 2, 3)]
    for world_size in (1, 2):
        assert in_processes(write_all, tmp_path, fp32 + bf16, world_size=world_size) == [0] * world_size
    for world_size in (1, 2):
        codes = in_processes(read_all, tmp_path, fp32 + bf16, world_size=world_size)
        assert codes == [0] * world_size


def round_trip(rank: int, folder: Path) -> None:
    group = start_group(find_placement(), "cpu")
    engine = make_engine(group, 0)
    train(engine, group, 0, 3)
    save(folder / "1", engine, group, images_seen=24)
    losses = train(engine, group, 3, 6)
    load_checkpoint(folder / "1", engine, group)
    assert train(engine, group, 3, 6) == losses
    save(folder / "2", engine, group, images_seen=48)
    assert [path.name for path, _ in complete_checkpoints(folder)] == ["1", "2"]

    part = next((folder / "2").glob("part-*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CheckpointError, match="part-"):
        load_checkpoint(folder / "2", engine, group)
    part.write_bytes(content[:-1])
    assert [path.name for path, _ in complete_checkpoints(folder)] == ["1"], "a short file is incomplete"
    stop_group()


def test_a_checkpoint_restores_weights_moments_and_count_and_notices_damage(tmp_path: Path, in_processes: Run) -> None:
    assert in_processes(round_trip, tmp_path) == [0]


def save_and_train_on(rank: int, folder: Path) -> None:
    """Ranks train on while one of them still writes; what is published is the state as it was, and each reads its part.

    Then the write of one rank fails.
    """
    torch.set_num_threads(1)
    group = start_group(find_placement(), "cpu")
    engine = make_engine(group, 3, "bf16")
    train(engine, group, 0, 2)
    real, may_write = saving._write_part, threading.Event()

    def write_later(*args: Any) -> Any:
        if rank == 1:
            may_write.wait()
        return real(*args)

    saving._write_part = write_later  # type: ignore[assignment]
    writer = CheckpointWriter(engine, group)
    begin(writer, folder / "1")
    losses = train(engine, group, 2, 5)
    assert writer.problem() is None
    assert not (folder / "1").exists()
    may_write.set()
    writer.finish()

    load_checkpoint(folder / "1", engine, group)
    saving._write_part = real
    waiting = CheckpointWriter(engine, group, copies=False)
    begin(waiting, folder / "same")
    losses_after = train(engine, group, 2, 5)  # changes nothing that is still to be written
    waiting.finish()
    waiting.close()
    assert waiting._copy is None
    assert sorted((folder / "same").iterdir()) == [
        folder / "same" / path.name for path in sorted((folder / "1").iterdir())
    ]
    assert all((folder / "same" / path.name).read_bytes() == path.read_bytes() for path in (folder / "1").iterdir())
    assert losses_after == losses

    def fail_on_one(*args: Any) -> Any:
        if rank == 1:
            raise OSError("no space")
        return real(*args)

    saving._write_part = fail_on_one
    begin(writer, folder / "2")
    with pytest.raises(CheckpointError, match="no space"):
        writer.finish()
    writer.close()
    group.wait()
    assert {path.name for path in folder.iterdir()} == {"1", "same"}
    stop_group()


def test_training_goes_on_while_a_checkpoint_is_written_and_ends_where_that_fails(
    tmp_path: Path, in_processes: Run
) -> None:
    assert in_processes(save_and_train_on, tmp_path, world_size=2) == [0, 0]


def fill_the_disk(rank: int, folder: Path) -> None:
    group = start_group(find_placement(), "cpu")
    engine = make_engine(group, 0)
    save(folder / "1", engine, group, images_seen=24)
    train(engine, group, 0, 1)
    with pytest.raises(CheckpointError, match=f"{folder.name}/2"):
        save(folder / "2", engine, group, images_seen=48)
    assert [path.name for path in folder.iterdir()] == ["1"], "nothing half-written is left"
    load_checkpoint(folder / "1", engine, group)
    stop_group()


def test_a_full_disk_never_costs_the_last_good_checkpoint(tmp_path: Path, in_processes: Run) -> None:
    size = 12 * sum(parameter.numel() for parameter in AIM(CONFIG).parameters())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        assert in_processes(fill_the_disk, tmp_path) == [0]
    finally:
        subprocess.run(["umount", tmp_path], check=True)
