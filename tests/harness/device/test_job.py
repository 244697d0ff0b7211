"""A rank's life as a job."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir

RANK = """
import sys, time
from pathlib import Path
from aimscale.harness.device.job import execute_job
from aimscale.harness.run.directory import RunDir
def work(job):
    print("at work", flush=True)
    time.sleep(600)
execute_job(RunDir(Path(sys.argv[1])), "cpu", work)
"""
AGENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]], start_new_session=True)
"""


def test_a_rank_ends_when_torchrun_is_killed(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config())
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, RANK, str(run.path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "none"},
        start_new_session=True,
    )
    assert agent.stdout is not None
    assert agent.stdout.readline() == b"at work\n"
    agent.kill()
    assert select.select([agent.stdout], [], [], 60)[0], "the rank, which holds the pipe, lives on"
    assert agent.stdout.read() == b""
    agent.wait()
    agent.stdout.close()
    assert not run.is_held()
