"""Sweeps of a program, under the real worker and the real supervisor."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from commands import until
from programs import TRAIN

from aimscale.analysis.report.page import write_page
from aimscale.analysis.report.study import read_study
from aimscale.harness.run.program import PROGRAM_FILE
from aimscale.sweeps.collection import collect
from aimscale.sweeps.engine import worker
from aimscale.sweeps.engine.launch import launch
from aimscale.sweeps.planning.sweepfile import load_sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.sweep_status import sweep_status


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    """Return a function that plans a sweep of `TRAIN`."""
    (tmp_path / "train.py").write_text(TRAIN)

    def make(
        hold: float = 0.0, sizes: tuple[int, ...] = (8, 16, 32), more: dict[str, Any] | None = None, **changes: Any
    ) -> PlannedSweep:
        trainer = {
            "command": "python train.py {run_dir} {width} {budget} {hold}",
            "sizes": {f"w{width}": {"width": width} for width in sizes},
            "params": "100*width",
            "unit": "tokens",
            "runtime": {"hold": hold},
            "stop": {"seconds": 5},
            **(more or {}),
        }
        values = {
            "name": "mine",
            "trainer": trainer,
            "sizes": [f"w{width}" for width in sizes],
            "budgets": [800, 1600, 3200],
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values | changes))
        return PlannedSweep(load_sweep(tmp_path / "sweep.yaml", tmp_path / "root"))

    return make


def num_trained(planned: PlannedSweep) -> list[int]:
    paths = [planned.sweep.run_dir(run.run_id) / "trained-by" for run in planned.runs]
    return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]


def supervisors() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "aimscale.harness.program" in each.cmdline()]


@pytest.mark.slow
def test_a_sweep_of_a_program_is_launched_collected_and_reported(planned: Any, tmp_path: Path) -> None:
    sweep = planned()
    result = launch(sweep, devices=2)
    assert len(result.finished) == 9
    assert num_trained(sweep) == [1] * 9
    again = planned()
    assert not launch(again, devices=2).finished
    status = sweep_status(again)
    assert {line.unit for line in status.runs} == {"tokens"}
    found = collect(again)
    assert (found.num_rows, found.num_complete) == (9, 9)
    page = write_page(read_study([found.table], {}, ())).read_text()
    assert "D counts tokens" in page
    assert "D: tokens" in page
    for word in ("training images", "images seen", "pixel", "Frozen-feature"):
        assert word not in page


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["program", "supervisor"])
def test_a_run_whose_process_is_killed_goes_on_from_its_checkpoint(
    victim: str, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = planned(hold=0.3, sizes=(8,), budgets=[800])

    def kill() -> None:
        (run,) = sweep.runs
        until((sweep.sweep.run_dir(run.run_id) / "checkpoint").exists)
        (supervisor,) = supervisors()
        chosen = supervisor if victim == "supervisor" else supervisor.children()[0]
        os.kill(chosen.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    result = launch(sweep, devices=1)
    thread.join()
    assert len(result.finished) == 1
    assert num_trained(sweep) == [2]
    points = [point["images_seen"] for point in sweep.states[0].record.read_curve()]
    assert points == sorted({*points}) == [100 * step for step in range(1, 9)]
    lines = (sweep.sweep.run_dir(sweep.runs[0].run_id) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) <= 9, "one step is trained again at most"


EXAM = """
import json, os, pathlib, sys, time
result, awaited, finished = (pathlib.Path(each) for each in sys.argv[1:])
with open(f"{result}.log", "a") as file:
    print(os.getpid(), file=file)
while not awaited.exists():
    time.sleep(0.05)
