"""`aimscale bench`: the harness's benchmarks and the fit's beside them, since `harness` may not import `analysis`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from aimscale.harness.cli.bench import app


@app.command()
def fit(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    starts: Annotated[int, typer.Option(min=1, help="Starts of the peers' grid (4500 is the published one).")] = 4500,
) -> None:
    """A Chinchilla fit and 4000 bootstraps against the start grid and PyPI's `chinchilla`, in one run."""
    from aimscale.analysis.bench import run, table

    result = run(grid_starts=starts)
    typer.echo(json.dumps(result) if as_json else table(result))


@app.command()
def card(
    out: Annotated[Path, typer.Option(help="Folder of card.json and card.md.")] = Path("card"),
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Small sizes on the CPU.")] = False,
    only: Annotated[str, typer.Option(help="Parts whose names contain this, e.g. `train aim-600M`.")] = "",
) -> None:
    """What only a card can show, in less than nine minutes: tests, peaks, training, a sweep, loading, a checkpoint.

    Exits with 1 if a part failed; the others are written.
    """
    from aimscale.sweeps.bench.card import run

    done = run(out, rehearse=rehearse, only=only, report=typer.echo)
    typer.echo(f"{out / 'card.json'} and {out / 'card.md'} are written")
    if any(part["problem"] for part in done["parts"].values()):
        raise typer.Exit(1)


@app.command()
def probe(
    images: Annotated[int, typer.Option(min=1000, help="Training images.")] = 200_000,
    classes: Annotated[int, typer.Option(min=2, help="Classes.")] = 1000,
    size: Annotated[str, typer.Option(help="Rung whose random weights are probed.")] = "rung-32",
    iterations: Annotated[int, typer.Option(min=1, help="Optimiser steps of the heads.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 1024,
    folder: Annotated[Path | None, typer.Option(help="Keep images and runs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Probe many small images alone, by two ranks and killed three times: equal numbers, and the card's forecast."""
    from aimscale.sweeps.bench.probing import run, table

    result = run(
        num_images=images, num_classes=classes, size=size, iterations=iterations, batch_size=batch, folder=folder
    )
    typer.echo(json.dumps(result) if as_json else table(result))


@app.command()
def faults(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each tries every fault once, crowds twice.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the random moments.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="New folder to try them in; default: a temporary one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Kill, stop and crowd the processes of a small sweep; each must end like the undisturbed one, to the byte."""
    from aimscale.sweeps.bench.faults import Trial, run, table

    def report(trial: Trial) -> None:
        what = "; ".join(trial.problems) or "as undisturbed"
        typer.echo(f"{trial.fault} (while {', '.join(trial.moments)}): {what}, {trial.seconds:.0f} s", err=True)

    with tempfile.TemporaryDirectory() as temporary:
        result = run(folder or Path(temporary) / "faults", rounds=rounds, seed=seed, report=report)
    typer.echo(json.dumps(result) if as_json else table(result["trials"]))
    if any(trial["problems"] for trial in result["trials"]):
        raise typer.Exit(1)
