"""Sweeps for programs and notebooks: what `plan`, `launch`, `status` and `collect` do, as functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aimscale.aim.errors import check_training_installed
from aimscale.sweeps import collection
from aimscale.sweeps.collection import CollectResult
from aimscale.sweeps.engine import launch as engine
from aimscale.sweeps.engine.worker import LaunchResult, Worker, print_events
from aimscale.sweeps.planning import DEFAULT_ROOT
from aimscale.sweeps.planning.checks import raise_on_problems
from aimscale.sweeps.planning.sweepfile import Sweep, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.sweep_status import SweepStatus, sweep_status

AnySweep = str | Path | Sweep | PlannedSweep
"""Sweep by file, by folder or by name, or one that is loaded or planned already."""


def plan(sweep: AnySweep, root: str | Path = DEFAULT_ROOT, *, check: bool = True) -> PlannedSweep:
    """Plan a sweep: list its runs, what each costs, and how each stands; nothing is written.

    Args:
        sweep: sweep file, folder or name of a launched sweep, name of a preset, or a sweep that is loaded.
        root: folder that holds the sweep directories, for a file or a name.
        check: whether to make the checks that a launch makes: of data sets, memory and settings.

    Returns:
        The sweep with `runs`, `cards` (cost cards: FLOPs, memory, time) and `states`. Hand it to `launch`, `status` and
        `collect`, which then plan nothing anew.

    Raises:
        SweepError, ConfigError: the file does not validate, or runs would fail.

    Example:
        >>> planned = plan("mysweep.yaml")
        >>> sum(card.device_hours for card in planned.cards)
        >>> [state.record.path for state in planned.states if state.state.needs_person]
    """
    if not isinstance(sweep, PlannedSweep):
        sweep = PlannedSweep(sweep if isinstance(sweep, Sweep) else load_sweep(sweep, root))
    if check:
        raise_on_problems(sweep.sweep, sweep.runs)
    return sweep


def launch(
    sweep: AnySweep,
    root: str | Path = DEFAULT_ROOT,
    *,
    devices: int | None = None,
    hours: float | None = None,
    retry: bool = False,
    stop_off_track: float | None = None,
    report: Callable[[Worker], None] = print_events,
) -> LaunchResult:
    """Execute what is missing of a sweep on this machine, and return when nothing is left to start.

    Runs that died are resumed, those that are done are skipped. Call it as often, and on as many machines that share
    the folder, as you like: each run is executed once. A sweep file's `slurm` section is left to `aimscale launch`.

    Args:
        sweep, root: as in `plan`.
        devices: number of GPUs to use, or of processes on a machine without GPUs; by default all.
        hours: time until this machine is gone; all runs are saved before.
        retry: also start runs that failed for good, diverged, went off track or were cancelled.
        stop_off_track: save and end runs whose loss stays so many standard deviations above its forecast.
        report: called every few moments with the worker; by default it prints a line for each start and end of a run.

    Returns:
        Ids of the runs that finished, failed, were stopped or skipped.

    Raises:
        SweepError, ConfigError: the sweep cannot be planned, its runs would fail, or its folder cannot be written.

    Example:
        >>> result = launch("mysweep.yaml", devices=2)
        >>> result.finished, result.failed
    """
    check_training_installed("launch")
    planned = plan(sweep, root, check=False)
    if planned.sweep.is_for_slurm:
        planned = PlannedSweep(planned.sweep.with_target("local"))
    planned.look()  # a notebook may have planned it long ago
    return engine.launch(planned, devices=devices, hours=hours, retry=retry, stop_sd=stop_off_track, report=report)


def status(sweep: AnySweep, root: str | Path = DEFAULT_ROOT) -> SweepStatus:
    """Look at all runs of a sweep: state, progress, losses, time left, and what to say of each.

    Args:
        sweep, root: as in `plan`. The runs of one that is planned are looked at again, but for those that are finished.

    Returns:
        The whole sweep, with a `RunStatus` for each run. Slurm is asked for the jobs of a sweep that was submitted.

    Raises:
        SweepError, ConfigError: the sweep cannot be planned.

    Example:
        >>> found = status("mysweep")
        >>> found.counts, found.progress
        >>> [(run.run_id, run.status.reason) for run in found.runs if run.state.needs_person]
    """
    planned = plan(sweep, root, check=False)
    jobs = slurm.sweep_jobs(planned.sweep)
    planned.look()
    return sweep_status(planned, jobs)


def collect(sweep: AnySweep, root: str | Path = DEFAULT_ROOT) -> CollectResult:
    """Gather the rows of all runs into one table, `results.parquet` and `.csv` in the sweep's folder.

    Args:
        sweep, root: as in `plan`.

    Returns:
        Path of the table, number of its rows and of those with results, and what was left out.

    Raises:
        SweepError: the sweep was never launched under this root, or all its runs belong to another plan.

    Example:
        >>> from aimscale.analysis import fit, read_table
        >>> fit(read_table(collect("mysweep").table), "chinchilla")
    """
    return collection.collect(plan(sweep, root, check=False))
