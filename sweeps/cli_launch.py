"""`aimscale launch`: start what is missing, resume what died, skip what is done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sweeps.cli_plan import Root, SweepName
from sweeps.launch import launch, left_alone

app = typer.Typer(help="Start what is missing, resume what died, skip what is done.")

EXIT_INTERRUPTED = 130


@app.command()
def launch_sweep(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    slots: Annotated[
        int | None, typer.Option(help="Processes at a time; by default one a card, or as many as the cores feed.")
    ] = None,
) -> None:
    """Start what is missing, resume what died, skip what is done."""
    result = launch(sweep, root, slots=slots)
    for line in left_alone(result.left):
        typer.echo(line)
    if result.interrupted:
        typer.echo(f"stopped; `aimscale launch {sweep} --root {root}` goes on from here")
        raise typer.Exit(EXIT_INTERRUPTED)
    typer.echo(f"{len(result.finished)} runs finished now, {len(result.failed)} failed")
    if result.failed or any(decision.verdict in ("failed", "damaged") for decision in result.left):
        typer.echo(f"see `aimscale status {sweep} --root {root}`")
        raise typer.Exit(1)
