"""`aimscale demo`: sizes by budgets on real photographs, with probes, laws and one report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, ROOT, print_next

if TYPE_CHECKING:
    import pandas as pd

    from aimscale.analysis.accuracy.correlation import Correlation
    from aimscale.sweeps.plan.costs import CostCard
    from aimscale.sweeps.plan.planner import Run
    from aimscale.sweeps.plan.sweepfile import Sweep

BASELINES = ("random", "raw-pixels")
"""Baselines that are probed like the runs: the largest model untrained, and raw pixels."""
FIRST_LAW = 3
"""Number of sizes from which a law is fitted while others are trained."""


def command(
    root: Annotated[Path, typer.Option(help="Where the data, the runs and the report go.")] = ROOT,
    devices: Annotated[
        int | None, typer.Option(min=1, help="GPUs to use, or processes where there is none; by default all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and images; each has runs of its own.")] = 0,
) -> None:
    """Pack photographs, train and probe a grid of tiny models, fit the laws, write the report.

    Six minutes on two cores. Interrupt it at any time; the same command continues.
    """
    from aimscale.analysis.report.page import write_report
    from aimscale.harness.data.store.bundled import write_bundled
    from aimscale.sweeps.cli.launch import failed_runs
    from aimscale.sweeps.engine.launch import launch
    from aimscale.sweeps.plan.costs import cost_cards
    from aimscale.sweeps.plan.planner import plan
    from aimscale.sweeps.plan.sweepfile import load_sweep
    from aimscale.sweeps.table.collection import collect

    sweep = load_sweep("demo", root)
    sweep = sweep.with_fields(seeds=[seed])
    num_sizes, num_budgets = len(sweep.file.sizes), len(sweep.file.budgets)
    typer.echo(
        f"{num_sizes} sizes of model see up to {max(sweep.file.budgets):,} crops of photographs, with results at "
        f"{num_budgets} budgets: about six minutes on two cores\n"
        f"the report will be {report_of(sweep)}; Ctrl-C saves, and the same command goes on"
    )
    data = sweep.base_dir / "data"
    if not data.is_dir():
        write_bundled(data)
    runs = plan(sweep)
    cards = cost_cards(sweep, runs)
    result = launch(sweep, root, devices=devices, smallest_first=True, tell=lambda event: _tell(event, sweep, runs, cards))
    if result.interrupted:
        print_next("demo", root=root)
        raise typer.Exit(EXIT_INTERRUPTED)
    if failed := failed_runs(result):
        print_next("logs", "demo", root, failed[0])
        raise typer.Exit(1)
