"""`aimscale probe RUN_DIR`: frozen-feature accuracies of a run's budgets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.config import ConfigError, ProbeSection, RunConfig, parse, read_yaml

app = typer.Typer(help="Probe the frozen features of one run's budgets.")


def _list_tasks(wanted: bool) -> None:
    if wanted:
        from harness.tasks import CARDS

        for card in CARDS.values():
            test = f"{card.num_test:,}" if card.num_test else "?"
            typer.echo(
                f"{card.name:<12} {card.num_classes:>5} classes, {card.num_train:>9,} + {test:>6} images; "
                f"scored on: {card.test_split}\n{'':<12} from {card.source}\n{'':<12} {card.folders}"
            )
        raise typer.Exit


@app.command()
def probe(
    target: Annotated[
        str,
        typer.Argument(
            help="Run directory with saved budgets; or, with --like, a baseline: timm:NAME, random or raw-pixels.",
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
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache_gb: Annotated[
        float, typer.Option(help="Memory for cached features; beyond it every epoch runs the backbone again.")
    ] = 2.0,
    again: Annotated[bool, typer.Option("--again", help="Repeat tasks that are done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
    list_tasks: Annotated[
        bool,
        typer.Option(
            "--list-tasks", callback=_list_tasks, is_eager=True, help="The paper's benchmarks and their data."
        ),
    ] = False,
) -> None:
    """Train the task's probe heads on frozen features and score the chosen ones on the test split.

    Runs by itself, under torchrun or in a Slurm job step with several tasks; a killed probe goes on where it was.
    """
    from harness.probe_features import ProbeError
    from harness.probe_run import join_ranks, probe_baseline, probe_run
    from harness.rundir import RunDir

    is_baseline = not Path(target).is_dir()
    if is_baseline and like is None:
        raise ProbeError(f"{target} is no run directory; to probe a baseline, name a run with --like")
    if not is_baseline and (like or weights or random_weights or hub or image_size or out):
        raise ProbeError("--like, --weights, --random, --hub, --image-size and --out go with baselines, not with a run")
    if is_baseline and images_seen is not None:
        raise ProbeError("--images-seen goes with a run, not with a baseline")
    config = RunDir(like or target).load_config()
    if tasks is not None:
        config = _with_tasks(config, tasks)
    sections = _sections(config, task, train, test, kind)
    since = None if again else 0.0
    with join_ranks(device) as group:
        results: Iterator[tuple[int | None, list[dict[str, Any]]]]
        if is_baseline:
            results = probe_baseline(
                target,
                RunDir(like or target),
                sections,
                weights=weights,
                random_weights=random_weights,
                hub=hub,
                image_size=image_size,
                out=out,
                group=group,
                cache_gb=cache_gb,
                since=since,
            )
        else:
            results = probe_run(Path(target), images_seen, sections, group=group, cache_gb=cache_gb, since=since)
        _print(results, is_first=group.is_first, as_json=as_json)


def _print(results: Iterator[tuple[int | None, list[dict[str, Any]]]], *, is_first: bool, as_json: bool) -> None:
    """Probe, and print each entry when it is there, or all as JSON at the end; only rank 0 prints."""
    found: list[dict[str, Any]] = []
    for budget, entries in results:
        found += [{"images_seen": budget, **entry} for entry in entries]
        if is_first and not as_json:
            for entry in entries:
                typer.echo(_line(budget, entry))
    if is_first and as_json:
        typer.echo(json.dumps(found, indent=1))


def _with_tasks(config: RunConfig, path: Path) -> RunConfig:
    """The configuration with the tasks of a file instead of its own."""
    values = read_yaml(path)
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path} must be a list of tasks, each with task, train and test")
    sections = tuple(parse(ProbeSection, value, f"{path}, task {number}") for number, value in enumerate(values, 1))
    return config.model_copy(update={"result": config.result.model_copy(update={"probes": sections})})


def _sections(
    config: RunConfig, task: list[str] | None, train: str | None, test: str | None, kind: list[str] | None
) -> list[ProbeSection]:
    """The run's own tasks, or the one spelled out on the command line."""
    from harness.probe_features import ProbeError
    from harness.probe_run import wanted_tasks

    kinds = {"kinds": kind} if kind else {}
    if (train is None) != (test is None):
        raise ProbeError("--train and --test belong together; give both")
    if train is None:
        own = wanted_tasks(config, task)
        return [parse(ProbeSection, section.model_dump() | kinds, "the command line") for section in own]
    if task is None or len(task) != 1:
        raise ProbeError("name the task of --train and --test with one --task NAME")
    return [parse(ProbeSection, {"task": task[0], "train": train, "test": test} | kinds, "the command line")]


def _line(budget: int | None, entry: dict[str, Any]) -> str:
    low, high = 100 * entry["top1_lo95"], 100 * entry["top1_hi95"]
    blocks = entry["blocks"]
    span = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
    who = "baseline" if budget is None else f"{budget:,} images"
    return (
        f"{who:>18}  {entry['task']:<16} {entry['kind']:<10} top-1 {100 * entry['top1']:.1f} % "
        f"(95 %: {low:.1f} to {high:.1f}, n {entry['n']}, chance {100 * entry['chance']:.1f}), {span}"
    )
