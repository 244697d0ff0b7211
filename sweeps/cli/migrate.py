"""`aimscale migrate`: bring run directories of earlier versions along."""

from __future__ import annotations

from pathlib import Path

import typer

from aimscale.sweeps.cli.options import DryRun, Root, SweepName
from aimscale.sweeps.plan.sweepfile import load_sweep
from aimscale.sweeps.state.migrate import migrate, misnamed
from aimscale.sweeps.state.sweep_dir import launch_lock


def command(sweep: SweepName, root: Root = Path("aimscale-runs"), dry_run: DryRun = False) -> None:
    """Give runs of earlier versions the names of this one, with rows, weights and probes; nothing is trained."""
    loaded = load_sweep(sweep, root)
    if not misnamed(loaded):
        typer.echo(f"no run under {loaded.runs_dir} is of an earlier version")
        return
    stay = 0
    with launch_lock(loaded):
        for old, new, sentence in migrate(loaded, dry_run=dry_run):
            typer.echo(f"{old} {sentence} {new}" if new else f"{old} stays: {sentence}")
            stay += new is None
    if stay:
        raise typer.Exit(1)
