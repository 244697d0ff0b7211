"""`aimscale probe`: frozen-feature accuracies of a run, or of all runs of a sweep."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aimscale.harness.cli.probe_output import print_entries
from aimscale.harness.cli.tasks import (
    CacheGB,
    DiskGB,
    Kinds,
    TaskChoice,
    TaskFile,
    TaskNames,
    TestSplit,
    Threads,
    TrainSplit,
    list_tasks,
)
from aimscale.sweeps.cli import options
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError, load_sweep

if TYPE_CHECKING:
    from aimscale.harness.probe.job import ProbeRequest
    from aimscale.sweeps.plan.planner import Run

Device = Literal["auto", "cpu", "cuda"]


def command(
    target: Annotated[
        str,
        typer.Argument(
            help="A run directory, or a sweep (file, preset or name), all of whose runs are probed.", show_default=False
        ),
    ],
    images_seen: Annotated[
        int | None, typer.Option(help="Probe this budget only; default: all saved ones.", show_default=False)
    ] = None,
    task: TaskNames = None,
    tasks: TaskFile = None,
    train: TrainSplit = None,
    test: TestSplit = None,
    kind: Kinds = None,
    on: Annotated[
        options.BackEnd | None,
        typer.Option(help="Probe by jobs, in a queue on this machine or on the cluster; sweeps: local by default."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Ranks that share one job's work.")] = 1,
    run: Annotated[list[str] | None, typer.Option(help="Part of a run id of the sweep (repeatable).")] = None,
    root: options.Root = Path("aimscale-runs"),
    slots: options.Slots = None,
    dry_run: options.DryRun = False,
    allow_dirty: options.AllowDirty = False,
    partition: options.Partition = None,
    account: options.Account = None,
    qos: options.Qos = None,
    constraint: options.Constraint = None,
    time_min: options.TimeMin = None,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    threads: Threads = None,
    cache_gb: CacheGB = 2.0,
    disk_gb: DiskGB = 500.0,
    released: Annotated[
        bool, typer.Option("--released", help="Score the head that came with imported weights; train nothing.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Repeat tasks that are done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
    list_tasks_: Annotated[
        bool,
        typer.Option("--list-tasks", callback=list_tasks, is_eager=True, help="The paper's benchmarks and their data."),
    ] = False,
) -> None:
    """Train the task's probe heads on frozen features and score the chosen ones on the test split.

    A run is probed in this process (alone, under torchrun, or in a Slurm job step with several tasks); a sweep, and a
    run with --on, by one job per run. What is done already is not done again; a killed probe goes on where it was.
    Baselines have their own verb, `aimscale baseline`.
    """
    choice = TaskChoice(names=task, file=tasks, train=train, test=test, kinds=kind)
    is_run = Path(target, "config.yaml").is_file()
    if is_run and on is None:
        if devices > 1 or slots or dry_run or run:
            raise SweepError("--devices, --slots, --dry-run and --run go with jobs; add --on local or --on slurm")
        if released:
            _score_released(Path(target), choice, device, threads, as_json)
            return
        _probe_here(Path(target), choice, images_seen, device, threads, (cache_gb, disk_gb), again, as_json)
        return
    if released:
        raise SweepError("--released goes with one imported run, probed in this process")
    if as_json or threads:
        raise SweepError("--json and --threads go with probing in this process, not with jobs")
    sweep, runs, paths = _runs(target, is_run, root, run)
    requests = {
        each.run_id: _request(each, choice, images_seen, time.time() if again else 0.0, device, (cache_gb, disk_gb))
        for each in runs
    }
    jobs = _Jobs(sweep=sweep, runs=runs, paths=paths, requests=requests, devices=devices, dry_run=dry_run)
    if on == "slurm":
        fields = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
        jobs.on_slurm({**fields, "time_min": time_min}, allow_dirty=allow_dirty)
    else:
        jobs.on_this_machine(slots)


def _probe_here(
    path: Path,
    choice: TaskChoice,
    images_seen: int | None,
    device: Device,
    threads: int | None,
    bounds_gb: tuple[float, float],
    again: bool,
    as_json: bool,
) -> None:
    """Probe a run by itself, under torchrun or in a Slurm job step with several tasks."""
    from aimscale.harness.probe.protocol import Bounds
    from aimscale.harness.probe.run import join_ranks, probe_run
    from aimscale.harness.run.directory import RunDir

    config = RunDir(path).load_config()
    sections = choice.sections(config)
    with join_ranks(device, threads or config.runtime.num_threads) as group:
        results = probe_run(
            path,
            images_seen,
            sections,
            group=group,
            bounds=Bounds(cache_gb=bounds_gb[0], disk_gb=bounds_gb[1]),
            since=None if again else 0.0,
        )
        print_entries(results, is_first=group.is_first, as_json=as_json)


def _score_released(path: Path, choice: TaskChoice, device: Device, threads: int | None, as_json: bool) -> None:
    """Score an imported run's own head."""
    from aimscale.harness.probe.released import score_released
    from aimscale.harness.probe.run import join_ranks
    from aimscale.harness.run.directory import RunDir

    config = RunDir(path).load_config()
    sections = choice.test_only().sections(config)
    with join_ranks(device, threads or config.runtime.num_threads) as group:
        print_entries(score_released(path, sections, group=group), is_first=group.is_first, as_json=as_json)