finished.touch()
result.write_text(json.dumps({"accuracy": {"exam:top-1": 0.5}}))
"""


def examined(run_dir: Path) -> int:
    """Return how often the command that evaluates a run was started."""
    return sum(len(path.read_text().splitlines()) for path in run_dir.glob("evaluations/*/*.log"))


def test_a_run_is_evaluated_while_another_trains(planned: Any, tmp_path: Path) -> None:
    (tmp_path / "exam.py").write_text(EXAM)
    # The longer run trains on until the shorter one was evaluated; were that to wait for it, both would hang.
    wait = "while width == 16 and step == 4 and not os.path.exists('examined'): time.sleep(0.05)"
    (tmp_path / "train.py").write_text(TRAIN.replace("time.sleep(hold)", wait))
    exam = {"evaluate": {"exam": f"python exam.py {{result}} {tmp_path} examined"}}
    sweep = planned(sizes=(8, 16), budgets=[800], more=exam)
    result = launch(sweep, devices=2)
    assert len(result.finished) == 2
    for run in sweep.runs:
        record = sweep.sweep.run_dir(run.run_id)
        assert examined(record) == 1
    assert num_trained(sweep) == [1, 1]
    assert [[row["probes"][0]["top1"] for row in each.record.read_rows()] for each in sweep.look()] == [[0.5]] * 2
    assert {each.state.value for each in sweep.look()} == {"finished"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["command", "supervisor"])
def test_an_evaluation_that_is_killed_is_measured_again_and_nothing_is_trained_again(
    victim: str, planned: Any, tmp_path: Path
) -> None:
    (tmp_path / "exam.py").write_text(EXAM)
    sweep = planned(
        sizes=(8,), budgets=[800], more={"evaluate": {"exam": "python exam.py {result} {run_dir}/go {run_dir}/done"}}
    )
    run_dir = sweep.sweep.run_dir(sweep.runs[0].run_id)

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not examined(run_dir) and time.monotonic() < deadline:
            time.sleep(0.05)
        (supervisor,) = [
            each for each in psutil.Process().children() if "aimscale.harness.program.evaluation" in each.cmdline()
        ]
        chosen = supervisor if victim == "supervisor" else supervisor.children()[0]
        os.kill(chosen.pid, signal.SIGKILL)
        (run_dir / "go").touch()

    thread = threading.Thread(target=kill)
    thread.start()
    result = launch(sweep, devices=1)
    thread.join()
    assert len(result.finished) == 1
    assert (num_trained(sweep), examined(run_dir)) == ([1], 2)
    (state,) = sweep.look()
    assert [len(each.read_attempts()) for each in (state.record, state.record.evaluation)] == [1, 2]


def test_an_evaluation_waits_until_its_program_has_saved_and_ended(planned: Any) -> None:
    """A program of several budgets tells of the last one before it ends."""
    sweep = planned(sizes=(8,), budgets=[800], more={"evaluate": {"exam": "true {result}"}})
    (run,) = sweep.runs
    record = RunRecord(sweep.sweep.run_dir(run.run_id))
    run.create(record.path)
    assert [str(each) for each in run.pending(record)] == ["training at 800"]
    record.record_row({"images_seen": 800, "run_id": run.run_id, "val_loss": 2.0})
    with record.hold():
        assert [str(each) for each in run.pending(record)] == ["training at 800"]
    assert [str(each) for each in run.pending(record)] == ["evaluation at 800"]
    (record.path / PROGRAM_FILE).write_text('{"D": 800}')
    assert record.evaluation.saved_progress() == [1, 800, 0, 0, 0]
    record.evaluation.record_row({"images_seen": 800, "evaluated": ["exam"]})
    assert not run.pending(record)
    assert record.evaluation.saved_progress() == [1, 800, 1, 0, 0], "by which attempts are bounded"


def test_a_program_of_two_devices_is_one_process(planned: Any) -> None:
    sweep = planned(hold=0.5, sizes=(8,), budgets=[800], more={"devices": 2})
    assert len(launch(sweep, devices=2).finished) == 1
    assert num_trained(sweep) == [1]
    assert len(sweep.look()[0].record.read_attempts()) == 1


def test_a_forecast_that_fails_ends_no_launch(planned: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("SVD did not converge")

    monkeypatch.setattr(worker, "write_forecasts", fail)
    result = launch(planned(sizes=(8,), budgets=[800]), devices=1)
    assert len(result.finished) == 1
    assert "no new forecasts of runs: SVD did not converge" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_off_its_forecast_is_ended_before_half_of_its_budget(planned: Any) -> None:
    sizes = (8, 16, 32)
    launch(planned(sizes=sizes, budgets=[3200]), devices=2)
    larger = planned(hold=1.5, sizes=(*sizes, 64), budgets=[3200])
    slow = larger.runs[-1]
    path = larger.sweep.base_dir / "train.py"
    path.write_text(TRAIN.replace("loss * (", "1.3 * loss * ("))
    result = launch(larger, devices=1, stop_sd=3)
    status = larger.look()[-1].status
    assert result.failed == (slow.run_id,)
    assert status.state == "off-track"
    assert 0 < status.images_done <= 1600
    assert "image" not in (status.reason or "")
