"""`aimscale collect`: every run's rows in one typed table."""

from __future__ import annotations

from pathlib import Path

import typer

from aimscale.sweeps.cli.plan import Root, SweepName
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import load_sweep
from aimscale.sweeps.table.collection import collect

app = typer.Typer(help="Gather every run's rows into one typed table.")


@app.command()
def command(sweep: SweepName, root: Root = Path("aimscale-runs")) -> None:
    """Gather every run's rows into one typed table (Parquet and CSV)."""
    loaded = load_sweep(sweep, root)
    runs = plan(loaded)
    found = collect(loaded, runs, cost_cards(loaded, runs))
    for why in found.damaged.values():
        typer.echo(f"skipped: {why}", err=True)
    if found.unplanned:
        typer.echo(
            f"left out: {len(found.unplanned)} run directories of another sweep file or version, such as "
            f"{found.unplanned[0]}",
            err=True,
        )
    if found.num_baselines:
        typer.echo(f"{found.num_baselines} baselines: {found.table.with_name('baselines.parquet')}")
    typer.echo(f"{found.num_complete} of {found.num_rows} rows have results, from {found.num_runs} runs: {found.table}")
