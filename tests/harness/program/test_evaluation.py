"""Evaluation of a program's runs by the user's commands, in a process of its own beside the training's files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.program import ProgramConfig, ProgramSection, StopSection

HEAD = "import json, os, signal, sys, time; path = sys.argv[1]; print(1, file=open(path + '.log', 'a')); "
GOOD = "json.dump({'accuracy': {'exam:top-1': 0.75}}, open(path, 'w'))"


def trained(folder: Path, **commands: str) -> RunDir:
    """Make a run that was trained at budgets of 100 and 200, and is to be evaluated by these Python commands."""
    evaluate: dict[str, Any] = {}
    for name, text in commands.items():
        for budget in (100, 200):
            words = (sys.executable, "-c", HEAD + text, str(folder / "evaluations" / str(budget) / f"{name}.json"))
            evaluate.setdefault(name, {})[budget] = words
    fields: dict[str, Any] = {"run_id": folder.name, "size": "s", "seed": 0, "directory": ".", "words": ("false",)}
    fields |= {"budgets": (100, 200), "together": True, "stop": StopSection(seconds=1), "evaluate": evaluate}
    run = RunDir.create(folder, ProgramConfig(program=ProgramSection(**fields)))
    for budget in (100, 200):
        told = [{"task": "digits", "kind": "linear", "top1": 0.5}]
        run.record_row({"images_seen": budget, "run_id": folder.name, "val_loss": 2.0, "probes": told})
    run.write_status(state="finished")
    return run


def evaluate(*runs: RunDir) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "aimscale.harness.program.evaluation", *(str(run.path) for run in runs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def num_starts(run: RunDir) -> int:
    return sum(len(path.read_text().splitlines()) for path in run.path.glob("evaluations/*/*.log"))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_command_measures_each_budget_once_beside_what_training_wrote(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", exam=GOOD, quiz=GOOD.replace("exam:top-1", "quiz:easy"))
    before = run.results.read_bytes(), run.status.read_bytes()
    for _ in range(2):
        process = evaluate(run)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert num_starts(run) == 4
    for row in run.read_rows():
        assert {(probe["task"], probe["kind"]): probe["top1"] for probe in row["probes"]} == {
            ("digits", "linear"): 0.5, ("exam", "top-1"): 0.75, ("quiz", "easy"): 0.75,
        }  # fmt: skip
        assert (row["val_loss"], row["evaluated"]) == (2.0, ["exam", "quiz"])
    assert (run.results.read_bytes(), run.status.read_bytes()) == before
    assert run.evaluation.read_status().state == "finished"


BAD = {
    "writes nothing": ("pass", "ended with exit code 0 and wrote no"),
    "crashes": ("raise ValueError('the user is wrong')", "exit code 1: ValueError: the user is wrong"),
    "tells per cent": (GOOD.replace("0.75", "75"), "give a share between 0 and 1"),
    "writes half a file": ("open(path, 'w').write('{')", "is damaged"),
    "leaves a result of before": ("os.path.exists(path) and sys.exit(3)", "wrote no"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_command_gets_a_sentence_and_keeps_no_other_run_from_being_evaluated(name: str, tmp_path: Path) -> None:
    text, sentence = BAD[name]
    bad, good = trained(tmp_path / "bad", exam=text), trained(tmp_path / "good", exam=GOOD)
    old = bad.path / "evaluations" / "100" / "exam.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"accuracy": {"exam:top-1": 0.1}}')
    process = evaluate(bad, good)
    said, _ = process.communicate(timeout=60)
    status = bad.evaluation.read_status()
    assert process.returncode == 1
    assert (status.state, bad.read_status().state) == ("failed", "finished")
    assert sentence in (status.reason or ""), (status, said)
    assert [row.get("evaluated") for row in good.read_rows()] == [["exam"]] * 2
    assert not bad.evaluation.is_held()


def test_a_stop_ends_it_and_what_was_measured_stays(tmp_path: Path) -> None:
    text = f"time.sleep(0 if '/100/' in path or os.path.exists('{tmp_path}/go') else 600); {GOOD}"
    run = trained(tmp_path / "run", exam=text)
    process = evaluate(run)
    wait_for(run.path / "evaluations" / "200" / "exam.json.log")
    assert run.evaluation.is_held()
    assert not run.is_held(), "training may go on with other budgets"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert run.evaluation.read_status().state == "preempted"
    (tmp_path / "go").touch()
    assert evaluate(run).wait() == 0
    assert num_starts(run) == 3


def test_an_orphan_keeps_the_evaluation_until_it_ends(tmp_path: Path) -> None:
    text = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(path + '.on', 'w').close(); time.sleep(600)"
    run = trained(tmp_path / "run", exam=text)
    process = evaluate(run)
    wait_for(run.path / "evaluations" / "100" / "exam.json.on")
    (child,) = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run.evaluation.is_held(), "else two processes would measure into one file"
    said, _ = evaluate(run).communicate(timeout=60)
    assert "is being executed by" in said
    child.kill()
    child.wait(60)
    assert not run.evaluation.is_held()
