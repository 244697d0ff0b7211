from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from aimscale.harness.results import _content, task_key, update_row, validation_name, weights_name
from aimscale.harness.run.directory import RunDir, Status
from aimscale.harness.run.files import write_json
from aimscale.harness.run.lock import hold_lock
from aimscale.sweeps.cli.layout import new_console
from aimscale.sweeps.cli.status_view import status_view
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.slurm.commands import JobInfo
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.run_state import State
from aimscale.sweeps.sweep_status import RunStatus, SweepStatus, sweep_status, time_left

PROBED = {"probes": [{"task": name, "train": f"data/{name}", "test": f"data/{name}-test"} for name in ("pets", "cars")]}


@pytest.fixture(autouse=True)
def counted(tmp_path: Path) -> None:
    """Make data folders that state their number of images, so that evaluation has a cost."""
    for name in ("validation", "pets", "cars"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "dataset.json").write_text('{"num_samples": 1000}')


def look(sweep: Any) -> SweepStatus:
    return sweep_status(PlannedSweep(sweep))


def finish_task(run: Run, record: RunRecord, budget: int, task: str, kinds: Sequence[str]) -> None:
    """Write the file of a task with these kinds of probes, and add them to the budget's row."""
    section = next(each for each in run.config.evaluation.probes if each.task == task)
    key = task_key(weights_name(record, run.config, budget), section, "train", "test", run.config.training.seed)
    document = {**key, "probes": [{"task": task, "kind": kind} for kind in kinds]}
    write_json(record.probes_dir(budget) / f"{task}-{key['evaluation']}.json", document)
    update_row(record, run.config, budget)


def test_evaluation_is_shown(write_sweep: Any, launch: Any, stand_in: Any, capsys: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], base=PROBED)
    run = plan(sweep)[0]
    launch(sweep, devices=1, command=stand_in())
    record = RunRecord(sweep.run_dir(run.run_id))
    for budget in run.budgets:
        record.model_file(budget).parent.mkdir(parents=True)
        record.model_file(budget).write_bytes(b"weights")
    for kinds, done in (([], 0), (["linear"], 0), (["linear", "attentive"], 4)):
        for budget in run.budgets:
            for task in ("pets", "cars"):
                finish_task(run, record, budget, task, kinds)
        line = look(sweep).runs[0]
        assert (line.state, line.evaluated, line.to_evaluate) == ("paused", done, 4), "validation is missing, too"
    RunDir(record.path).write_status(mfu=1.09)
    console = new_console()
    console.print(status_view(look(sweep), console.width))
    said = capsys.readouterr().out
    assert "4 of 4" in said
    assert "109 % (!)" in said, "no program is faster than the fastest product: the peak was measured too low"


def test_a_finished_run_that_is_extended_is_neither_finished_nor_to_be_collected(
    write_sweep: Any, launch: Any, stand_in: Any
) -> None:
    launch(write_sweep(sizes=["rung-32"]), devices=1, command=stand_in())
    longer = look(write_sweep(sizes=["rung-32"], budgets=[640, 1280, 6400]))
    assert longer.runs[0].state == "paused"
    assert "6400" in str(longer.runs[0].status.reason)
    assert 0 < longer.progress < 1


def test_progress_counts_planned_time(write_sweep: Any, launch: Any, stand_in: Any) -> None:
    slow = {"peak_tflops": 1e-3}  # so that steps take longer than images
    launch(write_sweep(sizes=["rung-32"], cost=slow), devices=1, command=stand_in())
    sweep = write_sweep(sizes=["rung-32", "rung-64"], cost=slow)
    small, large = (card.wall_s for card in PlannedSweep(sweep).cards)
    assert look(sweep).progress == pytest.approx(small / (small + large))
    assert large > 2 * small, "by images or runs it were a half"


