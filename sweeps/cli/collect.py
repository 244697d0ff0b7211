"""`aimscale collect`: every run's rows in one typed table."""

from __future__ import annotations

from pathlib import Path

import typer

from aimscale.sweeps.cli.options import Root, SweepName
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import load_sweep
from aimscale.sweeps.table.collection import collect

REGISTER, SCORES = "forecasts.jsonl", "forecast-scores.csv"


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
    for line in _scored_forecasts(found.table):
        typer.echo(line)
    typer.echo(f"{found.num_complete} of {found.num_rows} rows have results, from {found.num_runs} runs: {found.table}")


def _scored_forecasts(table: Path) -> list[str]:
    """Score the sweep's registered forecasts, keep the score table beside the results, and say what came true."""
    register = table.with_name(REGISTER)
    if not register.is_file():
        return []
    from aimscale.analysis.forecasts.registry import score_words, scores
    from aimscale.analysis.table.results import read_table

    found = scores(register, read_table(table))
    found.to_csv(table.with_name(SCORES), index=False)
    waiting = int((found["num_rows"] == 0).sum())
    return [f"forecast: {line}" for line in score_words(found)] + [
        f"{len(found)} registered forecasts, {waiting} not measured yet: {table.with_name(SCORES)}"
    ]
