"""What Slurm knows and is told, through its own commands: no accounting needed, but used where there is some."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aimscale.aim.errors import printable
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError

TIMEOUT_S = 60

PENDING = (
    "PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED", "RESV_DEL_HOLD", "SUSPENDED", "STOPPED",
)  # fmt: skip
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT",
)  # fmt: skip


class SlurmError(SweepError):
    """Slurm is missing, does not answer, or refuses; in its own words where it has some."""


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """One job or array element."""

    job_id: str
    """`123` or `123_4`."""
    state: str
    """Slurm's word, e.g. PENDING, RUNNING, OUT_OF_MEMORY."""
    reason: str = ""
    """Why it waits, or where it runs."""

    @property
    def phase(self) -> Literal["pending", "running", "ended"]:
        """Whether it waits, has ended, or runs: what Slurm is still dealing with, in a state unknown here, too."""
        if self.state in PENDING:
            return "pending"
        return "ended" if self.state in ENDED else "running"


def command(*words: str, timeout_s: float = TIMEOUT_S) -> str:
    """Run one of Slurm's commands and return what it prints.

    Raises:
        SlurmError: it is not installed, fails, or does not answer.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
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
    """Slurm's complaint in one line: what was fatal alone, else all of it."""
    lines = [printable(line.split("error: ", 1)[-1].strip()) for line in message.splitlines() if line.strip()]
    fatal = [line.split("fatal: ", 1)[1] for line in lines if "fatal: " in line]
    return "; ".join(dict.fromkeys(fatal or lines)) or "it gave no reason"


def jobs() -> dict[str, JobInfo]:
    """Jobs of this user that slurmctld remembers (ended ones for MinJobAge), by id; array elements one by one."""
    text = command("squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "-o", "%i|%T|%R")
    found = {}
    for line in text.splitlines():
        job_id, _, rest = printable(line).strip().partition("|")
        state, _, reason = rest.partition("|")
        if state:  # else a plugin's remark among the jobs
            found[job_id] = JobInfo(job_id=job_id, state=state, reason=reason.strip("()") if reason != "None" else "")
    return found


def submissions_file(sweep: Sweep) -> Path:
    """Where a sweep's submissions are noted; there from the first one on."""
    return sweep.directory / "slurm" / "elements.jsonl"


def try_list_jobs() -> dict[str, JobInfo] | None:
    """`jobs`, or None where Slurm is not installed or does not answer: then nothing is known."""
    try:
        return jobs()
    except SlurmError:
        return None


def job_state(job_id: str) -> str | None:
    """Slurm's word for how a job stands or ended, from squeue, else from accounting; None where neither knows."""
    if known := (try_list_jobs() or {}).get(job_id):
        return known.state
    with contextlib.suppress(SlurmError):
        for line in command("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", job_id).splitlines():
            name, _, state = line.partition("|")
            if name == job_id and state.strip():
                return state.split()[0]  # of `CANCELLED by 0`
    return None


def nodes_to_exclude(failed: Sequence[str], partition: str | None, num_needed: int) -> tuple[str, ...]:
    """Nodes to leave out, of those on which runs failed: none where fewer than `num_needed` others would be left."""
    if not failed:
        return ()
    where = [f"--partition={partition}"] if partition else []
    nodes = set(command("sinfo", "--noheader", "--Node", "-o", "%N", *where).split())
    return tuple(dict.fromkeys(failed)) if len(nodes - set(failed)) >= num_needed else ()


def max_array_size() -> int:
    """Most elements of one array; 1 where Slurm takes no arrays."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", command("scontrol", "show", "config"))
    return max(1, int(match[1])) if match else 1001  # Slurm's default


def current_job_id() -> str | None:
    """Id of the job this process runs in, `123_4` for an array element."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def current_nodes() -> list[str]:
    """Names of the nodes of the job this process runs in."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")  # one name, or names[1-2,7]
    return command("scontrol", "show", "hostnames", listed).split() if set("[,") & set(listed) else listed.split()
