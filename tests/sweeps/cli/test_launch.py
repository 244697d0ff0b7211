"""`launch` and `cancel`: where runs are executed, what is said before, and which runs are meant."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from typing import Any

import pytest
from commands import refused

from aimscale.aim.errors import UserError
from aimscale.analysis.table.read import read_table
from aimscale.harness.run.directory import EXIT_PREEMPTED
from aimscale.harness.run.lock import hold_lock
from aimscale.sweeps.cli.layout import format_duration, format_number
from aimscale.sweeps.cli.main import main
from aimscale.sweeps.cli.options import select_run_ids
from aimscale.sweeps.engine import launch as engine
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord


@pytest.fixture
def call(capsys: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a verb on a sweep whose runs end at once; return its exit code and what it prints."""
    monkeypatch.setattr("aimscale.sweeps.cli.launch.raise_on_problems", lambda *_: None)
    monkeypatch.setattr("aimscale.sweeps.cli.plan.check", lambda *_: ())

    def run(sweep: Sweep, verb: str, *options: str, behaviour: str = "finish") -> tuple[int, str]:
        monkeypatch.setattr(engine, "launch", functools.partial(launch, command=stand_in(behaviour)))
        with pytest.raises(SystemExit) as ended:
            main([verb, str(sweep.source), *options, "--root", str(sweep.root)])
        return int(str(ended.value.code or 0)), str(capsys.readouterr().out)

    return run


def test_a_file_with_a_slurm_section_never_trains_on_a_login_node_unless_told_so(
    write_sweep: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[str] = []

    def submit(planned: PlannedSweep, **_: Any) -> list[Any]:
        submitted.append(planned.sweep.name)
        return []

    monkeypatch.setattr("aimscale.sweeps.engine.slurm_worker.launch_slurm", submit)
    sweep = write_sweep(sizes=["rung-32"], slurm={})
    call(sweep, "launch")
    assert (submitted, sweep.runs_dir.exists()) == (["tiny"], False)
    assert "--on slurm" in refused("launch", sweep.source, "--root", sweep.root, "--devices", "1")
    _, said = call(sweep, "launch", "--on", "local")
    assert (submitted, "1 finished" in said) == (["tiny"], True)
    assert "slurm: {}" in refused("launch", write_sweep().source, "--root", sweep.root, "--on", "slurm")


@pytest.mark.parametrize("words", ["--devices 1e30", "--devices 1" + 30 * "0", "--stop-off-track inf"])
def test_numbers_beyond_sense_are_refused(words: str, write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    with pytest.raises(SystemExit, match="2"):
        main(["launch", str(sweep.source), "--root", str(sweep.root), *words.split()])
    assert not sweep.directory.exists()


def test_a_launch_says_first_what_is_there_and_what_is_new(write_sweep: Any, call: Any) -> None:
    call(write_sweep(sizes=["rung-32"], seeds=[0, 7]), "launch")
    longer = write_sweep(sizes=["rung-32"], seeds=[7], budgets=[640, 1280, 1920])
    call(longer, "launch", behaviour="crash")
    sweep = write_sweep(sizes=["rung-32"], seeds=[7, 8, 9])
    (old,) = {path.name for path in sweep.runs_dir.iterdir()} - {run.run_id for run in plan(sweep)}
    with hold_lock(RunRecord(sweep.run_dir(old)).lock):
        _, said = call(sweep, "launch", "--dry-run")
    lines = dict(line.split(maxsplit=1) for line in said.splitlines() if line.startswith(("runs", "cost", "unplanned")))
    assert lines["runs"] == "3: 2 new, 1 to resume"
    assert lines["unplanned"].startswith(f"1 run directories, 1 of them running, such as {old}")
    assert "up to" in lines["cost"]
    assert sweep.run_dir(plan(sweep)[1].run_id).exists() is False


def test_money_and_time_on_what_is_there_are_told_before_they_are_spent(write_sweep: Any, call: Any) -> None:
    cost = {"peak_tflops": 1e-6, "price_per_device_hour": "2.50 EUR"}
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2], cost=cost)
    hours = sum(card.device_hours for card in cost_cards(sweep, plan(sweep)))
    assert hours > 10
    _, said = call(sweep, "launch", "--dry-run", "--devices", "2")
    (line,) = (line for line in said.splitlines() if line.startswith("cost"))
    both = format_duration(hours * 3600 * 2 / 3)  # three equal runs on two devices
    assert f"device-hours ({format_number(2.5 * hours)} EUR); about {both} on 2 devices here; longest run" in line
    _, said = call(sweep, "plan")
    assert f"device-hours ({format_number(2.5 * hours)} EUR); longest run" in said
    _, said = call(sweep, "plan", "--json")
    assert json.loads(said)["price"] == {"amount": pytest.approx(2.5 * hours), "currency": "EUR"}
    for price in (2.5, "2.50", "EUR 2", "2,50 EUR", "-1 EUR", "nan EUR", "1 \x1b[31m"):
        with pytest.raises(UserError, match="an amount and a currency"):
            write_sweep(cost={"price_per_device_hour": price})


