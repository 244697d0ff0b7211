"""`aimscale logs`: the output of one run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.cli.options import Root, SweepName
from aimscale.sweeps.plan.sweepfile import SweepError, load_sweep
from aimscale.sweeps.state.claims import RunRecord
from aimscale.sweeps.state.probe_record import jobs_beside
from aimscale.sweeps.table.select import one_run

ENDED = ("finished", "failed", "diverged")


def command(
    sweep: SweepName,
    run: Annotated[str, typer.Argument(help="A run's id, or any part that no other id has.")],
    root: Root = Path("aimscale-runs"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the run ends or Ctrl-C.")] = False,
    probes: Annotated[
        bool, typer.Option("--probes", help="The log of its last evaluation job instead of its training.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Last lines to print; 0 for all.", min=0)] = 0,
) -> None:
    """Print or follow the log of one run's last attempt."""
    loaded = load_sweep(sweep, root)
    run_dir = loaded.run_dir(one_run(loaded, run))
    records = jobs_beside(run_dir).values() if probes else [RunRecord(run_dir)]
    logs = [(path.stat().st_mtime, path, record) for record in records if (path := record.last_log())]
    if not logs:
        what = "no job evaluated it by itself" if probes else "it was never started"
        raise SweepError(f"{run_dir.name} has no such log yet; {what}")
    _, path, record = max(logs, key=lambda each: each[0])
    with path.open(errors="replace") as file:
        text = file.read().splitlines(keepends=True)
        typer.echo("".join(text[-lines:] if lines else text), nl=False)
        try:
            while follow and record.last_log() == path:
                piece = file.read()
                if piece:
                    typer.echo(piece, nl=False)
                elif record.checked_status().state in ENDED:
                    return
                else:
                    time.sleep(0.5)
        except KeyboardInterrupt:
            return
