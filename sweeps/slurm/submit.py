"""Submit Slurm jobs through submitit: one job array per shape (nodes x devices).

A job is a worker (`sweeps.engine.slurm_worker`) and is tied to no run. A launch therefore submits one job for each run
that can start, less the jobs that already wait or run without one.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from aimscale.harness.run.lock import Lock, is_held, read_holder
from aimscale.harness.run.provenance import Snapshot, find_snapshot, make_snapshot
from aimscale.sweeps.plan.costs import grace_period_s
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SlurmSection, Sweep, SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.record import RunRecord


@dataclass(frozen=True, kw_only=True)
class JobShape:
    """Resources that a job requests."""

    nodes: int
    devices: int
    """Number of devices of each node."""


@dataclass(frozen=True, kw_only=True)
class LiveJob:
    """Job of the sweep that waits or runs."""

    info: slurm.JobInfo
    shape: JobShape
    is_busy: bool
    """Whether it executes a run."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Job array that was submitted, or that a dry run would submit."""

    shape: JobShape
    num_jobs: int
    """Number of its jobs."""
    num_runs: int
    """Number of pending runs of this shape."""
    excluded: tuple[str, ...]
    """Nodes that are excluded since runs of this shape failed on them."""
    script: str
    job_id: str | None
    """Slurm's job id; null in a dry run."""


