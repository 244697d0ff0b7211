"""TensorBoard and W&B hold every line and budget, also across a kill, under the run's name."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from trainers import stop_after, train_in

from aimscale.analysis import read_table
from aimscale.harness.log.loggers import open_loggers
from aimscale.harness.run.config import ConfigError, RunConfig
from aimscale.harness.run.directory import EXIT_PREEMPTED, RunDir

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]


def points(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, number) of every event in the run's files, in order."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((run.path / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                number = round(float(tensor_util.make_ndarray(value.tensor)), 5)
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def records(run: RunDir) -> dict[str, list[Any]]:
    """Kind -> records of the run's files of W&B, oldest first: a log of LevelDB's form after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[Any]] = {}
    for path in sorted((run.path / "wandb").glob("offline-run-*/*.wandb")):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (room := 32768 - at % 32768) < 7:
                at += room
                continue
            stop, kind = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            record = (record if kind in (3, 4) else b"") + data[at + 7 : stop]
            at = stop
            if kind in (1, 4):
                whole = Record.FromString(record)
                name = whole.WhichOneof("record_type")
                found.setdefault(name, []).append(getattr(whole, name))
    return found


def history(run: RunDir) -> list[dict[str, Any]]:
    """Every line that W&B was told."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line.item}
        for line in records(run)["history"]
    ]


@pytest.fixture
def probed(tiny_data: Path, tiny_config: Config) -> Callable[[str], RunConfig]:
    """Two budgets and a task, told to a logger with every step."""
    task = {"task": "two", "train": str(tiny_data / "two"), "test": str(tiny_data / "other"), "kinds": ["knn"]}
    return lambda logger: tiny_config({"loggers": [logger], "log_every_steps": 1}, probes=[task])


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B without a network, and nothing of the user's."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in (("HOME", str(tmp_path)), ("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)


def told(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """What both loggers must hold: each line of training once, and each budget."""
    expected: dict[str, list[tuple[int, float]]] = {}
    lines = {(line["branch"], line["images_seen"]): line for line in map(json.loads, run.metrics.open())}
    for (branch, images_seen), line in lines.items():
        name = "train/loss" if branch is None else "decay/loss"
        expected.setdefault(name, []).append((images_seen, round(line["loss"], 5)))
    for row in run.read_rows():
        (probe,) = row["probes"]
        numbers = {"val/loss": row["val_loss"], "val/loss_se": row["val_loss_se"], "probe/two/knn": probe["top1"]}
        for name, value in numbers.items():
            expected.setdefault(name, []).append((row["images_seen"], round(value, 5)))
    return expected


def test_tensorboard_holds_every_line_of_a_killed_run_once_and_its_budgets_on_the_same_panels(
    tmp_path: Path, probed: Callable[[str], RunConfig], in_processes: Run
) -> None:
    run = RunDir.create(tmp_path / "run", probed("tensorboard"))
    assert in_processes(stop_after, run.path, 72, signal.SIGKILL) == [-signal.SIGKILL]
    assert in_processes(train_in, run.path) == [0]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert len(lines) > len({(line["branch"], line["images_seen"]) for line in lines}), "some was trained twice"
    found, expected = points(run), told(run)
    assert {name: found[name] for name in expected} == expected
    assert not [name for name in found if any(str(budget) in name for budget in (64, 128))], "no panel for a budget"


def open_and_close(rank: int, path: Path) -> None:
    with open_loggers(RunDir(path), RunDir(path).load_config()):
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_wandb_holds_a_run_as_one_run_across_starts_with_what_reads_it_back(
    tmp_path: Path, probed: Callable[[str], RunConfig], in_processes: Run
) -> None:
    config = probed("wandb")
    run = RunDir.create(tmp_path / "my-sweep" / "runs" / "run", config)
    assert in_processes(stop_after, run.path, 72) == [EXIT_PREEMPTED]
    assert in_processes(train_in, run.path) == [0]
    lines, expected = history(run), told(run)
    found = {name: [(line["images_seen"], round(line[name], 5)) for line in lines if name in line] for name in expected}
    assert found == expected
    assert [line["images_seen"] for line in lines if "val/loss" in line] == [64, 128]
    kept = records(run)
    starts = kept["run"]
    assert len({each.run_id for each in starts}) == 1
    assert {(each.display_name, each.run_group, each.project) for each in starts} == {
        (config.run_id, "my-sweep", "aimscale")
    }
    assert set(starts[0].tags) == {"w16-d2", "D=64", "D=128"}
    values = {item.key: json.loads(item.value_json) for item in starts[0].config.update}
    assert values["params_total"] == run.read_rows()[0]["params_total"]
    every = pd.DataFrame([{"run_id": config.run_id} | values | line for line in lines if "val/loss" in line])
    every.to_json(tmp_path / "history.jsonl", orient="records", lines=True)  # as docs/loggers.md writes it
    table = read_table(tmp_path / "history.jsonl", {"D": "images_seen", "L": "val/loss"})
    assert table["val_loss"].tolist() == pytest.approx([row["val_loss"] for row in run.read_rows()])
    assert table["images_seen"].tolist() == [64, 128]
    assert [each.exit_code for each in kept["exit"]] == [1, 0, 0]  # of the evaluation, too
    assert len(kept["preempting"]) == 1
    again = RunDir.create(tmp_path / "again", config)  # its lines must not meet those of the first
    assert in_processes(open_and_close, again.path) == [0]
    assert records(again)["run"][0].run_id != starts[0].run_id


@pytest.mark.usefixtures("offline")
def test_trouble_with_wandb_is_said_before_training_or_survived(
    tmp_path: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No login is a mistake of the user's; no network keeps the start here; what fails later ends the logging only."""
    wandb = pytest.importorskip("wandb")
    run = RunDir.create(tmp_path / "run", tiny_config({"loggers": ["wandb"]}))
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="wandb login"), open_loggers(run, run.load_config()):
        pass
    for name, value in (
        ("API_KEY", "a" * 40),
        ("BASE_URL", "http://127.0.0.1:9"),
        ("INIT_TIMEOUT", "1"),
        ("X_GRAPHQL_RETRY_MAX", "0"),
    ):
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it has read its settings
    with open_loggers(run, run.load_config()) as (logger,):
        logger.log_values(8, {"val/loss": 0.5})
        logger.log_values(16, {"val/loss": object()})  # type: ignore[dict-item]
        logger.log_values(24, {"val/loss": 0.4})
    wandb.teardown()  # as at the end of the process
    assert [line["val/loss"] for line in history(run)] == [0.5]
    assert "cannot be reached" in caplog.text
    assert "gets no more" in caplog.text
