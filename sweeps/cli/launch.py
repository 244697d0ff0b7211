"""The verbs that start and stop the runs of a sweep: launch, work, cancel, retry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, Root, SweepName, some_runs
from aimscale.sweeps.engine import start, stop
from aimscale.sweeps.engine.local_queue import worker_command
from aimscale.sweeps.plan.sweepfile import load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.claims import RunRecord
from aimscale.sweeps.state.decision import Decision, decide
from aimscale.sweeps.state.sweep_dir import prepare, unplanned

if TYPE_CHECKING:
    from aimscale.sweeps.slurm.submit import Submission

Runs = Annotated[list[str] | None, typer.Argument(help="Run ids or parts of them; all runs by default.")]


def launch(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    on: Annotated[Literal["local", "slurm"], typer.Option(help="A queue on this machine, or the cluster's.")] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    slots: Annotated[
        int | None, typer.Option(help="Local processes at a time; by default one per card, or what the cores can feed.")
    ] = None,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Launch uncommitted code; it is copied and recorded.")
    ] = False,
) -> None:
    """Start what is missing, resume what died, skip what is done."""
    again = f"{sweep} --root {root}"
    if on == "slurm":
        _launch_slurm(sweep, root, dry_run, allow_dirty)
        if not dry_run:
            typer.echo(f"watch with `aimscale status {again} --watch`; launching again resumes what died")
        return
    if dry_run:
        _print_local(sweep, root)
        return
    result = start.launch(sweep, root, slots=slots)
    _print_left(result.left)
    _print_unplanned(result.unplanned)
    if result.interrupted:
        typer.echo(f"stopped; `aimscale launch {again}` goes on from here")
        raise typer.Exit(EXIT_INTERRUPTED)
    typer.echo(f"{len(result.finished)} runs finished now, {len(result.failed)} failed")
    if result.failed or any(decision.verdict in ("failed", "damaged") for decision in result.left):
        typer.echo(f"see `aimscale status {again}`")
        raise typer.Exit(1)


def work(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    hours: Annotated[
        float | None, typer.Option("--for", min=0.001, help="Hours until this machine is gone; runs save before that.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Cards to use, or processes where there are none; by default all.")
    ] = None,
) -> None:
    """Take free runs of a sweep, one after another, until none is left.

    Start it on any machine that sees the sweep's folder, as often as you like: workers and launches share the work, and
    each run is executed once. It leaves when nothing is left to take or its time is up, saving first.
    """
    did = start.work(sweep, root, hours=hours, devices=devices)
    why = "nothing is left" if not did.interrupted else "stopped" if did.stopped_by else "time is up"
    typer.echo(
        f"{why}: finished {len(did.finished)} runs, {len(did.failed)} failed; see "
        f"`aimscale status {sweep} --root {root}`"
    )
    if did.stopped_by:
        raise typer.Exit(EXIT_INTERRUPTED)
    if did.failed:
        raise typer.Exit(1)


def cancel(sweep: SweepName, runs: Runs = None, root: Root = Path("aimscale-runs")) -> None:
    """Stop the runs of a sweep (or those named); each saves first, and `aimscale launch` goes on later."""
    loaded = load_sweep(sweep, root)
    done, failed = stop.cancel(loaded, some_runs(loaded, runs or []))
    for line in [*done, *failed]:
        typer.echo(line)
    typer.echo(f"{len(done)} runs stopped" if done or failed else "nothing was waiting or running")
    if failed:
        raise typer.Exit(1)


def retry(sweep: SweepName, runs: Runs = None, root: Root = Path("aimscale-runs")) -> None:
    """Clear the failure of failed and diverged runs (or of those named), so that the next launch resumes them."""
    loaded = load_sweep(sweep, root)
    cleared, damaged = stop.retry(loaded, some_runs(loaded, runs or []))
    for line in [*(f"{name}: cleared" for name in cleared), *damaged]:
        typer.echo(line)
    typer.echo(f"{len(cleared)} failures cleared{'; `aimscale launch` resumes them' if cleared else ''}")
    if damaged:
        raise typer.Exit(1)


def _print_left(left: Sequence[Decision]) -> None:
    """What a launch did not touch."""
    for line in start.left_alone(left):
        typer.echo(line)


def _print_unplanned(names: Sequence[str]) -> None:
    if names:
        what = f"{len(names)} run directories, such as {names[0]}; what they trained differs"
        typer.echo(f"not in this plan and left as they are: {what}")


def _print_local(sweep: str, root: Path) -> None:
    """The commands that a local launch would run."""
    loaded, runs, _ = start.planned(sweep, root)
    is_queued = slurm.Queued()
    for run in runs:
        record = RunRecord(loaded.run_dir(run.run_id))
        decision = decide(run, record, is_queued)
        what = " ".join(worker_command(record.path, run.devices)) if decision.startable else decision.why
        typer.echo(f"{decision.verdict}: {what or run.run_id}")


def _launch_slurm(sweep: str, root: Path, dry_run: bool, allow_dirty: bool) -> None:
    from aimscale.sweeps.engine.packed_job import PackedJob
    from aimscale.sweeps.slurm.submit import launch_slurm  # submitit is slow to import

    loaded, runs, _ = start.planned(sweep, root)
    if not dry_run:
        start.check_data(start.startable(loaded, runs, slurm.is_queued(slurm.jobs())))
        prepare(loaded, runs)
    result = launch_slurm(loaded, runs, allow_dirty=allow_dirty, dry_run=dry_run, packed=PackedJob)
    _print_submitted(result.submitted, dry_run)
    _print_left(result.left)
    _print_unplanned(unplanned(loaded, runs))


def _print_submitted(parts: Sequence[Submission], dry_run: bool) -> None:
    """The jobs of a launch on Slurm, or their scripts."""
    for part in parts:
        if dry_run:
            typer.echo(f"# {len(part.run_ids)} runs: {' '.join(part.run_ids)}\n{part.script}")
            continue
        shape = f"{part.shape.nodes} x {part.shape.tasks_per_node}"
        inside = f", {part.num_jobs} of them" if part.num_jobs < len(part.run_ids) else ""
        typer.echo(f"submitted {len(part.run_ids)} runs of {shape} (nodes x tasks) as job {part.job_id}{inside}")
        if part.excluded:
            typer.echo(f"without {', '.join(part.excluded)}, where some of these runs failed")
