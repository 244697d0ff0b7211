"""`aimscale collapse SWEEP`: do the training curves of all sizes have one shape, and which size deviates?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.cli.options import AsJson, Root, SweepName


def command(
    sweep: SweepName,
    until: Annotated[
        float | None, typer.Option(min=0.2, max=1, help="Share of training to compare; default: what all runs reached.")
    ] = None,
    per_param: Annotated[
        bool, typer.Option("--per-param", help="Cut each run at the budget whose D/N is nearest to the others'.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw FIGURE.svg and FIGURE.png.")] = None,
    root: Root = Path("aimscale-runs"),
    as_json: AsJson = False,
) -> None:
    """Normalise every run's training curve by its end, draw them together, and name the sizes beyond the noise."""
    from aimscale.analysis.forecasts.collapse import collapse
    from aimscale.analysis.plots.curves import plot_collapse
    from aimscale.analysis.plots.style import save
    from aimscale.sweeps.plan.planner import plan
    from aimscale.sweeps.plan.sweepfile import load_sweep
    from aimscale.sweeps.table.curves import training_curves

    loaded = load_sweep(sweep, root)
    found = collapse(training_curves(loaded, plan(loaded), per_param=per_param), until=until)
    if figure is not None:
        save(plot_collapse(found), figure)
    typer.echo(found.to_json() if as_json else found.summary())
