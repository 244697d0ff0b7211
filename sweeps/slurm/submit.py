"""Submit Slurm jobs by submitit's batch scripts: one job array per shape (nodes x devices).

A job is a worker (`sweeps.engine.slurm_worker`) and is tied to no run. A launch therefore submits one job for each run
that can start, less the jobs that already wait or run without one.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shlex
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from aimscale.harness.run.provenance import Snapshot, find_snapshot, make_snapshot
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sections import SlurmSection
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.jobs import (
    JOB_BEGINS,
    JobArray,
    JobShape,
    LiveJob,
    broken_nodes,
    failed_jobs,
    hold_submissions,
    live_jobs,
    record_array,
    submitted_arrays,
)
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord

_log = logging.getLogger(__name__)

WORKER_MODULE = "aimscale.sweeps.engine.slurm_worker"
TIME_FACTOR, SHORTEST_LIMIT_MIN = 2, 60
"""Factor on the time that a plan says, and shortest time limit, minutes: a plan may be wrong, and start-up takes time.
A run that needs longer saves, is requeued and goes on."""


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
    """Return the shape of the job that a run needs."""
    devices = min(run.devices, section.devices_per_node)
    if run.devices % devices:
        raise SweepError(
            f"{run.run_id} wants {run.devices} devices, which do not fill nodes of {devices} evenly; change devices "
            f"or slurm.devices_per_node"
        )
    return JobShape(nodes=run.devices // devices, devices=devices)


def submit(
    planned: PlannedSweep, *, allow_dirty: bool = False, dry_run: bool = False, retry: bool = False
) -> list[Submission]:
    """Submit the jobs that the startable runs lack and return at once; a dry run asks Slurm nothing and writes nothing.

    With `retry`, a script is submitted again although all its jobs failed before their workers began.

    Raises:
        SweepError, SlurmError: there is no Slurm, the source tree has uncommitted changes, Slurm refuses a job, or all
            jobs with the same script failed.
    """
    sweep = planned.sweep
    if set(str(sweep.directory)) & set("%\\"):
        raise SweepError(f"Slurm would read '%' and '\\' in {sweep.directory} as patterns; choose another --root")
    snapshot = find_snapshot(sweep.directory, allow_dirty=allow_dirty)
    batch = _Batch(planned, snapshot=snapshot, dry_run=dry_run, retry=retry)
    if dry_run:
        return batch.submit()
    with hold_submissions(sweep):
        batch.known = slurm.jobs()
        if snapshot:
            make_snapshot(snapshot)
        return batch.submit()


def distribute_jobs(free: int, num_wanted: Sequence[int]) -> list[int]:
    """Distribute `free` jobs over arrays that want so many each, one job at a time in turn."""
    granted = [0] * len(num_wanted)
    while free > 0 and (short := [i for i, num in enumerate(num_wanted) if granted[i] < num][:free]):
        for i in short:
            granted[i] += 1
        free -= len(short)
    return granted


def time_limit_min(planned: PlannedSweep, runs: Sequence[Run], num_jobs: int) -> int:
    """Return the time limit of jobs that execute these runs, minutes: as short as the plan allows.

    Short jobs start earlier, in gaps between others. A run that was started before takes as many times what the plan
    says as its own pace shows; if that is not known, its jobs ask for all the time that the file allows.
    """
    walls = []
    for card in (planned.card(run.run_id) for run in runs):
        record, slower = RunRecord(planned.sweep.run_dir(card.run.run_id)), 1.0
        if record.read_attempts():
            slower = max(1.0, card.slowdown(record.read_status().images_per_s) or float("inf"))
        walls.append(slower * card.wall_s)
    needed_s = TIME_FACTOR * max(*walls, sum(walls) / num_jobs) + max(run.grace_s for run in runs)
    return math.ceil(min(planned.sweep.file.slurm.time_limit_min, max(SHORTEST_LIMIT_MIN, needed_s / 60)))


def submit_like(
    sweep: Sweep, job_id: str, shape: JobShape, minutes: int, exclude: Sequence[str] = (), *, is_after: bool = False
) -> str:
    """Submit a job like another of this sweep with another time limit, which a requeue would keep, or of another shape,
    and return its id; with `is_after` it starts when the other one has ended."""
    text = slurm.command("scontrol", "write", "batch_script", job_id, "-")
    text = re.sub(r"^#SBATCH --array=.*\n", "", text, flags=re.MULTILINE).replace("%A_%a.out", "%j.out")
    text = re.sub(
        rf"({re.escape(WORKER_MODULE)} .*) \d+ \d+$", rf"\1 {shape.nodes} {shape.devices}", text, flags=re.MULTILINE
    )
    words = [f"--time={minutes}"]
    words += [f"--exclude={','.join(exclude)}"] if exclude else []
    words += [f"--dependency=afterany:{job_id}"] if is_after else []
    unset = [f"--unset={name}" for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]
    with hold_submissions(sweep):
        arrays = [each for each in submitted_arrays(sweep) if job_id in each.names]
        if not arrays:
            raise SweepError(f"job {job_id} was not submitted by a launch of this sweep")
        if shape != arrays[-1].shape:
            words += [f"--nodes={shape.nodes}", f"--ntasks-per-node={shape.devices}"]
            gpus = sweep.file.slurm.gpu_request(shape.devices)
            words += [] if gpus is None else [f"--gpus-per-node={gpus}"]
        new = slurm.command("env", *unset, "sbatch", "--parsable", *words, text=text).strip().partition(";")[0]
        record_array(sweep, replace(arrays[-1], job_id=new, number=1, shape=shape))
    return new


class _Batch:
    """Job arrays of one launch."""

    def __init__(self, planned: PlannedSweep, *, snapshot: Snapshot | None, dry_run: bool, retry: bool) -> None:
        self.planned, self.sweep = planned, planned.sweep
        self.section, self.folder = self.sweep.file.slurm, self.sweep.directory / "slurm"
        self.snapshot, self.dry_run, self.retry = snapshot, dry_run, retry
        self.launch = uuid.uuid4().hex[:8]
        self.request = _digest(self.section.model_dump_json(exclude={"max_jobs"}))
        self.known: dict[str, slurm.JobInfo] = {}
        self.broken: tuple[str, ...] = ()

    def submit(self) -> list[Submission]:
        """Submit one array per shape, within `max_jobs` jobs; shapes for which none is left get none."""
        by_shape: dict[JobShape, list[Run]] = {}
        pending = {each.record.name: each.run for each in self.planned.states}  # on the devices for what is missing
        for run in (pending[run.run_id] for run in self.planned.startable()):
            by_shape.setdefault(job_shape(run, self.section), []).append(run)
        live = self._cancel_outdated(live_jobs(self.sweep, self.known))
        self.broken = broken_nodes(self.sweep, self.known, self.request)
        num_wanted = [
            max(0, len(shape_runs) - sum(job.shape == shape and not job.is_busy for job in live))
            for shape, shape_runs in by_shape.items()
        ]
        submitted: list[Submission] = []
        numbers = distribute_jobs(self.section.max_jobs - len(live), num_wanted)
        for (shape, shape_runs), want, num_jobs in zip(by_shape.items(), num_wanted, numbers, strict=True):
            if num_jobs:
                submitted += self._submit_shape(shape, shape_runs, num_jobs)
            elif want and all(job.shape != shape for job in live):
                what = f"{len(shape_runs)} runs of {shape.nodes} x {shape.devices}"
                _log.warning("no job for %s: slurm.max_jobs is reached; launch again when jobs have ended", what)
        return submitted

    def _cancel_outdated(self, live: Sequence[LiveJob]) -> list[LiveJob]:
        """Cancel pending jobs that request what the sweep file no longer says; return the other jobs."""
        outdated = [job for job in live if job.info.phase == "pending" and job.request != self.request]
        if outdated:
            slurm.command("scancel", "--quiet", "--state=PENDING", *(job.info.job_id for job in outdated))
            _log.info("cancelled %d pending jobs, whose request in the sweep file has changed since", len(outdated))
        return [job for job in live if job not in outdated]

    def _submit_shape(self, shape: JobShape, runs: Sequence[Run], num_jobs: int) -> Iterator[Submission]:
        """Submit the jobs as one array, or as several if Slurm limits their length; record each at once."""
        failed = [node for run in runs for node in RunRecord(self.sweep.run_dir(run.run_id)).failed_nodes()]
        broken = self.broken
        longest, excluded = num_jobs, tuple(dict.fromkeys([*broken, *failed]))
        if not self.dry_run:
            longest, where = slurm.max_array_size(), (self.section.partition, shape.nodes)
            also = self.section.extra.get("exclude")
            excluded = slurm.nodes_to_exclude(excluded, *where, also) or slurm.nodes_to_exclude(broken, *where, also)
        broken = tuple(node for node in broken if node in excluded)
        minutes = time_limit_min(self.planned, runs, num_jobs)
        # Without what changes from one launch to the next: the number of jobs, and the nodes to be excluded.
        digest = _digest(self._script(shape, runs, minutes, (), 1))
        if not self.dry_run:  # before the first part: its jobs may have begun and written nothing when the next is due
            self._refuse_failed_script(digest, broken)
        for first in range(0, num_jobs, longest):
            size = min(longest, num_jobs - first)
            script, job_id = self._script(shape, runs, minutes, excluded, size), None
            if not self.dry_run:
                job_id = slurm.command("sbatch", "--parsable", text=script).strip().partition(";")[0]
                facts = {"launch": self.launch, "script": digest, "request": self.request}
                record_array(self.sweep, JobArray(job_id=job_id, number=size, shape=shape, broken=broken, **facts))
            yield Submission(
                shape=shape, num_jobs=size, num_runs=len(runs), excluded=excluded, script=script, job_id=job_id
            )

    def _refuse_failed_script(self, digest: str, broken: Sequence[str]) -> None:
        """Raise SweepError if all jobs of the last launch with this script ended before their workers began, unless
        that was on one node, which is excluded now."""
        failed = [] if self.retry else failed_jobs(self.sweep, self.known, script=digest)
        is_of_node = len(broken) == 1 and {job.node for job in failed} == {*broken}
        if failed and not is_of_node and not any(job.has_begun for job in failed):
            raise SweepError(
                f"all {len(failed)} jobs of the last launch ended before their workers began: {failed[-1].why} (see "
                f"{failed[-1].log}); fix slurm.setup or slurm.python, or submit the same again by --retry"
            )

    def _script(self, shape: JobShape, runs: Sequence[Run], minutes: int, excluded: Sequence[str], size: int) -> str:
        """Return the batch script as submitit writes it; it becomes the worker."""
        section, log = self.section, "%A_%a.out" if size > 1 else "%j.out"
        # Slurm signals the batch script alone (B:), and that signals its runs.
        options = {"output": self.folder / log, "requeue": True, "signal": f"B:USR2@{max(run.grace_s for run in runs)}"}
        python = section.python or shlex.quote(sys.executable)
        say_node = f'echo "{JOB_BEGINS} $SLURMD_NODENAME"'
        words = [WORKER_MODULE, str(self.sweep.directory), str(shape.nodes), str(shape.devices)]
        fields: dict[str, Any] = {
            "job_name": f"aimscale-{self.sweep.name}",
            "partition": section.partition,
            "time": minutes,
            "nodes": shape.nodes,
            "ntasks_per_node": shape.devices,
            "cpus_per_task": section.cpus_per_task,
            "gpus_per_node": section.gpu_request(shape.devices),
            "exclude": ",".join(filter(None, [section.extra.get("exclude"), *excluded])) or None,
            "map_count": size if size > 1 else None,
            "array_parallelism": size,
            "wckey": None,  # submitit's own is refused where Slurm enforces wckeys
            # USR2 is ignored until the worker handles it, which knows its time limit
            "setup": [say_node, "trap '' USR2", *_environment(self.snapshot), *_fail_fast(section.setup)],
            "additional_parameters": options | {k: v for k, v in section.extra.items() if k != "exclude"},
            "stderr_to_stdout": True,
            "use_srun": False,
        }
        return _make_sbatch_string(f"exec {python} -u -m {shlex.join(words)}", self.folder, **fields)


def _fail_fast(setup: Sequence[str]) -> list[str]:
    """Return shell lines that end the job with a sentence if one of them fails; not at lines of a file they source."""
    say = 'echo "aimscale: slurm.setup failed with exit code $status: $BASH_COMMAND"'
    check = f"status=$?; if [ ${{#BASH_SOURCE[@]}} -lt 2 ]; then {say}; exit $status; fi"
    return [f"trap {shlex.quote(check)} ERR", *setup, "trap - ERR"] if setup else []


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
