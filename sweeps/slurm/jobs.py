"""Jobs that a sweep has submitted: which of them live, and which ended without having executed a run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from aimscale.aim.errors import printable
from aimscale.harness.run.files import read_file, write_text
from aimscale.harness.run.lock import Lock, is_held, read_holder
from aimscale.harness.run.timeouts import SUBMISSION_TIMEOUT_S
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError
from aimscale.sweeps.slurm.commands import JobInfo, submissions_file
from aimscale.sweeps.state.record import RUN_BEGINS, WORKER_BEGINS, write_error

_log = logging.getLogger(__name__)

JOB_BEGINS = "job begins on node"
"""First words of the line that the script of a job prints before anything else."""
WORKER_ENDS = "worker ends"
"""First words of the line that a worker prints when it ends without an error of its own."""


@dataclass(frozen=True, kw_only=True)
class JobShape:
    """Resources that a job requests."""

    nodes: int
    devices: int
    """Number of devices of each node."""


@dataclass(frozen=True, kw_only=True)
class JobArray:
    """Array of jobs, or a single job, that was submitted: a line of `jobs.jsonl`."""

    job_id: str
    number: int
    """Number of its jobs."""
    shape: JobShape
    launch: str
    """Name of the launch that submitted it."""
    script: str
    """Digest of its script."""
    request: str
    """Digest of what the sweep file requested."""
    broken: tuple[str, ...] = ()
    """Nodes that it excludes since jobs ended there before their workers began."""

    @property
    def names(self) -> list[str]:
        """Ids of its jobs."""
        return [f"{self.job_id}_{i}" for i in range(self.number)] if self.number > 1 else [self.job_id]


@dataclass(frozen=True, kw_only=True)
class LiveJob:
    """Job of the sweep that waits or runs."""

    info: JobInfo
    shape: JobShape
    is_busy: bool
    """Whether it executes a run."""
    request: str
    """Digest of its request, as in `JobArray`."""


@dataclass(frozen=True, kw_only=True)
class FailedJob:
    """Job that ended before it took a run, or with an error of its own."""

    job_id: str
    why: str
    """Last line of its log."""
    log: Path
    has_begun: bool
    """Whether its worker began; otherwise the script's first lines or the interpreter failed."""
    node: str
    """Node on which it began last; empty if it does not say."""


_ARRAY = TypeAdapter(JobArray)


def submitted_arrays(sweep: Sweep) -> list[JobArray]:
    """Return the sweep's job arrays, oldest first; jobs of lines that cannot be read are not counted."""
    arrays = []
    with contextlib.suppress(FileNotFoundError):
        for line in read_file(submissions_file(sweep)).splitlines():
            with contextlib.suppress(ValidationError, RecursionError):
                arrays.append(_ARRAY.validate_json(line))
    return arrays


def record_array(sweep: Sweep, array: JobArray) -> None:
    """Add an array to the sweep's record of submissions; the caller holds the lock of submissions."""
    arrays = [*submitted_arrays(sweep), array]
    write_text(submissions_file(sweep), "".join(f"{_ARRAY.dump_json(each).decode()}\n" for each in arrays))


@contextlib.contextmanager
def hold_submissions(sweep: Sweep) -> Iterator[None]:
    """Hold the lock of the sweep's Slurm submissions for the block.

    Raises:
        SweepError: another launch holds it for too long, or the directory cannot be written.
    """
    path = sweep.directory / "slurm" / "lock"
    lock, deadline, told = Lock(path), time.monotonic() + SUBMISSION_TIMEOUT_S, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(sweep, error) from error
    while not lock.take():
        other = read_holder(path)
        who = f"process {other.pid} on {other.host}" if other else "another process"
        if not told:
            _log.warning(told := f"waiting for {who}, which submits jobs of this sweep")
        if time.monotonic() > deadline:
            raise SweepError(
                f"{who} submits jobs of this sweep, for more than {SUBMISSION_TIMEOUT_S:.0f} s; "
                "end it, then launch again"
            )
    try:
        yield
    finally:
        lock.release()


