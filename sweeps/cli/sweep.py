"""Verbs that inspect a sweep and change none of its runs: status, logs, collect."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.live import Live

from aimscale.harness.run import lock
from aimscale.harness.run.directory import EXIT_PREEMPTED
from aimscale.sweeps.cli.options import (
    EXIT_INTERRUPTED,
    ROOT,
    AsJson,
    Root,
    SweepName,
    print_next,
    report_name,
    select_run_ids,
)
from aimscale.sweeps.plan import costs
from aimscale.sweeps.plan.planner import plan as plan_runs
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.table import collection
from aimscale.sweeps.table.collection import CollectResult
from aimscale.sweeps.table.status import ENDED_STATES, SweepStatus, sweep_status
from aimscale.sweeps.table.status_view import FAILED_STATES, Shown, progress_line, status_view
from aimscale.sweeps.table.views import new_console

LOOK_INTERVAL_S, LOOK_SHARE = 2.0, 0.05
"""Interval between looks at all runs, s, and maximum share of the time that they may take."""
SLURM_INTERVAL_S = 30.0
"""Interval between questions to Slurm, s."""
MAX_IDLE_LOOKS = 4
"""Number of looks in a row that may find no worker: between two runs, a worker holds none for a moment."""
TAIL_LINES = 20
"""Number of lines of a log from which `logs --follow` starts."""


def status(
    sweep: SweepName,
    root: Root = ROOT,
    as_json: AsJson = False,
    every_run: Annotated[bool, typer.Option("--all", help="List each run, however many there are.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="List only runs that failed, with their logs.")] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Refresh until nothing is executed any more. Exit code 0: all runs are finished; 1: one failed for "
            "good; 75: some are left.",
        ),
    ] = False,
    hours: Annotated[float | None, typer.Option("--time-limit", min=0, help="Hours to wait.")] = None,
) -> None:
    """Summarise a sweep: states, progress, time left, what needs attention, and its runs or groups of runs."""
    loaded = load_sweep(sweep, root)
    look = _looker(loaded)
    shown: Shown = "failed" if failed else "all" if every_run else "auto"
    code = 0
    if wait:
        code = _wait(look, shown, time.monotonic() + 3600 * hours if hours is not None else float("inf"))
    found = look()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
    else:
        console = new_console()
        console.print(status_view(found, console.width, shown), highlight=False, soft_wrap=True)
        verb, *more = _next_command(found)
        print_next(verb, report_name(loaded, sweep, root) if verb == "report" else sweep, root, *more)
    if code:
        raise typer.Exit(code)


def _looker(sweep: Sweep, run_id: str | None = None) -> Callable[[], SweepStatus]:
    """Return a function that inspects all runs, or one; it asks Slurm at most every `SLURM_INTERVAL_S`."""
    runs = [run for run in plan_runs(sweep) if run_id in (None, run.run_id)]
    cards, asked = costs.cost_cards(sweep, runs), float("-inf")
    jobs: dict[str, slurm.JobInfo] | None = None

    def look() -> SweepStatus:
        nonlocal jobs, asked
        if slurm.submissions_file(sweep).is_file() and time.monotonic() - asked > SLURM_INTERVAL_S:
            answer, asked = slurm.try_list_jobs(), time.monotonic()
            if answer is None:
                typer.echo("Slurm does not answer; its jobs are shown as they were, if they are known", err=True)
            jobs = jobs if answer is None else answer
        return sweep_status(sweep, runs, cards, jobs)

    return look


def _wait(look: Callable[[], SweepStatus], shown: Shown, deadline: float) -> int:
    """Show the status until nothing is executed, or until the deadline; return the exit code."""
    console, num_idle = new_console(), 0
    states: dict[str, int] = {}
    live = Live(console=console, auto_refresh=False, screen=True) if console.is_terminal else None
    try:
        with live or contextlib.nullcontext():
            while True:
                started = time.monotonic()
                found = look()
                if live:
                    live.update(status_view(found, console.width, shown), refresh=True)
                elif found.counts != states:
                    typer.echo(progress_line(found), err=True)
                    states = found.counts
                num_idle = 0 if found.is_active else num_idle + 1
                if num_idle > MAX_IDLE_LOOKS or found.counts.keys() <= {"finished"}:
                    return _exit_code(found)
                if time.monotonic() >= deadline:
                    return EXIT_PREEMPTED
                time.sleep(max(LOOK_INTERVAL_S, (time.monotonic() - started) / LOOK_SHARE))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _exit_code(found: SweepStatus) -> int:
    """Return 0 if all runs are finished, 1 if one failed for good, 75 if some are left."""
    if found.counts.keys() <= {"finished"}:
        return 0
    return 1 if any(state in found.counts for state in FAILED_STATES) else EXIT_PREEMPTED


def _next_command(found: SweepStatus) -> tuple[str, ...]:
    """Return the next verb and its options: logs of a failed run, else the verb that continues the sweep."""
    ended = ("failed", "diverged", "paused")
    in_vain = [line.run_id for line in found.runs if line.state in ended and line.status.reason_class and line.log]
    if in_vain:
        return "logs", in_vain[0]
    if found.counts.keys() <= {"finished", "damaged"}:
        return ("report",)
    if found.is_active:
        return "status", "--wait"
    return ("launch", "--retry") if found.counts.keys() <= {"finished", "cancelled", "off-track"} else ("launch",)


def logs(
    sweep: SweepName,
    run: Annotated[str, typer.Argument(help="A run's id, or any part that no other id has.")],
    root: Root = ROOT,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more, over all attempts, until the run is over or Ctrl-C.")
    ] = False,
) -> None:
    """Print the log of one run's last attempt, or follow it from its last lines."""
    loaded = load_sweep(sweep, root)
    name, *others = select_run_ids(loaded, [run if loaded.run_dir(run).is_dir() else f"*{run}*"])
    if others:
        raise SweepError(f"'{run}' is part of {1 + len(others)} run ids ({name}, {others[0]}, ...); give more of it")
    record = RunRecord(loaded.run_dir(name))
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(loaded, record)
        return
    if (path := record.last_log()) is None:
        raise SweepError(f"{name} has no log yet; it was never started")
    with path.open(errors="replace") as file:
        typer.echo(file.read(), nl=False)


