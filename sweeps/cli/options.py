"""Arguments shared by the verbs of a sweep: its name, its table, its runs; and the command to run next."""

from __future__ import annotations

import fnmatch
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.aim.errors import did_you_mean
from aimscale.sweeps.planning import DEFAULT_ROOT
from aimscale.sweeps.planning.sweepfile import SWEEP_FILE, Place, Sweep, SweepError, load_sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep

if TYPE_CHECKING:
    from aimscale.sweeps.collection import CollectResult

EXIT_INTERRUPTED = 130

SweepName = Annotated[
    str,
    typer.Argument(
        help="A sweep file, a preset's name (isoflop, ablation-orders, ...), or the name of a launched sweep."
    ),
]
Root = Annotated[Path, typer.Option(help="Folder that holds the sweep directories.")]
On = Annotated[
    Place | None,
    typer.Option(help="Where runs are executed; by default on Slurm if the file has a `slurm` section, else here."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]


def select_run_ids(planned: PlannedSweep, patterns: Sequence[str]) -> list[str]:
    """Return the ids of the planned and other runs that match any of the patterns; all planned ones without a pattern.

    Patterns are whole ids, or hold `*` and `?`; part of an id matches nothing.
    """
    sweep, run_ids = planned.sweep, [run.run_id for run in planned.runs]
    if not patterns:
        return run_ids
    run_ids += [path.name for path in sorted(sweep.runs_dir.glob("*/")) if path.name not in run_ids]
    chosen: list[str] = []
    for pattern in patterns:
        if not (matching := fnmatch.filter(run_ids, pattern)):
            part_of = [run_id for run_id in run_ids if pattern in run_id]
            hint = f"'*{pattern}*' matches {len(part_of)}, such as {part_of[0]}" if part_of else ""
            hint = hint or did_you_mean(pattern, run_ids, "its runs are")
            raise SweepError(f"no run of sweep '{sweep.name}' is '{pattern}'; {hint}")
        chosen += matching
    return list(dict.fromkeys(chosen))


def find_sweep(given: str | Path, root: Path) -> Sweep | None:
    """Return the sweep that an argument of a verb means, by file, folder or name; None if it is a table: any other file
    or folder, or the name of a file.

    Raises:
        SweepError: there is neither.
    """
    from aimscale.analysis.table.files import SUFFIXES

    path = Path(given)
    is_sweep = path.suffix in (".yaml", ".yml") or (path / SWEEP_FILE).is_file()
    if not is_sweep and (path.exists() or path.suffix in SUFFIXES):
        return None
    try:
        return load_sweep(path, root)
    except SweepError:
        if path.is_dir():  # a copy of a sweep's folder, without its record
            return None
        raise


def name_anywhere(sweep: Sweep, given: str | Path, root: Path) -> str:
    """Return what names a sweep to a verb that is given no `--root`: its name as it was typed, or its folder."""
    return str(given) if root == DEFAULT_ROOT else str(sweep.directory)


def fresh_table(sweep: Sweep, name: str) -> Path:
    """Collect a sweep and return its table; one that is not here or cannot be written is read as it is.

    Args:
        name: what names the sweep, instead of the table, in the command to run next.
    """
    from aimscale.analysis.cli.options import NAMES

    table = sweep.directory / "results.parquet"
    NAMES[table] = name
    if table.is_file() and not (sweep.runs_dir.is_dir() and os.access(sweep.directory, os.W_OK)):
        typer.echo(f"{table} is read as it is: its runs are not here, or its folder cannot be written", err=True)
        return table
    return collect_rows(PlannedSweep(sweep)).table


def collect_rows(planned: PlannedSweep) -> CollectResult:
    """Collect a sweep and say on the error stream what is left out."""
    from aimscale.sweeps.collection import collect  # pandas takes half a second

    collected = collect(planned)
    for reason in collected.damaged.values():
        typer.echo(f"skipped: {reason}", err=True)
    if collected.unplanned:
        what = f"{len(collected.unplanned)} run directories of another sweep file or version"
        typer.echo(f"left out: {what}, such as {collected.unplanned[0]}", err=True)
    return collected


def confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal, and end the command if the answer is no; without a terminal nothing is asked."""
    if not yes and sys.stdin.isatty():
        typer.confirm(question, abort=True)


def print_next(verb: str, sweep: str, root: Path = DEFAULT_ROOT, *more: str) -> None:
    """Print the command to run next, with the options that the user gave."""
    typer.echo(f"next: {shlex.join(['aimscale', verb, sweep, *more, *root_option(root)])}")


def root_option(root: Path) -> list[str]:
    """Return the option `--root` for the next command, if it is needed."""
    return [] if root == DEFAULT_ROOT else ["--root", str(root)]
