"""Launch on Slurm through submitit: one job array per resource shape, split at MaxArraySize."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from aimscale.sweeps.plan.costs import stop_seconds
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SlurmSection, Sweep, SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.commands import Turn, afterany, queued_jobs, turns
from aimscale.sweeps.slurm.job import SlurmJob
from aimscale.sweeps.state.claims import Claim, RunRecord, own_claim
from aimscale.sweeps.state.decision import Decision, JobKind, note_finished, training_jobs
from aimscale.sweeps.state.retries import diagnose
from aimscale.sweeps.state.snapshot import Snapshot, find_snapshot, make_snapshot
from aimscale.sweeps.state.sweep_dir import lock_file

Packed = Callable[[list[Path], int, int, tuple[str, ...]], Any]
"""(run directories, how many share a card, cards, worker) -> a job that executes them all."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one job asks for."""

    nodes: int
    tasks_per_node: int
    """Ranks (and cards) of each."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One array that was submitted, or would be."""

    shape: Shape
    run_ids: tuple[str, ...]
    """Its runs, in the order of its elements."""
    num_jobs: int
    """Elements; each executes one run, or several as a queue of its own."""
    turn: Turn
    excluded: tuple[str, ...]
    """Nodes that failed under one of these runs, which they will not get again."""
    script: str
    job_id: str | None = None
    """Slurm's id; null in a dry run."""


@dataclass(frozen=True, kw_only=True)
class SlurmLaunch:
    """What a launch on Slurm did."""

    submitted: tuple[Submission, ...]
    left: tuple[Decision, ...]
    """Runs left alone, and why."""
    snapshot: Snapshot

    @property
    def started(self) -> set[str]:
        """Ids of the runs that were submitted."""
        return {run_id for part in self.submitted for run_id in part.run_ids}