def test_who_holds_a_run_says_where_it_stands(write_sweep: Any, capsys: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[*range(9)])
    runs = plan(sweep)
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in runs]
    new, lost, paused, running, starting, failed, cancelled, other_version, by_hand = records
    for record, run in zip(records[1:], runs[1:], strict=True):
        RunRecord.create(record.path, run.config)
    for record in (lost, running, by_hand):
        record.write_status(state="running", phase="train", images_done=320, images_per_s=10.0, data_wait=0.29)
    running.write_status(data_wait=0.76)
    paused.write_status(state="preempted", reason="stopped by a signal")
    failed.write_status(state="failed", reason="no \x1b]0;title\x07such class\x1b[31m", reason_class="data")
    ended = {"exit_code": 1, "saved": failed.saved_progress(), "reason_class": "data", "failed_nodes": []}
    failed.append_attempt(attempt=1, ended=1.0, device_hours=0.0, reason="", **ended)
    cancelled.write_status(state="preempted")
    cancelled.cancelled.write_text("")
    other_version.write_status(version=99)
    running.record_row({"images_seen": 640, "val_loss": 0.4321})
    running.record_row({"images_seen": 1280, "val_loss": None})  # trained, and not evaluated yet
    by_hand.curve.write_text('{"images_seen": 320, "val_loss": 0.625}\n{"images_seen": 384, "val_loss": null}\n')
    (sweep.runs_dir / "old-run").mkdir()
    jobs = {each: JobInfo(job_id=each, state="PENDING", reason="Priority") for each in ("8_0", "9_0", "11_0")}
    array = {"number": 2, "shape": {"nodes": 1, "devices": 1}, "launch": "a", "script": "b", "request": "c"}
    (sweep.directory / "slurm").mkdir()
    (sweep.directory / "slurm" / "jobs.jsonl").write_text(json.dumps({"job_id": "8", **array}) + "\n")
    facts: dict[str, Any] = {"job_id": "7_1", "devices": 1, "nodes": "node1"}
    with running.hold(), by_hand.hold(), hold_lock(running.claim, **facts), hold_lock(starting.claim, **facts):
        alone, with_jobs = look(sweep), sweep_status(PlannedSweep(sweep), jobs)
        del jobs["8_0"]
        assert sweep_status(PlannedSweep(sweep), jobs).counts == alone.counts, "jobs of other sweeps are not its own"
    states = ["not started", "lost", "paused", "running", "starting", "failed", "cancelled", "damaged", "running"]
    assert [line.state for line in alone.runs] == states
    queued = ["queued" if state in ("not started", "lost", "paused") else state for state in states]
    assert [line.state for line in with_jobs.runs] == queued
    assert with_jobs.runs[0].status.reason == "Priority"
    assert (alone.runs[3].place, "job" in alone.runs[8].place) == (f"{socket.gethostname()} (job 7_1)", False)
    assert alone.unplanned == ("old-run",)
    assert not new.path.exists()
    json.dumps(asdict(alone), allow_nan=False)
    console = new_console()
    console.print(status_view(alone, console.width))
    said = capsys.readouterr().out
    assert "0.4321" in said
    assert alone.runs[8].val_loss == 0.625, "the last that was measured on its way"
    assert "76 %" in said, "the run that waits for images is named"
    assert "29 %" not in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("data-bound")] == [alone.runs[3].run_id]
    assert f"{socket.gethostname()} (job 7_1)" in said
    assert "status.json" in said
    assert not set(said) & {"\x1b", "\x07"}, "no run's words steer the terminal"


def test_nodes_are_shown_unless_all_is_done_here(write_sweep: Any, launch: Any, stand_in: Any, capsys: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    launch(sweep, devices=1, command=stand_in())
    first, second = (RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep))

    def said() -> str:
        new_console().print(status_view(look(sweep), 200))
        return str(capsys.readouterr().out)

    capsys.readouterr()
    for record in (first, second):
        record.write_status(host=socket.gethostname())
    assert socket.gethostname() not in said()
    first.write_status(host="gpu-7", job_id="12_3")
    assert "gpu-7 (job 12_3)" in said(), "of a finished run, too"
    second.write_status(state="running", heartbeat=time.time() - 65)
    with second.hold():
        assert "last sign" in said()
        assert "1m 5s ago" in said()


def test_the_time_left_is_that_of_the_last_run_to_end(write_sweep: Any) -> None:
    """The two that run take three and five times what the plan says; the longest runs start first."""
    sweep = write_sweep(sizes=["rung-32", "rung-64", "rung-96"], seeds=[0, 1], budgets=[64_000], base=PROBED)
    cards = sorted(cost_cards(sweep, plan(sweep)), key=lambda card: -card.device_hours)
    waiting = RunStatus(run_id="", cell={}, state=State.NOT_STARTED, status=Status(), to_evaluate=2)
    lines, end, is_measured = time_left(cards, [waiting] * 6)
    assert (end, is_measured, lines) == (None, False, [waiting] * 6), "nothing works"

    def running(i: int, slower: float, **facts: Any) -> RunStatus:
        pace = cards[i].images_executed / cards[i].training_s / slower
        return replace(waiting, state=State.RUNNING, status=Status(images_per_s=pace), **facts)

    runs = [running(0, 3, progress=0.5), waiting, running(2, 5), waiting, replace(waiting, state=State.FAILED), waiting]
    lines, end, is_measured = time_left(cards, runs)
    assert is_measured
    left = [3 * (cards[0].wall_s - cards[0].training_s / 2), 5 * cards[2].wall_s]
    assert [line.eta_s for line in lines if line.eta_s] == pytest.approx(left)
    lanes = sorted(left)
    for i in (1, 3, 5):
        lanes = sorted([lanes[0] + 4 * cards[i].wall_s, lanes[1]])
    assert end == pytest.approx(lanes[1])
    evaluating = replace(running(0, 1), progress=1.0, evaluated=1)
    assert time_left(cards[:1], [evaluating])[1] == pytest.approx(cards[0].evaluation_s / 2)


