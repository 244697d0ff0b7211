"""`aimscale launch`: start what is missing, resume what died, skip what is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.sweeps.cli import options
from aimscale.sweeps.engine.evaluations import Place, with_place
from aimscale.sweeps.engine.start import launch, left_alone, planned, startable, unplanned
from aimscale.sweeps.state.decision import Decision
from aimscale.sweeps.state.sweep_dir import prepare

if TYPE_CHECKING:
    from aimscale.sweeps.slurm.submit import Submission


def command(
    sweep: options.SweepName,
    root: options.Root = Path("aimscale-runs"),
    on: Annotated[options.BackEnd, typer.Option(help="A queue on this machine, or the cluster's.")] = "local",
    dry_run: options.DryRun = False,
    slots: options.Slots = None,
    runs_per_device: Annotated[
        str | None,
        typer.Option(help="Runs that share a card, a number or auto (by the memory estimate); instead of the file's."),
    ] = None,
    evaluate: Annotated[
        Place | None,
        typer.Option(
            help="Validate and probe inline, in the process that trained the run, or as separate jobs; default: jobs "
            "on Slurm, else as runtime.evaluate says."
        ),
    ] = None,
    allow_dirty: options.AllowDirty = False,
    partition: options.Partition = None,
    time_min: options.TimeMin = None,
) -> None:
    """Start what is missing, resume what died, skip what is done."""
    again = f"{sweep} --root {root}"
    if on == "slurm":
        asked = {"partition": partition, "time_min": time_min}
        _launch_slurm(sweep, root, dry_run, allow_dirty, evaluate or "jobs", again, runs_per_device, asked)
        return
    if dry_run:
        _print_local(sweep, root)
        return
    result = launch(sweep, root, slots=slots, runs_per_device=runs_per_device, evaluate=evaluate)
    print_left(result.left)
    _print_unplanned(result.unplanned)
    if result.interrupted:
        typer.echo(f"stopped; `aimscale launch {again}` goes on from here")
        raise typer.Exit(options.EXIT_INTERRUPTED)
    typer.echo(
        f"{len(result.finished)} runs finished now, {len(result.evaluated)} evaluated, {len(result.failed)} failed"
    )
    if result.failed or any(decision.verdict in ("failed", "damaged") for decision in result.left):
        typer.echo(f"see `aimscale status {again}`")
        raise typer.Exit(1)


def print_left(left: Sequence[Decision]) -> None:
    """What a launch did not touch."""
    for line in left_alone(left):
        typer.echo(line)


def _print_unplanned(names: Sequence[str]) -> None:
    if names:
        typer.echo(
            f"not in this plan and left as they are: {len(names)} run directories, such as {names[0]}; what they "
            f"trained differs"
        )


def _print_local(sweep: str, root: Path) -> None:
    """The commands that a local launch would run."""
    from aimscale.sweeps.engine.local_queue import worker_command
    from aimscale.sweeps.slurm import commands as slurm
    from aimscale.sweeps.state.claims import RunRecord
    from aimscale.sweeps.state.decision import decide

    loaded, runs, _ = planned(sweep, root)
    is_queued = slurm.Queued()
    for run in runs:
        record = RunRecord(loaded.run_dir(run.run_id))
        decision = decide(run, record, is_queued)
        what = " ".join(worker_command(record.path, run.devices)) if decision.startable else decision.why
        typer.echo(f"{decision.verdict}: {what or run.run_id}")


def print_submitted(parts: Sequence[Submission], what: str, dry_run: bool) -> None:
    """The jobs of a launch on Slurm, or their scripts."""
    for part in parts:
        if dry_run:
            typer.echo(f"# {what}{len(part.run_ids)} runs: {' '.join(part.run_ids)}\n{part.script}")
        else:
            shape = f"{part.shape.nodes} x {part.shape.tasks_per_node}"
            inside = f", {part.num_jobs} of them" if part.num_jobs < len(part.run_ids) else ""
            typer.echo(
                f"submitted {what}{len(part.run_ids)} runs of {shape} (nodes x tasks) as job {part.job_id}{inside}"
            )
            if part.excluded:
                typer.echo(f"without {', '.join(part.excluded)}, where some of these runs failed")


def _launch_slurm(
    sweep: str,
    root: Path,
    dry_run: bool,
    allow_dirty: bool,
    evaluate: Place,
    again: str,
    runs_per_device: str | None,
    fields: dict[str, str | int | None],
) -> None:
    from aimscale.sweeps.engine.evaluations import evaluation_arrays
    from aimscale.sweeps.engine.packed_job import PackedJob
    from aimscale.sweeps.engine.start import check_data
    from aimscale.sweeps.slurm import commands as slurm
    from aimscale.sweeps.slurm.submit import launch_slurm, with_slurm  # submitit is slow to import

    loaded, runs, _ = planned(sweep, root)
    loaded, runs = with_slurm(loaded, **fields), with_place(runs, evaluate)
    loaded = loaded if runs_per_device is None else loaded.with_fields(runs_per_device=runs_per_device)
    if not dry_run:
        check_data(startable(loaded, runs, slurm.is_queued(slurm.jobs())))
        prepare(loaded, runs)
    result = launch_slurm(loaded, runs, allow_dirty=allow_dirty, dry_run=dry_run, packed=PackedJob)
    print_submitted(result.submitted, "", dry_run)
    print_left(result.left)
    for part in evaluation_arrays(loaded, runs, result, allow_dirty=allow_dirty, dry_run=dry_run):
        print_submitted(part.submitted, "evaluations of ", dry_run)
        print_left([each for each in part.left if each.verdict in ("failed", "damaged")])
    _print_unplanned(unplanned(loaded, runs))
    if not dry_run:
        typer.echo(f"watch with `aimscale status {again} --watch`; launching again resumes what died")
