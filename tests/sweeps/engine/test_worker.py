from __future__ import annotations

import ast
import errno
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import until

import aimscale.sweeps.engine.launch
from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import RunDir
from aimscale.sweeps.cli.launch import _exit_code, print_result
from aimscale.sweeps.engine import active_run, looks
from aimscale.sweeps.engine import worker as engine
from aimscale.sweeps.engine.active_run import Event
from aimscale.sweeps.engine.devices import Machine
from aimscale.sweeps.engine.launch import cancel
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord, prepare_directory, unplanned_runs
from aimscale.sweeps.state.run_state import read_state


def starts(record: RunRecord) -> int:
    return len((record.path / "starts").read_text().split()) if (record.path / "starts").exists() else 0


def both_at_work(sweep: Any, start: Any) -> tuple[list[RunRecord], Any]:
    """Launch the sweep in a process; return the records of its two runs, once both are executed, and the process."""
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    first = start(2, "wait")
    until(lambda: all(map(starts, records)))
    return records, first


@pytest.mark.parametrize("num_smallest_first", [0, 1, 9])
def test_longest_runs_first_and_a_second_launch_starts_nothing(
    write_sweep: Any, capsys: Any, stand_in: Any, launch: Any, num_smallest_first: int
) -> None:
    sweep = write_sweep(seeds=[0, 1])
    result = launch(sweep, devices=1, command=stand_in(), num_smallest_first=num_smallest_first)
    assert len(result.finished) == 4
    begun = [line for line in capsys.readouterr().out.splitlines() if line.startswith("started")]
    long_first = [True, True, False, False]  # also where there are too few runs to begin with so many short ones
    expected = [False, True, True, False] if num_smallest_first == 1 else long_first
    assert ["rung-48" in line for line in begun] == expected
    again = launch(sweep, devices=1, command=stand_in())
    assert not again.finished
    assert [each.state for each in again.skipped] == ["finished"] * 4
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    assert [starts(record) for record in records] == [1, 1, 1, 1]
    assert not any(record.is_claimed() for record in records)


def test_interrupting_saves_and_launching_again_goes_on(
    write_sweep: Any, start: Any, stand_in: Any, launch: Any
) -> None:
    sweep = write_sweep()
    records, first = both_at_work(sweep, start)
    first.send_signal(signal.SIGINT)
    assert first.communicate()[0].splitlines()[-1] == "stopped 0"
    assert {record.read_status().state for record in records} == {"preempted"}
    assert not any(record.is_held() or record.is_claimed() for record in records)
    result = launch(sweep, devices=2, command=stand_in())
    assert len(result.finished) == 2
    assert [starts(record) for record in records] == [2, 2]


def test_a_killed_worker_leaves_live_runs_alone_until_they_end_and_dead_ones_resumable(
    write_sweep: Any, start: Any, stand_in: Any, launch: Any
) -> None:
    """The next launch ended beside the live run, which nobody evaluated then."""
    sweep = write_sweep()
    records, first = both_at_work(sweep, start)
    first.kill()
    first.wait()
    live, dead = records
    os.kill(int((dead.path / "starts").read_text()), signal.SIGKILL)
    pid, is_alone = int((live.path / "starts").read_text()), list[bool]()

    def end_it() -> None:
        until(lambda: starts(dead) == 2)
        is_alone.append(starts(live) == 1 and live.is_held())
        os.kill(pid, signal.SIGTERM)

    ending = threading.Thread(target=end_it)
    ending.start()
    result = launch(sweep, devices=2, command=stand_in())
    ending.join()
    assert is_alone == [True]
    assert {*result.finished} == {live.path.name, dead.path.name}
    assert [starts(live), starts(dead)] == [2, 2]


