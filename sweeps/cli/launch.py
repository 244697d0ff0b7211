"""Verbs that start and stop the runs of a sweep: launch and cancel."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.aim.errors import check_training_installed
from aimscale.harness.run.directory import EXIT_PREEMPTED
from aimscale.sweeps.cli.layout import format_number, print_key_values
from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, On, Root, SweepName, Yes, confirm, print_next, select_run_ids
from aimscale.sweeps.cli.plan_view import format_price, launch_view
from aimscale.sweeps.cli.status_view import pause_s, show_status
from aimscale.sweeps.cli.sweep import print_next_step
from aimscale.sweeps.engine import launch as engine
from aimscale.sweeps.engine.active_run import Event
from aimscale.sweeps.engine.devices import local_machine
from aimscale.sweeps.engine.worker import LaunchResult, Report, Worker, print_events
from aimscale.sweeps.planning import DEFAULT_ROOT
from aimscale.sweeps.planning.checks import raise_on_problems
from aimscale.sweeps.planning.run import Notice
from aimscale.sweeps.planning.sweepfile import SweepError
from aimscale.sweeps.state.planned_sweep import PlannedSweep, plan_sweep
from aimscale.sweeps.state.run_state import State
from aimscale.sweeps.sweep_status import sweep_status

if TYPE_CHECKING:
    from aimscale.sweeps.slurm.submit import Submission

CONFIRM_DEVICE_HOURS = 10
"""A launch of more device-hours asks for confirmation on a terminal."""


def launch(
    sweep: SweepName,
    root: Root = DEFAULT_ROOT,
    on: On = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=10**6, help="GPUs to use, or CPU processes on a machine without GPUs; default: all."),
    ] = None,
    hours: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            min=0.001,
            help="Hours until this machine goes away; runs save before that, and the exit code is 75.",
        ),
    ] = None,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", help="Also start runs that failed for good, diverged, went off track or were cancelled."
        ),
    ] = False,
    stop_off_track: Annotated[
        float | None,
        typer.Option(
            metavar="SD",
            min=1,
            max=10**6,
            help="Save and end runs whose loss stays this many standard deviations above its forecast.",
        ),
    ] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Read the files of finished runs, too: some may be lost or changed.")
    ] = False,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Launch uncommitted code; it is copied and recorded.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Start, resume, evaluate or skip each run of a sweep.

    Launch as often and on as many machines as you like: each run is executed once.
    """
    planned = plan_sweep(sweep, root, on, is_thorough=thorough)
    loaded = planned.sweep
    place = "slurm" if loaded.is_for_slurm else "local"
    for option, value, only in (
        ("--devices", devices, "local"),
        ("--time-limit", hours, "local"),
        ("--allow-dirty", allow_dirty, "slurm"),
    ):
        if value and place != only:
            raise SweepError(f"{option} has no meaning with --on {place}; it is for --on {only}")
    if place == "local" and not dry_run:
        check_training_installed("launch")
    if thorough and not dry_run:
        planned.forget_notes()
    num_devices = 0 if place == "slurm" else local_machine(planned.longest_first, devices=devices).devices
    states = planned.launch_states(retry=retry)
    work = planned.work_left(num_devices, states)
    print_key_values(launch_view(planned, states, work))
    if not dry_run and work and work.device_hours > CONFIRM_DEVICE_HOURS:
        price = format_price(loaded, work.device_hours)
        confirm(f"launch up to {format_number(work.device_hours)} device-hours{price}?", yes=yes)
    options = ["--on", on] if on else []
    options += [] if stop_off_track is None else ["--stop-off-track", f"{stop_off_track:g}"]
    options += [*(["--devices", str(devices)] if devices else []), *["--allow-dirty"] * allow_dirty]
    result = LaunchResult()
    if place == "slurm":
        from aimscale.sweeps.engine.slurm_worker import describe_step, launch_slurm

        submitted = launch_slurm(planned, retry=retry, stop_sd=stop_off_track, dry_run=dry_run, allow_dirty=allow_dirty)
        _print_submissions(submitted, dry_run=dry_run)
        for part in submitted if dry_run else ():
            if step := describe_step(planned, part.shape):
                typer.echo(f"# starts the ranks of a run of {part.shape.nodes} nodes\n{step}")
    elif dry_run:
        engine.find_machine(planned, devices=devices, retry=retry)
        raise_on_problems(loaded, planned.startable(retry=retry))
    else:
        with show_progress(planned) as report:
            result = engine.launch(
                planned,
                devices=devices,
                hours=hours,
                retry=retry,
                stop_sd=stop_off_track,
                num_smallest_first=engine.FIRST_LAW,
                report=report,
            )
        print_result(result)
        planned.look()
    if result.interrupted or (dry_run and any(each.state.startable for each in states)):
        print_next("launch", sweep, root, *options, *(["--retry"] if retry and dry_run else []))
    elif place == "slurm" and not dry_run and any(each.state.startable or each.state.active for each in states):
        print_next("status", sweep, root, "--wait")
    else:
        print_next_step(sweep_status(planned), loaded, sweep, root, *options)
    if code := _exit_code(result):
        raise typer.Exit(code)


