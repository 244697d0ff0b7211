"""`aimscale demo`: tiny models by data budgets on real photographs, with probes, laws and one report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, ROOT, print_next

if TYPE_CHECKING:
    from aimscale.sweeps.engine.active_run import Event
    from aimscale.sweeps.plan.costs import CostCard
    from aimscale.sweeps.plan.planner import Run
    from aimscale.sweeps.plan.sweepfile import Sweep

BASELINES = ("random", "raw-pixels")
"""Baselines that are probed like the runs: the largest model untrained, and raw pixels."""
FIRST_LAW = 3
"""Number of trained sizes from which a first law is told; the smallest are trained first."""


def command(
    root: Annotated[Path, typer.Option(help="Where the data, the runs and the report go.")] = ROOT,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=10**6, help="GPUs to use, or CPU processes on a machine without GPUs; default: all."),
    ] = None,
) -> None:
    """Cut images from photographs, train and probe a grid of tiny models, fit the laws, write the report.

    Eight minutes on two idle cores. Interrupt it at any time; the same command continues.
    """
    from aimscale.analysis.report.page import write_page
    from aimscale.analysis.report.study import read_study
    from aimscale.analysis.report.summary import findings
    from aimscale.harness.data.store.bundled import write_bundled
    from aimscale.sweeps.cli.launch import failed_runs
    from aimscale.sweeps.engine.launch import launch
    from aimscale.sweeps.plan.costs import cost_cards
    from aimscale.sweeps.plan.planner import plan
    from aimscale.sweeps.plan.sweepfile import load_sweep
    from aimscale.sweeps.table.collection import collect

    sweep = load_sweep("demo", root)
    sizes, budgets = sweep.file.sizes, sweep.file.budgets
    typer.echo(
        f"{len(sizes)} tiny models see up to {max(budgets):,} crops of photographs and are measured at {len(budgets)} "
        f"budgets.\nThis takes eight minutes on two idle cores. The report will be {sweep.directory / 'report.html'}."
    )
    data = sweep.base_dir / "data"
    if not data.is_dir():
        write_bundled(data)
    cards = cost_cards(sweep, plan(sweep))

    def tell(event: Event) -> str | None:
        """Word an event of the launch: what the sizes that are trained say so far."""
        if event.kind == "started":
            return None
        return _first_law(sweep, cards) if event.kind == "finished" else str(event)

    result = launch(sweep, root, devices=devices, num_smallest_first=FIRST_LAW, tell=tell)
    if result.interrupted:
        given = [*([] if root == ROOT else ["--root", str(root)]), *(["--devices", str(devices)] if devices else [])]
        typer.echo(f"next: {shlex.join(['aimscale', 'demo', *given])}")
        raise typer.Exit(EXIT_INTERRUPTED)
    if failed := failed_runs(result):
        print_next("logs", "demo", root, failed[0])
        raise typer.Exit(1)
    _probe_baselines(sweep, cards[-1].run)
    study = read_study([collect(sweep, cards).table], {}, ())
    report = write_page(study)
    for each in findings(study):
        first, *_ = each.caption.rstrip(".").split(". ")
        typer.echo(f"{each.title}. {first}.")
    typer.echo(f"report: {report.resolve()}")


def _first_law(sweep: Sweep, cards: Sequence[CostCard]) -> str | None:
    """Fit the sizes that are trained so far; None while they are too few, or once the report is about to come."""
    from aimscale.analysis import AnalysisError, fit, read_table
    from aimscale.sweeps.table.collection import collect

    rows = read_table(collect(sweep, cards).table).dropna(subset="val_loss")
    num = rows["size"].nunique()
    if not FIRST_LAW <= num < len(cards):
        return None
    try:
        law = fit(rows, "chinchilla")
    except AnalysisError as error:
        return f"so far, {num} of {len(cards)} sizes: {error}"
    exponents = ", ".join(law.equation(name, name) for name in ("alpha", "beta"))
    return f"so far, {num} of {len(cards)} sizes: {law.law.formula}, {exponents}"


def _probe_baselines(sweep: Sweep, largest: Run) -> None:
    """Probe the untrained largest model and raw pixels on the runs' tasks."""
    from aimscale.harness.probe.run import probe_baseline, standalone_group
    from aimscale.harness.run.directory import RunDir

    like, config = RunDir(sweep.run_dir(largest.run_id)), largest.config
    with standalone_group(like, config.runtime.device) as group:
        for name in BASELINES:
            for _ in probe_baseline(name, like, config.evaluation.probes, group=group):
                pass