def test_a_plan_says_what_is_there_and_what_an_edited_file_adds(write_sweep: Any, call: Any) -> None:
    assert "\nthere" not in call(write_sweep(sizes=["rung-32"], seeds=[0, 7]), "plan")[1]
    call(write_sweep(sizes=["rung-32"], seeds=[0, 7]), "launch")
    sweep = write_sweep(sizes=["rung-32"], seeds=[7, 8, 9], budgets=[640, 1280, 1920])
    _, said = call(sweep, "plan")
    lines = dict(line.split(maxsplit=1) for line in said.splitlines() if line.startswith(("there", "added", "unpl")))
    assert (lines["there"], lines["added"]) == ("3: 2 new, 1 to extend", "training at 1920 (1 run)")
    assert lines["unplanned"].startswith("1 run directories, such as")
    _, said = call(sweep, "plan", "--json")
    found = json.loads(said)
    assert (found["states"], len(found["unplanned"])) == ({"not started": 2, "paused": 1}, 1)
    sweep = write_sweep(sizes=["rung-32"], seeds=[7], budgets=[640, 1280, 1920])
    (card,) = cost_cards(sweep, plan(sweep))
    left = 1 - (640 + 1280) / card.images_executed  # of the time, nearly all is training
    _, said = call(sweep, "plan")
    assert f"up to {format_number(left * card.device_hours)} device-hours" in said


def test_a_launch_asks_for_the_hours_that_are_left(
    write_sweep: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("aimscale.sweeps.cli.launch.confirm", lambda question, **_: asked.append(question))
    monkeypatch.setattr("aimscale.sweeps.cli.launch.CONFIRM_DEVICE_HOURS", 0.01)
    cost = {"peak_tflops": 1e-6}
    call(write_sweep(sizes=["rung-32"], budgets=[640, 1280], cost=cost), "launch")
    sweep = write_sweep(sizes=["rung-32"], budgets=[640, 1280, 1920], cost=cost)
    (card,) = cost_cards(sweep, plan(sweep))
    left = 1 - (640 + 1280) / card.images_executed  # of the time, nearly all is training
    call(sweep, "launch")
    assert asked[1] == f"launch up to {format_number(left * card.device_hours)} device-hours?"


def test_a_file_with_a_slurm_section_is_priced_for_where_it_is_launched(write_sweep: Any, call: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], slurm={"gpus": "h100"})
    assert "H100 (slurm.gpus)" in call(sweep, "plan")[1].replace("h100", "H100")
    _, said = call(sweep, "plan", "--on", "local")
    assert "H100" not in said.replace("h100", "H100")
    assert said.splitlines()[-1] == f"next: aimscale launch {sweep.source} --on local --root {sweep.root}"
    _, here = call(sweep, "launch", "--on", "local", "--dry-run", "--devices", "1")
    assert " on 1 device here" in here


def test_a_dry_run_refuses_what_its_launch_would(write_sweep: Any, call: Any) -> None:
    code, said = call(write_sweep(sizes=["rung-32"], cost={"device": "H100"}), "launch", "--dry-run")
    assert code == 2
    assert "next:" not in said


def test_time_that_is_up_is_not_success(write_sweep: Any, call: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    assert call(sweep, "launch", "--time-limit", "0.001")[0] == EXIT_PREEMPTED
    assert call(sweep, "launch")[0] == 0


def test_what_failed_before_is_no_failure_of_a_launch(write_sweep: Any, call: Any) -> None:
    """Else each pod of a job ends with 1 because of one run, until the limit of failures ends those that train."""
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    bad, _ = (RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep))
    RunRecord.create(bad.path, plan(sweep)[0].config)
    bad.write_status(state="diverged", reason="NaN", reason_class="nan")
    bad.append_attempt(attempt=1, ended=1.0, device_hours=0.0, saved=bad.saved_progress(), reason_class="nan")
    code, said = call(sweep, "launch")
    assert (code, "1 finished" in said, "1 diverged" in said) == (0, True, True)
    assert call(sweep, "launch", "--retry", behaviour="off track")[0] == 1