@contextlib.contextmanager
def show_progress(planned: PlannedSweep, tell: Callable[[Event], str | None] = str) -> Iterator[Report]:
    """Yield what shows a launch's progress, for `launch(report=...)`.

    Args:
        tell: turns an event, such as the end of a run, into the line that is printed; none for None.
    """
    next_look = 0.0
    with show_status() as (show, is_live):

        def report(worker: Worker) -> None:
            nonlocal next_look
            print_events(worker, tell)  # above the table
            if (started := time.monotonic()) < next_look:
                return
            planned.look()
            status = sweep_status(planned)
            next_look = time.monotonic() + pause_s(started, is_log=not is_live)
            show(status)

        yield report


def _exit_code(result: LaunchResult) -> int:
    """Return 130 after a signal, 75 if time was up or runs were cancelled, 1 if a run failed in this launch or could
    not be read or started, else 0: runs that failed before do not count."""
    if result.stopped_by:
        return EXIT_INTERRUPTED
    if (result.interrupted or result.stopped) and not result.broken:
        return EXIT_PREEMPTED
    return int(bool(result.broken or result.failed) or any(each.state is State.DAMAGED for each in result.skipped))


def failed_runs(result: LaunchResult) -> list[str]:
    """Return the runs that failed for good in this launch or before."""
    return [
        *result.failed,
        *(each.record.name for each in result.skipped if each.state.needs_person and each.state.retryable),
    ]


def print_result(result: LaunchResult) -> None:
    """Print how the runs of a launch ended, and how many it skipped."""
    lead = "time is up: " if result.interrupted and not result.stopped_by else ""
    ended = {
        "finished": result.finished,
        "evaluated": result.evaluated,
        "failed": result.failed,
        "stopped": result.stopped,
    }
    counts = ", ".join(f"{len(runs)} {how}" for how, runs in ended.items() if runs or how == "finished")
    lines = [Notice(key="launched", text=f"{lead}{counts}")]
    if skipped := Counter(each.state for each in result.skipped):
        lines.append(Notice(key="skipped", text=", ".join(f"{num} {state}" for state, num in skipped.items())))
    reasons = dict.fromkeys(each.reason for each in result.skipped if each.state is State.DAMAGED)
    lines += [Notice(key="damaged", text=reason) for reason in reasons]
    print_key_values(lines)


def cancel(
    sweep: SweepName,
    runs: Annotated[
        list[str] | None, typer.Argument(help="Run ids, or patterns such as 'rung-64_*'; all runs by default.")
    ] = None,
    root: Root = DEFAULT_ROOT,
    yes: Yes = False,
) -> None:
    """Stop runs of a sweep, wherever they run; each saves first, and `launch --retry` goes on."""
    planned = plan_sweep(sweep, root)
    names = select_run_ids(planned, runs or [])
    if len(names) > 1:
        confirm(f"cancel {len(names)} runs of '{planned.sweep.name}'?", yes=yes)
    done, failed = engine.cancel(planned, names if runs else [])
    for line in [*done, *failed]:
        typer.echo(line)
    typer.echo(f"{len(done)} runs stopped" if done or failed else "nothing was waiting or running")
    print_next(*(("launch", sweep, root, "--retry") if done else ("status", sweep, root)))
    if failed:
        raise typer.Exit(1)


def _print_submissions(submitted: Sequence[Submission], *, dry_run: bool) -> None:
    """Print which jobs were submitted, or the scripts that would be."""
    for part in submitted:
        shape = f"{part.shape.nodes} x {part.shape.devices} (nodes x devices)"
        if dry_run:
            typer.echo(f"# {part.num_runs} runs of {shape}, {part.num_jobs} jobs that execute them\n{part.script}")
            continue
        typer.echo(f"submitted {part.num_jobs} jobs of {shape} for {part.num_runs} runs as {part.job_id}")
        if part.excluded:
            typer.echo(f"excluded  {', '.join(part.excluded)}: jobs or runs failed there")
    if not submitted:
        typer.echo("nothing to submit: jobs for all runs wait or run already, or no run is left")
