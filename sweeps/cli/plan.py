"""`aimscale plan`: the runs of a sweep with a cost card each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.plan import costs
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import SWEEP_FILE, load_sweep, preset_names
from aimscale.sweeps.table import views

app = typer.Typer(help="List the runs of a sweep with a cost card each; no side effect.")


def complete_sweep(ctx: typer.Context, incomplete: str) -> list[str]:
    """What the shell offers for SWEEP: sweep files beside what was typed, presets, and sweeps under the root."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    launched = Path(ctx.params.get("root") or "aimscale-runs").glob(f"*/{SWEEP_FILE}")
    names = [*map(str, files), *preset_names(), *(path.parent.name for path in launched)]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete.removeprefix("./"))]


SweepName = Annotated[
    str,
    typer.Argument(
        help="A sweep file, a preset's name, or the name of a launched sweep.", autocompletion=complete_sweep
    ),
]
Root = Annotated[Path, typer.Option(help="Sweep directories are made under this folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def command(
    sweep: SweepName,
    root: Root = Path("aimscale-runs"),
    as_json: AsJson = False,
    bench: Annotated[
        Path | None, typer.Option(help="JSON of `aimscale bench train`: its MFU replaces the assumed.")
    ] = None,
) -> None:
    """List the runs of a sweep with a cost card each; no side effect."""
    loaded = load_sweep(sweep, root)
    if bench:
        loaded = costs.with_bench(loaded, bench)
    runs = plan(loaded)
    cards = costs.cost_cards(loaded, runs)
    if as_json:
        typer.echo(json.dumps(costs.to_json(loaded, runs, cards), indent=1))
    else:
        views.print_plan(loaded, runs, cards)