def job_shape(run: Run, section: SlurmSection) -> JobShape:
    """Return the shape of the job that a run needs.

    Raises:
        SweepError: its devices do not fill whole nodes.
    """
    devices = min(run.devices, section.devices_per_node)
    if run.devices % devices:
        raise SweepError(
            f"{run.run_id} wants {run.devices} devices, which do not fill nodes of {devices} evenly; change devices "
            f"or slurm.devices_per_node"
        )
    return JobShape(nodes=run.devices // devices, devices=devices)


def live_jobs(sweep: Sweep, known: dict[str, slurm.JobInfo]) -> list[LiveJob]:
    """Return the jobs of the sweep that wait or run."""
    try:
        lines = [json.loads(line) for line in slurm.submissions_file(sweep).read_text().splitlines()]
    except FileNotFoundError:
        return []
    claims = sweep.runs_dir.glob("*/claim")
    busy = {holder.facts.get("job_id") for path in claims if (holder := read_holder(path)) and is_held(path)}
    found = []
    for line in lines:
        names = [f"{line['job_id']}_{i}" for i in range(line["number"])] if line["number"] > 1 else [line["job_id"]]
        jobs = [known[name] for name in names if name in known]
        shape = JobShape(nodes=line["shape"]["nodes"], devices=line["shape"]["devices"])
        found += [LiveJob(info=job, shape=shape, is_busy=job.job_id in busy) for job in jobs if job.phase != "ended"]
    return found


def submit(
    sweep: Sweep,
    list_runs: Callable[[], Sequence[Run]],
    make_job: Callable[[JobShape], Callable[[], Any]],
    *,
    allow_dirty: bool = False,
    dry_run: bool = False,
) -> list[Submission]:
    """Submit the jobs that are missing and return at once; a dry run asks Slurm nothing and writes nothing.

    Args:
        list_runs: returns the runs to start; called while no other launch submits.
        make_job: makes the callable that a job of this shape executes.

    Raises:
        SweepError, SlurmError: there is no Slurm, the source tree has uncommitted changes, or Slurm refuses a job.
    """
    if set(str(sweep.directory)) & set("%\\"):
        raise SweepError(f"Slurm would read '%' and '\\' in {sweep.directory} as patterns; choose another --root")
    snapshot = find_snapshot(sweep.directory, allow_dirty=allow_dirty)
    batch = _Batch(sweep=sweep, snapshot=snapshot, make_job=make_job, dry_run=dry_run)
    if dry_run:
        return batch.submit(list_runs())
    lock = Lock(batch.folder / "lock")
    while lock.take() is None:
        time.sleep(0.2)  # another launch submits
    try:
        batch.live = live_jobs(sweep, slurm.jobs())
        if snapshot:
            make_snapshot(snapshot)
        return batch.submit(list_runs())
    finally:
        lock.release()


def distribute_jobs(free: int, num_wanted: Sequence[int]) -> list[int]:
    """Distribute `free` jobs over arrays that want so many each, one job at a time in turn."""
    granted = [0] * len(num_wanted)
    while free > 0 and (short := [i for i, num in enumerate(num_wanted) if granted[i] < num][:free]):
        for i in short:
            granted[i] += 1
        free -= len(short)
    return granted


@dataclass(kw_only=True)
class _Batch:
    """Job arrays of one launch."""

    sweep: Sweep
    snapshot: Snapshot | None
    make_job: Callable[[JobShape], Callable[[], Any]]
    dry_run: bool
    live: Sequence[LiveJob] = ()
    """Jobs of the sweep that wait or run."""

    @property
    def section(self) -> SlurmSection:
        """Section `slurm` of the sweep file."""
        return self.sweep.file.slurm

    @property
    def folder(self) -> Path:
        """Folder of scripts, logs, and the record of submissions."""
        return self.sweep.directory / "slurm"

    def submit(self, runs: Sequence[Run]) -> list[Submission]:
        """Submit one array per shape, within `max_parallel` jobs.

        A shape for which no job is left gets one that waits for the end of the others.
        """
        by_shape: dict[JobShape, list[Run]] = {}
        for run in runs:
            by_shape.setdefault(job_shape(run, self.section), []).append(run)
        num_wanted = [self._jobs_needed(shape, shape_runs) for shape, shape_runs in by_shape.items()]
        numbers = distribute_jobs(self.section.max_parallel - len(self.live), num_wanted)
        submitted: list[Submission] = []
        earlier = list(dict.fromkeys(each.info.job_id.split("_")[0] for each in self.live))
        for (shape, shape_runs), want, num_jobs in zip(by_shape.items(), num_wanted, numbers, strict=True):
            if num_jobs:
                new = self._submit_arrays(shape, shape_runs, num_jobs, [])
            elif want and all(each.shape != shape for each in self.live):
                new = self._submit_arrays(shape, shape_runs, 1, earlier)
            else:
                continue
            submitted += new
            earlier += [each.job_id or "EARLIER_ARRAY" for each in new]
        return submitted

    def _jobs_needed(self, shape: JobShape, runs: Sequence[Run]) -> int:
        """Return the number of jobs that these runs need beyond the idle jobs of their shape."""
        idle = sum(each.shape == shape and not each.is_busy for each in self.live)
        return max(0, len(runs) - idle)

    def _submit_arrays(
        self, shape: JobShape, runs: Sequence[Run], num_jobs: int, after_jobs: Sequence[str]
    ) -> list[Submission]:
        """Submit the jobs as one array, or as several if Slurm limits their length; record each at once."""
        failed = [node for run in runs for node in RunRecord(self.sweep.run_dir(run.run_id)).failed_nodes()]
        longest, excluded = num_jobs, tuple(dict.fromkeys(failed))
        if not self.dry_run:
            longest = slurm.max_array_size()
            excluded = slurm.nodes_to_exclude(excluded, self.section.partition, shape.nodes)
        fields = self._sbatch_parameters(shape, runs, excluded, after_jobs)
        done = []
        for first in range(0, num_jobs, longest):
            size = min(longest, num_jobs - first)
            fields["array_parallelism"] = size
            done.append(
                Submission(
                    shape=shape,
                    num_jobs=size,
                    num_runs=len(runs),
                    excluded=excluded,
                    script=self._script(fields, size),
                    job_id=None if self.dry_run else self._submit(fields, shape, size),
                )
            )
        return done

    def _sbatch_parameters(
        self, shape: JobShape, runs: Sequence[Run], excluded: Sequence[str], after_jobs: Sequence[str]
    ) -> dict[str, Any]:
        """Return submitit's parameters for an array."""
        section = self.section
        delay_s = max(grace_period_s(run) for run in runs)
        # The batch script becomes the worker. Slurm signals it alone (B:), and it signals its runs.
        options = {"requeue": True, "signal": f"B:USR2@{delay_s}", **section.extra}
        if after_jobs:
            own = [section.extra["dependency"]] if "dependency" in section.extra else []
            options |= {
                "dependency": ",".join([*own, ":".join(["afterany", *after_jobs])]),
                "kill-on-invalid-dep": "yes",
            }
        fields: dict[str, Any] = {
            "job_name": f"aimscale-{self.sweep.name}",
            "partition": section.partition,
            "time": section.time_min,
            "nodes": shape.nodes,
            "ntasks_per_node": shape.devices,
            "cpus_per_task": section.cpus_per_task,
            "gpus_per_node": section.gpu_request(shape.devices),
            "exclude": ",".join(excluded) or None,
            "use_srun": False,
            "stderr_to_stdout": True,
            "setup": [*_environment(self.snapshot), *section.setup],
            "additional_parameters": options,
        }
        return {key: value for key, value in fields.items() if value is not None}

    @property
    def _python(self) -> str:
        return f"exec {self.section.python or shlex.quote(sys.executable)}"

    def _script(self, fields: dict[str, Any], size: int) -> str:
        """Return the sbatch script as submitit writes it."""
        words = f"{self._python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        return _make_sbatch_string(words, self.folder, map_count=size if size > 1 else None, **fields)

    def _submit(self, fields: dict[str, Any], shape: JobShape, size: int) -> str:
        try:
            # Retries are bounded by progress (sweeps.state.attempts), not by submitit's count of timeouts.
            executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=1_000_000, python=self._python)
            executor.update_parameters(**fields)
            with executor.batch():
                jobs = [executor.submit(self.make_job(shape)) for _ in range(size)]
        except (FailedJobError, FailedSubmissionError) as error:
            raise slurm.SlurmError(f"Slurm refused the job: {slurm.shorten_error(str(error))}") from error
        job_id = str(jobs[0].job_id).split("_")[0]
        with slurm.submissions_file(self.sweep).open("a") as file:
            file.write(json.dumps({"job_id": job_id, "number": size, "shape": asdict(shape)}) + "\n")
        return job_id


def _environment(snapshot: Snapshot | None) -> list[str]:
    """Return shell lines that make a job run the pinned code and record its commit."""
    if snapshot is None:
        return []
    path = shlex.quote(str(snapshot.path))
    return [
        f"cd {path} || exit 1",  # a job must not run other code than the pinned one
        f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export AIMSCALE_GIT_COMMIT={snapshot.commit} AIMSCALE_GIT_DIRTY={int(snapshot.dirty)}",
    ]
