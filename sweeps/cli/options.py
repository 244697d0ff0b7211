"""Arguments shared by the verbs of a sweep."""

from __future__ import annotations

import fnmatch
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from aimscale.aim.errors import did_you_mean
from aimscale.sweeps.planning.sweepfile import DEFAULT_ROOT, Place, SweepError
from aimscale.sweeps.state.planned_sweep import PlannedSweep

EXIT_INTERRUPTED = 130
ROOT = DEFAULT_ROOT
"""Default folder of sweeps."""

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


def confirm(question: str, *, yes: bool) -> None:
    """Ask on a terminal, and end the command if the answer is no; without a terminal nothing is asked."""
    if not yes and sys.stdin.isatty():
        typer.confirm(question, abort=True)


def print_next(verb: str, sweep: str, root: Path = ROOT, *more: str) -> None:
    """Print the command to run next, with the options that the user gave."""
    where = [] if root == ROOT else ["--root", str(root)]
    typer.echo(f"next: {shlex.join(['aimscale', verb, sweep, *more, *where])}")
