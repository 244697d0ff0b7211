"""Ranks on one node: how they start and end, what a signal does, and what is written about one that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import until

from aimscale.harness.distributed import ranks as ranks_module
from aimscale.harness.distributed.ranks import FAILED_RANK, run_ranks
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EXIT_CRASHED, EXIT_DIVERGED, EXIT_FINISHED, EXIT_PREEMPTED, RunDir

RANKS = [sys.executable, "-m", "aimscale.harness.distributed.ranks"]
KILL, ABORT = 128 + signal.SIGKILL, 128 + signal.SIGABRT


@pytest.mark.parametrize(
    ("program", "exit_code", "failure"),
    [
        ("pass", EXIT_FINISHED, None),
        ("assert os.environ['WORLD_SIZE'] == os.environ['LOCAL_WORLD_SIZE'] == '3'", EXIT_FINISHED, None),
        ("rank == 1 and os.abort(); time.sleep(600)", ABORT, (1, -signal.SIGABRT)),
        ("rank == 2 and os.kill(os.getpid(), 9); time.sleep(600)", KILL, (2, -signal.SIGKILL)),
        ("rank == 1 and sys.exit(1); signal.signal(15, signal.SIG_IGN); time.sleep(600)", EXIT_CRASHED, (1, 1)),
        # all ranks end so, and one may have more to write
        ("rank and sys.exit(75); time.sleep(3); mark(); sys.exit(75)", EXIT_PREEMPTED, None),
        ("rank and sys.exit(3); time.sleep(3); mark(); sys.exit(3)", EXIT_DIVERGED, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_rank_to_fail_ends_all_and_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, exit_code: int, failure: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(ranks_module, "EXIT_TIMEOUT_S", 1.0)
    monkeypatch.setenv(FAILED_RANK, str(tmp_path / "failed"))
    head = f"import os, pathlib, signal, sys, time; mark = pathlib.Path({str(tmp_path / 'mark')!r}).touch\n"
    head += "rank = int(os.environ['RANK'])\n"
    assert run_ranks(3, ["-c", head + program]) == exit_code
    assert (tmp_path / "mark").exists() == ("mark" in program)
    if failure is not None:
        found = json.loads((tmp_path / "failed").read_text())
        assert (found["rank"], found["exit_code"], *sorted(found)) == (*failure, "exit_code", "rank", "time")


RANK = """
import sys, time
from pathlib import Path
from aimscale.harness.distributed.job import execute_job
from aimscale.harness.run.directory import RunDir
def work(job):
    print("at work", flush=True)
    time.sleep(600)
execute_job(RunDir(Path(sys.argv[1])), "cpu", work)
"""


def test_ranks_end_when_the_process_that_started_them_is_killed(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config())
    parent = subprocess.Popen([*RANKS, "2", "-c", RANK, str(run.path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"at work\n"
    parent.kill()
    parent.wait()
    assert parent.stdout.read() in (b"", b"at work\n"), "to its end: the ranks hold the pipe"
    parent.stdout.close()
    until(lambda: not run.is_held())


def test_signals_that_stop_a_run_reach_every_rank(tmp_path: Path) -> None:
    program = "import signal, sys; handle = lambda number, _: sys.exit(100 + number)\n"
    program += "for number in (10, 12, 15): signal.signal(number, handle)\n"
    program += "sys.stdout.write('ready\\n'); sys.stdout.flush(); signal.pause()"  # in one write: ranks share the pipe
    for number in (signal.SIGUSR2, signal.SIGTERM):
        parent = subprocess.Popen([*RANKS, "2", "-c", program], stdout=subprocess.PIPE)
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        parent.send_signal(number)
        assert parent.wait() == 100 + number
        parent.stdout.close()


@pytest.mark.slow
def test_two_ranks_start_save_on_a_signal_and_go_on(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The bounds of all that trains rest on this test: the weekly job runs it with the lowest versions."""
    sizes = {"checkpoint_every_images": None, "num_workers": 0, "log_every_steps": 1}
    run = RunDir.create(tmp_path / "run", tiny_config(sizes, budgets=[800]))
    command = [*RANKS, "2", "-m", "aimscale.harness.train", str(run.path)]
    parent = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while parent.poll() is None and run.read_status().images_done == 0:
        time.sleep(0.1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait() == EXIT_PREEMPTED
    status = run.read_status()
    assert (status.state, status.reason_class) == ("preempted", None)
    (saved,) = run.checkpoints.iterdir()
    assert 0 < int(saved.name) < 800
    again = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (again.returncode, run.read_status().state) == (EXIT_FINISHED, "finished")
    assert len(run.read_starts()) == 2