def _follow(sweep: Sweep, record: RunRecord) -> None:
    """Print the last lines of a run's log and what is added, attempt after attempt, until nobody executes it."""
    if all(run.run_id != record.name for run in plan_runs(sweep)):
        raise SweepError(f"{record.name} is no longer planned by {sweep.source}; print its log without --follow")
    look, path, file, num_idle = _looker(sweep, record.name), None, None, 0
    while True:
        end = _end(sweep, look())
        num_idle = 0 if end is None else num_idle + 1
        if file is not None:
            typer.echo(file.read(), nl=False)
        if (newest := record.last_log()) is not None and newest != path:
            typer.echo(f"--- {newest.stem} of {record.name}")
            path, file = newest, newest.open(errors="replace") if path else _open_tail(newest)
        elif num_idle > MAX_IDLE_LOOKS:
            typer.echo(f"--- {end}")
            return
        else:
            time.sleep(0.5)


def _open_tail(path: Path) -> TextIO:
    """Open a log at its last lines."""
    num_lines = path.read_bytes().count(b"\n")
    file = path.open(errors="replace")
    for _ in range(num_lines - TAIL_LINES):
        file.readline()
    return file


def _end(sweep: Sweep, found: SweepStatus) -> str | None:
    """Say how the one run of a status stands, if it is over or no worker of the sweep can take it; else None."""
    (line,) = found.runs
    reason = f" ({line.status.reason})" if line.status.reason else ""
    if line.state in ENDED_STATES:
        return f"{line.run_id} is {line.state}{reason}"
    has_workers = any(lock.is_held(path) for path in sweep.runs_dir.glob("*/claim"))
    return None if found.is_active or has_workers else f"{line.run_id} is {line.state}, and no worker is there{reason}"


def collect(sweep: SweepName, root: Root = ROOT) -> None:
    """Gather every run's rows into one typed table (Parquet and CSV), and score registered forecasts.

    Verbs that are given a sweep do this themselves.
    """
    loaded = load_sweep(sweep, root)
    found = _collect(loaded)
    if found.num_baselines:
        typer.echo(f"{found.num_baselines} baselines: {found.table.with_name('baselines.parquet')}")
    _score_forecasts(found.table)
    typer.echo(f"{found.num_complete} of {found.num_rows} rows have results: {found.table}")
    print_next("report", report_name(loaded, sweep, root))


def fresh_table(sweep: Sweep) -> Path:
    """Collect a sweep and return its table; one whose runs are not here, or that cannot be written, is read as it is.

    Raises:
        SweepError: there are neither runs nor a table.
    """
    table = sweep.directory / "results.parquet"
    if table.is_file() and not (sweep.runs_dir.is_dir() and os.access(sweep.directory, os.W_OK)):
        typer.echo(f"{table} is read as it is: its runs are not here, or its folder cannot be written", err=True)
        return table
    return _collect(sweep).table


def _collect(sweep: Sweep) -> CollectResult:
    """Collect a sweep and say on the error stream what is left out."""
    runs = plan_runs(sweep)
    found = collection.collect(sweep, runs, costs.cost_cards(sweep, runs))
    for why in found.damaged.values():
        typer.echo(f"skipped: {why}", err=True)
    if found.unplanned:
        what = f"{len(found.unplanned)} run directories of another sweep file or version"
        typer.echo(f"left out: {what}, such as {found.unplanned[0]}", err=True)
    return found


def _score_forecasts(table: Path) -> None:
    """Score the sweep's registered forecasts, write the scores beside the results, and say how they fared."""
    register = table.with_name("forecasts.jsonl")
    if not register.is_file():
        return
    from aimscale.analysis.forecasts.registry import SCORES, score_words, scores
    from aimscale.analysis.table.read import read_table

    found = scores(register, read_table(table))
    found.to_csv(table.with_name(SCORES), index=False)
    typer.echo(f"forecasts: {score_words(found)}: {table.with_name(SCORES)}")
