"""Probe jobs: the finished budgets of a sweep's runs, or of one run, on the local queue or on Slurm.

A job works on one run and knows its directory alone (`harness.probe.job`); its claim, attempts, status and logs lie in
`RUN/probing/`, beside those of training. What a task's file already holds is not probed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from aimscale.aim.errors import UserError
from aimscale.harness.probe.files import merge_into_rows
from aimscale.harness.probe.job import ProbeRequest, read_request
from aimscale.harness.probe.run import finished_task, saved_budgets
from aimscale.harness.run.config import ProbeSection, RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.provenance import is_imported
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError, SweepFile, load_sweep
from aimscale.sweeps.state.claims import Claim, RunRecord
from aimscale.sweeps.state.decision import Decision, Verdict, decision, standing
from aimscale.sweeps.state.job_kind import JobKind
from aimscale.sweeps.state.probe_record import ProbeRecord, sweep_folder
from aimscale.sweeps.state.retries import forgive
from aimscale.sweeps.state.sweep_dir import launch_lock_path

WORKER = ("-m", "aimscale.harness.probe.job")


def runs_of_sweep(sweep: Sweep, parts: Sequence[str] = ()) -> list[Run]:
    """Runs of the plan that were started, and imported ones beside them; with `parts`, those whose names contain one.

    Raises:
        SweepError: a part that names none of them, or a sweep without runs.
    """
    planned = [run for run in plan(sweep) if sweep.run_dir(run.run_id).is_dir()]
    names = {run.run_id for run in planned}
    there = sorted(sweep.runs_dir.iterdir()) if sweep.runs_dir.is_dir() else []
    runs = planned + [run_at(path) for path in there if path.name not in names and is_imported(RunDir(path))]
    if not runs:
        raise SweepError(f"sweep '{sweep.name}' has no runs under {sweep.directory}; launch it first, or check --root")
    for part in parts:
        if not any(part in run.run_id for run in runs):
            raise SweepError(f"no run of sweep '{sweep.name}' has '{part}' in its id; `aimscale status` lists them")
    return [run for run in runs if not parts or any(part in run.run_id for part in parts)]


def run_at(path: Path) -> Run:
    """A run by its directory, under the directory's name."""
    return Run(run_id=path.name, config=RunDir(path).load_config(), cell={}, devices=1, batch_target=0)


def sweep_of_run(run_dir: Path) -> tuple[Sweep, Run]:
    """One run and the sweep that it belongs to, or one made up for it, whose folder is the run's own.

    Raises:
        SweepError: the folder's name can be no sweep's.
        ConfigError: it is no run directory.
    """
    run_dir = run_dir.resolve()
    run = run_at(run_dir)
    folder = sweep_folder(run_dir)
    if folder is not None:
        return load_sweep(folder, folder.parent), run
    try:
        file = SweepFile(name=run_dir.name, sizes=(run.config.training.model.size,), budgets=run.budgets)
    except ValidationError as error:
        raise SweepError(
            f"the folder name '{run_dir.name}' has other than letters, digits, . _ -; rename it"
        ) from error
    return Sweep(file=file, text="", source=run_dir, base_dir=run_dir, root=run_dir.parent), run


Requests = Mapping[str, ProbeRequest]
"""Run id -> what is to be probed."""


def missing(run: RunDir, config: RunConfig, request: ProbeRequest) -> list[tuple[int, ProbeSection]]:
    """(budget, task) that a job would probe now.

    Raises:
        ProbeError, TaskError, DataError: a task's data cannot be used.
    """
    budgets = saved_budgets(run)
    return [
        (budget, section)
        for budget in (budgets if request.images_seen is None else [b for b in budgets if b == request.images_seen])
        for section in request.tasks
        if finished_task(run, config, budget, section, request.since) is None
    ]


def probing_jobs(sweep: Sweep, paths: Mapping[str, Path], requests: Requests) -> JobKind:
    """Probe runs: where each lies, and what is asked of it."""
    return JobKind(
        name=f"aimscale-{sweep.name}-probes",
        lock=launch_lock_path(sweep),
        record=lambda run: ProbeRecord.of(paths[run.run_id]),
        decide=functools.partial(_decide, requests),
        claim=functools.partial(_claim, requests),
        worker=WORKER,
    )


def _decide(requests: Requests, run: Run, record: RunRecord, is_queued: Callable[[Claim], bool]) -> Decision:
    assert isinstance(record, ProbeRecord)
    probed, request = record.run, requests[run.run_id]

    def verdict() -> tuple[Verdict, str]:
        left = missing(probed, run.config, request)
        if not left:
            for budget in saved_budgets(probed):
                merge_into_rows(probed, run.config, budget)
            return "finished", ""
        is_other = not _same_tasks(record, request)
        found = standing(record, record.checked_status(), is_queued, forgive_failure=is_other)
        return found or ("start", f"{len(left)} tasks to probe")

    return decision(run, record, verdict)


def _same_tasks(record: RunRecord, request: ProbeRequest) -> bool:
    """Whether the job failed at what is asked for now."""
    try:
        return read_request(record).tasks == request.tasks
    except UserError:
        return False


def _claim(requests: Requests, record: RunRecord, run: Run, claim: Claim) -> None:
    request = requests[run.run_id]
    if record.path.exists() and not _same_tasks(record, request):
        forgive(record)  # another question starts with a clean slate
    request.write(record)
    record.write_status(state="queued", reason=None, reason_class=None)
    record.write_claim(claim)
