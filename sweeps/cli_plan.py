"""`aimscale plan`: the runs of a sweep with a cost card each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sweeps import costs, views
from sweeps.planner import plan
from sweeps.sweepfile import load_sweep

app = typer.Typer(help="List the runs of a sweep with a cost card each; no side effect.")

SweepName = Annotated[str, typer.Argument(help="A sweep file, a preset's name, or the name of a launched sweep.")]
Root = Annotated[Path, typer.Option(help="Sweep directories are made under this folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def plan_sweep(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    as_json: AsJson = False,
    bench: Annotated[
        Path | None, typer.Option(help="JSON of `aimscale bench train`: its MFU replaces the assumed.")
    ] = None,
) -> None:
    """List the runs of a sweep with a cost card each; no side effect."""
    loaded = load_sweep(sweep, root)
    if bench:
        loaded = costs.with_bench(loaded, bench)
    runs = plan(loaded)
    cards = costs.cost_cards(loaded, runs)
    if as_json:
        typer.echo(json.dumps(costs.to_json(loaded, runs, cards), indent=1))
    else:
        views.print_plan(loaded, runs, cards)
