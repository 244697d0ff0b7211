"""Verbs that start and stop the runs of a sweep: launch and cancel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, ROOT, Root, SweepName, print_next, select_run_ids
from aimscale.sweeps.engine import launch as engine
from aimscale.sweeps.engine.devices import local_machine
from aimscale.sweeps.engine.worker import LaunchResult
from aimscale.sweeps.plan.checks import raise_on_problems
from aimscale.sweeps.plan.sweepfile import SweepError, load_sweep
from aimscale.sweeps.state.decision import RunState
from aimscale.sweeps.state.sweep_dir import unplanned_runs
from aimscale.sweeps.table.views import KeyValue, key_value_text, new_console

Runs = Annotated[list[str] | None, typer.Argument(help="Run ids or parts of them; all runs by default.")]
Place = Literal["local", "here", "slurm"]


def launch(
    sweep: SweepName,
    root: Root = ROOT,
    on: Annotated[
        Place,
        typer.Option(
            help="This machine, with a live table; `here`: one worker of many, under any scheduler; or Slurm."
        ),
    ] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="GPUs to use, or processes where there is none; by default all.")
    ] = None,
    hours: Annotated[
        float | None, typer.Option("--for", min=0.001, help="Hours until this machine is gone; runs save before that.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try runs again that failed for good or diverged.")] = False,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Launch uncommitted code; it is copied and recorded.")
    ] = False,
) -> None:
    """Start what is missing, resume what died, evaluate what lacks it, skip what is done.

    Launch as often and on as many machines as you like: each run is executed once.
    """
    for option, value, *places in (
        ("--devices", devices, "local", "here"),
        ("--for", hours, "here"),
        ("--allow-dirty", allow_dirty, "slurm"),
    ):
        if value and on not in places:
            raise SweepError(f"{option} has no meaning with --on {on}; it is for --on {' or '.join(places)}")
    if on == "slurm":
        skipped = _launch_slurm(sweep, root, retry=retry, dry_run=dry_run, allow_dirty=allow_dirty)
    elif dry_run:
        skipped = _print_local(sweep, root, devices, retry=retry)
    if on == "slurm" and not dry_run and any(each.startable or each.is_active for each in skipped):
        print_next("status", sweep, root, "--watch")
        return
    if on == "slurm" or dry_run:
        _print_next(LaunchResult(skipped=skipped), sweep, root, on, *(["--retry"] if retry else []))
        return
    result = engine.launch(sweep, root, devices=devices, hours=hours, retry=retry, show_progress=on == "local")
    print_result(result)
    _print_next(result, sweep, root, on)
    if result.stopped_by:
        raise typer.Exit(EXIT_INTERRUPTED)
    if failed_runs(result) or any(each.state == "damaged" for each in result.skipped):
        raise typer.Exit(1)


def _print_next(result: LaunchResult, sweep: str, root: Path, on: Place, *more: str) -> None:
    """Print the next command: launch if runs are left, logs of a failed run, else status or collect."""
    if result.interrupted or any(each.startable for each in result.skipped):
        print_next("launch", sweep, root, *(["--on", on] if on != "local" else []), *more)
    elif failed := failed_runs(result):
        print_next("logs", sweep, root, failed[0])
    else:
        is_over = all(decision.state in ("finished", "cancelled") for decision in result.skipped)
        print_next("collect" if is_over else "status", sweep, root)


def failed_runs(result: LaunchResult) -> list[str]:
    """Return the runs that failed for good in this launch or before."""
    return [*result.failed, *(each.record.name for each in result.skipped if each.state in ("failed", "diverged"))]


def print_result(result: LaunchResult) -> None:
    """Print the result of a launch and the runs that it skipped."""
    why = "time is up: " if result.interrupted and not result.stopped_by else ""
    ended = {
        "finished": result.finished,
        "evaluated": result.evaluated,
        "failed": result.failed,
        "stopped": result.stopped,
    }
    counts = ", ".join(f"{len(runs)} {how}" for how, runs in ended.items() if runs or how == "finished")
    _print_skipped(result.skipped, result.unplanned, KeyValue(key="launched", value=f"{why}{counts}"))


def cancel(sweep: SweepName, runs: Runs = None, root: Root = ROOT) -> None:
    """Stop the runs of a sweep (or those named), wherever they run; each saves first, and the next launch goes on."""
    loaded = load_sweep(sweep, root)
    names = select_run_ids(loaded, runs) if runs else []
    done, failed = engine.cancel(loaded, names)
    for line in [*done, *failed]:
        typer.echo(line)
    typer.echo(f"{len(done)} runs stopped" if done or failed else "nothing was waiting or running")
    print_next(*(("launch", sweep, root, "--retry") if done else ("status", sweep, root)))
    if failed:
        raise typer.Exit(1)


def _print_skipped(skipped: Sequence[RunState], others: Sequence[str], *more: KeyValue) -> None:
    """Print failed and damaged runs one by one, the number of other skipped runs, and more lines."""
    named = [each for each in skipped if each.state in ("failed", "diverged", "damaged")]
    words = {"failed": "; --retry tries it again", "diverged": "; --retry tries it again", "damaged": ""}
    flags = [KeyValue(level=e.state, key=e.record.name, value=f"{e.why}{words[e.state]}") for e in named]
    counts = Counter(each.state for each in skipped if each not in named)
    lines = [KeyValue(key="left alone", value=", ".join(f"{num} {state}" for state, num in counts.items()))]
    if others:
        value = f"{len(others)} run directories of an earlier sweep file, such as {others[0]}; they stay as they are"
        lines.append(KeyValue(key="unplanned", value=value))
    for part in (flags, [line for line in (*lines, *more) if line.value]):
        if part:
            console = new_console()
            console.print(key_value_text(part, console.width), highlight=False, soft_wrap=True)


def _print_local(sweep: str, root: Path, devices: int | None, *, retry: bool) -> tuple[RunState, ...]:
    """Check the runs and print the commands that a launch on this machine would execute."""
    loaded, runs, _ = engine.load_plan(sweep, root)
    machine = local_machine(runs, devices=devices)
    decisions = tuple(engine.launch_state(loaded, run, retry=retry) for run in runs)
    raise_on_problems(loaded, [each.run for each in decisions if each.startable])
    for each in decisions:
        words = machine.command(each.record.path, min(each.run.devices, machine.devices))
        typer.echo(f"{each.state:<11} {' '.join(words) if each.startable else each.why or each.run.run_id}")
    return decisions


def _launch_slurm(sweep: str, root: Path, *, retry: bool, dry_run: bool, allow_dirty: bool) -> tuple[RunState, ...]:
    from aimscale.sweeps.engine.slurm_worker import launch_slurm

    loaded, runs, _ = engine.load_plan(sweep, root)
    submitted = launch_slurm(loaded, runs, retry=retry, dry_run=dry_run, allow_dirty=allow_dirty)
    for part in submitted:
        shape = f"{part.shape.nodes} x {part.shape.devices} (nodes x devices)"
        if dry_run:
            typer.echo(f"# {part.num_runs} runs of {shape}, {part.num_jobs} jobs that execute them\n{part.script}")
            continue
        typer.echo(f"submitted {part.num_jobs} jobs of {shape} for {part.num_runs} runs as {part.job_id}")
        if part.excluded:
            typer.echo(f"excluded  {', '.join(part.excluded)}: some of these runs failed there")
    if not submitted:
        typer.echo("nothing to submit: jobs for all runs wait or run already, or no run is left")
    decisions = tuple(engine.launch_state(loaded, run, retry=retry and dry_run) for run in runs)
    _print_skipped([each for each in decisions if not each.startable], unplanned_runs(loaded, runs))
    return decisions
