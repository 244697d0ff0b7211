"""Options that say which tasks are probed, shared by `aimscale probe` and `aimscale baseline`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from aimscale.harness.run.config import ConfigError, ProbeSection, RunConfig, parse, read_yaml

TaskNames = Annotated[
    list[str] | None, typer.Option("--task", help="Task of the run's configuration (repeatable); default: all.")
]
TaskFile = Annotated[
    Path | None,
    typer.Option("--tasks", help="YAML list of tasks, as under `probes` in a sweep file, instead of the run's."),
]
TrainSplit = Annotated[str | None, typer.Option(help="Training split of a task of your own: a labelled data set.")]
TestSplit = Annotated[str | None, typer.Option(help="Test split of that task.")]
Kinds = Annotated[
    list[str] | None,
    typer.Option("--kind", help="linear, attentive, efficient, knn or lora (repeatable) instead of the task's own."),
]

CacheGB = Annotated[
    float,
    typer.Option(
        min=0,
        help="Memory of a rank for tokens, and the same for pooled features, GB; beyond it the backbone computes "
        "tokens batch by batch, and pooled features go to disk.",
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Torch threads of a rank (CPU); default: the run's `runtime.num_threads`.")
]
DiskGB = Annotated[float, typer.Option(min=0, help="Disk of a rank for pooled features that memory does not hold, GB.")]


@dataclass(frozen=True, kw_only=True)
class TaskChoice:
    """Which tasks the command line asks for; relative paths start here."""

    names: list[str] | None = None
    """Tasks of the configuration; None takes all."""
    file: Path | None = None
    """A list of tasks instead of the configuration's."""
    train: str | None = None
    """Training split of a task spelled out on the command line."""
    test: str | None = None
    """Its test split."""
    kinds: list[str] | None = None
    """Kinds of probes instead of each task's own."""

    def test_only(self) -> TaskChoice:
        """The same where nothing is trained: a test split alone is enough."""
        return replace(self, train=self.train or self.test)

    def sections(self, config: RunConfig) -> list[ProbeSection]:
        """The tasks as sections of a configuration.

        Raises:
            ConfigError, ProbeError: no such task, or one that is only half given.
        """
        from aimscale.harness.probe.features.backbones import ProbeError
        from aimscale.harness.probe.run import wanted_tasks

        kinds = {"kinds": self.kinds} if self.kinds else {}
        if (self.train is None) != (self.test is None):
            raise ProbeError("--train and --test belong together; give both")
        if self.train is not None and self.test is not None:
            if self.names is None or len(self.names) != 1:
                raise ProbeError("name the task of --train and --test with one --task NAME")
            values = {"task": self.names[0], "train": _absolute(self.train), "test": _absolute(self.test)}
            return [parse(ProbeSection, values | kinds, "the command line")]
        own = wanted_tasks(config if self.file is None else _with_tasks(config, self.file), self.names)
        return [parse(ProbeSection, section.model_dump() | kinds, "the command line") for section in own]


def list_tasks(wanted: bool) -> None:
    """Print the cards of the paper's benchmarks and end, if `wanted`."""
    if wanted:
        from aimscale.harness.probe.features.benchmarks import CARDS

        for card in CARDS.values():
            test = f"{card.num_test:,}" if card.num_test else "?"
            typer.echo(
                f"{card.name:<12} {card.num_classes:>5} classes, {card.num_train:>9,} + {test:>6} images; "
                f"scored on: {card.test_split}\n{'':<12} from {card.source}\n{'':<12} {card.folders}"
            )
        raise typer.Exit


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
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"probes": placed})})


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)