@pytest.mark.parametrize(("behaviour", "kind", "tries"), [("crash", "code", 2), ("die", "oom", 2)])
def test_failures_are_classified_retried_within_bounds_and_forgiven(
    write_sweep: Any, behaviour: str, kind: str, tries: int, stand_in: Any, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active_run, "EARLY_S", 0.0)
    sweep = write_sweep(sizes=["rung-32"])
    record = RunRecord(sweep.run_dir(plan(sweep)[0].run_id))
    result = launch(sweep, devices=1, command=stand_in(behaviour))
    assert result.failed == (record.path.name,)
    assert starts(record) == tries
    assert (record.read_status().state, record.read_status().reason_class) == ("failed", kind)
    if behaviour == "crash":
        assert record.read_status().reason == "RuntimeError: the user's code is wrong"
    again = launch(sweep, devices=1, command=stand_in())
    assert starts(record) == tries
    assert [each.state for each in again.skipped] == ["failed"]
    assert launch(sweep, devices=1, command=stand_in(), retry=True).finished == (record.path.name,)


def test_another_budget_extends_a_run_and_another_seed_is_a_new_one(
    write_sweep: Any, stand_in: Any, launch: Any
) -> None:
    launch(write_sweep(sizes=["rung-32"]), devices=1, command=stand_in())
    longer = write_sweep(sizes=["rung-32"], budgets=[640, 1920])
    assert len(launch(longer, devices=1, command=stand_in()).finished) == 1
    (path,) = longer.runs_dir.iterdir()
    assert [row["images_seen"] for row in RunRecord(path).read_rows()] == [640, 1280, 1920]
    assert [each.state for each in launch(longer, devices=1, command=stand_in()).skipped] == ["finished"]
    other = write_sweep(sizes=["rung-32"], seeds=[1])
    assert len(launch(other, devices=1, command=stand_in()).finished) == 1
    assert unplanned_runs(other, plan(other)) == (path.name,)


def test_a_run_is_not_told_that_srun_started_its_worker(
    write_sweep: Any, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the other tasks of a Slurm step for its ranks."""
    for name in ("SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    sweep = write_sweep(sizes=["rung-32"], devices=2)
    note = "import os, pathlib, sys; pathlib.Path(sys.argv[1], 'told').write_text(str(dict(os.environ))); sys.exit(2)"
    launch(sweep, devices=2, command=lambda run_dir, devices: [sys.executable, "-c", note, str(run_dir)])
    (run,) = plan(sweep)
    told = ast.literal_eval((sweep.run_dir(run.run_id) / "told").read_text())
    assert not {"SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} & told.keys()


def test_what_cannot_start_makes_nothing(
    write_sweep: Any, tmp_path: Path, stand_in: Any, request: pytest.FixtureRequest
) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    with pytest.raises(UserError, match="data/train"):
        aimscale.sweeps.engine.launch.launch(PlannedSweep(sweep), devices=1)
    assert not sweep.root.exists()
    (tmp_path / "root").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="--root"):
        request.getfixturevalue("launch")(sweep, devices=1, command=stand_in())


def test_launches_at_once_execute_each_run_once(write_sweep: Any, start: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=list(range(8)))
    all_of_them = [start(devices) for devices in (1, 1, 2)]
    lines = [each.communicate()[0].splitlines()[-1] for each in all_of_them]
    assert sum(int(line.split()[-1]) for line in lines) == 8, lines
    assert {line.split()[0] for line in lines} == {"done"}
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    assert [len((record.path / "starts").read_text().split()) for record in records] == [1] * 8
    assert [len(record.read_rows()) for record in records] == [2] * 8


def test_a_worker_whose_time_is_up_saves_and_another_goes_on(
    write_sweep: Any, stand_in: Any, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two minutes of an hour are kept for saving; the clock jumps there once both runs are executed."""
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    jumps = iter([3600 - 150, 3600 - 90])

    def later() -> float:
        at_work = all((record.path / "starts").exists() for record in records)
        return time.time() + (next(jumps, 3600 - 90) if at_work else 0)

    monkeypatch.setattr(engine, "time", SimpleNamespace(time=later, sleep=time.sleep, monotonic=time.monotonic))
    result = launch(sweep, hours=1, devices=2, command=stand_in("wait"))
    assert (result.interrupted, result.stopped_by) == (True, None)
    assert next(jumps, None) is None, "not before that"
    assert [record.read_status().state for record in records] == ["preempted", "preempted"]
    monkeypatch.setattr(engine, "time", time)
    result = launch(sweep, devices=1, command=stand_in())
    assert (result.interrupted, sorted(result.finished)) == (False, sorted(record.path.name for record in records))


def test_a_free_device_never_waits_behind_a_run_that_needs_more(write_sweep: Any, launch: Any, tmp_path: Path) -> None:
    """A run occupies one of three devices; the next needs all three, the one after it only one."""
    wide = [{"when": {"seed": 1}, "set": {"devices": 3}}]
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2], override=wide)
    first, broad, last = (sweep.run_dir(run.run_id) for run in plan(sweep))
    program = (
        "import pathlib, sys, time; mine, first, last = map(pathlib.Path, sys.argv[1:]); mine.joinpath('ran').touch()\n"
        "while mine == first and not last.joinpath('ran').exists(): time.sleep(.05)\n"
        "sys.exit(2)"
    )
    result = launch(sweep, devices=3, command=lambda path, _: [sys.executable, "-c", program, path, first, last])
    assert len(result.failed) == 3, "the first run ends when the last has begun"
    assert (broad / "ran").exists()


