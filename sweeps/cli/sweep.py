"""Verbs that inspect a sweep and change none of its runs: status, logs, collect."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.cli.options import ROOT, AsJson, Root, SweepName, print_next, report_name, select_run_ids
from aimscale.sweeps.plan import costs
from aimscale.sweeps.plan.planner import plan as plan_runs
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.table import collection, views
from aimscale.sweeps.table.collection import CollectResult
from aimscale.sweeps.table.status import SweepStatus, sweep_status

ENDED = ("finished", "failed", "diverged")


def status(
    sweep: SweepName,
    root: Root = ROOT,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """One line per run: state, loss, images/s, MFU, time left, why it failed."""
    loaded = load_sweep(sweep, root)
    runs = plan_runs(loaded)
    cards = costs.cost_cards(loaded, runs)

    def get_status() -> SweepStatus:
        is_submitted = slurm.submissions_file(loaded).is_file()
        jobs = slurm.try_list_jobs() if is_submitted else None
        if is_submitted and jobs is None and not watch:
            typer.echo("Slurm does not answer; runs that wait there are shown as unfinished or dead", err=True)
        return sweep_status(loaded, runs, cards, jobs)

    if as_json:
        typer.echo(json.dumps(asdict(get_status()), indent=1))
    elif watch:
        views.watch(get_status)
    else:
        console, found = views.new_console(), get_status()
        console.print(views.status_table(found, console.width), highlight=False, soft_wrap=True)
        verb, *more = _next_command(found)
        print_next(verb, report_name(loaded, sweep, root) if verb == "report" else sweep, root, *more)


def _next_command(found: SweepStatus) -> tuple[str, ...]:
    """Return the next verb and its options: logs of a failed run, else the verb that continues the sweep."""
    ended = ("failed", "diverged", "unfinished")
    in_vain = [line.run_id for line in found.runs if line.state in ended and line.status.reason_class and line.log]
    if in_vain:
        return "logs", in_vain[0]
    states = {line.state for line in found.runs}
    if states <= {"finished", "damaged"}:
        return ("report",)
    if states & {"running", "starting", "queued"}:
        return "status", "--watch"
    return ("launch",)


def logs(
    sweep: SweepName,
    run: Annotated[str, typer.Argument(help="A run's id, or any part that no other id has.")],
    root: Root = ROOT,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the run ends or Ctrl-C.")] = False,
) -> None:
    """Print or follow the log of one run's last attempt."""
    loaded = load_sweep(sweep, root)
    name, *others = select_run_ids(loaded, [run])
    if others:
        raise SweepError(f"'{run}' is part of {1 + len(others)} run ids ({name}, {others[0]}, ...); give more of it")
    record = RunRecord(loaded.run_dir(name))
    path = record.last_log()
    if path is None:
        raise SweepError(f"{name} has no log yet; it was never started")
    with path.open(errors="replace") as file:
        typer.echo(file.read(), nl=False)
        try:
            while follow and record.last_log() == path:
                piece = file.read()
                if piece:
                    typer.echo(piece, nl=False)
                elif record.read_status().state in ENDED:
                    return
                else:
                    time.sleep(0.5)
        except KeyboardInterrupt:
            return


def collect(sweep: SweepName, root: Root = ROOT) -> None:
    """Gather every run's rows into one typed table (Parquet and CSV), and score registered forecasts.

    Verbs that are given a sweep do this themselves.
    """
    loaded = load_sweep(sweep, root)
    found = _collect(loaded)
    if found.num_baselines:
        typer.echo(f"{found.num_baselines} baselines: {found.table.with_name('baselines.parquet')}")
    for line in _scored_forecasts(found.table):
        typer.echo(line)
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


def _scored_forecasts(table: Path) -> list[str]:
    """Score the sweep's registered forecasts, write the scores beside the results, and return one line each."""
    register = table.with_name("forecasts.jsonl")
    if not register.is_file():
        return []
    from aimscale.analysis.forecasts.registry import SCORES, read_register, score_words, scores
    from aimscale.analysis.table.read import read_table

    found = scores(register, read_table(table))
    found.to_csv(table.with_name(SCORES), index=False)
    waiting = int((found["num_rows"] == 0).sum())
    last = f"{len(read_register(register))} registered forecasts, {waiting} not measured yet: {table.with_name(SCORES)}"
    return [*(f"forecast: {line}" for line in score_words(found)), last]
