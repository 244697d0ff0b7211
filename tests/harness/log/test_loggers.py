"""Across kills and cut-back metrics, TensorBoard and W&B hold every line once, under the run's id."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import aimscale.harness.device.peak
import aimscale.harness.log.record
from aimscale.harness.log.loggers import open_loggers, past_lines, scalars
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.train.attempt import train

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metric(images_seen: int, branch: int | None, loss: float | None) -> dict[str, Any]:
    return {"images_seen": images_seen, "step": images_seen // 8, "branch": branch, "loss": loss, "loss_spikes": []}


def points(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of every event in the run's files, in the order of writing."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((run.path / "tensorboard").glob("events*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                number = float(tensor_util.make_ndarray(value.tensor))
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def train_and_die(rank: int, path: Path, num_images: int) -> None:
    """Train and die of SIGKILL once `num_images` are done (0: never)."""
    aimscale.harness.device.peak.GEMM_SIDE = {"cpu": 128, "cuda": 1024}
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    real = aimscale.harness.log.record.Recorder.step

    def step(self: aimscale.harness.log.record.Recorder, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if self.counters.images_done == num_images:
            os.kill(os.getpid(), signal.SIGKILL)

    aimscale.harness.log.record.Recorder.step = step  # type: ignore[method-assign]
    sys.exit(train(path))


def test_tensorboard_holds_every_line_once_after_kills(tmp_path: Path, tiny_config: Config, in_processes: Run) -> None:
    runtime = {"loggers": ["tensorboard"], "checkpoint_every_images": 24, "log_every_steps": 1}
    run = RunDir.create(tmp_path / "run", tiny_config(runtime))
    # Killed on the trunk behind a checkpoint, in the first decay, and on the trunk behind it.
    for num_images in (40, 72, 96):
        assert in_processes(train_and_die, run.path, num_images) == [-signal.SIGKILL]
    assert in_processes(train_and_die, run.path, 0) == [0]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert len(lines) > 16
    expected = {
        tag: [(line["images_seen"], pytest.approx(line["loss"])) for line in lines if line["branch"] == branch]
        for tag, branch in (("trunk/loss", None), ("decay-64/loss", 64), ("decay-128/loss", 128))
    }
    found = points(run)
    assert {tag: found[tag] for tag in expected} == expected
    assert [step for step, _ in found["trunk/images_per_s"]] == [step for step, _ in expected["trunk/loss"]]
    assert max(Counter(map(tuple, found["decay-64/lr"])).values()) == 1


def test_lines_are_joined_with_their_last_speed(tmp_path: Path, tiny_config: Config) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config())
    assert past_lines(run) == []
    blocks = {"trunk.blocks.0": {"grad_norm": 0.7, "update_ratio": None}}
    third = metric(16, 16, 0.25) | {"blocks": blocks}
    write_lines(run.metrics, [metric(8, None, 0.5), metric(16, None, None), third])
    speed = [{"images_seen": 8, "branch": None, "mfu": mfu, "time": 100 + mfu} for mfu in (0.1, 0.2)]
    write_lines(run.speed, [*speed, {"images_seen": 16, "branch": 16, "mfu": 0.3}])
    with run.speed.open("a") as file:
        file.write('{"images_seen": 24, "bra')  # a kill in the middle of a line
    first, second, third = past_lines(run)
    assert (first["loss"], first["mfu"], first["time"]) == (0.5, 0.2, 100.2)
    assert scalars(first) == {"trunk/loss": 0.5, "trunk/mfu": 0.2}
    assert scalars(second) == {}, "a loss that was not finite is no point"
    assert scalars(third) == {"decay-16/loss": 0.25, "decay-16/grad_norm/trunk.blocks.0": 0.7, "decay-16/mfu": 0.3}


def test_wandb_gets_what_it_lacks_by_line_number(
    tmp_path: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder in place of the service, which says how many steps it has, as one that is resumed does."""
    settings: list[dict[str, Any]] = []
    logged: list[tuple[int, int]] = []

    def init(**values: Any) -> SimpleNamespace:
        settings.append(values)
        return SimpleNamespace(
            step=len(logged),
            log=lambda values, step: logged.append((step, values["images_seen"])),
            define_metric=lambda *_, **__: None,
            finish=lambda: None,
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    config = tiny_config({"loggers": ["wandb"]})
    run = RunDir.create(tmp_path / "run", config)
    write_lines(run.metrics, [metric(8, None, 0.5), metric(16, None, 0.4)])
    stale, synced = (run.path / "wandb" / f"offline-run-{day}-{config.run_id}" for day in (1, 2))
    for folder in (stale, synced):
        folder.mkdir(parents=True)
    (synced / "run.wandb.synced").write_text("")
    (logger,) = open_loggers(run, config)
    assert [folder.exists() for folder in (stale, synced)] == [False, True]
    logger.log(metric(24, None, 0.3))
    logger.log(metric(16, 16, 0.2))
    # Killed, and cut back by one line, which is then written again.
    write_lines(run.metrics, [metric(8, None, 0.5), metric(16, None, 0.4), metric(24, None, 0.3)])
    (again,) = open_loggers(run, config)
    again.log(metric(16, 16, 0.2))
    again.log(metric(32, None, 0.1))
    assert logged == [(0, 8), (1, 16), (2, 24), (3, 16), (4, 32)]
    assert [(each["id"], each["resume"]) for each in settings] == [(config.run_id, "allow")] * 2


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of W&B's file: 7 bytes of magic, then LevelDB's log format, 32 KiB blocks of checksum, length, type."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block's end too short for a header is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or last part
            yield whole
            whole = b""


def train_offline(rank: int, path: Path, num_images: int) -> None:
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_SILENT"] = "true"
    train_and_die(rank, path, num_images)


@pytest.mark.slow
def test_wandb_offline_holds_every_line_once_after_a_kill(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    config = tiny_config({"loggers": ["wandb"], "checkpoint_every_images": 24, "log_every_steps": 1})
    run = RunDir.create(tmp_path / "my-sweep" / "runs" / config.run_id, config)
    assert in_processes(train_offline, run.path, 40) == [-signal.SIGKILL]
    assert in_processes(train_offline, run.path, 0) == [0]
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    assert config.run_id in file.name
    rows, about = [], []
    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            about.append((record.run.run_group, list(record.run.tags)))
        if record.HasField("history"):
            rows.append({item.key or "/".join(item.nested_key): item.value_json for item in record.history.item})
    assert about
    assert set(map(str, about)) == {str(("my-sweep", [config.training.model.size, "D=64", "D=128"]))}
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [int(row["images_seen"]) for row in rows] == [line["images_seen"] for line in lines]
    assert [float(row.get("trunk/loss", 0)) for row in rows] == [
        0 if line["branch"] else pytest.approx(line["loss"]) for line in lines
    ]
