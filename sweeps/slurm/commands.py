"""Slurm's commands: squeue, sacct, sinfo and scontrol; accounting is used if available, and not required."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aimscale.aim.errors import printable
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError

TIMEOUT_S = 60

PENDING = (
    "PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED", "RESV_DEL_HOLD", "SUSPENDED", "STOPPED",
)  # fmt: skip
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
)  # fmt: skip


class SlurmError(SweepError):
    """Error of Slurm: it is missing, does not answer, or refuses; contains Slurm's own message."""


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """One job or array element."""

    job_id: str
    """`123` or `123_4`."""
    state: str
    """Slurm's state, e.g. PENDING, RUNNING, OUT_OF_MEMORY."""
    reason: str = ""
    """Reason why it waits, or the nodes on which it runs."""

    @property
    def phase(self) -> Literal["pending", "running", "ended"]:
        """Phase of the job; an unknown state counts as running, since Slurm still handles the job."""
        if self.state in PENDING:
            return "pending"
        return "ended" if self.state in ENDED else "running"


def command(*words: str, timeout_s: float = TIMEOUT_S, text: str = "") -> str:
    """Run one of Slurm's commands, with `text` on its standard input, and return its output."""
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except OSError as error:
        raise SlurmError(
            f"there is no Slurm here ({words[0]}: {error.strerror}); use --on local, or a login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{words[0]} did not answer within {timeout_s:.0f} s; is slurmctld up? (scontrol ping)"
        ) from error
    if done.returncode:
        raise SlurmError(f"{words[0]} failed: {shorten_error(done.stderr or done.stdout)}")
    return done.stdout


def shorten_error(message: str) -> str:
    """Shorten an error message of Slurm to one line: the fatal errors, or all lines if there are none."""
    lines = [printable(line.split("error: ", 1)[-1].strip()) for line in message.splitlines() if line.strip()]
    fatal = [line.split("fatal: ", 1)[1] for line in lines if "fatal: " in line]
    return "; ".join(dict.fromkeys(fatal or lines)) or "it gave no reason"


def jobs() -> dict[str, JobInfo]:
    """Return this user's jobs by id, array elements one by one; ended jobs are listed for MinJobAge."""
    text = command("squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "-o", "%i|%T|%R")
    jobs = {}
    for line in text.splitlines():
        job_id, _, rest = printable(line).strip().partition("|")
        state, _, reason = rest.partition("|")
        if state:  # other lines are messages of plugins
            jobs[job_id] = JobInfo(job_id=job_id, state=state, reason=reason.strip("()") if reason != "None" else "")
    return jobs


def submissions_file(sweep: Sweep) -> Path:
    """Return the path of the sweep's record of submissions; the file exists from the first submission on."""
    return sweep.directory / "slurm" / "jobs.jsonl"


def try_list_jobs() -> dict[str, JobInfo] | None:
    """Return `jobs()`, or None if Slurm is not installed or does not answer."""
    try:
        return jobs()
    except SlurmError:
        return None


def sweep_jobs(sweep: Sweep) -> dict[str, JobInfo] | None:
    """Return `jobs()`, or none without asking for a sweep of which no job was submitted; None without an answer."""
    return try_list_jobs() if submissions_file(sweep).is_file() else {}


def job_states(job_ids: Collection[str]) -> dict[str, str]:
    """Return Slurm's states of jobs, by one squeue and, for those it has forgotten, one sacct; unknown ones lack."""
    if not job_ids:
        return {}
    listed = try_list_jobs() or {}
    states = {job_id: listed[job_id].state for job_id in job_ids if job_id in listed}
    if forgotten := sorted(set(job_ids) - states.keys()):
        with contextlib.suppress(SlurmError):
            for line in command("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(forgotten)).splitlines():
                name, _, state = line.partition("|")
                if name in forgotten and state.strip():
                    states[name] = state.split()[0]  # of `CANCELLED by 0`
    return states


def excluded_nodes(job_id: str) -> list[str]:
    """Return the nodes that a job excludes."""
    listed = command("squeue", "--noheader", "--array", f"--jobs={job_id}", "-o", "%x").strip()
    return [] if listed in ("", "(null)", "N/A") else _host_names(listed)


def nodes_to_exclude(
    failed: Sequence[str], partition: str | None, num_needed: int, also: str | None = None
) -> tuple[str, ...]:
    """Return the nodes to exclude: those with failures, or none if fewer than `num_needed` others would be left.

    Args:
        also: further nodes that are excluded anyhow, as Slurm writes them.
    """
    if not failed:
        return ()
    where = [f"--partition={partition}"] if partition else []
    nodes = set(command("sinfo", "--noheader", "--Node", "-o", "%N", *where).split())
    others = nodes - {*failed, *_host_names(also or "")}
    return tuple(dict.fromkeys(failed)) if len(others) >= num_needed else ()


def max_array_size() -> int:
    """Return the maximum number of elements of a job array; 1 if Slurm accepts no arrays."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", command("scontrol", "show", "config"))
    return max(1, int(match[1])) if match else 1001  # Slurm's default


def current_job_id() -> str | None:
    """Return the id of this process's job, `123_4` for an array element."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def current_nodes() -> list[str]:
    """Return the names of the nodes of this process's job."""
    return _host_names(os.environ.get("SLURM_JOB_NODELIST", ""))


def _host_names(listed: str) -> list[str]:
    """Expand a list of hosts: one name, or names[1-2,7]."""
    return command("scontrol", "show", "hostnames", listed).split() if set("[,") & set(listed) else listed.split()
