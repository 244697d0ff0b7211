"""`aimscale demo`: tiny models by data budgets on real photographs, with probes, laws and one report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.sweeps.cli.options import EXIT_INTERRUPTED, print_next, root_option
from aimscale.sweeps.planning import DEFAULT_ROOT

if TYPE_CHECKING:
    from aimscale.sweeps.engine.active_run import Event
    from aimscale.sweeps.planning.run import Run
    from aimscale.sweeps.planning.sweepfile import Sweep
    from aimscale.sweeps.state.planned_sweep import PlannedSweep

BASELINES = ("random", "raw-pixels")
"""Baselines that are probed like the runs: the largest model untrained, and raw pixels."""


def command(
    root: Annotated[Path, typer.Option(help="Where the data, the runs and the report go.")] = DEFAULT_ROOT,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=10**6, help="GPUs to use, or CPU processes on a machine without GPUs; default: all."),
    ] = None,
) -> None:
    """Cut images from photographs, train and probe a grid of tiny models, fit the laws, write the report.

    Seven minutes on two idle cores. Interrupt it at any time; the same command continues.
    """
    from aimscale.analysis.report.page import write_page
    from aimscale.analysis.report.study import read_study
    from aimscale.analysis.report.summary import findings
    from aimscale.harness.data.store.bundled import write_bundled
    from aimscale.sweeps.cli.launch import failed_runs, show_progress
    from aimscale.sweeps.collection import collect
    from aimscale.sweeps.engine.launch import FIRST_LAW, launch
    from aimscale.sweeps.state.planned_sweep import plan_sweep

    planned = plan_sweep("demo", root)
    sweep = planned.sweep
    sizes, budgets = sweep.file.sizes, sweep.file.budgets
    typer.echo(
        f"{len(sizes)} tiny models see up to {max(budgets):,} crops of photographs and are measured at {len(budgets)} "
        f"budgets.\nThis takes seven minutes on two idle cores. The report will be {sweep.directory / 'report.html'}."
    )
    data = sweep.base_dir / "data"
    if not data.is_dir():
        write_bundled(data)

    laws = list[str]()

    def tell(event: Event) -> str | None:
        """Word an event of the launch: what the sizes that are evaluated say so far, once."""
        if event.kind not in ("started", "finished"):
            return str(event)
        law = _first_law(planned) if event.kind == "finished" else None
        if law is None or law in laws:
            return None
        laws.append(law)
        return law

    with show_progress(planned, tell) as report_progress:
        result = launch(planned, devices=devices, num_smallest_first=FIRST_LAW, report=report_progress)
    if result.interrupted:
        given = [*root_option(root), *(["--devices", str(devices)] if devices else [])]
        typer.echo(f"next: {shlex.join(['aimscale', 'demo', *given])}")
        raise typer.Exit(EXIT_INTERRUPTED)
    if failed := failed_runs(result):
        print_next("logs", "demo", root, failed[0])
        raise typer.Exit(1)
    _probe_baselines(sweep, planned.runs[-1])
    study = read_study([collect(planned).table], {}, ())
    report = write_page(study)
    for finding in findings(study):
        first, *_ = finding.caption.rstrip(".").split(". ")
        typer.echo(f"{finding.title}. {first}.")
    typer.echo(f"report: {report.resolve()}")


def _first_law(planned: PlannedSweep) -> str | None:
    """Fit the sizes that are trained so far; None while they are too few, or once the report is about to come."""
    from aimscale.analysis import AnalysisError, fit, read_table
    from aimscale.sweeps.collection import collect
    from aimscale.sweeps.engine.launch import FIRST_LAW

    rows = read_table(collect(planned).table)
    num = rows["size"][rows["val_loss"].notna()].nunique()
    if not FIRST_LAW <= num < len(planned.runs):
        return None
    try:
        law = fit(rows, "chinchilla")
    except AnalysisError as error:
        return f"so far, {num} of {len(planned.runs)} sizes: {error}"
    exponents = ", ".join(law.equation(name, name) for name in ("alpha", "beta"))
    return f"so far, {num} of {len(planned.runs)} sizes: {law.law.formula}, {exponents}"


def _probe_baselines(sweep: Sweep, largest: Run) -> None:
    """Probe the untrained largest model and raw pixels on the runs' tasks."""
    from aimscale.harness.probe.run import probe_baseline, standalone_group
    from aimscale.harness.run.directory import RunDir

    like, config = RunDir(sweep.run_dir(largest.run_id)), largest.config
    with standalone_group(like, config.runtime.device) as group:
        for name in BASELINES:
            for _ in probe_baseline(name, like, config.evaluation.probes, group=group):
                pass