def live_jobs(sweep: Sweep, jobs: Mapping[str, JobInfo]) -> list[LiveJob]:
    """Return the jobs of the sweep that wait or run."""
    arrays = submitted_arrays(sweep)
    is_any = any(name in jobs and jobs[name].phase != "ended" for array in arrays for name in array.names)
    claims = [path for stage in ("", "evaluation/") for path in sweep.runs_dir.glob(f"*/{stage}claim") if is_any]
    busy = {holder.facts.get("job_id") for path in claims if (holder := read_holder(path)) and is_held(path)}
    return [
        LiveJob(info=jobs[name], shape=array.shape, is_busy=name in busy, request=array.request)
        for array in arrays
        for name in array.names
        if name in jobs and jobs[name].phase != "ended"
    ]


def failed_jobs(sweep: Sweep, jobs: Mapping[str, JobInfo], *, script: str | None = None) -> list[FailedJob]:
    """Return the jobs of the last launch that failed before they took a run, or with an error of their own.

    Args:
        script: digest of a script; returns nothing unless all jobs with it in their last launch failed.
    """
    arrays = [array for array in submitted_arrays(sweep) if script in (None, array.script)]
    names = [name for array in arrays if array.launch == arrays[-1].launch for name in array.names]
    ended = [name for name in names if name not in jobs or jobs[name].phase == "ended"]
    failed_jobs = [failed for name in ended if (failed := _failed_job(sweep, name))]
    return failed_jobs if script is None or len(failed_jobs) == len(names) else []


def broken_nodes(sweep: Sweep, jobs: Mapping[str, JobInfo], request: str) -> tuple[str, ...]:
    """Return the nodes on which jobs of this request ended before their workers began, in the last launch or before: a
    node that cannot start the interpreter is free again at once, and takes one job after another."""
    arrays = [array for array in submitted_arrays(sweep) if array.request == request]
    last = [array for array in arrays if array.launch == arrays[-1].launch]
    nodes = [node for array in last for node in array.broken]
    names = {name for array in last for name in array.names}
    failed = [job for job in failed_jobs(sweep, jobs) if job.job_id in names and job.node and not job.has_begun]
    return tuple(dict.fromkeys([*nodes, *(job.node for job in failed)]))


def _failed_job(sweep: Sweep, job_id: str) -> FailedJob | None:
    log = submissions_file(sweep).with_name(f"{job_id}.out")
    try:
        text = log.read_text(errors="replace")
    except OSError:  # cancelled before it started
        return None
    _, begun, said = text.rpartition(WORKER_BEGINS)
    begins = [line for line in text.splitlines() if line.startswith(JOB_BEGINS)]
    lines = [line.strip() for line in (said if begun else text).splitlines() if line.strip() and line not in begins]
    lines = [line for line in lines if not line.endswith(": Success")]  # bash adds it where `exec` fails
    last = printable(lines[-1])[:300] if lines else "its log is empty"
    took_run = any(line.startswith(RUN_BEGINS) for line in lines)
    if begun and (last.startswith(WORKER_ENDS) or (took_run and not last.startswith("aimscale: "))):
        return None
    node = begins[-1].removeprefix(JOB_BEGINS).strip() if begins else ""
    return FailedJob(job_id=job_id, why=last.removeprefix("aimscale: "), log=log, has_begun=bool(begun), node=node)


def describe_failed_jobs(failed: Sequence[FailedJob]) -> list[str]:
    """Return one sentence for each reason for which jobs failed."""
    reasons: dict[str, list[FailedJob]] = {}
    for job in failed:
        reasons.setdefault(job.why, []).append(job)
    return [f"{reason} ({len(jobs)} jobs; see {jobs[-1].log})" for reason, jobs in reasons.items()]
