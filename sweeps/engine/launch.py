"""Launch and cancellation of a sweep; runs are executed on this machine."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.live import Live

from aimscale.aim.errors import UserError
from aimscale.harness.run.files import write_text
from aimscale.harness.run.lock import Lock
from aimscale.sweeps.engine.active_run import Command, Event
from aimscale.sweeps.engine.devices import local_machine
from aimscale.sweeps.engine.worker import LaunchResult, Worker, print_events, run_worker
from aimscale.sweeps.plan.checks import raise_on_problems
from aimscale.sweeps.plan.costs import CostCard, cost_cards, grace_period_s
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.plan.sweepfile import Place, Sweep, SweepError, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.jobs import live_jobs
from aimscale.sweeps.state.attempts import clear_failure, record_lost_attempt
from aimscale.sweeps.state.decision import ENDED_BY_HAND, RunState, read_state, read_states
from aimscale.sweeps.state.record import RunRecord, prepare_directory, unplanned_runs
from aimscale.sweeps.table.on_track import set_stop
from aimscale.sweeps.table.status import SweepStatus, sweep_status
from aimscale.sweeps.table.status_view import progress_line, status_view
from aimscale.sweeps.table.views import new_console

LOG_INTERVAL_S, LIVE_INTERVAL_S = 30.0, 2.0
LOOK_SHARE = 0.05
"""Maximum share of the time that is spent on looking at all runs, to show their progress."""


def launch(
    sweep: Sweep | str | Path,
    root: Path = Path("aimscale-runs"),
    *,
    devices: int | None = None,
    hours: float | None = None,
    retry: bool = False,
    stop_sd: float | None = None,
    show_progress: bool = True,
    num_smallest_first: int = 0,
    tell: Callable[[Event], str | None] = str,
    command: Command | None = None,
) -> LaunchResult:
    """Execute what is missing, resume what died and skip what is done; return when nothing is left to start.

    Any number of launches on machines that share the sweep's folder, and of jobs on Slurm, execute each run once
    between them. A repeated call continues where the last one stopped.

    Args:
        devices: number of GPUs to use, or of processes on a machine without GPUs; by default all, or as many as the
            cores can feed.
        hours: time until this machine is gone; all runs are saved before.
        retry: clear failures and cancellations first.
        stop_sd: save and end runs whose loss lies so many standard deviations above their forecast.
        show_progress: show progress, as a live table on a terminal; else only events are printed.
        num_smallest_first: how many of the shortest runs to start with; then the longest follow, which ends sooner.
        tell: turns an event, such as the end of a run, into the line that is printed; none for None.
        command: replaces the program that executes a run.

    Raises:
        SweepError, ConfigError: the sweep cannot be planned, its runs would fail a check (`sweeps.plan.checks`), or its
            directory cannot be written; nothing was created.
    """
    started = time.time()
    loaded, cards = load_plan(sweep, root, "local")
    runs = [card.run for card in cards]
    machine = local_machine(runs, devices=devices)
    prepare_launch(loaded, runs, retry=retry, stop_sd=stop_sd)
    deadline = float("inf")
    if hours is not None:
        # Runs stop early enough to save before the time is up, but at most half of a short time is kept for that.
        deadline = started + 3600 * hours - min(max(map(grace_period_s, runs)), 1800 * hours)
    shortest = runs[::-1][:num_smallest_first]
    waiting = [*shortest, *(run for run in runs if run not in shortest)]
    worker = Worker(sweep=loaded, machine=machine, waiting=waiting, command=command, deadline=deadline)
    with _progress_display(lambda: sweep_status(loaded, cards), show_progress, tell) as report:
        return run_worker(worker, report)


def prepare_launch(sweep: Sweep, runs: Sequence[Run], *, retry: bool, stop_sd: float | None = None) -> None:
    """Check the runs that a launch would start, create the sweep's directory, and record attempts that were lost.

    Args:
        retry, stop_sd: as in `launch`; the second holds for workers anywhere until the next launch.
    """
    states = read_states(sweep, runs)
    start = [each.startable or (retry and each.state in ENDED_BY_HAND) for each in states]
    raise_on_problems(sweep, list(itertools.compress(runs, start)))
    prepare_directory(sweep, runs)
    set_stop(sweep, stop_sd)
    lost = {each.worker.facts.get("job_id") for each in states if each.state == "lost" and each.worker}
    job_states = slurm.job_states([str(job_id) for job_id in lost if job_id])
    for each in states:
        if each.state == "lost" or (retry and each.state in ENDED_BY_HAND):
            with contextlib.suppress(UserError, OSError):  # a damaged directory, which the worker reports
                _close_attempt(each, job_states, retry=retry)


def _close_attempt(found: RunState, job_states: Mapping[str, str], *, retry: bool) -> None:
    """Record the end of an attempt whose worker is gone and, with `retry`, clear failure and cancellation."""
    record = found.record
    before, lock = record.claimant(), Lock(record.claim)
    if record.is_held() or not lock.take():
        return
    try:
        record_lost_attempt(record, before, job_states.get(str(before.facts.get("job_id"))) if before else None)
        if retry:
            record.cancelled.unlink(missing_ok=True)
            if record.read_status().state in ("failed", "diverged", "off-track"):
                clear_failure(record)
    finally:
        lock.release()


def load_plan(sweep: Sweep | str | Path, root: Path, place: Place | None = None) -> tuple[Sweep, list[CostCard]]:
    """Load a sweep with the cost cards of its runs, longest first; `place` replaces what the file says."""
    loaded = sweep if isinstance(sweep, Sweep) else load_sweep(sweep, root)
    loaded = loaded if place is None else loaded.at(place)
    cards = cost_cards(loaded, plan(loaded))
    return loaded, sorted(cards, key=lambda card: (-card.device_hours, -card.flops_executed))


@contextmanager
def _progress_display(
    get_status: Callable[[], SweepStatus], show_progress: bool, tell: Callable[[Event], str | None]
) -> Iterator[Callable[[Worker], None]]:
    """Yield the progress callback of `run_worker`: the status on a terminal, else lines, or only events."""
    console, next_look = new_console(), 0.0
    live = Live(console=console, auto_refresh=False, transient=True) if show_progress and console.is_terminal else None

    def report(worker: Worker) -> None:
        nonlocal next_look
        print_events(worker, tell)  # above the table
        started = time.monotonic()
        if not show_progress or started < next_look:
            return
        status = get_status()
        now = time.monotonic()
        next_look = now + max(LIVE_INTERVAL_S if live else LOG_INTERVAL_S, (now - started) / LOOK_SHARE)
        if live is None:
            print(progress_line(status), flush=True)
        else:
            live.update(status_view(status, console.width), refresh=True)

    with live or contextlib.nullcontext():
        yield report


def cancel(sweep: Sweep, run_ids: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Mark runs as cancelled; workers on any machine let those that are running save and exit, and start none of them.

    Pending Slurm jobs are cancelled if no run is left for them.

    Args:
        run_ids: runs to cancel; by default all that are planned or executed. Those that have ended stay as they are.

    Returns:
        One sentence for each run that was stopped, and one for each that could not be; none if no worker is active.
    """
    if not sweep.directory.is_dir():
        raise SweepError(f"sweep '{sweep.name}' was never launched under {sweep.root}; there is nothing to cancel")
    runs = plan(sweep)
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in runs]
    startable = {run.run_id for run, record in zip(runs, records, strict=True) if read_state(run, record).startable}
    records += [RunRecord(sweep.run_dir(run_id)) for run_id in unplanned_runs(sweep, runs)]
    waiting = []
    if slurm.submissions_file(sweep).is_file():
        waiting = [each.info.job_id for each in live_jobs(sweep, slurm.jobs()) if each.info.phase == "pending"]
    active = {record.name for record in records if record.is_held() or record.is_claimed()}
    if not waiting and not active:
        return [], []
    done: list[str] = []
    failed: list[str] = []
    for record in records:
        if (run_ids and record.name not in run_ids) or record.name not in startable | active:
            continue
        write_text(record.cancelled, "")
        if record.name not in active:
            done.append(f"{record.name}: will not start before `launch --retry`")
        elif record.is_claimed():
            done.append(f"{record.name}: told to save and end")
        else:
            host = record.read_status().host
            failed.append(f"{record.name}: its worker is gone; end its process on {host} by hand")
    if waiting and all(RunRecord(sweep.run_dir(name)).cancelled.exists() for name in startable):
        slurm.command("scancel", "--quiet", *waiting)
    return done, failed