def test_what_is_to_be_evaluated_is_work_too(write_sweep: Any) -> None:
    """A run that is trained and not evaluated is as far as its training takes of the planned time."""
    planned = PlannedSweep(write_sweep(sizes=["rung-32"], budgets=[64_000], base=PROBED))
    (card,) = planned.cards
    planned.cards = (replace(card, start_s=1.0, training_s=30.0, evaluation_s=69.0, wall_s=100.0),)
    status = sweep_status(planned)
    assert status.progress == 0
    trained = replace(status.runs[0], progress=1.0, to_evaluate=4)
    stages = [trained, replace(trained, evaluated=2), replace(trained, evaluated=4)]
    left = [time_left(planned.cards, [replace(each, state=State.RUNNING)])[1] for each in stages]
    assert left == pytest.approx([69.0, 34.5, 0.0])


def test_before_anything_is_measured_the_plan_stands(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2], base=PROBED)
    cards = cost_cards(sweep, plan(sweep))
    waiting = RunStatus(run_id="", cell={}, state=State.PAUSED, status=Status())
    two = [replace(waiting, state=State.STARTING)] * 2
    assert time_left(cards, [*two, waiting])[1] == pytest.approx(2 * cards[0].wall_s)
    wide = [replace(card, run=replace(card.run, devices=2)) for card in cards]
    assert time_left(wide, [two[0], waiting, waiting])[1] == pytest.approx(3 * cards[0].wall_s)


def test_many_runs_are_grouped_by_size_and_only_those_that_need_a_person_are_named(
    write_sweep: Any, capsys: Any
) -> None:
    sweep = write_sweep(seeds=[*range(20)])
    runs = plan(sweep)
    records = [RunRecord(RunRecord.create(sweep.run_dir(run.run_id), run.config).path) for run in runs]
    records[0].write_status(state="diverged", reason="loss is NaN", reason_class="nan")
    with records[1].hold():
        records[1].write_status(state="running", phase="train")
        found, console = look(sweep), new_console()
        console.print(status_view(found, console.width))
        said = capsys.readouterr().out
        console.print(status_view(found, console.width, every_run=True))
        every = capsys.readouterr().out
    assert said.splitlines()[0].startswith("runs   40: 38 not started")
    assert [record.name in said for record in records[:3]] == [True, False, False]
    sizes = {line.split()[0]: line for line in said.splitlines() if line.startswith("rung-")}
    assert list(sizes) == ["rung-32", "rung-48"]
    assert "18 not started, 1 " in sizes["rung-32"]
    assert all(record.name in every for record in records)


def test_a_finished_run_that_learnt_nothing_is_named(write_sweep: Any, capsys: Any) -> None:
    """Neither spikes nor a loss above a constant prediction's end a run whose learning rate is far too high."""
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2], axes={"objective.target": ["normalised", "raw"]})
    losses = {0: (0.4, 0), 1: (0.8, 7), 2: (1.3, 2)}
    for run in plan(sweep):
        record = RunRecord.create(sweep.run_dir(run.run_id), run.config)
        val_loss, spikes = losses[run.cell["seed"]]
        record.record_row({"images_seen": 640, "val_loss": val_loss, "num_loss_spikes": spikes})
    found, console = look(sweep), new_console()
    assert [line.num_loss_spikes for line in found.runs] == [0, 7, 2, 0, 7, 2]
    console.print(status_view(found, console.width))
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("unstable")] == [found.runs[2].run_id]
    assert "lr_peak" in said
    assert "spikes" in said


def test_a_look_at_finished_runs_reads_none_of_their_weights(write_sweep: Any, tmp_path: Path) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=list(range(5)))
    runs, weights = plan(sweep), {"w": np.zeros(2_000_000, "f4")}
    for run in runs:
        record = RunRecord(sweep.run_dir(run.run_id))
        RunRecord.create(record.path, run.config)
        with record.hold():
            for budget in run.budgets:
                record.model_file(budget).parent.mkdir(parents=True)
                save_file(weights, record.model_file(budget))
                record.validation_file(budget).parent.mkdir(exist_ok=True)
                name = validation_name(record, run.config, budget)
                losses = {"val_loss": 1.0, "val_loss_se": 0.1, "val_num_images": 9}
                np.savez(record.validation_file(budget), name=name, **losses)
                record.record_row({"images_seen": budget, "validation": name, **losses})
            record.write_status(state="finished")

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    look(sweep)  # it imports what it needs
    _content.cache_clear()
    before = bytes_read()
    assert look(sweep).counts == {"finished": 5}
    assert bytes_read() - before < 50_000 * len(runs)
    save_file(weights | {"v": np.ones(3, "f4")}, RunRecord(sweep.run_dir(runs[0].run_id)).model_file(640))
    assert look(sweep).counts == {"finished": 4, "paused": 1}, "its weights are others now"
