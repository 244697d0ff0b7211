"""`aimscale status`: one line per run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.cli.options import AsJson, Root, SweepName
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.table import views
from aimscale.sweeps.table.status import SweepStatus, sweep_status


def command(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between refreshes.", min=0.2)] = 2.0,
) -> None:
    """One line per run: state, step, loss, images/s, MFU, ETA, why it failed."""
    loaded = load_sweep(sweep, root)
    runs = plan(loaded)
    cards = cost_cards(loaded, runs)

    def look() -> SweepStatus:
        return sweep_status(loaded, runs, cards, slurm.known_jobs())

    if as_json:
        typer.echo(json.dumps(asdict(look()), indent=1))
    elif watch:
        views.watch(look, every)
    else:
        console = views.new_console()
        console.print(views.status_table(look(), console.width), highlight=False, soft_wrap=True)