def shape_of(run: Run, section: SlurmSection) -> Shape:
    """Nodes and tasks for a run's devices.

    Raises:
        SweepError: they do not fill whole nodes.
    """
    per_node = min(run.devices, section.devices_per_node)
    if run.devices % per_node:
        raise SweepError(
            f"{run.run_id} wants {run.devices} devices, which do not fill nodes of {per_node} evenly; change devices "
            f"or slurm.devices_per_node"
        )
    return Shape(nodes=run.devices // per_node, tasks_per_node=per_node)


def launch_slurm(
    sweep: Sweep,
    runs: Sequence[Run],
    *,
    allow_dirty: bool = False,
    dry_run: bool = False,
    worker: tuple[str, ...] | None = None,
    kind: JobKind | None = None,
    packed: Packed | None = None,
    after: Sequence[str] = (),
    most: int | None = None,
) -> SlurmLaunch:
    """Submit what is missing and return at once; the sweep's directory exists, but in a dry run, which writes nothing.

    `kind` is what is done with the runs, training by default; `worker` replaces the program that does it. `packed`
    makes the job that executes several runs of one device, where `runs_per_device` or `slurm.devices_per_job` ask so.
    `after` are dependencies in Slurm's words, such as `afterany:123`, and `most` says how many jobs may then run at a
    time; by default those of `slurm.max_parallel` that other jobs of the sweep leave free.

    Raises:
        SweepError, SlurmError: no Slurm, an unknown partition, a dirty tree, a job that Slurm refuses.
    """
    kind = kind or training_jobs(sweep)
    kind = replace(kind, worker=worker) if worker else kind
    slurm.check_partition(sweep.file.slurm.partition)
    snapshot = find_snapshot(sweep.directory, allow_dirty=allow_dirty)
    batch = _Batch(sweep, kind, snapshot, slurm.max_array_size(), packed, dry_run=dry_run)
    if dry_run:
        decisions = _decide(kind, runs, settle_ended=False)
        return _result(batch.submit(decisions, after, most), decisions, snapshot)
    make_snapshot(snapshot)
    with lock_file(kind.lock):
        decisions = _decide(kind, runs, settle_ended=True)
        for decision in decisions:
            note_finished(decision)
        return _result(batch.submit(decisions, after, most), decisions, snapshot)


def _result(submitted: Sequence[Submission], decisions: Sequence[Decision], snapshot: Snapshot) -> SlurmLaunch:
    left = tuple(decision for decision in decisions if not decision.startable)
    return SlurmLaunch(submitted=tuple(submitted), left=left, snapshot=snapshot)


def _decide(kind: JobKind, runs: Sequence[Run], *, settle_ended: bool) -> list[Decision]:
    """The verdict on every run; how a job ended that could not say so itself is written down first."""
    records = [kind.record(run) for run in runs]
    known = slurm.jobs()
    if settle_ended:
        settle(records, known)
    return [kind.decide(run, record, slurm.is_queued(known)) for run, record in zip(runs, records, strict=True)]


def settle(records: Sequence[RunRecord], known: dict[str, slurm.JobInfo]) -> None:
    """Record the end of jobs that are gone while their runs say that they wait or run; what is damaged is left."""
    lost: list[tuple[RunRecord, Claim]] = []
    for record in records:
        with contextlib.suppress(SweepError):
            claim = record.read_claim()
            if claim and claim.backend == "slurm" and not slurm.is_queued(known)(claim) and not record.is_held():
                lost.append((record, claim))
    states = {job_id: info.state for job_id, info in known.items()}
    states |= slurm.ended_states([claim.job_id for _, claim in lost if claim.job_id and claim.job_id not in states])
    for record, claim in lost:
        with contextlib.suppress(SweepError):
            diagnose(record, states.get(claim.job_id or ""), claim)
            record.drop_claim()


class _Batch:
    """All arrays of one launch."""

    def __init__(
        self, sweep: Sweep, kind: JobKind, snapshot: Snapshot, chunk: int, packed: Packed | None, *, dry_run: bool
    ) -> None:
        self.sweep, self.kind, self.snapshot, self.chunk = sweep, kind, snapshot, chunk
        self.packed, self.dry_run = packed, dry_run
        self.section = sweep.file.slurm

    def submit(self, decisions: Sequence[Decision], after: Sequence[str], most: int | None) -> list[Submission]:
        """Submit the startable ones, as one array per resource shape and chunk of Slurm's greatest array."""
        by_shape: dict[Shape, list[Decision]] = {}
        for decision in decisions:
            if decision.startable:
                by_shape.setdefault(shape_of(decision.run, self.section), []).append(decision)
        arrays: list[tuple[Shape, list[list[Decision]]]] = []
        for shape, members in by_shape.items():
            jobs = self._jobs(shape, members)
            arrays += [(shape, jobs[i : i + self.chunk]) for i in range(0, len(jobs), self.chunk)]
        if most is None and arrays:
            queued = queued_jobs(self.sweep)
            most = self.section.max_parallel - len(queued)
            if most < 1:
                after, most = [*after, *afterany(sorted(queued))], self.section.max_parallel
        submitted: list[Submission] = []
        for (shape, jobs), turn in zip(arrays, turns(most or 1, [len(jobs) for _, jobs in arrays]), strict=True):
            before = [part.job_id or "EARLIER_ARRAY" for part in submitted if part.turn.lane == turn.lane][-1:]
            submitted.append(self._array(shape, jobs, turn, [*after, *afterany(before)]))
        return submitted

    def _jobs(self, shape: Shape, members: Sequence[Decision]) -> list[list[Decision]]:
        """The runs of each job: one, or as many of one device as its cards take at a time."""
        together = self.sweep.file.runs_per_device * self.section.devices_per_job
        if self.packed is None or shape != Shape(nodes=1, tasks_per_node=1):
            together = 1
        return [list(members[i : i + together]) for i in range(0, len(members), together)]

    def _array(self, shape: Shape, jobs: Sequence[Sequence[Decision]], turn: Turn, after: Sequence[str]) -> Submission:
        """Submit one array and claim its runs; a job that starts before its claim waits for the launch's lock."""
        members = [each for job in jobs for each in job]
        devices = self.section.devices_per_job if any(len(job) > 1 for job in jobs) else shape.tasks_per_node
        excluded = self._excluded(members, shape.nodes)
        executor = executor_for(
            self.sweep,
            shape,
            self.snapshot,
            self.kind.name,
            signal_delay_s=max(stop_seconds(self.sweep, each.run) for each in members),
            max_parallel=turn.limit,
            devices=devices,
            exclude=excluded,
            after=after,
        )
        job_id = None if self.dry_run else _submit(executor, [self._job(job, devices) for job in jobs])
        if job_id is not None:
            for i, job in enumerate(jobs):
                element = job_id if len(jobs) == 1 else f"{job_id}_{i}"
                for each in job:
                    self.kind.claim(each.record, each.run, own_claim("slurm", each.run.devices, element))
        return Submission(
            shape=shape,
            run_ids=tuple(each.run.run_id for each in members),
            num_jobs=len(jobs),
            turn=turn,
            excluded=excluded,
            script=script(executor, len(jobs)),
            job_id=job_id,
        )

    def _job(self, members: Sequence[Decision], devices: int) -> Any:
        if len(members) == 1 or self.packed is None:
            (only,) = members
            return SlurmJob(only.record.path, self.kind.worker)
        paths = [each.record.path for each in members]
        return self.packed(paths, self.sweep.file.runs_per_device, devices, self.kind.worker)

    def _excluded(self, members: Sequence[Decision], num_needed: int) -> tuple[str, ...]:
        """Nodes on which these runs failed; none where too few would be left to run on."""
        failed = dict.fromkeys(node for each in members for node in each.record.failed_nodes())
        if not failed:
            return ()
        left = set(slurm.node_names(self.section.partition)) - set(failed)
        return tuple(failed) if len(left) >= num_needed else ()


def _submit(executor: submitit.SlurmExecutor, jobs: list[Any]) -> str:
    try:
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise slurm.SlurmError(f"Slurm refused the job: {slurm.plain(str(error))}") from error
    except OSError as error:
        raise SweepError(f"cannot write into {executor.folder}: {error.strerror}; choose another --root") from error
    return str(submitted[0].job_id).split("_")[0]


def executor_for(
    sweep: Sweep,
    shape: Shape,
    snapshot: Snapshot,
    job_name: str,
    *,
    signal_delay_s: int,
    max_parallel: int,
    devices: int,
    exclude: Sequence[str] = (),
    after: Sequence[str] = (),
) -> submitit.SlurmExecutor:
    """A submitit executor with everything that a job of this shape asks for; `devices` are those of a node."""
    section = sweep.file.slurm
    # A time limit is not a failure here: progress bounds the attempts (sweeps.state.retries), not submitit's count.
    executor = submitit.SlurmExecutor(
        folder=sweep.directory / "slurm", max_num_timeout=1_000_000, python=section.python
    )
    parameters: dict[str, Any] = {
        "job_name": job_name,
        "partition": section.partition,
        "time": section.time_min,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "cpus_per_task": section.cpus_per_task * devices // shape.tasks_per_node,
        "gpus_per_node": devices if section.gpus else None,
        "exclude": ",".join(exclude) or None,
        "signal_delay_s": signal_delay_s,
        "array_parallelism": max_parallel,
        "srun_args": ["--kill-on-bad-exit=1", *section.srun],
        "stderr_to_stdout": True,
        "setup": [*_environment(snapshot), *section.setup],
        "additional_parameters": {"requeue": True, **section.extra},
    }
    if after:
        after = [*([section.extra["dependency"]] if "dependency" in section.extra else []), *after]
        parameters["additional_parameters"] |= {"dependency": ",".join(after), "kill-on-invalid-dep": "yes"}
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


def _environment(snapshot: Snapshot) -> list[str]:
    """Shell lines that make the job run the pinned code, and let it say which."""
    if snapshot.path is None:
        return []
    dirty, path = int(snapshot.dirty), shlex.quote(str(snapshot.path))
    return [
        f"cd {path} || exit 1",  # without its pinned code a job must not run
        f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export AIMSCALE_GIT_COMMIT={snapshot.commit} AIMSCALE_GIT_DIRTY={dirty}",
    ]


def script(executor: submitit.SlurmExecutor, num_jobs: int) -> str:
    """The sbatch script that submitit writes for an array of this many jobs."""
    plain = submitit.SlurmExecutor(folder=executor.folder, max_num_timeout=executor.max_num_timeout)
    plain.update_parameters(**executor.parameters)
    if num_jobs > 1:
        plain.parameters["map_count"] = num_jobs
    return str(plain._make_submission_file_text(executor._submitit_command_str, ""))