def test_cancelled_runs_save_and_stay_ended_until_the_next_launch_and_that_is_no_failure(
    write_sweep: Any, start: Any, stand_in: Any, launch: Any
) -> None:
    sweep = write_sweep(seeds=[0, 1])
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    worker = start(2, "wait")
    until(lambda: sum(record.is_held() for record in records) == 2)
    done, failed = cancel(PlannedSweep(sweep))
    assert (len(done), failed) == (4, [])
    assert worker.communicate()[0].splitlines()[-1] == "done 0", "it ended by itself"
    assert not any(record.is_held() for record in records)
    result = launch(sweep, devices=2, command=stand_in())
    assert [each.state for each in result.skipped] == ["cancelled"] * 4, "another worker starts none of them"
    assert sum(starts(record) for record in records) == 2
    result = launch(sweep, devices=2, command=stand_in(), retry=True)
    assert len(result.finished) == 4


def test_cancel_reaches_what_runs_although_it_is_no_longer_planned(write_sweep: Any, start: Any) -> None:
    records, worker = both_at_work(write_sweep(), start)
    done, _ = cancel(PlannedSweep(write_sweep(seeds=[1])))
    assert [line.endswith("told to save and end") for line in done].count(True) == 2
    assert worker.communicate()[0].splitlines()[-1] == "done 0"
    assert {record.read_status().state for record in records} == {"preempted"}


