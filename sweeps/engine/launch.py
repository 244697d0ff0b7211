"""Launch and cancellation of a sweep; runs are executed on this machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Group
from rich.live import Live

from aimscale.aim.errors import UserError
from aimscale.harness.run.config import parse, read_yaml
from aimscale.harness.run.files import write_text
from aimscale.harness.run.lock import Lock
from aimscale.sweeps.engine.devices import local_machine
from aimscale.sweeps.engine.processes import Command
from aimscale.sweeps.engine.worker import LaunchResult, Worker, print_events, run_worker
from aimscale.sweeps.plan.checks import raise_on_problems
from aimscale.sweeps.plan.costs import CostCard, cost_cards, grace_period_s
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.plan.sweepfile import SWEEP_FILE, Sweep, SweepError, SweepFile, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.attempts import clear_failure, record_lost_attempt
from aimscale.sweeps.state.decision import Decision, decide
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.sweep_dir import prepare_directory, unplanned_runs
from aimscale.sweeps.table.status import SweepStatus, sweep_status
from aimscale.sweeps.table.status_view import progress_bar, progress_line, runs_table
from aimscale.sweeps.table.views import new_console

LOG_INTERVAL_S = 30.0
LIVE_INTERVAL_S = 0.5


def launch(
    sweep: Sweep | str | Path,
    root: Path = Path("aimscale-runs"),
    *,
    devices: int | None = None,
    hours: float | None = None,
    retry: bool = False,
    show_progress: bool = True,
    command: Command | None = None,
) -> LaunchResult:
    """Execute what is missing, resume what died and skip what is done; return when nothing is left to start.

    Any number of launches on machines that share the sweep's folder, and of jobs on Slurm, execute each run once
    between them. A repeated call continues where the last one stopped.

    Args:
        sweep: a sweep or its name.
        devices: number of GPUs to use, or of processes on a machine without GPUs; by default all, or as many as the
            cores can feed.
        hours: time until this machine is gone; all runs are saved before.
        retry: clear cancellations and failures first.
        show_progress: show progress, as a live table on a terminal; else only events are printed.
        command: replaces the program that executes a run.

    Raises:
        SweepError, ConfigError: the sweep cannot be planned, its runs would fail a check (`sweeps.plan.checks`), or its
            directory cannot be written; nothing was created.
    """
    started = time.time()
    loaded, runs, cards = load_plan(sweep, root)
    machine = local_machine(runs, devices=devices)
    prepare_launch(loaded, runs, retry=retry)
    deadline = float("inf")
    if hours is not None:
        # Runs stop early enough to save before the time is up, but at most half of a short time is kept for that.
        deadline = started + 3600 * hours - min(max(grace_period_s(run) for run in runs), 1800 * hours)
    worker = Worker(sweep=loaded, machine=machine, waiting=list(runs), command=command, deadline=deadline)
    with _progress_display(lambda: sweep_status(loaded, runs, cards), show_progress) as report:
        result = run_worker(worker, report)
    return replace(result, unplanned=unplanned_runs(loaded, runs))


def prepare_launch(sweep: Sweep, runs: Sequence[Run], *, retry: bool) -> None:
    """Check the runs that a launch would start, create the sweep's directory and, with `retry`, clear cancellations.

    Raises:
        SweepError, ConfigError: as in `launch`.
    """
    raise_on_problems(sweep, [run for run in runs if launch_decision(sweep, run, retry=retry).startable])
    prepare_directory(sweep, runs)
    for run in runs:
        record = RunRecord(sweep.run_dir(run.run_id))
        if retry:
            record.cancelled.unlink(missing_ok=True)
        _close_lost_attempt(record, retry=retry)


def launch_decision(sweep: Sweep, run: Run, *, retry: bool) -> Decision:
    """Decide on a run as a launch will after it has, with `retry`, cleared cancellations and failures."""
    decision = decide(run, RunRecord(sweep.run_dir(run.run_id)))
    is_freed = retry and decision.verdict in ("cancelled", "failed")
    return replace(decision, verdict="resume") if is_freed else decision


def _close_lost_attempt(record: RunRecord, *, retry: bool) -> None:
    """Record the end of an attempt whose worker is gone and, with `retry`, clear a failure.

    Damaged directories are skipped.
    """
    ended = ("failed", "diverged")
    with contextlib.suppress(UserError, OSError):
        if record.read_status().state in ("queued", "running", *(ended if retry else ())):
            before, lock = record.claimant(), Lock(record.claim)
            if not record.is_held() and lock.take():
                record_lost_attempt(record, before, slurm.job_state)
                if retry and record.read_status().state in ended:
                    clear_failure(record)
            lock.release()


def load_plan(sweep: Sweep | str | Path, root: Path) -> tuple[Sweep, list[Run], list[CostCard]]:
    """Load a sweep with its runs, longest first, and their cost cards.

    Raises:
        SweepError, ConfigError: the sweep cannot be planned.
    """
    loaded = sweep if isinstance(sweep, Sweep) else load_sweep(sweep, root)
    runs = plan(loaded)
    _refuse_new_smallest_budget(loaded, runs)
    cards = cost_cards(loaded, runs)
    order = sorted(range(len(runs)), key=lambda i: -cards[i].device_hours)  # so that none is left for the end
    return loaded, [runs[i] for i in order], [cards[i] for i in order]


def _refuse_new_smallest_budget(sweep: Sweep, runs: Sequence[Run]) -> None:
    """Raise if a new smallest budget would change the ids of existing runs, because the recipe depends on it.

    Raises:
        SweepError: it would.
    """
    stored, budget = sweep.directory / SWEEP_FILE, None
    with contextlib.suppress(UserError, OSError):  # never launched, or by a version with other keys
        budget = min(parse(SweepFile, read_yaml(stored), str(stored)).budgets, default=None)
    if budget is None or not sweep.file.budgets or budget == min(sweep.file.budgets):
        return
    existing = {path.parent.name for path in sweep.runs_dir.glob("*/config.yaml")} - {run.run_id for run in runs}
    if changed := [run for run in plan(sweep, recipe_budget=budget) if run.run_id in existing]:
        training = changed[0].config.training
        kept = f"optimiser.batch_size: {training.optimiser.batch_size}"
        kept += f", schedule.warmup_images: {training.schedule.warmup_images}"
        raise SweepError(
            f"{sweep.source}: the new smallest budget changes what recipe '{sweep.file.recipe}' trains in "
            f"{len(changed)} runs, such as {changed[0].run_id}; write `base: {{{kept}}}` to keep them, or rename the "
            f"sweep"
        )


@contextmanager
def _progress_display(get_status: Callable[[], SweepStatus], show_progress: bool) -> Iterator[Callable[[Worker], None]]:
    """Yield the progress callback of `run_worker`: a live table on a terminal, else lines, or only events."""
    console, shown = new_console(), 0.0
    live = Live(console=console, auto_refresh=False, transient=True) if show_progress and console.is_terminal else None
    every = LIVE_INTERVAL_S if live else LOG_INTERVAL_S

    def report(worker: Worker) -> None:
        nonlocal shown
        print_events(worker)  # above the table
        if not show_progress or time.time() - shown < every:
            return
        shown = time.time()
        status = get_status()
        if live is None:
            print(progress_line(status), flush=True)
            return
        active = {active_run.run.run_id for active_run in worker.active}
        lines, bar = tuple(line for line in status.runs if line.run_id in active), progress_bar(status, console.width)
        live.update(Group(runs_table(lines, console.width), bar) if lines else bar, refresh=True)

    with live or contextlib.nullcontext():
        yield report


def cancel(sweep: Sweep, runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Mark runs that have not ended as cancelled; workers on any machine let those that are running save and exit.

    No worker starts them before a launch with `retry`. Pending Slurm jobs are cancelled if no run is left for them.

    Returns:
        One sentence for each run that was stopped, and one for each that could not be; none if no worker is active.

    Raises:
        SweepError: the sweep was never launched, or Slurm does not answer.
    """
    if not sweep.directory.is_dir():
        raise SweepError(f"sweep '{sweep.name}' was never launched under {sweep.root}; there is nothing to cancel")
    decisions = [decide(run, RunRecord(sweep.run_dir(run.run_id))) for run in plan(sweep)]
    waiting = []
    if slurm.submissions_file(sweep).is_file():
        from aimscale.sweeps.slurm.submit import live_jobs  # submitit is slow to import

        waiting = [each.info.job_id for each in live_jobs(sweep, slurm.jobs()) if each.info.phase == "pending"]
    if not waiting and all(decision.verdict != "running" for decision in decisions):
        return [], []
    done: list[str] = []
    failed: list[str] = []
    chosen = {run.run_id for run in runs}
    for decision in decisions:
        record = decision.record
        if decision.run.run_id not in chosen or not (decision.startable or decision.verdict == "running"):
            continue
        write_text(record.cancelled, "")
        if decision.verdict != "running":
            done.append(f"{record.name}: will not start before `launch --retry`")
        elif record.is_claimed():
            done.append(f"{record.name}: told to save and end")
        else:
            failed.append(f"{record.name}: its worker is gone; end its process by hand ({decision.why})")
    if waiting and all(decision.record.cancelled.exists() for decision in decisions if decision.startable):
        slurm.command("scancel", "--quiet", *waiting)
    return done, failed
