"""Launch and cancellation of a sweep; runs are executed on this machine."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from aimscale.aim.errors import UserError
from aimscale.harness.run.files import write_text
from aimscale.harness.run.lock import Lock
from aimscale.sweeps.engine.active_run import Command
from aimscale.sweeps.engine.devices import Machine, local_machine, refuse_other_machine
from aimscale.sweeps.engine.forecasts import save_stop_threshold
from aimscale.sweeps.engine.worker import LaunchResult, Report, Worker, print_events, run_worker
from aimscale.sweeps.planning.checks import raise_on_problems
from aimscale.sweeps.planning.sweepfile import SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.jobs import live_jobs
from aimscale.sweeps.state.attempts import clear_failure, record_lost_attempt
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord, prepare_directory
from aimscale.sweeps.state.run_state import RunState, State, read_state

FIRST_LAW = 3
"""Number of sizes from which a first law is told, and later runs are held against a forecast."""
_log = logging.getLogger(__name__)


def launch(
    planned: PlannedSweep,
    *,
    devices: int | None = None,
    hours: float | None = None,
    retry: bool = False,
    stop_sd: float | None = None,
    num_smallest_first: int = 0,
    command: Command | None = None,
    report: Report = print_events,
) -> LaunchResult:
    """Execute what is missing, resume what died and skip what is done; return when nothing is left to start.

    Any number of launches on machines that share the sweep's folder, and of jobs on Slurm, execute each run once
    between them. A repeated call continues where the last one stopped.

    Args:
        planned: the sweep; what it knows of the states of its runs is not read again.
        devices: number of GPUs to use, or of processes on a machine without GPUs; by default all, or as many as the
            cores can feed.
        hours: time until this machine is gone; all runs are saved before.
        retry: clear failures and cancellations first.
        stop_sd: save and end runs whose loss lies so many standard deviations above their forecast.
        num_smallest_first: how many of the shortest runs to start with, of twice as many or more; then the
            longest follow, which ends sooner.
        command: replaces the program that executes a run.
        report: called every few moments, to show the worker's events and its progress.

    Raises:
        SweepError, ConfigError: the sweep cannot be planned, its runs would fail a check (`sweeps.planning.checks`), or
            its directory cannot be written; nothing was created.
    """
    started, runs = time.time(), planned.longest_first
    machine = find_machine(planned, devices=devices, retry=retry)
    prepare_launch(planned, retry=retry, stop_sd=stop_sd)
    deadline = float("inf")
    if hours is not None:
        # Runs stop early enough to save before the time is up, but at most half of a short time is kept for that.
        deadline = started + 3600 * hours - min(max(run.grace_s for run in runs), 1800 * hours)
    shortest = runs[::-1][:num_smallest_first] if len(runs) >= 2 * num_smallest_first else []
    waiting = [*shortest, *(run for run in runs if run not in shortest)]
    worker = Worker(sweep=planned.sweep, machine=machine, waiting=waiting, command=command, deadline=deadline)
    worker.skip_finished(planned.states)
    return run_worker(worker, report)


def find_machine(planned: PlannedSweep, *, devices: int | None, retry: bool) -> Machine:
    """Return this machine for a launch, or raise SweepError for runs that were planned for another."""
    machine = local_machine(planned.longest_first, devices=devices)
    refuse_other_machine(planned.sweep, planned.startable(retry=retry), machine, is_said=devices is not None)
    return machine


def prepare_launch(planned: PlannedSweep, *, retry: bool, stop_sd: float | None = None) -> None:
    """Check the runs that a launch would start, create the sweep's directory, and record attempts that were lost.

    Args:
        retry, stop_sd: as in `launch`; the second holds for workers anywhere until the next launch.
    """
    raise_on_problems(planned.sweep, planned.startable(retry=retry))
    prepare_directory(planned.sweep, planned.runs)
    save_stop_threshold(planned.sweep, stop_sd)
    gone = [state for state in planned.states if state.worker and (state.state is State.LOST or state.is_unlocked)]
    job_states = slurm.job_states({state.job_id for state in gone if state.job_id}) if gone else {}
    states = []
    for run, state in zip(planned.runs, planned.states, strict=True):
        is_over = state.is_unlocked and job_states.get(str(state.job_id)) in slurm.ENDED
        now = replace(state, state=State.LOST, is_unlocked=False) if is_over else state
        if now.state is State.LOST or (retry and now.state.retryable):
            with contextlib.suppress(UserError, OSError):  # a damaged directory, which the worker reports
                _close_attempt(now, job_states, retry=retry)
            # It may have been the last attempt that the run has, and nothing is to be submitted for it then.
            now = read_state(run, RunRecord(planned.sweep.run_dir(run.run_id)))
        states.append(now)
    planned.states = tuple(states)


def _close_attempt(state: RunState, job_states: Mapping[str, str], *, retry: bool) -> None:
    """Record the end of an attempt whose worker is gone and, with `retry`, clear failure and cancellation."""
    record = state.record
    before, lock = record.claimant(), Lock(record.claim)
    if record.is_held() or not lock.take():
        return
    try:
        record_lost_attempt(record, before, job_states.get(str(state.job_id)))
        if retry:
            record.cancelled.unlink(missing_ok=True)
            if record.read_status().state in ("failed", "diverged", "off-track"):
                clear_failure(record)
    finally:
        lock.release()


def _is_active(record: RunRecord) -> bool:
    """Return whether a process or a worker holds a run at this stage."""
    return record.is_held() or record.is_claimed()


def cancel(planned: PlannedSweep, run_ids: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Mark runs as cancelled; workers on any machine let those that are running save and exit, and start none of them.

    Pending Slurm jobs are cancelled if no run is left for them.

    Args:
        run_ids: runs to cancel; by default all that are planned or executed. Those that have ended stay as they are.

    Returns:
        One sentence for each run that was stopped, and one for each that could not be; none if no worker is active.
    """
    sweep = planned.sweep
    if not sweep.directory.is_dir():
        raise SweepError(f"sweep '{sweep.name}' was never launched under {sweep.root}; there is nothing to cancel")
    startable = {each.record.name for each in planned.states if each.state.startable or each.is_unlocked}
    records = [RunRecord(sweep.run_dir(name)) for name in (*(run.run_id for run in planned.runs), *planned.unplanned)]
    jobs = slurm.sweep_jobs(sweep)
    is_told = jobs is not None
    waiting = [each.info.job_id for each in live_jobs(sweep, jobs or {}) if each.info.phase == "pending"]
    active = {record.name for record in records if _is_active(record) or _is_active(record.evaluation)}
    if is_told and not waiting and not active:
        return [], []
    done: list[str] = []
    failed: list[str] = []
    for record in records:
        if (run_ids and record.name not in run_ids) or record.name not in startable | active:
            continue
        write_text(record.cancelled, "")
        if record.name not in active:
            done.append(f"{record.name}: will not start before `launch --retry`")
        elif record.is_claimed() or record.evaluation.is_claimed():
            done.append(f"{record.name}: told to save and end")
        else:
            host = record.read_status().host
            failed.append(f"{record.name}: its worker is gone; end its process on {host} by hand")
    if not is_told:
        _log.warning("Slurm does not answer here: jobs that wait stay in its queue, and end as soon as they start")
    if waiting and all(RunRecord(sweep.run_dir(name)).cancelled.exists() for name in startable):
        slurm.command("scancel", "--quiet", *waiting)
    return done, failed