def test_runs_are_marked_where_there_is_no_slurm_to_ask(
    write_sweep: Any, call: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sweep = write_sweep(sizes=["rung-32"], slurm={})
    (sweep.directory / "slurm").mkdir(parents=True)
    array = {"number": 1, "shape": {"nodes": 1, "devices": 1}, "launch": "a", "script": "b", "request": "c"}
    (sweep.directory / "slurm" / "jobs.jsonl").write_text(json.dumps({"job_id": "8", **array}) + "\n")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as ended:
        main(["cancel", str(sweep.source), "--root", str(sweep.root)])
    told = capsys.readouterr()
    assert (ended.value.code or 0, "1 runs stopped" in told.out) == (0, True)
    assert "Slurm does not answer here" in told.err
    assert RunRecord(sweep.run_dir(plan(sweep)[0].run_id)).cancelled.exists()


def test_a_launch_whose_runs_are_all_cancelled_is_not_over(write_sweep: Any, call: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    record = RunRecord(sweep.run_dir(plan(sweep)[0].run_id))

    def cancel() -> None:
        while not record.is_held():
            time.sleep(0.05)
        record.cancelled.touch()

    canceller = threading.Thread(target=cancel, daemon=True)
    canceller.start()
    code, said = call(sweep, "launch", behaviour="wait")
    canceller.join()
    last = f"next: aimscale launch {sweep.source} --retry --root {sweep.root}"
    assert (code, said.splitlines()[-1]) == (EXIT_PREEMPTED, last)


def test_a_pattern_takes_whole_ids_only(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["w16-d1", "w16-d12"], seeds=[1, 10])
    ids = [run.run_id for run in plan(sweep)]
    assert select_run_ids(PlannedSweep(sweep), []) == ids
    assert select_run_ids(PlannedSweep(sweep), [ids[0]]) == ids[:1]
    assert select_run_ids(PlannedSweep(sweep), ["w16-d1_*"]) == ids[:2]
    said = refused("cancel", sweep.source, "w16-d1", "--root", sweep.root)
    assert "'*w16-d1*' matches 4" in said


@pytest.mark.parametrize(("options", "answer", "is_started"), [((), "n", False), ((), "y", True), (("-y",), "", True)])
def test_a_dear_launch_is_confirmed_on_a_terminal(
    options: tuple[str, ...],
    answer: str,
    is_started: bool,
    write_sweep: Any,
    call: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost = {"peak_tflops": 1e-6, "mfu": 0.1, "price_per_device_hour": "3 USD"}
    sweep = write_sweep(sizes=["rung-32"], cost=cost)
    controller, terminal = os.openpty()
    os.write(controller, f"{answer}\n".encode())
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        code, said = call(sweep, "launch", *options)
    assert ("USD)?" in said) == (not options)
    assert (code == 0, sweep.directory.exists()) == (is_started, is_started)


@pytest.mark.parametrize(("answer", "is_cancelled"), [("n", False), ("y", True)])
def test_several_runs_are_cancelled_on_a_terminal_after_a_question(
    answer: str, is_cancelled: bool, write_sweep: Any, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    for run in plan(sweep):
        RunRecord.create(sweep.run_dir(run.run_id), run.config)
    controller, terminal = os.openpty()
    os.write(controller, f"{answer}\n".encode())
    with os.fdopen(terminal) as stdin, hold_lock(records[0].claim):
        monkeypatch.setattr(sys, "stdin", stdin)
        call(sweep, "cancel")
    assert [record.cancelled.exists() for record in records] == [is_cancelled] * 2


def test_a_verb_that_is_given_a_sweep_reads_what_is_there_now(write_sweep: Any, call: Any, capsys: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    call(sweep, "launch")
    call(sweep, "collect")
    longer = write_sweep(sizes=["rung-32"], budgets=[640, 1280, 1920])
    call(longer, "launch")
    with pytest.raises(SystemExit):
        main(["compare", str(sweep.directory), "--json"])
    assert list(read_table(sweep.directory / "results.parquet")["images_seen"]) == [640, 1280, 1920]


def test_a_table_without_its_runs_is_read_as_it_is(write_sweep: Any, call: Any, tmp_path: Any, capsys: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    call(sweep, "launch")
    call(sweep, "collect")
    sweep.runs_dir.rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        main(["compare", str(sweep.directory), "--json"])
    assert "read as it is" in capsys.readouterr().err
    assert json.loads((sweep.directory / "collect.json").read_text())["machines"] is not None
