"""`status --wait` and `logs --follow`: how they end, and what their exit codes say."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from commands import refused

from aimscale.harness.run.lock import hold_lock
from aimscale.sweeps.cli import status_view
from aimscale.sweeps.cli import sweep as verbs
from aimscale.sweeps.cli.main import main
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.slurm.commands import JobInfo, submissions_file
from aimscale.sweeps.state.record import RunRecord


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_view, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(status_view, "MAX_LOOK_SHARE", 1.0)


@pytest.fixture
def call(capsys: Any) -> Callable[..., tuple[int, str]]:
    """Run a verb on a sweep; return its exit code and what it prints."""

    def run(sweep: Sweep, verb: str, *options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([verb, str(sweep.source), *options, "--root", str(sweep.root)])
        return int(str(ended.value.code or 0)), str(capsys.readouterr().out)

    return run


def records_of(sweep: Sweep) -> list[RunRecord]:
    return [RunRecord(RunRecord.create(sweep.run_dir(run.run_id), run.config).path) for run in plan(sweep)]


def finish(record: RunRecord) -> None:
    for budget in (640, 1280):
        record.record_row({"images_seen": budget, "val_loss": 0.5})
    record.write_status(state="finished", reason=None)


def test_waiting_ends_with_the_last_run_and_says_how(write_sweep: Any, call: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    first, second = records_of(sweep)
    assert call(sweep, "status", "--wait")[0] == 75, "nobody executes them"
    finish(first)
    began = threading.Event()

    def work() -> None:
        with hold_lock(second.claim):
            began.set()
            time.sleep(1.0)
            finish(second)

    worker = threading.Thread(target=work)
    worker.start()
    assert began.wait(30)
    code, said = call(sweep, "status", "--wait")
    worker.join()
    assert (code, said.splitlines()[-1].split()[2]) == (0, "report")
    second.write_status(state="diverged", reason="loss is NaN", reason_class="nan")
    ended = {"saved": second.saved_progress(), "reason": "loss is NaN", "reason_class": "nan"}
    second.append_attempt(attempt=1, ended=1.0, device_hours=0.0, exit_code=3, **ended)
    assert call(sweep, "status", "--wait")[0] == 1


def test_a_slurm_that_does_not_answer_for_a_while_does_not_end_the_waiting(
    write_sweep: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    (record,) = records_of(sweep)
    submissions_file(sweep).parent.mkdir()
    submissions_file(sweep).write_text(
        '{"job_id": "8", "number": 1, "shape": {"nodes": 1, "devices": 1}, '
        '"launch": "a", "script": "b", "request": "c"}\n'
    )
    asked: list[int] = []

    def answer() -> dict[str, JobInfo] | None:
        asked.append(1)
        if len(asked) == 20:
            finish(record)
        return {"8": JobInfo(job_id="8", state="PENDING")} if len(asked) == 1 else None

    monkeypatch.setattr(verbs, "SLURM_INTERVAL_S", 0.0)
    monkeypatch.setattr("aimscale.sweeps.cli.sweep.slurm.try_list_jobs", answer)
    assert call(sweep, "status", "--wait")[0] == 0
    code, said = call(sweep, "status", "--wait", "--json")
    assert (code, json.loads(said)["counts"]) == (0, {"finished": 1})


def test_a_followed_log_begins_at_its_end_goes_on_with_the_next_attempt_and_ends_with_a_word(
    write_sweep: Any, call: Any
) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    (record,) = records_of(sweep)
    assert call(sweep, "logs", "rung", "-f")[1] == f"--- {record.name} is not started\n"
    record.logs.mkdir()
    record.attempt_log(1).write_text("".join(f"line {i}\n" for i in range(1000)))
    record.write_status(state="preempted", reason="stopped by a signal")
    _, said = call(sweep, "logs", "rung", "-f")
    assert "line 979\n" not in said
    assert said.splitlines()[-1].endswith(" is paused (stopped by a signal; `aimscale launch` resumes it)")
    began = threading.Event()

    def work() -> None:
        with hold_lock(record.claim):
            began.set()
            time.sleep(1.0)
            record.attempt_log(2).write_text("second attempt\n")
            time.sleep(1.0)
            finish(record)

    worker = threading.Thread(target=work)
    worker.start()
    assert began.wait(30)
    _, said = call(sweep, "logs", "rung", "-f")
    worker.join()
    assert said.index("line 980\n") < said.index("--- attempt-2") < said.index("second attempt\n")
    assert said.splitlines()[-1] == f"--- {record.name} is finished"
    assert call(sweep, "logs", "rung")[1] == "second attempt\n"
    assert "2 run ids" in refused("logs", write_sweep().source, "rung", "--root", sweep.root)
