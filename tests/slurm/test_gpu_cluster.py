"""A sweep for 16 nodes of 8 GPUs each on a real slurmctld: its jobs, what they reserve, and what each rank would see.

The GPUs are files like /dev/null that Slurm counts, and the interpreter of a rank is a script that records its
environment, for want of 128 GPUs. All else is as on a cluster: `launch`, sbatch, the worker on the first node, srun.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from commands import say
from slurm_cluster import running_slurm

from aimscale.harness.distributed.group import find_placement, gpu_index
from aimscale.sweeps.slurm import commands as slurm

NODES, GPUS, PATIENCE_S = 16, 8, 200
PYTHON = """#!/bin/bash
case "$*" in
*aimscale.harness.train*)
  env -0 > {seen}/$SLURM_JOB_ID-${{SLURM_PROCID:-0}}.part
  mv {seen}/$SLURM_JOB_ID-${{SLURM_PROCID:-0}}.part {seen}/$SLURM_JOB_ID-${{SLURM_PROCID:-0}}
  exec sleep 600 ;;
*) exec {python} "$@" ;;
esac
"""
"""Interpreter of jobs and ranks: the job's worker is real, a rank writes its environment and waits."""


@pytest.fixture
def gpu_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with running_slurm(28100, num_nodes=NODES, gpus_per_node=GPUS) as folder:
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        yield folder
        slurm.command("scancel", "--full", "--user=root")


def sweep_file(folder: Path, data: Path, python: Path) -> Path:
    """Write a sweep of two shapes: one run on 16 nodes and two on one."""
    base = {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": str(data / "train")}]},
        "validation": {"path": str(data / "validation")},
        "optimiser": {"batch_size": 128},
        "devices": GPUS,
    }
    values = {
        "name": "gpus",
        "recipe": "aim-paper",
        "sizes": ["rung-32", "rung-48", "rung-64"],
        "budgets": [1280],
        "base": base,
        "override": [{"when": {"size": "rung-64"}, "set": {"devices": NODES * GPUS}}],
        "cost": {"device": "H100"},
        "slurm": {
            "gpus": "h100",
            "devices_per_node": GPUS,
            "cpus_per_task": 12,
            "time_limit_min": 60,
            "python": str(python),
        },
    }
    path = folder / "gpus.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def environments(seen: Path, job_id: str) -> list[dict[str, str]]:
    """Wait until all ranks of a job have recorded their environments, and return them by rank."""
    deadline = time.time() + PATIENCE_S
    while (job := slurm.jobs()[job_id]).phase != "ended" and time.time() < deadline:
        paths = [seen / f"{job_id}-{rank}" for rank in range(NODES * GPUS)]
        if all(path.exists() for path in paths):
            return [
                dict(line.partition("=")[::2] for line in path.read_text().split("\0") if "=" in line) for path in paths
            ]
        time.sleep(0.5)
    pytest.fail(f"{len(list(seen.iterdir()))} ranks of job {job} began")


def test_a_run_of_128_gpus_gets_its_nodes_and_each_rank_its_place(
    gpu_cluster: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (seen := tmp_path / "seen").mkdir()
    (python := tmp_path / "python").write_text(PYTHON.format(seen=seen, python=sys.executable))
    python.chmod(0o755)
    sweep = sweep_file(tmp_path, data, python)
    told = say("launch", sweep, "--root", tmp_path, "--allow-dirty")
    assert "submitted 1 jobs of 16 x 8" in told
    assert "submitted 2 jobs of 1 x 8" in told

    whole, *others = sorted(slurm.jobs(), key=lambda job_id: job_id.split("_"))
    ranks = environments(seen, whole)
    details = slurm.command("scontrol", "show", "job", whole)
    assert f"NumNodes={NODES} NumCPUs={NODES * GPUS * 12} NumTasks={NODES * GPUS} CPUs/Task=12" in details
    assert "TresPerNode=gres/gpu:h100:8" in details
    assert len(others) == 2
    assert all(slurm.jobs()[each].phase == "pending" for each in others), "every GPU is taken"

    placements = [find_placement(rank) for rank in ranks]
    assert [(place.rank, place.world_size, place.local_rank) for place in placements] == [
        (rank, NODES * GPUS, rank % GPUS) for rank in range(NODES * GPUS)
    ]
    assert {(place.address, place.port) for place in placements} == {("node1", 20000 + int(whole))}
    for rank, (environment, place) in enumerate(zip(ranks, placements, strict=True)):
        assert environment["SLURMD_NODENAME"] == f"node{1 + rank // GPUS}"
        assert environment["AIMSCALE_DEVICE"] == "cuda", "a rank without a GPU must not train on the CPU"
        visible = environment["CUDA_VISIBLE_DEVICES"].split(",")
        monkeypatch.setenv("SLURM_LOCALID", environment["SLURM_LOCALID"])
        assert gpu_index(place, len(visible)) == rank % GPUS
    assert len({environment["AIMSCALE_CLAIM"] for environment in ranks}) == 1
