"""`aimscale demo`: five sizes by four budgets on bundled real images, with probes, laws and one report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, ROOT, print_next

BASELINES = ("random", "raw-pixels")
"""Baselines that are probed like the runs: the largest model untrained, and raw pixels."""


def command(
    root: Annotated[Path, typer.Option(help="Where the data, the runs and the report go.")] = ROOT,
    devices: Annotated[
        int | None, typer.Option(min=1, help="GPUs to use, or processes where there is none; by default all.")
    ] = None,
) -> None:
    """Pack the bundled images, train and probe the grid, fit the laws, write the report.

    Five to eight minutes on two cores. Interrupt it at any time; the same command continues.
    """
    from aimscale.analysis.report.page import write_report
    from aimscale.harness.data.store.bundled import write_bundled
    from aimscale.harness.probe.run import probe_baseline, standalone_group
    from aimscale.harness.run.directory import RunDir
    from aimscale.sweeps.cli.launch import failed_runs, print_result
    from aimscale.sweeps.engine.launch import launch
    from aimscale.sweeps.plan.costs import cost_cards
    from aimscale.sweeps.plan.planner import plan
    from aimscale.sweeps.plan.sweepfile import load_sweep
    from aimscale.sweeps.table.collection import collect

    started = time.monotonic()
    sweep = load_sweep("demo", root)
    data = sweep.base_dir / "data"
    if not data.is_dir():
        typer.echo(f"packing photographs and digits from installed packages into {data}")
        write_bundled(data)
    result = launch(sweep, root, devices=devices)
    print_result(result)
    if result.interrupted:
        typer.echo("next: aimscale demo")
        raise typer.Exit(EXIT_INTERRUPTED)
    failed = failed_runs(result)
    runs = plan(sweep)
    largest = runs[-1]
    like = RunDir(sweep.run_dir(largest.run_id))
    if not failed:
        typer.echo(f"probing the baselines {' and '.join(BASELINES)}")
    with standalone_group(like, largest.config.runtime.device) as group:
        for name in BASELINES if not failed else ():
            for _ in probe_baseline(name, like, largest.config.evaluation.probes, group=group):
                pass
    collected = collect(sweep, runs, cost_cards(sweep, runs))
    typer.echo(f"{collected.num_complete} of {collected.num_rows} rows have results: {collected.table}")
    typer.echo("fitting laws and writing the report")
    report = write_report(collected.table)
    typer.echo(f"report after {(time.monotonic() - started) / 60:.1f} minutes")
    if failed:
        print_next("logs", "demo", root, failed[0])
        raise typer.Exit(1)
    typer.echo(f"next: open {report.resolve()}")
