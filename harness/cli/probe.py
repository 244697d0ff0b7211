"""Probing in this process: one run's budgets, or a baseline on the same tasks (`sweeps.cli.probe` calls it)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from aimscale.harness.run.config import ConfigError, ProbeSection, RunConfig, parse, read_yaml


def list_tasks(wanted: bool) -> None:
    """Print the cards of the paper's benchmarks and end, if `wanted`."""
    if wanted:
        from aimscale.harness.probe.benchmarks import CARDS

        for card in CARDS.values():
            test = f"{card.num_test:,}" if card.num_test else "?"
            typer.echo(
                f"{card.name:<12} {card.num_classes:>5} classes, {card.num_train:>9,} + {test:>6} images; "
                f"scored on: {card.test_split}\n{'':<12} from {card.source}\n{'':<12} {card.folders}"
            )
        raise typer.Exit


def probe_here(
    target: str,
    *,
    images_seen: int | None,
    task: list[str] | None,
    tasks: Path | None,
    train: str | None,
    test: str | None,
    kind: list[str] | None,
    like: Path | None,
    weights: Path | None,
    random_weights: bool,
    hub: bool,
    image_size: int | None,
    out: Path | None,
    device: str,
    cache_gb: float,
    again: bool,
    as_json: bool,
) -> None:
    """Probe a run or a baseline by itself, under torchrun or in a Slurm job step with several tasks; prints entries."""
    from aimscale.harness.probe.features import ProbeError
    from aimscale.harness.probe.run import join_ranks, probe_baseline, probe_run
    from aimscale.harness.run.directory import RunDir

    is_baseline = not Path(target).is_dir()
    if is_baseline and like is None:
        raise ProbeError(f"{target} is no run directory; to probe a baseline, name a run with --like")
    if not is_baseline and (like or weights or random_weights or hub or image_size or out):
        raise ProbeError("--like, --weights, --random, --hub, --image-size and --out go with baselines, not with a run")
    if is_baseline and images_seen is not None:
        raise ProbeError("--images-seen goes with a run, not with a baseline")
    sections = wanted_sections(RunDir(like or target).load_config(), task, tasks, train, test, kind)
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


def wanted_sections(
    config: RunConfig,
    task: list[str] | None,
    tasks: Path | None,
    train: str | None,
    test: str | None,
    kind: list[str] | None,
) -> list[ProbeSection]:
    """The run's own tasks, those of a file, or the one spelled out on the command line (relative paths: to here).

    Raises:
        ConfigError, ProbeError: no such task, or one that is only half given.
    """
    from aimscale.harness.probe.features import ProbeError
    from aimscale.harness.probe.run import wanted_tasks

    kinds = {"kinds": kind} if kind else {}
    if (train is None) != (test is None):
        raise ProbeError("--train and --test belong together; give both")
    if train is not None and test is not None:
        if task is None or len(task) != 1:
            raise ProbeError("name the task of --train and --test with one --task NAME")
        values = {"task": task[0], "train": _absolute(train), "test": _absolute(test)}
        return [parse(ProbeSection, values | kinds, "the command line")]
    if tasks is not None:
        config = _with_tasks(config, tasks)
    own = wanted_tasks(config, task)
    return [parse(ProbeSection, section.model_dump() | kinds, "the command line") for section in own]


def _with_tasks(config: RunConfig, path: Path) -> RunConfig:
    """The configuration with the tasks of a file instead of its own."""
    values = read_yaml(path)
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path} must be a list of tasks, each with task, train and test")
    sections = (parse(ProbeSection, value, f"{path}, task {number}") for number, value in enumerate(values, 1))
    placed = tuple(
        section.model_copy(update={"train": _absolute(section.train), "test": _absolute(section.test)})
        for section in sections
    )
    return config.model_copy(update={"result": config.result.model_copy(update={"probes": placed})})


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _line(budget: int | None, entry: dict[str, Any]) -> str:
    low, high = 100 * entry["top1_lo95"], 100 * entry["top1_hi95"]
    blocks = entry["blocks"]
    span = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}"
    who = "baseline" if budget is None else f"{budget:,} images"
    return (
        f"{who:>18}  {entry['task']:<16} {entry['kind']:<10} top-1 {100 * entry['top1']:.1f} % "
        f"(95 %: {low:.1f} to {high:.1f}, n {entry['n']}, chance {100 * entry['chance']:.1f}), {span}"
    )
