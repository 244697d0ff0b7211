"""A checkpoint written by any ranks and stage is read by any other; a failed write costs nothing."""

from __future__ import annotations

import filecmp
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM, HELD
from aimscale.harness.distributed.group import Group, PeerFailedError
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step import checkpoint, saving
from aimscale.harness.step.checkpoint import CheckpointError, load_checkpoint, load_newest, save_weights
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.saving import CheckpointWriter

CONFIG = model_config("w32-d2", image_size=16, patch_size=4)
Ranks = Callable[..., list[Any]]


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
        batch = Batch(images=images[mine], prefix_lengths=prefix_len[mine], positions=mine)
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
    told = {"run_id": "r", "images_seen": images_seen, "branch": None, "progress": {"images_done": images_seen}}
    writer.save(path, **told, keep=path.parent.iterdir())


def write_all(group: Group, folder: Path, cases: list[tuple[int, str]]) -> dict[str, list[float]]:
    """Train three steps, save, and give the losses of three more."""
    found = {}
    for stage, precision in cases:
        engine = make_engine(group, stage, precision)
        train(engine, group, 0, 3)
        name = f"{group.world_size}-{stage}-{precision}"
        save(folder / name, engine, group)
        found[name] = train(engine, group, 3, 6)
        save_weights(folder / f"{name}.safetensors", engine, group)
    return found


def read_all(group: Group, folder: Path, cases: list[tuple[int, str]], expected: dict[str, list[float]]) -> None:
    """Every stage goes on from one of another stage and world size, and exactly so from its own."""
    for stage, precision in cases:
        own, following = f"{group.world_size}-{stage}-{precision}", max((stage + 1) % 4, precision == "bf16")
        for source in (own, f"{3 - group.world_size}-{following:d}-{precision}"):
            engine = make_engine(group, stage, precision)
            train(engine, group, 20, 21)  # what was there before must not matter
            assert load_checkpoint(folder / source, engine, group).adam_step == 3
            losses = train(engine, group, 3, 6)
            if source == own:
                assert losses == expected[source], (source, stage)
                save_weights(folder / "again.safetensors", engine, group)
                same = filecmp.cmp(folder / "again.safetensors", folder / f"{source}.safetensors", shallow=False)
                assert group.rank > 0 or same, (source, stage)
            else:
                tolerance = 1e-5 if precision == "fp32" else 2e-2
                assert losses == pytest.approx(expected[source], rel=tolerance), (source, stage)


@pytest.mark.slow
def test_any_ranks_and_stage_go_on_from_any_checkpoint(tmp_path: Path, in_group: Ranks) -> None:
    cases = [*((stage, "fp32") for stage in (0, 1, 2, 3)), *((stage, "bf16") for stage in (1, 2, 3))]
    expected: dict[str, list[float]] = {}
    for world_size in (1, 2):
        expected |= in_group(write_all, tmp_path, cases, world_size=world_size)[0]
    for world_size in (1, 2):
        in_group(read_all, tmp_path, cases, expected, world_size=world_size)


def save_and_train_on(group: Group, folder: Path) -> None:
    """Ranks train on while one of them still writes; what is published is the state as it was, and each reads its part.

    Then the write of one rank fails.
    """
    engine = make_engine(group, 3, "bf16")
    train(engine, group, 0, 2)
    real, may_write = saving._write_part, threading.Event()

    def write_later(*args: Any) -> Any:
        if group.rank == 1:
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
    save(folder / "same", engine, group)
    losses_after = train(engine, group, 2, 5)
    assert sorted((folder / "same").iterdir()) == [
        folder / "same" / path.name for path in sorted((folder / "1").iterdir())
    ]
    assert all((folder / "same" / path.name).read_bytes() == path.read_bytes() for path in (folder / "1").iterdir())
    assert losses_after == losses

    def fail_on_one(*args: Any) -> Any:
        if group.rank == 1:
            raise OSError("no space")
        return real(*args)

    saving._write_part = fail_on_one
    begin(writer, folder / "2")
    with pytest.raises(CheckpointError, match="no space"):
        writer.finish()
    writer.close()
    group.barrier()
    assert {path.name for path in folder.iterdir()} == {"1", "same"}


