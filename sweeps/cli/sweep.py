"""Verbs that inspect a sweep and change none of its runs: status, logs, collect."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aimscale.harness.run.directory import EXIT_PREEMPTED
from aimscale.harness.run.files import check_file, read_file
from aimscale.sweeps.cli.layout import new_console
from aimscale.sweeps.cli.options import (
    EXIT_INTERRUPTED,
    AsJson,
    Root,
    SweepName,
    collect_rows,
    name_anywhere,
    print_next,
    select_run_ids,
)
from aimscale.sweeps.cli.status_view import pause_s, show_status, status_view
from aimscale.sweeps.planning import DEFAULT_ROOT
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.planned_sweep import PlannedSweep, plan_sweep
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.run_state import State
from aimscale.sweeps.sweep_status import SweepStatus, sweep_status

SLURM_INTERVAL_S = 30.0
"""Interval between questions to Slurm, s."""
MAX_IDLE_LOOKS = 4
"""Number of looks in a row that may find no worker: between two runs, a worker holds none for a moment."""
TAIL_LINES = 20
"""Number of lines of a log from which `logs --follow` starts."""


def status(
    sweep: SweepName,
    root: Root = DEFAULT_ROOT,
    as_json: AsJson = False,
    every_run: Annotated[bool, typer.Option("--all", help="List each run, however many there are.")] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Refresh until nothing is executed any more. Exit code 0: all runs are finished; 1: one failed for "
            "good; 75: some are left.",
        ),
    ] = False,
) -> None:
    """Summarise a sweep: states, progress, time left, what needs attention, and its runs or groups of runs."""
    planned = plan_sweep(sweep, root)
    poll = _status_poller(planned)
    code = _wait(poll, every_run) if wait else 0
    current = poll()
    if as_json:
        typer.echo(json.dumps(asdict(current), indent=1))
    else:
        console = new_console()
        console.print(status_view(current, console.width, every_run=every_run), highlight=False, soft_wrap=True)
        print_next_step(current, planned.sweep, sweep, root)
    if code:
        raise typer.Exit(code)


def _status_poller(planned: PlannedSweep) -> Callable[[], SweepStatus]:
    """Return a function that looks at all runs; it asks Slurm at most every `SLURM_INTERVAL_S`."""
    asked = float("-inf")
    jobs: dict[str, slurm.JobInfo] | None = None

    def poll() -> SweepStatus:
        nonlocal jobs, asked
        if time.monotonic() - asked > SLURM_INTERVAL_S:
            answer, asked = slurm.sweep_jobs(planned.sweep), time.monotonic()
            if answer is None:
                typer.echo("Slurm does not answer; its jobs are shown as they were, if they are known", err=True)
            jobs = jobs if answer is None else answer
        planned.look()
        return sweep_status(planned, jobs)

    return poll


def _wait(poll: Callable[[], SweepStatus], every_run: bool) -> int:
    """Show the status until nothing is executed; return the exit code."""
    num_idle, counts = 0, dict[str, int]()
    try:
        with show_status(every_run=every_run, on_screen=True) as (show, is_live):
            while True:
                started = time.monotonic()
                current = poll()
                if is_live or current.counts != counts:
                    show(current)
                    counts = current.counts
                num_idle = 0 if current.is_active else num_idle + 1
                if num_idle > MAX_IDLE_LOOKS or current.is_finished:
                    return _exit_code(current)
                time.sleep(pause_s(started))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _exit_code(status: SweepStatus) -> int:
    """Return 0 if all runs are finished, 1 if one failed for good, 75 if some are left."""
    if status.is_finished:
        return 0
    return 1 if any(line.state.needs_person for line in status.runs) else EXIT_PREEMPTED


def print_next_step(status: SweepStatus, sweep: Sweep, name: str, root: Path, *options: str) -> None:
    """Print the next command: logs of a failed run, else the verb that continues the sweep, named as it was typed."""
    for line in status.runs:
        has_failed = line.state.needs_person or line.state is State.PAUSED
        if has_failed and line.status.reason_class and line.log:
            return print_next("logs", name, root, line.run_id)
    if "finished" in status.counts and status.counts.keys() <= {"finished", "damaged"}:
        return print_next("report", name_anywhere(sweep, name, root))
    if status.is_active:
        return print_next("status", name, root, "--wait")
    retry = ["--retry"] if all(line.state is State.FINISHED or line.state.retryable for line in status.runs) else []
    return print_next("launch", name, root, *options, *retry)


def logs(
    sweep: SweepName,
    run: Annotated[str, typer.Argument(help="A run's id, or any part that no other id has.")],
    root: Root = DEFAULT_ROOT,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more, over all attempts, until the run is over or Ctrl-C.")
    ] = False,
) -> None:
    """Print the log of one run's last attempt, or follow it from its last lines."""
    planned = plan_sweep(sweep, root)
    loaded = planned.sweep
    name, *others = select_run_ids(planned, [run if loaded.run_dir(run).is_dir() else f"*{run}*"])
    if others:
        raise SweepError(f"'{run}' is part of {1 + len(others)} run ids ({name}, {others[0]}, ...); give more of it")
    record = RunRecord(loaded.run_dir(name))
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(_status_poller(planned.of_run(name)), record)
    elif (path := record.last_log()) is None:
        raise SweepError(f"{name} has no log yet: no attempt has started")
    else:
        typer.echo(read_file(path).decode(errors="replace"), nl=False)


def _follow(poll: Callable[[], SweepStatus], record: RunRecord) -> None:
    """Print the last lines of a run's log and what is added, attempt after attempt, until nobody executes it."""
    path, file, num_idle = None, None, 0
    while num_idle <= MAX_IDLE_LOOKS:
        current = poll()
        num_idle = 0 if current.is_active else num_idle + 1
        if file is not None:
            typer.echo(file.read(), nl=False)
        if (newest := record.last_log()) is not None and newest != path:
            typer.echo(f"--- {newest.stem} of {record.name}")
            check_file(newest)
            file = newest.open(errors="replace")
            typer.echo("".join(deque(file, None if path else TAIL_LINES)), nl=False)
            path = newest
        time.sleep(0.5)
    reason = current.runs[0].status.reason
    typer.echo(f"--- {record.name} is {current.runs[0].state}{f' ({reason})' if reason else ''}")


def collect(sweep: SweepName, root: Root = DEFAULT_ROOT) -> None:
    """Gather every run's rows into one typed table (Parquet and CSV), and score registered forecasts.

    Verbs that are given a sweep do this themselves.
    """
    planned = plan_sweep(sweep, root)
    collected = collect_rows(planned)
    if collected.num_baselines:
        typer.echo(f"{collected.num_baselines} baselines: {collected.table.with_name('baselines.parquet')}")
    _score_forecasts(collected.table)
    typer.echo(f"{collected.num_complete} of {collected.num_rows} rows have results: {collected.table}")
    print_next("report", name_anywhere(planned.sweep, sweep, root))


def _score_forecasts(table: Path) -> None:
    """Score the sweep's registered forecasts, write the scores beside the results, and say how they fared."""
    register = table.with_name("forecasts.jsonl")
    if not register.is_file():
        return
    from aimscale.analysis.forecasts.forecast import SCORES, score_words, scores
    from aimscale.analysis.table.read import read_table

    scored = scores(register, read_table(table))
    scored.to_csv(table.with_name(SCORES), index=False)
    typer.echo(f"forecasts: {score_words(scored)}: {table.with_name(SCORES)}")