def _runs(target: str, is_run: bool, root: Path, parts: list[str] | None) -> tuple[Sweep, list[Run], dict[str, Path]]:
    """The runs meant, with their directories."""
    from aimscale.harness.probe.features.baseline_models import is_baseline
    from aimscale.sweeps.engine.probes import runs_of_sweep, sweep_of_run

    if is_run:
        sweep, one = sweep_of_run(Path(target))
        return sweep, [one], {one.run_id: Path(target).resolve()}
    if is_baseline(target):
        raise SweepError(f"{target} is no run directory; probe a baseline with `aimscale baseline {target} --like RUN`")
    sweep = load_sweep(target, root)
    runs = runs_of_sweep(sweep, parts or [])
    return sweep, runs, {run.run_id: sweep.run_dir(run.run_id) for run in runs}


def _request(
    run: Run, choice: TaskChoice, images_seen: int | None, since: float, device: Device, bounds_gb: tuple[float, float]
) -> ProbeRequest:
    from aimscale.harness.probe.job import ProbeRequest

    tasks = tuple(choice.sections(run.config))
    cache_gb, disk_gb = bounds_gb
    return ProbeRequest(
        tasks=tasks, images_seen=images_seen, since=since, device=device, cache_gb=cache_gb, disk_gb=disk_gb
    )


@dataclass(frozen=True, kw_only=True)
class _Jobs:
    """Probe jobs of some runs of one sweep."""

    sweep: Sweep
    runs: list[Run]
    paths: dict[str, Path]
    requests: dict[str, ProbeRequest]
    devices: int
    dry_run: bool

    def _ready(self) -> list[Run]:
        """Runs with a finished budget, each probed by `devices` ranks; says how many have none."""
        from aimscale.harness.probe.run import saved_budgets
        from aimscale.harness.run.directory import RunDir

        ready = [run for run in self.runs if saved_budgets(RunDir(self.paths[run.run_id]))]
        if len(ready) < len(self.runs):
            typer.echo(f"{len(self.runs) - len(ready)} of {len(self.runs)} runs have no finished budget yet")
        return [replace(run, devices=self.devices) for run in ready]

    def on_slurm(self, fields: dict[str, str | int | None], *, allow_dirty: bool) -> None:
        """Submit one array per resource shape, or print the scripts."""
        from aimscale.sweeps.cli.launch import print_left, print_submitted
        from aimscale.sweeps.engine.probes import probing_jobs
        from aimscale.sweeps.slurm.submit import launch_slurm, with_slurm  # submitit is slow to import

        if not (ready := self._ready()):
            return
        kind = probing_jobs(self.sweep, self.paths, self.requests)
        changed = with_slurm(self.sweep, **fields)
        result = launch_slurm(changed, ready, allow_dirty=allow_dirty, dry_run=self.dry_run, kind=kind)
        print_submitted(result.submitted, "probes of ", self.dry_run)
        print_left(result.left)

    def on_this_machine(self, slots: int | None) -> None:
        """Work through the jobs in a queue on this machine, or say what it would do."""
        from aimscale.sweeps.cli.launch import print_left
        from aimscale.sweeps.engine.devices import default_slots, visible_gpus
        from aimscale.sweeps.engine.local_queue import print_events, run_queue, worker_command
        from aimscale.sweeps.engine.probes import WORKER, probing_jobs
        from aimscale.sweeps.slurm import commands as slurm

        if not (ready := self._ready()):
            return
        kind = probing_jobs(self.sweep, self.paths, self.requests)
        is_queued = slurm.Queued()
        if self.dry_run:
            for each in ready:
                decision = kind.decide(each, kind.record(each), is_queued)
                typer.echo(f"{decision.verdict}: {each.run_id} {decision.why}".rstrip())
            return
        gpus = visible_gpus()
        done = run_queue(
            ready,
            slots=default_slots(ready, gpus) if slots is None else slots,
            gpus=gpus,
            command=lambda path, ranks: worker_command(path, ranks, WORKER),
            report=print_events,
            is_queued=is_queued,
            kind=kind,
        )
        print_left(done.left)
        if done.interrupted:
            typer.echo("stopped; the same command goes on from here")
            raise typer.Exit(options.EXIT_INTERRUPTED)
        typer.echo(f"{len(done.finished)} runs probed now, {len(done.failed)} failed")
        if done.failed or any(decision.verdict in ("failed", "damaged") for decision in done.left):
            raise typer.Exit(1)
