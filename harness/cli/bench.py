"""`aimscale bench`: throughput of training and of loading."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aimscale.harness.run.config import RunConfig

app = typer.Typer(help="Measure training and loading, or a whole GPU.", no_args_is_help=True, add_completion=False)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="A run's configuration, stepped on random images.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Model size: a name, or w<width>-d<depth>; default: rung-128.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per optimiser step; default: 64.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (default) or bf16.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other field of a run (repeatable), e.g. model.image_size=224 or runtime.zero_stage=2; without a "
            "configuration images have 32 pixels and patches 4.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 20,
) -> None:
    """Time a training step on random images: ms/step, images/s, MFU and peak memory, as JSON."""
    import torch

    from aimscale.harness.bench.train import run

    changes = {"model.size": size, "optimiser.batch_size": batch, "optimiser.precision": precision}
    chosen = _config(config, {key: value for key, value in changes.items() if value is not None}, settings or [])
    torch.set_num_threads(chosen.runtime.num_threads)
    facts = run(chosen, num_steps=steps)
    if int(os.environ["RANK"]) == 0:
        typer.echo(json.dumps(facts, indent=1))


def _config(file: Path | None, changes: dict[str, Any], settings: list[str]) -> RunConfig:
    """Build a run's configuration from a file, or one of small random images, with some fields changed."""
    import yaml

    from aimscale.harness.run.config import ConfigError, RuntimeConfig, load_run_config, parse, run_config
    from aimscale.harness.run.section import merge

    where = "the command line"
    if file is None:
        nowhere = {"path": "random images"}
        values: dict[str, Any] = {"data": {"sources": [nowhere]}, "validation": nowhere, "runtime": {}}
        values["model"] = {"size": "rung-128", "image_size": 32, "patch_size": 4}
        values["optimiser"] = {"batch_size": 64, "precision": "fp32"}
    else:
        parts = load_run_config(file).model_dump(mode="json")
        values = parts["training"] | parts["evaluation"] | {"runtime": parts["runtime"]}
    for text in settings:
        key, is_visible, value = text.partition("=")
        if not is_visible:
            raise ConfigError(f"--set {text} has no value; write KEY=VALUE, such as runtime.zero_stage=2")
        changes[key] = yaml.safe_load(value)
    for key, value in changes.items():
        nested = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        values = merge(values, nested)
    runtime = parse(RuntimeConfig, values.pop("runtime"), where)
    return run_config(values | {"budgets": [values["optimiser"]["batch_size"]]}, where, runtime)


@app.command()
def data(
    dataset: Annotated[
        str | None, typer.Argument(help="A data set of yours, a folder or URL, to read in place of photographs.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Wall time of all measurements together.")] = 10.0,
    workers: Annotated[
        list[int] | None, typer.Option(min=0, help="Numbers of loader processes; default: 0, 1 and every core.")
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(help="Cache of its shards, as `runtime.cache_dir`.")] = None,
) -> None:
    """Measure images/s of the loader, as JSON; a plan assumes 1,100 photographs/s for each process."""
    from aimscale.harness.bench.data import run

    measured = run(dataset, seconds=seconds, workers=workers, cache_dir=cache_dir)
    typer.echo(json.dumps(measured, indent=1))


@app.command()
def gpu(
    out: Annotated[Path, typer.Argument(help="Folder of gpu.json.")] = Path("gpu"),
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Small sizes on the CPU.")] = False,
) -> None:
    """Measure everything that needs a GPU, in less than nine minutes: tests, peaks, training, a sweep, loading.

    Exits with 1 if a part failed; what the others found is written.
    """
    from aimscale.harness.bench.gpu import run

    done = run(out, rehearse=rehearse)
    failed = [name for name, part in done["parts"].items() if part["problem"]]
    typer.echo(f"wrote {out / 'gpu.json'}: {len(done['parts'])} parts, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)
