"""`aimscale retry`: clear failures, so that the next launch resumes the runs."""

from __future__ import annotations

from pathlib import Path

import typer

from aimscale.sweeps.cli.cancel import Runs
from aimscale.sweeps.cli.options import Root, SweepName, some_runs
from aimscale.sweeps.engine.stop import retry
from aimscale.sweeps.plan.sweepfile import load_sweep


def command(sweep: SweepName, runs: Runs = None, root: Root = Path("aimscale-runs")) -> None:
    """Clear the failure of failed and diverged runs (or of those named)."""
    loaded = load_sweep(sweep, root)
    cleared, damaged = retry(loaded, some_runs(loaded, runs or []))
    for line in [*(f"{name}: cleared" for name in cleared), *damaged]:
        typer.echo(line)
    again = "; `aimscale launch` resumes them" if cleared else ""
    typer.echo(f"{len(cleared)} failures cleared{again}")
    if damaged:
        raise typer.Exit(1)
