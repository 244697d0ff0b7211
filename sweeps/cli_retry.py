"""`aimscale retry`: clear failures, so that the next launch resumes the runs."""

from __future__ import annotations

from pathlib import Path

import typer

from sweeps.cli_cancel import Runs
from sweeps.cli_plan import Root, SweepName
from sweeps.select import some_runs
from sweeps.stop import retry
from sweeps.sweepfile import load_sweep

app = typer.Typer(help="Clear the failure of runs, so that the next launch resumes them.")


@app.command()
def retry_runs(sweep: SweepName, runs: Runs = None, root: Root = Path("aimscale-runs")) -> None:
    """Clear the failure of failed and diverged runs (or of those named)."""
    loaded = load_sweep(sweep, root)
    cleared = retry(loaded, some_runs(loaded, runs or []))
    for run_id in cleared:
        typer.echo(f"{run_id}: cleared")
    typer.echo(f"{len(cleared)} failures cleared; `aimscale launch` (of probes: `aimscale probe`) resumes them")
