"""`aimscale cancel`: stop runs; each saves first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.cli.options import Root, SweepName, some_runs
from aimscale.sweeps.engine.stop import cancel
from aimscale.sweeps.plan.sweepfile import load_sweep

Runs = Annotated[list[str] | None, typer.Argument(help="Run ids or parts of them; all runs by default.")]


def command(sweep: SweepName, runs: Runs = None, root: Root = Path("aimscale-runs")) -> None:
    """Stop the runs of a sweep (or those named); each saves first, and `aimscale launch` goes on later."""
    loaded = load_sweep(sweep, root)
    done, failed = cancel(loaded, some_runs(loaded, runs or []))
    for line in [*done, *failed]:
        typer.echo(line)
    typer.echo(f"{len(done)} runs stopped" if done or failed else "nothing was waiting or running")
    if failed:
        raise typer.Exit(1)
