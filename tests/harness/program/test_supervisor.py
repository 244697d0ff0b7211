"""Programs good and bad, each under the real supervisor in a process of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.program import MetricsSection, ProgramConfig, ProgramSection, StopSection

HEAD = """
import json, os, signal, sys, time
path = os.path.join({folder!r}, "metrics.jsonl")
def tell(**line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\\n")
"""
GOOD = "tell(D=50, loss=3, val_loss=2.5, N=7); tell(D=100, val_loss=2.0)"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the supervisor of a program with this text."""

    def begin(text: str, **changes: Any) -> subprocess.Popen[str]:
        code = HEAD.format(folder=str(tmp_path / "run")) + textwrap.dedent(text)
        fields = {
            "run_id": "run",
            "size": "s",
            "seed": 3,
            "directory": str(tmp_path),
            "words": (sys.executable, "-c", code),
        }
        fields |= {"budgets": (100,), "together": False, "unit": "tokens", "stop": StopSection(seconds=1)}
        RunDir.create(tmp_path / "run", ProgramConfig(program=ProgramSection(**(fields | changes))))
        command = [sys.executable, "-m", "aimscale.harness.program", str(tmp_path / "run")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_program_trains_and_leaves_a_row(start: Any, tmp_path: Path) -> None:
    evaluate = {"exam": {100: (sys.executable, "-c", "raise SystemExit('an item of its own')")}}
    process = start(GOOD, evaluate=evaluate, values={"width": 2}, setup={"lr": 0.1})
    said, _ = process.communicate()
    assert process.returncode == 0, said
    run = RunDir(tmp_path / "run")
    (row,) = run.read_rows()
    assert {key: row[key] for key in ("images_seen", "params_total", "flops_train", "val_loss", "seed", "unit")} == {
        "images_seen": 100, "params_total": 7, "flops_train": 4200.0, "val_loss": 2.0, "seed": 3, "unit": "tokens",
    }  # fmt: skip
    assert row["probes"] == []
    assert row["setup"] == {"lr": 0.1}, "the values of a size are no setting that varies"
    assert [point["images_seen"] for point in run.read_curve()] == [50, 100]
    (began,) = run.read_starts()
    assert began["packages"]["numpy"], "of the program's interpreter"
    assert began["git_commit"] is None, "its folder is under no version control"
    assert run.read_status().state == "finished"
    before = run.results.read_bytes()
    assert start("raise SystemExit('trained twice')", evaluate=evaluate).wait() == 0
    assert run.results.read_bytes() != before, "a start is recorded"
    assert run.read_rows() == [row]


LEAVES = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
"""
BAD = {
    "prints nothing": ("pass", 1, "metrics.jsonl has no line with D and val_loss"),
    "NaN": ("tell(D=50, val_loss=2.0); tell(D=100, val_loss=float('nan'))", 3, "at 100 is not finite"),
    "D = 0": ("tell(D=0, val_loss=2.0)", 1, "lines without a D above 0: 1"),
    "D goes back": (f"{GOOD}; tell(D=10, val_loss=3.0)", 1, "at 10 tokens, and not within 1 % of its budget of 100"),
    "N changes": ("tell(D=1, N=3); tell(D=2, N=4); time.sleep(600)", 1, "N is 4 at D = 2 and was 3"),
    "half a line": ("open(path, 'w').write('{\"D\": 100, \"val_loss\": 1')", 1, "no line with D and val_loss"),
    "stops early": ("tell(D=90, val_loss=1.0)", 1, "not within 1 % of its budget"),
    "crashes": ("raise ValueError('the user is wrong')", 1, "exit code 1: ValueError: the user is wrong"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", 1, "usually out of memory"),
    "leaves a child": (LEAVES, 1, "behind, which was ended"),
    "no number": ("tell(D=100, val_loss='low')", 3, "is not finite"),
    "an accuracy of 75": ("tell(D=100, val_loss=2.0, accuracy={'a:b': 75})", 1, "give a share between 0 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_program_gets_a_sentence(name: str, start: Any, tmp_path: Path) -> None:
    text, code, sentence = BAD[name]
    process = start(text)
    said, _ = process.communicate(timeout=60)
    status = RunDir(tmp_path / "run").read_status()
    assert sentence in (status.reason or ""), (status, said)
    assert "Traceback" not in said.replace('Traceback (most recent call last):\n  File "<string>"', ""), said
    assert process.returncode == code
    assert not RunDir(tmp_path / "run").is_held()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\\n", ""])
def test_a_gigabyte_of_output_is_cut_and_read_to_its_end(end: str, start: Any, tmp_path: Path) -> None:
    """In lines, or in one without an end, which may not fill the memory."""
    metrics = MetricsSection(pattern=r"D=(?P<D>\d+) val=(?P<val_loss>[\d.]+)")
    text = f"[sys.stdout.write(('x' * 999 + '{end}') * 1000) for _ in range(1000)]; print('\\nD=100 val=1.5')"
    process = start(text, metrics=metrics)
    (tmp_path / "log").write_bytes(process.stdout.buffer.read(50_000_000))
    most_bytes = 0
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            most_bytes = max(most_bytes, psutil.Process(process.pid).memory_info().rss)
        time.sleep(0.02)
    with (tmp_path / "log").open("ab") as log:
        shutil.copyfileobj(process.stdout.buffer, log)
    assert process.returncode == 0
    assert 0 < most_bytes < 200_000_000
    assert 50_000_000 < (tmp_path / "log").stat().st_size < 50_001_000
    assert (tmp_path / "log").read_bytes().endswith(b"no more are kept\n")
    assert RunDir(tmp_path / "run").read_rows()[0]["val_loss"] == 1.5


def test_a_program_that_prints_nothing_is_told_as_such_while_it_goes_on(start: Any, tmp_path: Path) -> None:
    run, process = RunDir(tmp_path / "run"), start("time.sleep(600)")
    deadline = time.monotonic() + 60
    while run.read_status().phase != "no line yet":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert (process.returncode, run.read_status().state, run.read_rows()) == (75, "preempted", [])


STOPPED = {
    "saves": ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))", "saved when it was asked to"),
    "ends with success": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))",
        "ended with exit code 0 when it was asked to; it goes on from its last checkpoint",
    ),
    "dies": ("pass", "ended by SIGTERM; it goes on from its last checkpoint"),
    "does not listen": (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "did not end within 1 s of SIGTERM and was killed",
    ),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_stop_is_passed_on_and_told_as_it_was_taken(name: str, start: Any, tmp_path: Path) -> None:
    how, sentence = STOPPED[name]
    process = start(f"{how}; tell(D=50, val_loss=2.0); time.sleep(600)")
    wait_for(tmp_path / "run" / "curve.jsonl")
    process.terminate()
    process.communicate(timeout=60)
    status = RunDir(tmp_path / "run").read_status()
    assert process.returncode == 75
    assert (status.state, status.images_done) == ("preempted", 50)
    assert sentence in (status.reason or "")
    resumed = start("tell(D=100, val_loss=1.0)", resume_if_exists="metrics.jsonl", resume_words=("--resume",))
    said, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 0
    assert "--resume (in " in said, "the command is in the log"


def test_an_orphan_keeps_its_run_and_is_asked_to_end(start: Any, tmp_path: Path) -> None:
    text = "signal.signal(signal.SIGTERM, lambda *_: open('asked', 'w').close()); tell(D=50, val_loss=2.0); pause()"
    process = start(f"def pause():\n    while not os.path.exists('go'): time.sleep(0.05)\n{text}")
    wait_for(tmp_path / "run" / "curve.jsonl")
    run = RunDir(tmp_path / "run")
    (child,) = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(tmp_path / "asked")
    assert child.is_running()
    assert run.is_held(), "else a second attempt would write into the same folder"
    second = start(GOOD)
    said, _ = second.communicate(timeout=60)
    assert "is being executed by" in said
    (tmp_path / "go").touch()
    child.wait(60)
    assert not run.is_held()
    assert start(GOOD).wait() == 0
    assert len(run.read_rows()) == 1


def test_the_supervisor_starts_without_torch_and_pandas() -> None:
    code = "import sys, aimscale.harness.program.supervisor; print({'torch', 'pandas', 'scipy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
