"""What a run lacks: named, worked off after any kill, and no more than that."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainers import evaluate_in, rows, train_in

import aimscale.harness.results
from aimscale.harness.results import pending_work
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]


@pytest.fixture
def asked(tiny_data: Path, tiny_config: Config) -> RunConfig:
    """A run of one budget with two tasks, one of them of two kinds."""
    task = {"train": str(tiny_data / "two"), "test": str(tiny_data / "other"), "epochs": 1, "lrs": [0.01]}
    kinds = {"sides": ["attentive", "knn"], "again": ["knn"]}
    probes = [{**task, "task": name, "kinds": some} for name, some in kinds.items()]
    return tiny_config(budgets=[64], probes=probes)


def train_and_die_after_a_result(rank: int, path: Path) -> None:
    """Die of SIGKILL as soon as one file of results is there that was not there before, or is changed."""
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        before = Path(target).read_bytes() if Path(target).exists() else b""
        real(source, target)
        if Path(target).read_bytes() == before:
            return  # a head that an attempt had trained before it was killed
        if Path(target).name == "results.json" or {"validation", "probes"} & set(Path(target).parts):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    train_in(rank, path)


def result_files(run: RunDir) -> dict[str, Any]:
    """Bytes of all results, and the rows without times."""
    found: dict[str, Any] = {
        str(path.relative_to(run.path)): path.read_bytes()
        for folder in ("budgets", "validation")
        for path in (run.path / folder).rglob("*.*")
    }
    return found | {"rows": rows(run)}


def test_kills_after_every_result_lose_none_and_double_none(
    tmp_path: Path, asked: RunConfig, in_processes: Run
) -> None:
    whole = RunDir.create(tmp_path / "whole", asked)
    assert [str(each) for each in pending_work(whole, asked)] == ["training at 64"]
    assert in_processes(train_in, whole.path) == [0]
    assert pending_work(whole, asked) == []
    run = RunDir(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    for name in ("validation", "probes"):
        shutil.rmtree(run.path / name)
    run.results.unlink()
    left = [["validation at 64", "sides at 64", "again at 64"]]
    while in_processes(train_and_die_after_a_result, run.path) == [-signal.SIGKILL]:
        assert len(left) < 20
        left.append([str(each) for each in pending_work(run, asked)])
    assert run.read_status().state == "finished"
    assert result_files(run) == result_files(whole)
    # the row; losses, in the row; one kind, in the row, a head, another kind, in the row; one kind, in it
    assert left == [left[0]] * 3 + [left[0][1:]] * 5 + [left[0][2:]] * 2 + [[]]


def test_what_is_lost_or_asked_anew_is_lacking_and_nothing_else(
    tmp_path: Path, asked: RunConfig, in_processes: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.create(tmp_path / "run", asked)
    assert in_processes(train_in, run.path) == [0]

    def words(**changes: Any) -> list[str]:
        evaluation = asked.evaluation.model_copy(update=changes)
        return [str(each) for each in pending_work(run, asked.model_copy(update={"evaluation": evaluation}))]

    with monkeypatch.context() as patch:  # of a thousand runs they are 100 MB
        patch.setattr(
            aimscale.harness.results, "task_files", lambda *_: pytest.fail("the results of a finished run were read")
        )
        assert words() == []
    first, second = asked.evaluation.probes
    assert words(budgets=(64, 128)) == ["training at 128"]
    assert words(probes=(first, second.model_copy(update={"kinds": ("linear", "knn")}))) == ["again at 64"]
    assert words(validation=asked.evaluation.validation.model_copy(update={"num_images": 5})) == ["validation at 64"]
    (row,) = run.read_rows()
    run.evaluation.record_row({**run.evaluation.read_own_rows()[64], "probes": row["probes"][:1]})
    assert words() == ["sides at 64"]
    metrics = run.metrics.read_bytes()
    run.validation_file(64).unlink()
    assert words()[0] == "validation at 64"
    assert in_processes(train_in, run.path) == [0]
    assert words() == []
    (again,) = run.read_rows()
    assert again | {"finished_at": ""} == row | {"finished_at": ""}
    assert run.metrics.read_bytes() == metrics, "nothing was trained"


def test_evaluation_is_a_program_of_its_own_that_trains_nothing(
    tmp_path: Path, asked: RunConfig, in_processes: Run
) -> None:
    run = RunDir.create(tmp_path / "run", asked)
    assert in_processes(evaluate_in, run.path) == [0]
    assert (run.read_status().state, run.read_rows()) == ("created", []), "nothing is there to be evaluated"
    assert in_processes(train_in, run.path) == [0]
    before, metrics = result_files(run), run.metrics.read_bytes()
    for name in ("validation", "probes"):
        shutil.rmtree(run.path / name)
    run.results.unlink()
    assert in_processes(evaluate_in, run.path) == [0]
    assert result_files(run) == before
    assert (run.read_status().state, run.metrics.read_bytes()) == ("finished", metrics)
