"""`aimscale probe` and `aimscale baseline`: frozen-feature accuracies of a run, and of a model to compare it with."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aimscale.harness.log.progress import Bar
from aimscale.harness.run.config import ConfigError, ProbeSection, RunConfig, parse, read_yaml

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the backbone runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")]
TaskNames = Annotated[
    list[str] | None, typer.Option("--task", help="Task of the run's configuration (repeatable); default: all.")
]
TaskFile = Annotated[
    Path | None,
    typer.Option("--tasks", help="YAML list of tasks, as under `probes` in a sweep file, instead of the run's."),
]


_ROW = "{:>11}  {:<13} {:<9} {:>7} {:>12} {:>8} {:>6} {:>6}"
_HEADER = _ROW.format("images", "task", "kind", "top-1 %", "95 %", "chance %", "n", "blocks")


def probe(
    run: Annotated[Path, typer.Argument(help="Run directory with saved budgets.", show_default=False)],
    images_seen: Annotated[
        int | None, typer.Option(help="Probe this budget only; default: all saved ones.", show_default=False)
    ] = None,
    task: TaskNames = None,
    tasks: TaskFile = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="linear, attentive, efficient, knn or lora (repeatable) instead of the task's own; `released` scores "
            "the head that came with imported weights and trains nothing."
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train the task's probe heads on frozen features and score the chosen ones on the test split.

    In this process, under torchrun, or in a Slurm job step with several tasks; refused while the run is evaluated.
    What is done already is not done again. To probe a whole sweep, edit `probes` in its file and launch it again.
    """
    from aimscale.harness.probe.released import RELEASED, score_released
    from aimscale.harness.probe.run import probe_run, standalone_group
    from aimscale.harness.run.directory import RunDir

    config = RunDir(run).load_config()
    is_released = kind == [RELEASED]
    sections = _sections(config, task, tasks, None if is_released else kind)
    with standalone_group(RunDir(run), device) as group, Bar(shows=group.is_first) as bar:
        if is_released:
            results = score_released(run, sections, group=group)
        else:
            results = probe_run(run, images_seen, sections, group=group, report_progress=bar)
        _print_entries(results, bar, run, as_json=as_json)


def baseline(
    name: Annotated[str, typer.Argument(help="timm:NAME, random or raw-pixels.", show_default=False)],
    like: Annotated[
        Path, typer.Option(help="Run directory whose tasks, images and seed are used.", show_default=False)
    ],
    task: TaskNames = None,
    tasks: TaskFile = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="Kind of probe (repeatable) instead of the task's own.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of a timm model: a file, `hub` (fetched, or from its cache) or `random`.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train the tasks' probe heads on a baseline's features and score them as a run's are scored.

    Results go to LIKE/baselines/NAME; `aimscale collect` gathers them into `baselines.parquet`, and `aimscale compare`
    and the report show them.
    """
    from aimscale.harness.probe.run import probe_baseline, standalone_group
    from aimscale.harness.run.directory import RunDir

    run = RunDir(like)
    sections = _sections(run.load_config(), task, tasks, kind)
    with standalone_group(run, device) as group, Bar(shows=group.is_first) as bar:
        results = probe_baseline(name, run, sections, weights=weights, group=group, report_progress=bar)
        _print_entries(results, bar, like, as_json=as_json)


def _sections(
    config: RunConfig, names: list[str] | None, file: Path | None, kinds: list[str] | None
) -> list[ProbeSection]:
    """Return the tasks that the command line asks for, as sections of a configuration; relative paths start here."""
    from aimscale.harness.probe.run import wanted_tasks

    changes = {"kinds": kinds} if kinds else {}
    sections = wanted_tasks(config.evaluation.probes if file is None else _tasks_of(file), names)
    return [parse(ProbeSection, section.model_dump() | changes, "the command line") for section in sections]


def _tasks_of(path: Path) -> list[ProbeSection]:
    """Read the tasks of a file."""
    values = read_yaml(path)
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path} must be a list of tasks, each with task, train and test")
    sections = (parse(ProbeSection, value, f"{path}, task {number}") for number, value in enumerate(values, 1))
    return [
        section.model_copy(update={"train": _absolute(section.train), "test": _absolute(section.test)})
        for section in sections
    ]


def _absolute(path: str) -> str:
    """Make a local path absolute."""
    return path if "://" in path else os.path.abspath(path)


def _print_entries(
    results: Iterable[tuple[int | None, list[dict[str, Any]]]], bar: Bar, run: Path, *, as_json: bool
) -> None:
    """Print each entry as soon as it is there, and then which command collects them; or all as JSON at the end."""
    printed: list[dict[str, Any]] = []
    for budget, entries in results:
        printed += [{"images_seen": budget, **entry} for entry in entries]
        for entry in entries if not as_json else ():
            if len(printed) == len(entries) and entry is entries[0]:
                bar.say(_HEADER)
            bar.say(_line(budget, entry))
    sweep = run.resolve().parent.parent
    if as_json:
        bar.say(json.dumps(printed, indent=1))
    elif (sweep / "sweep.yaml").is_file():  # a run outside of a sweep is in no table
        bar.say(f"next: aimscale collect {shlex.quote(os.path.relpath(sweep))}")


def _line(budget: int | None, entry: dict[str, Any]) -> str:
    """Format an entry as a row of the table."""
    top1, low, high, chance = (f"{100 * entry[name]:.1f}" for name in ("top1", "top1_lo95", "top1_hi95", "chance"))
    blocks = entry["blocks"]
    span = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
    seen = "" if budget is None else f"{budget:,}"
    return _ROW.format(seen, entry["task"], entry["kind"], top1, f"{low} to {high}", chance, f"{entry['n']:,}", span)
