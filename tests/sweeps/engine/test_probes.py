"""Probes of a sweep's finished budgets as jobs: what is decided, and the local queue with the real prober."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.aim.weights import write_weights
from aimscale.analysis.published.comparison import compare
from aimscale.analysis.table.read import probe_frame, read_table, read_tables
from aimscale.harness.probe.files import is_probed
from aimscale.harness.probe.job import ProbeRequest, probe_job
from aimscale.harness.probe.run import probe_baseline, probe_run
from aimscale.harness.run.config import ProbeSection
from aimscale.harness.run.directory import EXIT_FINISHED, RunDir
from aimscale.harness.run.files import write_json
from aimscale.harness.run.row import model_of
from aimscale.sweeps.cli.main import verb
from aimscale.sweeps.engine.probes import missing, probing_jobs, run_at, runs_of_sweep, sweep_of_run
from aimscale.sweeps.engine.stop import cancel, retry
from aimscale.sweeps.engine.worker import work
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm.submit import launch_slurm
from aimscale.sweeps.state.claims import own_claim
from aimscale.sweeps.state.probe_record import ProbeRecord
from aimscale.sweeps.state.retries import conclude
from aimscale.sweeps.state.sweep_dir import prepare
from aimscale.sweeps.table.collection import collect

NOTHING_QUEUED = lambda claim: False  # noqa: E731


@pytest.fixture
def trained(write_sweep: Any, write_images: Any, tmp_path: Path) -> Callable[..., tuple[Sweep, list[Run]]]:
    """A sweep whose runs have finished budgets (of random weights) with rows without probes."""
    for name, number in (("train", 24), ("test", 12)):
        write_images(tmp_path / "data" / name, number, seed=number, classes=("red", "blue"))

    def make(**task: Any) -> tuple[Sweep, list[Run]]:
        own = {"task": "colour", "train": "data/train", "test": "data/test", "kinds": ["knn"], **task}
        sweep = write_sweep(
            sizes=["w16-d2"],
            budgets=[64, 128],
            seeds=[0, 1],
            base={
                "model": {"image_size": 16, "patch_size": 4},
                "data": {"sources": [{"path": "data/train"}]},
                "optimiser": {"batch_size": 64},
                "schedule": {"warmup_images": 0},
                "validation": {"path": "data/test"},
                "probes": [own],
            },
        )
        runs = plan(sweep)
        for run in runs:
            record = RunDir.create(sweep.run_dir(run.run_id), run.config)
            record.write_status(state="finished")
            for budget in run.budgets:
                torch.manual_seed(budget)
                write_weights(AIM(model_of(run.config.training)).state_dict(), record.model_file(budget))
                write_json(
                    record.budget_dir(budget) / "model.json",
                    {"images_seen": budget, "progress": {"images_done": budget}},
                )
                record.record_row(
                    {"run_id": run.run_id, "images_seen": budget, "val_loss": 0.5, "finished_at": 1.0, "probes": []}
                )
        return sweep, runs

    return make


def work_on(sweep: Sweep, runs: list[Run], **changes: Any) -> Any:
    requests = {run.run_id: ProbeRequest(tasks=run.config.evaluation.probes, **changes) for run in runs}
    return probing_jobs(sweep, {run.run_id: sweep.run_dir(run.run_id) for run in runs}, requests)


def verdicts(work: Any, runs: list[Run]) -> list[str]:
    return [work.decide(run, work.record(run), NOTHING_QUEUED).verdict for run in runs]


def test_a_job_needs_the_run_directory_alone_and_its_results_reach_the_table(trained: Any, monkeypatch: Any) -> None:
    sweep, runs = trained()
    work = work_on(sweep, runs)
    assert verdicts(work, runs) == ["start", "start"]
    for run in runs:
        record = work.record(run)
        work.claim(record, run, own_claim("local", 1))
        assert probe_job(record.path) == EXIT_FINISHED
        assert record.checked_status().state == "finished"
        record.drop_claim()
    assert verdicts(work, runs) == ["finished", "finished"]
    found = collect(sweep, runs, cost_cards(sweep, runs))
    probes = probe_frame(read_table(found.table))
    assert sorted(zip(probes["run_id"], probes["images_seen"], strict=True)) == sorted(
        (run.run_id, budget) for run in runs for budget in run.budgets
    )
    assert set(probes["n"]) == {12}
    # training's own state is untouched
    assert {RunDir(sweep.run_dir(run.run_id)).read_status().state for run in runs} == {"finished"}


def test_what_is_done_from_other_weights_or_before_again_is_missing(trained: Any) -> None:
    sweep, (run, _) = trained()
    directory = RunDir(sweep.run_dir(run.run_id))
    list(probe_run(directory.path))
    request = ProbeRequest(tasks=run.config.evaluation.probes)
    assert missing(directory, run.config, request) == []
    again = request.model_copy(update={"since": time.time() + 1})
    assert [budget for budget, _ in missing(directory, run.config, again)] == [64, 128]
    other = ProbeSection.model_validate(request.tasks[0].model_dump() | {"epochs": 3})
    assert len(missing(directory, run.config, request.model_copy(update={"tasks": (*request.tasks, other)}))) == 2
    retrained = AIM(model_of(run.config.training))
    retrained.init_weights(1)
    write_weights(retrained.state_dict(), directory.model_file(64))
    assert [budget for budget, _ in missing(directory, run.config, request)] == [64]
    assert missing(directory, run.config, request.model_copy(update={"images_seen": 128})) == []


def test_evaluations_with_other_settings_or_data_both_stay_and_the_table_keeps_them_apart(
    trained: Any, write_images: Any, tmp_path: Path
) -> None:
    sweep, runs = trained()
    path = sweep.run_dir(runs[0].run_id)
    own = runs[0].config.evaluation.probes[0]
    (first, second) = [entries for _, entries in probe_run(path)]
    kept = {file: file.read_bytes() for file in path.glob("probes/*/*.json")}
    more = own.model_copy(update={"holdout_fraction": 0.4})
    write_images(tmp_path / "data" / "other", 16, seed=5, classes=("red", "blue"))
    others = [more, own.model_copy(update={"test": str(tmp_path / "data" / "other")})]
    names = [entries[0]["evaluation"] for _, entries in probe_run(path, sections=others)]
    assert len({first[0]["evaluation"], *names}) == 3
    assert {file: file.read_bytes() for file in kept} == kept
    rows = RunDir(path).read_rows()
    assert [row["probes"][0] for row in rows] == [first[0], second[0]]
    assert [len(row["probes"]) for row in rows] == [3, 3]
    assert is_probed(RunDir(path), runs[0].config, 64, own)  # and going back to either measures nothing
    assert is_probed(RunDir(path), runs[0].config, 64, more)
    probes = probe_frame(read_table(collect(sweep, runs, cost_cards(sweep, runs)).table))
    assert set(probes["task"]) == {"colour", *(f"colour@{name}" for name in names)}
    assert list(probes.loc[probes["task"] == "colour", "evaluation"]) == [first[0]["evaluation"]] * 2


def test_a_row_written_after_its_probes_gets_them_when_the_sweep_is_looked_at(trained: Any) -> None:
    sweep, (run, _) = trained()
    directory = RunDir(sweep.run_dir(run.run_id))
    rows = directory.read_rows()
    directory.results.unlink()
    list(probe_run(directory.path))
    directory.record_row(rows[0])
    assert verdicts(work_on(sweep, [run]), [run]) == ["finished"]
    assert [entry["task"] for entry in directory.read_rows()[0]["probes"]] == ["colour"]


def test_baselines_reach_a_table_of_their_own_and_the_comparison(trained: Any) -> None:
    sweep, runs = trained()
    for run in runs:
        list(probe_run(sweep.run_dir(run.run_id)))
    first = RunDir(sweep.run_dir(runs[0].run_id))
    (entries,) = [found for _, found in probe_baseline("raw-pixels", first, runs[0].config.evaluation.probes)]
    found = collect(sweep, runs, cost_cards(sweep, runs))
    assert (found.num_rows, found.num_complete, found.num_baselines) == (4, 4, 1)
    frame = read_tables([found.table])
    assert len(frame) == 4  # no law meets a baseline
    beside = compare(frame, resamples=20).baselines
    assert list(beside["baseline"]) == ["raw-pixels"] * 2
    assert list(beside["images_seen"]) == [128] * 2
    assert list(beside["baseline_top1"]) == [entries[0]["top1"]] * 2
    assert "raw-pixels" in compare(frame, resamples=20).summary()
    next((first.path / "baselines" / "raw-pixels").glob("*.json")).write_text("{")
    again = collect(sweep, runs, cost_cards(sweep, runs))
    assert again.num_baselines == 0
    assert "probe it again" in next(iter(again.damaged.values()))
    assert not (sweep.directory / "baselines.parquet").exists()


def test_running_queued_and_failed_jobs_are_left_alone_until_cleared(trained: Any) -> None:
    sweep, (run, other) = trained()
    work = work_on(sweep, [run, other])
    record = work.record(run)
    work.claim(record, run, own_claim("slurm", 1, "12"))
    assert work.decide(run, record, lambda claim: claim.job_id == "12").verdict == "queued"
    record.drop_claim()
    with record.hold():
        assert verdicts(work, [run, other]) == ["running", "start"]
        with pytest.raises(UserError, match="is being executed by process"):
            probe_job(record.path)
    for attempt in (1, 2):
        assert conclude(record, attempt, 1, "here") == ("again" if attempt == 1 else "stop")
    assert verdicts(work, [run]) == ["failed"]
    # another question starts with a clean slate
    changed = ProbeSection.model_validate(run.config.evaluation.probes[0].model_dump() | {"epochs": 3})
    requests = {run.run_id: ProbeRequest(tasks=(changed,))}
    asked = probing_jobs(sweep, {run.run_id: sweep.run_dir(run.run_id)}, requests)
    assert verdicts(asked, [run]) == ["start"]
    assert retry(sweep, [run.run_id]) == ([f"probes of {run.run_id}"], [])
    assert verdicts(work, [run]) == ["start"]


def test_a_broken_task_fails_with_its_sentence(trained: Any, tmp_path: Path) -> None:
    sweep, (run, _) = trained()
    work = work_on(sweep, [run])
    record = work.record(run)
    work.claim(record, run, own_claim("local", 1))
    shard = next((tmp_path / "data" / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError):
        probe_job(record.path)
    status = record.checked_status()
    assert (status.state, status.reason_class) == ("failed", "data")
    assert "\n" not in str(status.reason)


def test_progress_of_a_job_is_finished_tasks_and_saved_epochs(trained: Any) -> None:
    sweep, (run, _) = trained()
    record = ProbeRecord.of(sweep.run_dir(run.run_id))
    num_files, last = record.saved_progress()  # the budget's weights and validation losses
    assert last == 0
    folder = record.run.probes_dir(64)
    folder.mkdir(parents=True)
    (folder / "colour.lora-0.partial.pt").touch()
    assert record.saved_progress()[1] > 0
    (folder / "colour.json").touch()
    assert record.saved_progress()[0] == num_files + 1
    prepare(sweep)
    assert record.home == sweep.directory


def test_a_worker_evaluates_what_is_trained_and_not_evaluated(trained: Any, capsys: Any) -> None:
    sweep, runs = trained()
    did = work(sweep, devices=2, check=lambda runs: None)
    assert (did.why, did.trained, sorted(did.evaluated)) == ("nothing is left", (), sorted(run.run_id for run in runs))
    for run in runs:
        assert [len(row["probes"]) for row in RunDir(sweep.run_dir(run.run_id)).read_rows()] == [1, 1]
    assert "finished" in capsys.readouterr().out


def test_runs_without_a_sweep_have_a_home_of_their_own(trained: Any, tmp_path: Path) -> None:
    sweep, (run, _) = trained()
    alone = tmp_path / "elsewhere" / "alone"
    alone.parent.mkdir()
    sweep.run_dir(run.run_id).rename(alone)
    made_up, one = sweep_of_run(alone)
    assert (made_up.directory, one.run_id) == (alone, "alone")
    assert ProbeRecord.of(alone).home == alone
    assert run_at(alone).config == run.config
    odd = alone.rename(alone.with_name("a run"))
    with pytest.raises(UserError, match="rename it"):
        sweep_of_run(odd)


def test_imported_runs_belong_to_the_sweep_and_strangers_do_not(trained: Any) -> None:
    sweep, runs = trained()
    for name, provenance in (("imported-600M", {"starts": [{"imported": {}}]}), ("of-an-older-file", {"starts": []})):
        path = RunDir.create(sweep.run_dir(name), runs[0].config).path
        (path / "provenance.json").write_text(json.dumps(provenance))
    assert [run.run_id for run in runs_of_sweep(sweep)] == [*(run.run_id for run in runs), "imported-600M"]
    assert [run.run_id for run in runs_of_sweep(sweep, ["600M"])] == ["imported-600M"]
    with pytest.raises(UserError, match="has 'nothing' in its id"):
        runs_of_sweep(sweep, ["nothing"])


def test_without_slurm_nothing_is_claimed(trained: Any, monkeypatch: Any, tmp_path: Path) -> None:
    sweep, runs = trained()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no Slurm here"):
        launch_slurm(sweep, runs, kind=work_on(sweep, runs))
    assert not ProbeRecord.of(sweep.run_dir(runs[0].run_id)).path.exists()


def invoke(*words: str) -> Any:
    return CliRunner().invoke(verb("probe"), list(words), catch_exceptions=False)


def test_a_dry_run_says_what_is_missing_and_writes_nothing(trained: Any) -> None:
    sweep, runs = trained()
    shown = invoke(str(sweep.source), "--root", str(sweep.root), "--dry-run", "--run", runs[0].run_id).output
    assert shown == f"start: {runs[0].run_id} 2 tasks to probe\n"
    assert not ProbeRecord.of(sweep.run_dir(runs[0].run_id)).path.exists()
    with pytest.raises(UserError, match="add --on local or --on slurm"):
        invoke(str(sweep.run_dir(runs[0].run_id)), "--dry-run")
    with pytest.raises(UserError, match="aimscale baseline"):
        invoke("raw-pixels")
    with pytest.raises(UserError, match="no sweep 'nowhere'"):
        invoke("nowhere", "--root", str(sweep.root))


@pytest.mark.slow
def test_two_queues_at_once_probe_everything_once(trained: Any) -> None:
    sweep, runs = trained()
    command = [sys.executable, "-m", "aimscale", "probe", str(sweep.source), "--root", str(sweep.root), "--slots", "2"]
    queues = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [queue.communicate(timeout=200)[0] for queue in queues]
    assert [queue.returncode for queue in queues] == [0, 0], outputs
    assert sum(output.count("started ") for output in outputs) == 2, outputs
    for run in runs:
        assert [len(row["probes"]) for row in RunDir(sweep.run_dir(run.run_id)).read_rows()] == [1, 1]
    killed_at_the_end = ProbeRecord.of(sweep.run_dir(runs[0].run_id))
    killed_at_the_end.write_status(state="failed", reason="killed by the system", reason_class="oom")
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert killed_at_the_end.checked_status().state == "finished"
    assert again == "left alone: 2 finished\n0 runs probed now, 0 failed\n"


@pytest.mark.slow
def test_two_ranks_of_a_job_get_the_numbers_of_one(trained: Any) -> None:
    sweep, (run, _) = trained(kinds=["linear"], epochs=4)
    alone = [entry for _, entries in probe_run(sweep.run_dir(run.run_id)) for entry in entries]
    command = [sys.executable, "-m", "aimscale", "probe", str(sweep.run_dir(run.run_id)), "--on", "local"]
    done = subprocess.run([*command, "--devices", "2", "--slots", "2", "--again"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = RunDir(sweep.run_dir(run.run_id)).read_rows()
    together = [entry for row in rows for entry in row["probes"]]
    assert [entry["top1"] for entry in together] == pytest.approx([entry["top1"] for entry in alone], abs=0.1)
    document = json.loads(next(RunDir(sweep.run_dir(run.run_id)).probes_dir(64).glob("colour-*.json")).read_text())
    assert document["world_size"] == 2


@pytest.mark.slow
def test_a_queue_told_to_stop_keeps_what_is_done(trained: Any) -> None:
    sweep, (run, _) = trained(kinds=["lora"], epochs=400, lrs=[1e-3])
    path = sweep.run_dir(run.run_id)
    slowly = f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parents[2] / 'slow_evaluations'}"
    command = [sys.executable, "-m", "aimscale", "probe", str(path), "--on", "local"]
    queue = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": slowly})
    record = ProbeRecord.of(path)
    deadline = time.time() + 200
    while record.saved_progress()[1] == 0 and time.time() < deadline:
        time.sleep(0.1)
    os.kill(queue.pid, signal.SIGINT)
    assert queue.wait(timeout=200) == 130
    assert record.checked_status().state == "preempted"
    assert not record.is_held()
    assert record.saved_progress()[1] > 0
    assert cancel(sweep, [run.run_id]) == ([], [])