def test_a_run_that_hangs_is_killed_after_its_grace(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(active_run, "KILL_MARGIN_S", -plan(write_sweep())[0].grace_s + 1.0)
    sweep = write_sweep(sizes=["rung-32"])
    record = RunRecord(sweep.run_dir(plan(sweep)[0].run_id))
    canceller = threading.Thread(target=lambda: (until(record.is_held), record.cancelled.touch()), daemon=True)
    canceller.start()
    launch(sweep, devices=1, command=stand_in("hang"))
    assert "killing" in capsys.readouterr().out
    assert (record.read_status().state, record.read_status().reason) == ("preempted", "cancelled")


def test_a_broken_node_gives_its_runs_back_and_ends_its_worker(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It would otherwise fail the whole sweep within minutes, faster than sound nodes train."""
    sweep = write_sweep(seeds=[0, 1])
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    for node in ("bad", "good"):
        monkeypatch.setattr(socket, "gethostname", lambda node=node: node)
        result = launch(sweep, devices=1, command=stand_in("crash" if node == "bad" else "finish"))
        if node == "bad":
            assert "two runs in a row failed on bad before their first step (RuntimeError" in str(result.broken)
            assert "no more runs are started here" in capsys.readouterr().out
            assert (len(result.failed), sum(map(starts, records))) == (2, 2)
            states = [read_state(run, record).state for run, record in zip(plan(sweep), records, strict=True)]
            assert sorted(states) == ["not started"] * 2 + ["paused"] * 2
    assert (len(result.finished), result.broken) == (4, None)


def test_a_run_that_another_worker_has_ended_since_blames_no_node(write_sweep: Any, stand_in: Any) -> None:
    """Two runs were given back here; the first went to another worker before the second's end was recorded."""
    planned = PlannedSweep(write_sweep(sizes=["rung-32"], seeds=[0, 1]))
    sweep, runs = planned.sweep, planned.longest_first
    prepare_directory(sweep, runs)
    first, second = (RunRecord(sweep.run_dir(run.run_id)) for run in runs)
    about: dict[str, Any] = {"ended": 1.0, "device_hours": 0.0, "saved": [0]}
    for run, record in zip(runs, (first, second), strict=True):
        RunRecord.create(record.path, run.config)
        record.append_attempt(attempt=1, reason_class="code", failed_nodes=["bad"], given_back=True, **about)
    worker = engine.Worker(sweep=sweep, machine=Machine(devices=1), waiting=list(runs), command=stand_in())
    worker.ended = [(record.name, "released") for record in (first, second)]
    last = SimpleNamespace(run=runs[1], record=second)
    for since in ({"forgiven": True}, {"attempt": 2, "reason_class": None, **about}):
        first.append_attempt(**since)
        engine._suspect_node(worker, last)  # type: ignore[arg-type]
        assert worker.broken is None


def test_a_full_disk_while_a_run_is_made_is_said_and_no_success(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its first start, or at the next after a failure."""
    create = RunDir.create.__func__  # type: ignore[attr-defined]
    for num_good in (0, 1):
        monkeypatch.setattr(active_run, "EARLY_S", 0.0)
        sweep = write_sweep(name=f"full{num_good}", sizes=["rung-32"])
        left = [num_good]

        def full(cls: Any, path: Path, config: Any, left: list[int] = left) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return create(cls, path, config)

        monkeypatch.setattr(RunDir, "create", classmethod(full))
        result = launch(sweep, devices=1, command=stand_in("crash"))
        assert [each.state for each in result.skipped] == ["damaged"]
        assert _exit_code(result) == 1
        print_result(result)
        assert capsys.readouterr().out.count("No space left on device") == 2


def test_forecasts_are_made_while_runs_start(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, told = write_sweep(sizes=["rung-32"], seeds=[0, 1]), list[bool]()

    def write_forecasts(sweep: Any, planned: Any, chosen: Any) -> None:
        told.extend((sweep.run_dir(run.run_id) / "logs" / "attempt-1.log").exists() for run in chosen)

    monkeypatch.setattr(engine, "write_forecasts", write_forecasts)
    launch(sweep, devices=2, command=stand_in())
    assert told[:2] == [True, True], "their processes run"


def test_a_broken_run_fails_for_good_on_two_nodes_and_stops_no_other(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2])
    bad = RunRecord(sweep.run_dir(plan(sweep)[0].run_id))
    RunRecord.create(bad.path, plan(sweep)[0].config)
    (bad.path / "behaviour").write_text("crash")
    result = launch(sweep, devices=1, command=stand_in())
    assert (len(result.finished), result.failed, result.broken) == (2, (bad.name,), None)
    assert starts(bad) == 2
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert launch(sweep, devices=1, command=stand_in()).failed == (bad.name,)
    assert read_state(plan(sweep)[0], bad).state == "failed"
    assert [each.state for each in launch(sweep, devices=1, command=stand_in()).skipped].count("failed") == 1


def test_a_launch_that_waits_for_a_silent_run_of_another_worker_says_so(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(looks, "LOST_AFTER_S", 62.0)
    sweep = write_sweep(sizes=["rung-32"])
    (run,) = plan(sweep)
    record = RunRecord(sweep.run_dir(run.run_id))
    RunRecord.create(record.path, run.config)
    with record.hold():
        record.write_status(state="running", host="node7", heartbeat=time.time() - 61)
        assert [each.state for each in launch(sweep, devices=1, command=stand_in()).skipped] == ["running"]
    assert f"waiting: {run.run_id} is silent on node7" in capsys.readouterr().out


def test_a_launcher_whose_sweep_was_moved_stops_and_makes_nothing(
    write_sweep: Any, launch: Any, stand_in: Any, tmp_path: Path
) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    record = RunRecord(sweep.run_dir(plan(sweep)[0].run_id))

    def move() -> None:
        until(record.is_held)
        sweep.directory.rename(tmp_path / "elsewhere")

    threading.Thread(target=move, daemon=True).start()
    result = launch(sweep, devices=1, command=stand_in("wait"))
    assert "was moved or removed" in str(result.broken)
    assert not sweep.directory.exists()


def test_a_job_takes_runs_of_its_own_shape_first(write_sweep: Any, stand_in: Any) -> None:
    """Otherwise a small run keeps a node of eight devices from the run that it was requested for."""
    wide = [{"when": {"size": "rung-32"}, "set": {"devices": 2}}]
    planned = PlannedSweep(write_sweep(override=wide, seeds=[0, 1]))
    sweep, runs = planned.sweep, sorted(planned.longest_first, key=lambda run: run.devices)
    prepare_directory(sweep, runs)
    machine = Machine(devices=2, allow_fewer_devices=False)
    worker = engine.Worker(sweep=sweep, machine=machine, waiting=list(runs), command=stand_in(), job_id="7")
    told: list[Event] = []
    result = engine.run_worker(worker, lambda worker: (told.extend(worker.events), worker.events.clear()))
    assert len(result.finished) == 4
    assert [event.kind for event in told if "rung-32" in event.text] == ["started", "finished"] * 2
    assert all("rung-32" in event.text for event in told[:4])


def test_a_run_that_took_long_to_start_is_not_started_with_little_time(write_sweep: Any, stand_in: Any) -> None:
    """It would be killed before its first step, and that would count as an attempt without progress."""
    planned = PlannedSweep(write_sweep(sizes=["rung-32"], seeds=[0, 1]))
    sweep, runs = planned.sweep, planned.longest_first
    prepare_directory(sweep, runs)
    slow, quick = (RunRecord.create(sweep.run_dir(run.run_id), run.config) for run in runs)
    for record, startup_s in ((slow, 400.0), (quick, 5.0)):
        record.record_start({"startup_s": startup_s})
    worker = engine.Worker(
        sweep=sweep, machine=Machine(devices=1), waiting=list(runs), command=stand_in(), deadline=time.time() + 600
    )
    result = engine.run_worker(worker, lambda worker: None)
    assert result.finished == (quick.path.name,)
    assert (result.remaining, result.interrupted) == ((slow.path.name,), True)


def test_each_stage_of_a_run_is_given_to_its_own_program(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def command(machine: Machine, run: Run, run_dirs: list[Path], num_devices: int) -> list[str]:
        started.append([run.stage, *(each.name for each in run_dirs)])
        return stand_in()(run_dirs[0], num_devices) if run.stage == "train" else ["true"]

    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    monkeypatch.setattr(Machine, "command", command)
    launch(sweep, devices=1)
    runs = plan(sweep)
    for run in runs:
        file = RunRecord(sweep.run_dir(run.run_id)).model_file(run.budgets[0])
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
    launch(sweep, devices=1)
    names = [run.run_id for run in runs]
    assert started[:2] == [["train", name] for name in names]
    assert started[2] == ["evaluate", *names], "one process for both"
    assert len(started) < 12, "a program that does nothing is not started for ever"
    words = [run.evaluation.command([Path(name) for name in names]) for run in runs[:1]]
    assert words == [["-m", "aimscale.harness.evaluate", *names]]
