"""`aimscale work`: a worker that any scheduler, or a person, can start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, Root, SweepName


def command(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    hours: Annotated[
        float | None, typer.Option("--for", min=0.001, help="Hours until this machine is gone; runs save before that.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Cards to use, or processes where there are none; by default all.")
    ] = None,
) -> None:
    """Take free runs and evaluations of a sweep, one after another, until none is left.

    Start it on any machine that sees the sweep's folder, as often as you like: workers and launches share the work, and
    each run is executed once. It leaves when nothing is left to take or its time is up, saving first.
    """
    from aimscale.sweeps.engine.start import work  # imports torch

    did = work(sweep, root, hours=hours, devices=devices)
    typer.echo(
        f"{did.why}: trained {len(did.trained)} runs, evaluated {len(did.evaluated)}, {len(did.failed)} failed; see "
        f"`aimscale status {sweep} --root {root}`"
    )
    if did.why == "stopped":
        raise typer.Exit(EXIT_INTERRUPTED)
    if did.failed:
        raise typer.Exit(1)