def test_training_goes_on_while_a_checkpoint_is_written_and_ends_where_that_fails(
    tmp_path: Path, in_group: Ranks
) -> None:
    in_group(save_and_train_on, tmp_path, world_size=2)


def load_where_one_sees_less(group: Group, folder: Path) -> None:
    """The second rank's file system shows no manifest, as a cache of NFS may, and then not the files, either."""
    engine = make_engine(group, 2)
    for images_seen in (8, 16):
        save(folder / str(images_seen), engine, group, images_seen)
        train(engine, group, images_seen, images_seen + 1)
    if group.rank == 1:
        checkpoint._manifest_in = lambda path: None
    manifest = load_newest(folder, engine, group, branches=[])
    assert manifest is not None
    assert group.all_gather_object(manifest.images_seen) == [16, 16]
    if group.rank == 1:
        checkpoint.file_crc32 = lambda path: os.stat(path.with_name("gone")).st_size
    with pytest.raises((OSError, PeerFailedError), match="No such file"):
        load_newest(folder, engine, group, branches=[])
    group.barrier()
    assert {path.name for path in folder.iterdir()} == {"8", "16"}, "what one rank cannot see is not damaged"


def test_no_rank_goes_on_from_another_checkpoint_alone(tmp_path: Path, in_group: Ranks) -> None:
    in_group(load_where_one_sees_less, tmp_path, world_size=2)


def bytes_per_param(group: Group, folder: Path) -> tuple[float, float]:
    """Return what the optimiser holds of each parameter, and what a checkpoint keeps, in bytes."""
    engine = make_engine(group, 0)
    train(engine, group, 0, 1)
    save(folder / "1", engine, group)
    num_params = sum(parameter.numel() for parameter in AIM(CONFIG).parameters())
    owners = engine.optimiser_tensors()
    tensors = [
        *owners,
        *(value for owner in owners for value in engine.adam_state(owner).values() if torch.is_tensor(value)),
    ]
    held = sum(each.nbytes for each in tensors if each.numel() > 1)
    return held / num_params, sum(path.stat().st_size for path in (folder / "1").iterdir()) / num_params


def test_planned_memory_and_disk_are_those_of_the_optimiser(tmp_path: Path, in_group: Ranks) -> None:
    """Another optimiser needs other numbers in harness/device/memory.py: every plan of memory and disk follows them."""
    ((held, kept),) = in_group(bytes_per_param, tmp_path)
    assert held == pytest.approx(sum(HELD["fp32", 0][0]), rel=0.01)
    assert kept == pytest.approx(CHECKPOINT_BYTES_PER_PARAM, rel=0.15), "names and the manifest come on top"


def lose_a_byte(group: Group, folder: Path) -> None:
    """The disk below the page cache keeps another byte than it was given."""
    engine = make_engine(group, 0)
    save(folder / "1", engine, group)

    def spoil(descriptor: int, *args: int) -> None:
        with open(f"/proc/self/fd/{descriptor}", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            (last,) = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))

    os.posix_fadvise = spoil  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="does not read back as it was written"):
        save(folder / "2", engine, group)
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_what_does_not_read_back_as_it_was_written_is_no_checkpoint(tmp_path: Path, in_group: Ranks) -> None:
    in_group(lose_a_byte, tmp_path)


def fill_the_disk(group: Group, folder: Path) -> None:
    engine = make_engine(group, 0)
    save(folder / "1", engine, group, images_seen=24)
    train(engine, group, 0, 1)
    with pytest.raises(CheckpointError, match=f"{folder.name}/2"):
        save(folder / "2", engine, group, images_seen=48)
    assert [path.name for path in folder.iterdir()] == ["1"], "nothing half-written is left"
    load_checkpoint(folder / "1", engine, group)


def test_a_full_disk_never_costs_the_last_good_checkpoint(tmp_path: Path, in_group: Ranks) -> None:
    size = 12 * sum(parameter.numel() for parameter in AIM(CONFIG).parameters())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        in_group(fill_the_disk, tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
