"""`aimscale status`: one line per run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.sweeps.cli.options import AsJson, Root, SweepName
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.plan.sweepfile import Sweep, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.table import views
from aimscale.sweeps.table.status import SweepStatus, sweep_status

if TYPE_CHECKING:
    from aimscale.analysis.forecasts.ending import Ending


def command(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    ends: Annotated[
        bool,
        typer.Option("--ends", help="Also forecast where running runs will end, from the curves of finished ones."),
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds between refreshes.", min=0.2)] = 2.0,
) -> None:
    """One line per run: state, step, loss, images/s, MFU, ETA, why it failed."""
    loaded = load_sweep(sweep, root)
    runs = plan(loaded)
    cards = cost_cards(loaded, runs)

    def look() -> SweepStatus:
        return sweep_status(loaded, runs, cards, slurm.known_jobs())

    if as_json:
        more = {"endings": [asdict(each) for each in _endings(loaded, runs)]} if ends else {}
        typer.echo(json.dumps(asdict(look()) | more, indent=1))
    elif watch:
        views.watch(look, every)
    else:
        console = views.new_console()
        console.print(views.status_table(look(), console.width), highlight=False, soft_wrap=True)
        for each in _endings(loaded, runs) if ends else ():
            typer.echo(each.sentence())


def _endings(sweep: Sweep, runs: Sequence[Run]) -> list[Ending]:
    """Forecasts of the ends of running runs."""
    from aimscale.analysis.forecasts.ending import endings
    from aimscale.sweeps.table.curves import training_curves

    return endings(training_curves(sweep, runs))
