"""The verbs that start and stop the runs of a sweep: launch and cancel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, Root, SweepName, some_runs
from aimscale.sweeps.engine import launch as engine
from aimscale.sweeps.engine.devices import this_machine
from aimscale.sweeps.engine.queue import LaunchResult
from aimscale.sweeps.plan.checks import refuse
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import SweepError, load_sweep
from aimscale.sweeps.state.decision import Decision, decide
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.sweep_dir import unplanned

Runs = Annotated[list[str] | None, typer.Argument(help="Run ids or parts of them; all runs by default.")]
Place = Literal["local", "here", "slurm"]


def launch(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    on: Annotated[
        Place,
        typer.Option(
            help="This machine, with a live table; here, the same as one worker of many under any scheduler; or Slurm."
        ),
    ] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="GPUs to use, or processes where there is none; by default all.")
    ] = None,
    per_device: Annotated[int, typer.Option(min=1, help="Runs of one device that share it.")] = 1,
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
    again = f"{sweep} --root {root}"
    if on == "slurm":
        _launch_slurm(sweep, root, per_device=per_device, retry=retry, dry_run=dry_run, allow_dirty=allow_dirty)
        if not dry_run:
            typer.echo(f"watch with `aimscale status {again} --watch`; launching again resumes what died")
        return
    if dry_run:
        _print_local(sweep, root, devices, per_device)
        return
    did = engine.launch(
        sweep, root, devices=devices, per_device=per_device, hours=hours, retry=retry, shows=on == "local"
    )
    _print_untouched(did.left, did.unplanned)
    _end(did, again)


def _end(did: LaunchResult, again: str) -> None:
    """Say what a launch did, and exit as it ended."""
    why = "stopped: " if did.stopped_by else "time is up: " if did.interrupted else ""
    typer.echo(f"{why}{len(did.finished)} runs finished now, {len(did.evaluated)} evaluated, {len(did.failed)} failed")
    if did.interrupted:
        typer.echo(f"`aimscale launch {again}` goes on from here")
    if did.stopped_by:
        raise typer.Exit(EXIT_INTERRUPTED)
    if did.failed or any(decision.verdict in ("failed", "damaged") for decision in did.left):
        typer.echo(f"see `aimscale status {again}`")
        raise typer.Exit(1)


def cancel(sweep: SweepName, runs: Runs = None, root: Root = Path("aimscale-runs")) -> None:
    """Stop the runs of a sweep (or those named), wherever they run; each saves first, and the next launch goes on."""
    loaded = load_sweep(sweep, root)
    names = some_runs(loaded, runs or [])
    done, failed = engine.cancel(loaded, [run for run in plan(loaded) if run.run_id in names])
    for line in [*done, *failed]:
        typer.echo(line)
    typer.echo(f"{len(done)} runs stopped" if done or failed else "nothing was waiting or running")
    if failed:
        raise typer.Exit(1)


def _print_untouched(left: Sequence[Decision], unplanned: Sequence[str]) -> None:
    for line in engine.left_alone(left):
        typer.echo(line)
    if unplanned:
        what = f"{len(unplanned)} run directories, such as {unplanned[0]}; what they trained differs"
        typer.echo(f"not in this plan and left as they are: {what}")


def _print_local(sweep: str, root: Path, devices: int | None, per_device: int) -> None:
    """The commands that a launch here would run, after the checks that it would make."""
    loaded, runs, _ = engine.planned(sweep, root)
    machine = this_machine(runs, devices=devices, per_device=per_device)
    refuse(loaded, [run for run in runs if engine.to_start(loaded, run)])
    for run in runs:
        decision = decide(run, RunRecord(loaded.run_dir(run.run_id)))
        words = machine.command(decision.record.path, min(run.devices, machine.devices))
        what = " ".join(words) if decision.startable else decision.why
        typer.echo(f"{decision.verdict}: {what or run.run_id}")


def _launch_slurm(sweep: str, root: Path, *, per_device: int, retry: bool, dry_run: bool, allow_dirty: bool) -> None:
    from aimscale.sweeps.engine.element import launch_slurm  # submitit is slow to import

    loaded, runs, _ = engine.planned(sweep, root)
    submitted = launch_slurm(loaded, runs, per_device=per_device, retry=retry, dry_run=dry_run, allow_dirty=allow_dirty)
    for part in submitted:
        shape = f"{part.shape.nodes} x {part.shape.devices} (nodes x devices)"
        if dry_run:
            typer.echo(f"# {part.num_runs} runs of {shape}, {part.number} jobs that execute them\n{part.script}")
            continue
        typer.echo(f"submitted {part.number} jobs of {shape} for {part.num_runs} runs as {part.job_id}")
        if part.excluded:
            typer.echo(f"without {', '.join(part.excluded)}, where some of these runs failed")
    if not submitted:
        typer.echo("no job is lacking")
    found = [decide(run, RunRecord(loaded.run_dir(run.run_id))) for run in runs]
    _print_untouched([each for each in found if not each.startable], unplanned(loaded, runs))
