"""Workers that a person starts in an allocation, and workers behind the command of a container."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def test_workers_that_srun_starts_on_two_nodes_share_a_sweep_and_no_run_is_a_rank_of_two(
    fault: Any, undisturbed: Any
) -> None:
    case = fault(seeds=[0, 1])
    words = [sys.executable, "-m", "aimscale", "work", str(case.sweep.source), "--root", str(case.sweep.root)]
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--label"]
    said = subprocess.run([*step, *words, "--devices", "1"], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.count("nothing is left") == 2
    assert said.stdout.count(": started ") == said.stdout.count(": finished ") == 2, said.stdout
    assert [row["world_size"] for record in case.records for row in record.read_rows()] == [1] * 4
    assert case.losses() == undisturbed


def test_the_interpreter_may_be_a_command_that_enters_a_container(fault: Any, undisturbed: Any) -> None:
    """As `apptainer exec` does: into a mount namespace of its own, then it becomes the interpreter."""
    case = fault(slurm={"python": f"unshare --mount {sys.executable}", "srun": ["--export=ALL"]})
    case.launch()
    case.wait_trained()
    claim = case.records[0].read_claim()
    subprocess.run(["scontrol", "requeue", str(claim.job_id)], check=True)
    case.wait_state("finished")
    case.wait_empty_queue()
    assert case.records[0].checked_status().attempt == 2
    assert case.losses() == {run_id: undisturbed[run_id] for run_id in case.losses()}
