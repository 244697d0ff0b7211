"""`aimscale collapse SWEEP`: do the training curves of all sizes have one shape, and which size deviates?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aimscale.sweeps.cli.plan import AsJson, Root, SweepName

if TYPE_CHECKING:
    import pandas as pd

    from aimscale.sweeps.plan.sweepfile import Sweep

app = typer.Typer(help="Compare the shapes of training curves and name sizes that deviate.")


@app.command()
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
    from aimscale.sweeps.plan.sweepfile import load_sweep

    found = collapse(_curves(load_sweep(sweep, root), per_param), until=until)
    if figure is not None:
        save(plot_collapse(found), figure)
    typer.echo(found.to_json() if as_json else found.summary())


def _curves(sweep: Sweep, per_param: bool) -> pd.DataFrame:
    """Logged losses of every run that has begun, by size in order of N, up to its largest budget's end."""
    import numpy as np
    import pandas as pd

    from aimscale.harness.run.row import model_of
    from aimscale.sweeps.plan.planner import counts_of, plan
    from aimscale.sweeps.plan.sweepfile import SweepError

    runs = plan(sweep)
    params = {run.run_id: counts_of(model_of(run.config.training))[0].total for run in runs}
    middle = float(np.median([np.log(max(run.budgets) / params[run.run_id]) for run in runs]))
    rows: list[dict[str, Any]] = []
    for run in sorted(runs, key=lambda run: params[run.run_id]):
        path = sweep.run_dir(run.run_id) / "metrics.jsonl"
        if not path.is_file():
            continue
        end = max(run.budgets)
        if per_param:
            end = min(run.budgets, key=lambda seen: abs(np.log(seen / params[run.run_id]) - middle))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        shared = {"rung": run.cell["size"], "run": run.run_id}
        rows += [
            {**shared, "progress": line["images_seen"] / end, "loss": line["loss"]}
            for line in lines
            if line.get("branch") in (None, end) and line["images_seen"] <= end
        ]
    if not rows:
        raise SweepError(f"no run of {sweep.name} has logged a loss under {sweep.runs_dir}; launch it first")
    return pd.DataFrame(rows)
