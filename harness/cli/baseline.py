"""`aimscale baseline`: probe a model to compare with on the tasks, images and seed of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
)


def command(
    name: Annotated[str, typer.Argument(help="timm:NAME, random or raw-pixels.", show_default=False)],
    like: Annotated[
        Path, typer.Option(help="Run directory whose tasks, images and seed are used.", show_default=False)
    ],
    task: TaskNames = None,
    tasks: TaskFile = None,
    train: TrainSplit = None,
    test: TestSplit = None,
    kind: Kinds = None,
    weights: Annotated[Path | None, typer.Option(help="Weight file of a timm model.")] = None,
    random_weights: Annotated[bool, typer.Option("--random", help="Leave a timm model untrained.")] = False,
    hub: Annotated[bool, typer.Option("--hub", help="Fetch a timm model's weights from the hub or its cache.")] = False,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Image side of a timm model, pixels; default: its own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: LIKE/baselines/NAME.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the baseline runs.")] = "auto",
    threads: Threads = None,
    cache_gb: CacheGB = 2.0,
    disk_gb: DiskGB = 500.0,
    again: Annotated[bool, typer.Option("--again", help="Repeat tasks that are done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the entries as JSON.")] = False,
) -> None:
    """Train the tasks' probe heads on a baseline's features and score them as a run's are scored.

    `aimscale collect` gathers the results into `baselines.parquet`; `aimscale compare` and the report show them.
    """
    from aimscale.harness.probe.protocol import Bounds
    from aimscale.harness.probe.run import join_ranks, probe_baseline
    from aimscale.harness.run.directory import RunDir

    run = RunDir(like)
    choice = TaskChoice(names=task, file=tasks, train=train, test=test, kinds=kind)
    config = run.load_config()
    sections = choice.sections(config)
    with join_ranks(device, threads or config.runtime.num_threads) as group:
        results = probe_baseline(
            name,
            run,
            sections,
            weights=weights,
            random_weights=random_weights,
            hub=hub,
            image_size=image_size,
            out=out,
            group=group,
            bounds=Bounds(cache_gb=cache_gb, disk_gb=disk_gb),
            since=None if again else 0.0,
        )
        print_entries(results, is_first=group.is_first, as_json=as_json)
