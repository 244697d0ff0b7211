"""`aimscale probe`: frozen-feature accuracies of a run, of all runs of a sweep, or of a baseline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aimscale.harness.cli.probe import list_tasks, probe_here, wanted_sections
from aimscale.sweeps.cli.plan import Root
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError, load_sweep

if TYPE_CHECKING:
    from aimscale.sweeps.launch.local_queue import Queue
    from aimscale.sweeps.launch.probes import Requests
    from aimscale.sweeps.plan.planner import Run

app = typer.Typer(help="Probe the frozen features of a run's or a sweep's budgets.")

EXIT_INTERRUPTED = 130


@app.command()
def probe(
    target: Annotated[
        str,
        typer.Argument(
            help="A run directory; a sweep (file, preset or name), all of whose runs are probed; or, with --like, a "
            "baseline: timm:NAME, random or raw-pixels.",
            show_default=False,
        ),
    ],
    images_seen: Annotated[
        int | None, typer.Option(help="Probe this budget only; all saved ones otherwise.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task of the run's configuration (repeatable); all otherwise.")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="YAML list of tasks, as under `probes` in a sweep file, instead of the run's.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="Labelled data set of a task of your own: its training split.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="And its test split.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="linear, attentive, knn or lora (repeatable) instead of the task's own.")
    ] = None,
    on: Annotated[
        Literal["local", "slurm"] | None,
        typer.Option(help="Probe by jobs of a queue on this machine or of the cluster; sweeps: local by default."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Ranks that share one job's work.")] = 1,
    run: Annotated[list[str] | None, typer.Option(help="Part of a run id of the sweep (repeatable).")] = None,
    root: Root = Path("aimscale-runs"),
    slots: Annotated[int | None, typer.Option(help="Local processes at a time; by default as `launch`.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what jobs would do; start nothing.")] = False,
    allow_dirty: Annotated[bool, typer.Option("--allow-dirty", help="Submit uncommitted code.")] = False,
    partition: Annotated[str | None, typer.Option(help="Instead of slurm.partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Instead of slurm.account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Instead of slurm.qos.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Instead of slurm.constraint.")] = None,
    time_min: Annotated[int | None, typer.Option(help="Minutes a job, instead of slurm.time_min.")] = None,
    like: Annotated[
        Path | None, typer.Option(help="Run directory whose tasks, images and seed a baseline is probed with.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weight file of a timm model.")] = None,
    random_weights: Annotated[bool, typer.Option("--random", help="Leave a timm model untrained.")] = False,
    hub: Annotated[bool, typer.Option("--hub", help="Fetch a timm model's weights from the hub or its cache.")] = False,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Image side of a timm model, pixels; its own otherwise.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a baseline's results; LIKE/baselines/NAME otherwise.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the backbone runs.")] = "auto",
    cache_gb: Annotated[
        float, typer.Option(help="Memory for cached features; beyond it every epoch runs the backbone again.")
    ] = 2.0,
    again: Annotated[bool, typer.Option("--again", help="Repeat tasks that are done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
    list_tasks_: Annotated[
        bool,
        typer.Option("--list-tasks", callback=list_tasks, is_eager=True, help="The paper's benchmarks and their data."),
    ] = False,
) -> None:
    """Train the task's probe heads on frozen features and score the chosen ones on the test split.

    A run or a baseline is probed in this process (alone, under torchrun, or in a Slurm job step with several tasks); a
    sweep, and a run with --on, by one job a run. What is done already is not done again; a killed probe goes on where
    it was.
    """
    is_run = Path(target, "config.yaml").is_file()
    if like is None and (not is_run or on is not None):
        if as_json or weights or random_weights or hub or image_size or out:
            raise SweepError("--json and the options of baselines go with probing in this process, not with jobs")
        names = (task, tasks, train, test, kind)
        sweep, runs, paths = _runs(target, is_run, root, run)
        fields = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
        since = time.time() if again else 0.0
        requests = _requests(runs, paths, names, images_seen, since, device, cache_gb)
        _by_jobs(sweep, runs, paths, requests, on or "local", devices, slots, dry_run, allow_dirty, fields, time_min)
        return
    if devices > 1 or slots or dry_run or run:
        raise SweepError("--devices, --slots, --dry-run and --run go with jobs; add --on local or --on slurm")
    probe_here(
        target,
        images_seen=images_seen,
        task=task,
        tasks=tasks,
        train=train,
        test=test,
        kind=kind,
        like=like,
        weights=weights,
        random_weights=random_weights,
        hub=hub,
        image_size=image_size,
        out=out,
        device=device,
        cache_gb=cache_gb,
        again=again,
        as_json=as_json,
    )


def _runs(target: str, is_run: bool, root: Path, parts: list[str] | None) -> tuple[Sweep, list[Run], dict[str, Path]]:
    """The runs meant, with their directories."""
    from aimscale.harness.probe.baseline_models import TIMM
    from aimscale.sweeps.launch.probes import runs_of_sweep, sweep_of_run

    if is_run:
        sweep, one = sweep_of_run(Path(target))
        return sweep, [one], {one.run_id: Path(target).resolve()}
    if target in ("random", "raw-pixels") or target.startswith(TIMM):
        raise SweepError(f"{target} is no run directory; to probe a baseline, name a run with --like")
    sweep = load_sweep(target, root)
    runs = runs_of_sweep(sweep, parts or [])
    return sweep, runs, {run.run_id: sweep.run_dir(run.run_id) for run in runs}


def _requests(
    runs: Sequence[Run],
    paths: dict[str, Path],
    names: tuple[list[str] | None, Path | None, str | None, str | None, list[str] | None],
    images_seen: int | None,
    since: float,
    device: Literal["auto", "cpu", "cuda"],
    cache_gb: float,
) -> Requests:
    from aimscale.harness.probe.job import ProbeRequest

    return {
        run.run_id: ProbeRequest(
            tasks=tuple(wanted_sections(run.config, *names)),
            images_seen=images_seen,
            since=since,
            device=device,
            cache_gb=cache_gb,
        )
        for run in runs
    }


def _by_jobs(
    sweep: Sweep,
    runs: Sequence[Run],
    paths: dict[str, Path],
    requests: Requests,
    on: Literal["local", "slurm"],
    devices: int,
    slots: int | None,
    dry_run: bool,
    allow_dirty: bool,
    fields: dict[str, str | None],
    time_min: int | None,
) -> None:
    from aimscale.harness.probe.run import saved_budgets
    from aimscale.harness.run.directory import RunDir
    from aimscale.sweeps.launch.local_queue import default_slots, run_queue, visible_gpus, worker_command
    from aimscale.sweeps.launch.probes import WORKER, probing, with_devices
    from aimscale.sweeps.launch.start import left_alone
    from aimscale.sweeps.slurm import commands as slurm

    ready = with_devices([run for run in runs if saved_budgets(RunDir(paths[run.run_id]))], devices)
    work = probing(sweep, paths, requests)
    if len(ready) < len(runs):
        typer.echo(f"{len(runs) - len(ready)} of {len(runs)} runs have no finished budget yet")
    if not ready:
        return
    if on == "slurm":
        from aimscale.sweeps.slurm.submit import launch_slurm, with_slurm  # submitit is slow to import

        changed = with_slurm(sweep, **fields, time_min=time_min)
        result = launch_slurm(changed, ready, allow_dirty=allow_dirty, dry_run=dry_run, work=work)
        for part in result.submitted:
            if dry_run:
                typer.echo(f"# probe {len(part.run_ids)} runs: {' '.join(part.run_ids)}\n{part.script}")
            else:
                shape = f"{part.shape.nodes} x {part.shape.tasks_per_node}"
                typer.echo(
                    f"submitted probes of {len(part.run_ids)} runs of {shape} (nodes x tasks): job {part.job_id}"
                )
        for line in left_alone(result.left):
            typer.echo(line)
        return
    known = slurm.known_jobs()
    is_queued = slurm.is_queued(known) if known is not None else lambda claim: True
    if dry_run:
        for each in ready:
            decision = work.decide(each, work.record(each), is_queued)
            typer.echo(f"{decision.verdict}: {each.run_id} {decision.why}".rstrip())
        return
    gpus = visible_gpus()
    done = run_queue(
        sweep,
        ready,
        slots=(default_slots(ready, gpus) if slots is None else slots),
        gpus=gpus,
        command=lambda path, ranks: worker_command(path, ranks, WORKER),
        report=_print_events,
        is_queued=is_queued,
        work=work,
    )
    for line in left_alone(done.left):
        typer.echo(line)
    if done.interrupted:
        typer.echo("stopped; the same command goes on from here")
        raise typer.Exit(EXIT_INTERRUPTED)
    typer.echo(f"{len(done.finished)} runs probed now, {len(done.failed)} failed")
    if done.failed:
        raise typer.Exit(1)


def _print_events(queue: Queue) -> None:
    for event in queue.events:
        typer.echo(event)
    queue.events.clear()
