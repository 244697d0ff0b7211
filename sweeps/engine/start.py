"""Execute a sweep on this machine: launch it and wait for its end, or take free runs of it as one worker of many."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from aimscale.harness.data.store.card import num_images
from aimscale.harness.run.config import ModelSection, ProbeSection, parse, read_yaml
from aimscale.harness.run.schedule import schedule_of
from aimscale.sweeps.engine.devices import default_slots, visible_gpus
from aimscale.sweeps.engine.local_queue import Command, LaunchResult, Queue, print_events, run_queue, worker_command
from aimscale.sweeps.plan.costs import CostCard, cost_cards
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.plan.sweepfile import SWEEP_FILE, Sweep, SweepError, SweepFile, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.claims import Claim, RunRecord
from aimscale.sweeps.state.decision import Decision, decide, training_jobs
from aimscale.sweeps.state.sweep_dir import prepare, unplanned
from aimscale.sweeps.table.status import SweepStatus, sweep_status
from aimscale.sweeps.table.views import new_console, status_summary, status_table

MAX_OPENED = 50_000_000
"""The index of a larger data set is left to the trainers: opening it takes 25 bytes per image."""
PLAIN_EVERY_S = 30.0
LIVE_EVERY_S = 0.5


def check_data(runs: Sequence[Run]) -> None:
    """Open every data set that the runs read, once.

    Raises:
        DataError: a folder or an index is missing, or a shard is missing or truncated.
        ProbeError: the data of a probe have no labels, its two sides do not fit together, or they bear a benchmark's
            name and are not that benchmark.
    """
    unlabelled: dict[str, None] = {}
    tasks: dict[tuple[str, str, str], tuple[ProbeSection, ModelSection]] = {}
    for run in runs:
        training, evaluation = run.config.training, run.config.evaluation
        sources = () if training.data.is_unindexed else (source.path for source in training.data.sources)
        unlabelled |= dict.fromkeys([*sources, evaluation.validation.path])
        tasks |= {(probe.task, probe.train, probe.test): (probe, training.model) for probe in evaluation.probes}
    if not unlabelled:
        return
    from aimscale.harness.data.store.index import open_dataset  # imports torch

    for path in unlabelled:
        if (num_images(path) or 0) <= MAX_OPENED:
            open_dataset(path)
    if not tasks:
        return
    from aimscale.harness.probe.features.images import open_task

    for probe, model in tasks.values():
        if max(num_images(probe.train) or 0, num_images(probe.test) or 0) <= MAX_OPENED:
            open_task(probe, model)


def launch(
    sweep: Sweep | str | Path,
    root: Path = Path("aimscale-runs"),
    *,
    slots: int | None = None,
    command: Command = worker_command,
    check: Callable[[Sequence[Run]], None] = check_data,
) -> LaunchResult:
    """Start what is missing, resume what died, skip what is done; returns when nothing is left to start.

    Calling it again goes on where it was.

    Args:
        sweep: a sweep or its name.
        slots: processes at a time; by default one per card, or as many as the cores can feed.
        command: the program that executes a run.
        check: looks at the data of the runs that would start.

    Raises:
        SweepError, ConfigError, DataError: the sweep cannot be planned, its data not be read, or its directory not be
            written; nothing was made.
    """
    loaded, runs, cards = planned(sweep, root)
    ask = slurm.Queued()
    check(startable(loaded, runs, ask))
    prepare(loaded, runs)
    gpus = visible_gpus()
    queue = functools.partial(
        run_queue,
        slots=default_slots(runs, gpus, loaded.file.runs_per_device) if slots is None else slots,
        gpus=gpus,
        is_queued=ask,
    )
    with _display(lambda: sweep_status(loaded, runs, cards)) as report:
        result = queue(runs, command=command, report=report, kind=training_jobs(loaded))
    return replace(result, unplanned=unplanned(loaded, runs))


def work(
    sweep: Sweep | str | Path,
    root: Path = Path("aimscale-runs"),
    *,
    hours: float | None = None,
    devices: int | None = None,
    command: Command = worker_command,
    check: Callable[[Sequence[Run]], None] = check_data,
) -> LaunchResult:
    """Train and evaluate what is free until nothing is left, or until everything must be saved to end in time.

    It starts what a launch would start, by the same locks and decisions, so that any number of workers and launches,
    here and on Slurm, execute each run once between them.

    Args:
        sweep: a sweep or its name.
        hours: time until the machine is gone.
        devices: cards (or, without cards, processes) to use; by default all.
        command: the program that executes a run.
        check: looks at the data of the runs that would start.

    Raises:
        SweepError, ConfigError, DataError: as `launch`.
    """
    started = time.time()
    loaded, runs, _ = planned(sweep, root)
    if devices is not None and devices < 1:
        raise SweepError(f"--devices must be 1 or more, not {devices}")
    check(startable(loaded, runs, slurm.Queued()))
    prepare(loaded, runs)
    gpus = visible_gpus()[:devices]
    training = training_jobs(loaded)
    until = float("inf")
    if hours is not None:
        # What runs must have saved when the time is up; of a short time, half is for that.
        until = started + 3600 * hours - min(max(map(training.stop_s, runs)), 1800 * hours)
    queue = functools.partial(
        run_queue,
        slots=default_slots(runs, gpus, loaded.file.runs_per_device) if gpus or not devices else devices,
        gpus=gpus,
        report=print_events,
        until=until,
    )
    did = LaunchResult()
    while True:
        result = queue(runs, kind=training, command=command, is_queued=slurm.Queued())
        did = replace(
            result,
            finished=tuple(dict.fromkeys(did.finished + result.finished)),
            failed=tuple(dict.fromkeys(did.failed + result.failed)),
        )
        if result.interrupted or not (result.finished or result.failed):
            return did


def planned(sweep: Sweep | str | Path, root: Path) -> tuple[Sweep, list[Run], list[CostCard]]:
    """A sweep with its runs, longest first, and their cards; what could not start is refused.

    Raises:
        SweepError, ConfigError: the sweep cannot be planned, or a run's warm-up reaches into its decay.
    """
    loaded = sweep if isinstance(sweep, Sweep) else load_sweep(sweep, root)
    runs = plan(loaded)
    for run in runs:
        schedule_of(run.config)
    _refuse_renaming(loaded, runs)
    cards = cost_cards(loaded, runs)
    order = sorted(range(len(runs)), key=lambda i: -cards[i].device_hours)  # no long run is left for the end
    return loaded, [runs[i] for i in order], [cards[i] for i in order]


def _refuse_renaming(sweep: Sweep, runs: Sequence[Run]) -> None:
    """Stop where a smaller budget alone would train runs again, because the recipe follows the smallest.

    Raises:
        SweepError: it would.
    """
    written, names = sweep.directory / SWEEP_FILE, {run.run_id for run in runs}
    if not sweep.file.budgets or not written.is_file():
        return
    before = parse(SweepFile, read_yaml(written), str(written))
    budget = before.recipe_budget or min(before.budgets, default=None)
    if budget in (None, sweep.file.recipe_budget or min(sweep.file.budgets)):
        return
    there = {path.parent.name for path in sweep.runs_dir.glob("*/config.yaml")} - names
    if again := sorted(there & {run.run_id for run in plan(sweep.with_fields(recipe_budget=budget))}):
        raise SweepError(
            f"{sweep.source}: recipe '{sweep.file.recipe}' follows the smallest budget, so {len(again)} runs that are "
            f"there, such as {again[0]}, would be trained again under other names; write `recipe_budget: {budget}` to "
            f"keep them, or give this sweep another name"
        )


def startable(sweep: Sweep, runs: Sequence[Run], is_queued: Callable[[Claim], bool]) -> list[Run]:
    """Runs that a launch would start now."""
    return [run for run in runs if decide(run, RunRecord(sweep.run_dir(run.run_id)), is_queued).startable]


def left_alone(left: Sequence[Decision]) -> list[str]:
    """What a launch did not touch: finished and running ones counted, failed and damaged ones named."""
    counts = Counter(decision.verdict for decision in left)
    lines = [f"{num} {verdict}" for verdict, num in counts.items() if verdict in ("finished", "running", "queued")]
    sentences = [f"left alone: {', '.join(lines)}"] if lines else []
    for decision in left:
        if decision.verdict == "damaged":
            sentences.append(f"skipped {decision.record.title}: {decision.why}")
        elif decision.verdict == "failed":
            sentences.append(f"not tried again: {decision.record.title} ({decision.why}); `aimscale retry` clears it")
    return sentences


@contextmanager
def _display(look: Callable[[], SweepStatus]) -> Iterator[Callable[[Queue], None]]:
    """A function for `run_queue(report=...)`: a live table on a terminal, lines otherwise."""
    console = new_console()
    shown = {"last": 0.0}
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def report(queue: Queue) -> None:
                for event in queue.events:
                    live.console.print(event, highlight=False, soft_wrap=True)
                queue.events.clear()
                if time.time() - shown["last"] >= LIVE_EVERY_S:
                    shown["last"] = time.time()
                    live.update(_live(look(), queue, console.width), refresh=True)

            yield report
        return

    def report_plain(queue: Queue) -> None:
        print_events(queue)
        if time.time() - shown["last"] >= PLAIN_EVERY_S:
            shown["last"] = time.time()
            print(status_summary(look()), flush=True)

    yield report_plain


def _live(status: SweepStatus, queue: Queue, width: int) -> Group:
    """Active runs as `aimscale status` shows them, and the whole sweep's bar."""
    active = {job.run.run_id for job in queue.active}
    shown = replace(status, runs=tuple(line for line in status.runs if line.run_id in active))
    bar = ProgressBar(total=1.0, completed=status.progress, width=40, complete_style="green")
    stop = Text("stopping: every run saves first (Ctrl-C again kills)", style="yellow") if queue.stopping else Text("")
    table = [status_table(shown, width, status_summary(status))] if shown.runs else []
    return Group(*table, bar, stop)
