"""Placement of this process among the ranks of a run, by whatever started it: nothing, torchrun, or Slurm."""

from __future__ import annotations

import dataclasses
import os
import re

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import EXIT_CRASHED

LOOPBACK = "127.0.0.1"


class LaunchError(UserError):
    """Environment that does not say which rank of how many this is, or lacks a device that another node may have."""

    exit_code = EXIT_CRASHED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Place of this process among all processes of the run."""

    rank: int
    """0..world_size-1."""
    world_size: int
    """Number of processes, one per device."""
    local_rank: int
    """Index of the device on this host."""
    address: str
    """Host of rank 0; `LOOPBACK` if all ranks are on one."""
    port: int
    """TCP port of rank 0."""


def find_placement(environment: dict[str, str] | None = None) -> Placement:
    """Read torchrun's variables, else those of a Slurm step with several tasks, else assume a single process."""
    env = dict(os.environ) if environment is None else environment
    try:
        return _by_torchrun(env) if "RANK" in env or "WORLD_SIZE" in env else _by_slurm(env)
    except KeyError as error:
        raise LaunchError(
            f"this process is to be one of several ranks, but {error.args[0]} is not set; start with torchrun or srun, "
            "or unset RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS to run alone"
        ) from error


def _by_torchrun(env: dict[str, str]) -> Placement:
    is_local = env["WORLD_SIZE"] == env.get("LOCAL_WORLD_SIZE")
    return Placement(
        rank=int(env["RANK"]),
        world_size=int(env["WORLD_SIZE"]),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        address=LOOPBACK if is_local else env["MASTER_ADDR"],
        port=int(env["MASTER_PORT"]),
    )


def _by_slurm(env: dict[str, str]) -> Placement:
    # Only steps started by srun have this variable: a batch script itself is a single process, whatever its job has.
    num_tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks == 1:
        return Placement(rank=0, world_size=1, local_rank=0, address=LOOPBACK, port=0)
    is_local = env.get("SLURM_STEP_NUM_NODES") == "1"
    first = first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    return Placement(
        rank=int(env["SLURM_PROCID"]),
        world_size=num_tasks,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        address=LOOPBACK if is_local else env.get("MASTER_ADDR", first),
        # Every task of a job computes the same port; jobs that share a host get different ones.
        port=int(env.get("MASTER_PORT", 20000 + int(env["SLURM_JOB_ID"]) % 20000)),
    )


def first_host(node_list: str) -> str:
    """Return the first name of a Slurm host list: `r[1-2]i[0,3]n07,other` gives `r1i0n07`."""
    match = re.match(r"(?:[^\[\],]|\[[^\[\]]+\])+", node_list)
    if match is None:
        raise LaunchError(f"cannot read the node list {node_list!r}; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", match[0])


def gpu_index(placement: Placement, num_visible: int) -> int:
    """Return the index of this process's GPU: 0 if Slurm binds one to each task, else the local rank."""
    if num_visible == 1 and "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    if placement.local_rank >= num_visible:
        raise LaunchError(
            f"local rank {placement.local_rank} has no CUDA device: this host shows {num_visible}; start one process "
            "per device"
        )
    return placement.local_rank
