"""`aimscale plan`: the runs of a sweep with a cost card each."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from aimscale.sweeps.cli.options import AsJson, Root, SweepName
from aimscale.sweeps.plan import costs
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import load_sweep
from aimscale.sweeps.table import views


def command(sweep: SweepName, root: Root = Path("aimscale-runs"), as_json: AsJson = False) -> None:
    """List the runs of a sweep with a cost card each; no side effect."""
    loaded = load_sweep(sweep, root)
    runs = plan(loaded)
    cards = costs.cost_cards(loaded, runs)
    if as_json:
        typer.echo(json.dumps(costs.to_json(loaded, cards), indent=1))
    else:
        views.print_plan(loaded, cards)
