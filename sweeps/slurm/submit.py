"""Launch on Slurm through submitit: one job array per resource shape, split at MaxArraySize."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SlurmSection, Sweep, SweepError
from aimscale.sweeps.runs.claims import Claim, RunRecord, own_claim
from aimscale.sweeps.runs.decision import Decision
from aimscale.sweeps.runs.job_kind import JobKind, training_jobs
from aimscale.sweeps.runs.retries import diagnose
from aimscale.sweeps.runs.snapshot import Snapshot, find_snapshot, make_snapshot
from aimscale.sweeps.runs.sweep_dir import launch_lock
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.job import SlurmJob


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one job asks for."""

    nodes: int
    """Machines."""
    tasks_per_node: int
    """Ranks (and cards) of each."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One array that was submitted, or would be."""

    shape: Shape
    """Of each element."""
    run_ids: tuple[str, ...]
    """Element i executes run i."""
    script: str
    """The sbatch script."""
    job_id: str | None = None
    """Slurm's id; null in a dry run."""


@dataclass(frozen=True, kw_only=True)
class SlurmLaunch:
    """What a launch on Slurm did."""

    submitted: tuple[Submission, ...]
    """Arrays."""
    left: tuple[Decision, ...]
    """Runs left alone, and why."""
    snapshot: Snapshot
    """The code that the jobs run."""


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
) -> SlurmLaunch:
    """Submit what is missing and return at once; the sweep's directory exists, but in a dry run, which writes nothing.

    `kind` is what is done with the runs, training by default; `worker` replaces the program that does it.

    Raises:
        SweepError, SlurmError: no Slurm, an unknown partition, a dirty tree, a job that Slurm refuses.
    """
    kind = kind or training_jobs(sweep)
    kind = replace(kind, worker=worker) if worker else kind
    section = sweep.file.slurm
    slurm.check_partition(section.partition)
    snapshot = find_snapshot(sweep.directory, allow_dirty=allow_dirty)
    chunk = slurm.max_array_size()
    if dry_run:
        decisions = _decide(kind, runs, settle_ended=False)
        return _result(_arrays(sweep, decisions, chunk, snapshot, kind, _print_only), decisions, snapshot)
    make_snapshot(snapshot)
    with launch_lock(sweep):
        decisions = _decide(kind, runs, settle_ended=True)
        return _result(_arrays(sweep, decisions, chunk, snapshot, kind, _submit), decisions, snapshot)


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
    """Record the end of jobs that are gone while their runs say that they wait or run."""
    lost: list[tuple[RunRecord, Claim]] = []
    for record in records:
        claim = record.read_claim()
        if claim is None or claim.backend != "slurm" or slurm.is_queued(known)(claim) or record.is_held():
            continue
        lost.append((record, claim))
    states = {job_id: info.state for job_id, info in known.items()}
    states |= slurm.ended_states([claim.job_id for _, claim in lost if claim.job_id and claim.job_id not in states])
    for record, claim in lost:
        diagnose(record, states.get(claim.job_id or ""), claim.job_id)
        record.drop_claim()


Submit = Callable[[submitit.SlurmExecutor, list[SlurmJob]], str | None]


def _arrays(
    sweep: Sweep,
    decisions: Sequence[Decision],
    chunk: int,
    snapshot: Snapshot,
    kind: JobKind,
    submit: Submit,
) -> list[Submission]:
    by_shape: dict[Shape, list[Decision]] = {}
    for decision in decisions:
        if decision.startable:
            by_shape.setdefault(shape_of(decision.run, sweep.file.slurm), []).append(decision)
    submissions = []
    for shape, members in by_shape.items():
        for i in range(math.ceil(len(members) / chunk)):
            part = members[i * chunk : (i + 1) * chunk]
            executor = executor_for(sweep, shape, snapshot, kind.name)
            submissions.append(_submit_array(executor, shape, part, kind, submit))
    return submissions


def _submit_array(
    executor: submitit.SlurmExecutor,
    shape: Shape,
    members: Sequence[Decision],
    kind: JobKind,
    submit: Submit,
) -> Submission:
    """Submit one array and claim its runs; a job that starts before its claim waits for the launch's lock."""
    job_id = submit(executor, [SlurmJob(each.record.path, kind.worker, type(each.record)) for each in members])
    if job_id is not None:
        for i, decision in enumerate(members):
            element = job_id if len(members) == 1 else f"{job_id}_{i}"
            kind.claim(decision.record, decision.run, own_claim("slurm", decision.run.devices, element))
    return Submission(
        shape=shape,
        run_ids=tuple(decision.run.run_id for decision in members),
        script=script(executor, len(members)),
        job_id=job_id,
    )


def _print_only(executor: submitit.SlurmExecutor, jobs: list[SlurmJob]) -> None:
    return None


def _submit(executor: submitit.SlurmExecutor, jobs: list[SlurmJob]) -> str:
    try:
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        raise slurm.SlurmError(f"Slurm refused the job: {slurm.plain(str(error))}") from error
    except OSError as error:
        raise SweepError(f"cannot write into {executor.folder}: {error.strerror}; choose another --root") from error
    return str(submitted[0].job_id).split("_")[0]


def executor_for(sweep: Sweep, shape: Shape, snapshot: Snapshot, job_name: str) -> submitit.SlurmExecutor:
    """A submitit executor with everything that a job of this shape asks for."""
    section = sweep.file.slurm
    # A time limit is not a failure here: progress bounds the attempts (sweeps.runs.retries), not submitit's count.
    executor = submitit.SlurmExecutor(
        folder=sweep.directory / "slurm", max_num_timeout=1_000_000, python=section.python
    )
    parameters: dict[str, Any] = {
        "job_name": job_name,
        "partition": section.partition,
        "account": section.account,
        "qos": section.qos,
        "constraint": section.constraint,
        "time": section.time_min,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "cpus_per_task": section.cpus_per_task,
        "gpus_per_node": shape.tasks_per_node if section.gpus else None,
        "signal_delay_s": section.signal_delay_s,
        "array_parallelism": section.max_parallel,
        "stderr_to_stdout": True,
        "setup": [*_environment(snapshot), *section.setup],
        "additional_parameters": {"requeue": True, **section.extra},
    }
    if section.mem_gb is not None:
        parameters["mem"] = f"{math.ceil(1024 * section.mem_gb)}M"
    if section.min_nodes is not None and section.min_nodes < shape.nodes:
        parameters["additional_parameters"]["nodes"] = f"{section.min_nodes}-{shape.nodes}"
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


def with_slurm(sweep: Sweep, **fields: Any) -> Sweep:
    """The sweep with fields of its `slurm` section replaced; None leaves a field as it is."""
    given = {key: value for key, value in fields.items() if value is not None}
    return sweep.with_fields(slurm={**sweep.file.slurm.model_dump(mode="json"), **given}) if given else sweep
