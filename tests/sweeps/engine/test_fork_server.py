"""Runs in forks of a server: as in processes of their own, and no script of the user's is run again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import until
from trainers import rows, weights

from aimscale.harness.run.directory import EXIT_PREEMPTED, EXIT_USER_ERROR, RunDir
from aimscale.sweeps.engine import fork_server
from aimscale.sweeps.engine.fork_server import ForkedProgram, can_fork
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import load_sweep

SCRIPT = """
import sys
from pathlib import Path
from aimscale.sweeps.engine import active_run
from aimscale.sweeps.engine.launch import launch
from aimscale.sweeps.state.planned_sweep import plan_sweep

print("begun", flush=True)
if sys.argv[2] == "plain":
    active_run.can_fork = lambda *_: False
print(len(launch(plan_sweep(sys.argv[1], Path(sys.argv[2])), devices=2, report=lambda worker: None).evaluated))
"""


@pytest.fixture
def data(write_images: Any, tmp_path: Path) -> Path:
    """Pack a few images for `write_sweep`."""
    write_images(tmp_path / "data" / "train", 64, seed=0, side=20)
    write_images(tmp_path / "data" / "validation", 8, seed=1, side=20)
    return tmp_path / "data"


@pytest.mark.slow
@pytest.mark.usefixtures("data")
def test_forks_train_what_processes_of_their_own_do(write_sweep: Any, tmp_path: Path) -> None:
    source = write_sweep(budgets=[128, 256]).source
    script = tmp_path / "mine.py"  # without a guard of `__main__`
    script.write_text(SCRIPT)
    runs = {}
    for kind in ("plain", "forked"):
        words = [sys.executable, str(script), str(source), kind]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == "begun\n2\n"
        assert not done.stderr
        sweep = load_sweep(source, tmp_path / kind)
        runs[kind] = [RunDir(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    for plain, forked in zip(runs["plain"], runs["forked"], strict=True):
        assert rows(plain) == rows(forked)
        assert weights(plain, 256) == weights(forked, 256)


def test_a_fork_is_signalled_and_ends_as_a_process_of_its_own_does(
    write_sweep: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "_server_variables", None)  # tests before this one may have set others
    sweep = write_sweep(sizes=["rung-32"], budgets=[640_000])
    (run,) = plan(sweep)
    run_dir, log = RunDir(sweep.run_dir(run.run_id)), tmp_path / "log"
    run.create(run_dir.path)
    command = [sys.executable, *run.command([run_dir.path])]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert can_fork(command, variables)
    assert not can_fork(["/usr/bin/python3", *command[1:]], variables)
    for number, exit_code in ((signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGKILL, -signal.SIGKILL)):
        fork = ForkedProgram(command[1:], variables, log)
        before = run_dir.metrics.stat().st_size if run_dir.metrics.exists() else 0
        until(lambda before=before: run_dir.metrics.exists() and run_dir.metrics.stat().st_size > before)
        assert fork.poll() is None
        assert os.getsid(fork.pid) == fork.pid
        fork.send_signal(number)
        until(lambda fork=fork: fork.poll() is not None)
        assert fork.poll() == exit_code
        fork.send_signal(number)  # it is gone: nothing is signalled
    assert not can_fork(command, {**variables, "OMP_NUM_THREADS": "2"})  # of which the server knows nothing
    shutil.rmtree(data / "train")
    fork = ForkedProgram(command[1:], variables, log)
    until(lambda: fork.poll() is not None)
    assert fork.poll() == EXIT_USER_ERROR
    assert log.read_text().splitlines()[-1].startswith("aimscale: ")
