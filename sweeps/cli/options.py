"""Arguments shared by the verbs of a sweep."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from aimscale.aim.errors import did_you_mean
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError

EXIT_INTERRUPTED = 130


def select_run_ids(sweep: Sweep, parts: Sequence[str]) -> list[str]:
    """Return the run ids that contain any of the parts, or all planned runs if no part is given.

    Raises:
        SweepError: a part matches no run.
    """
    planned = [run.run_id for run in plan(sweep)]
    there = [path.name for path in sweep.runs_dir.iterdir()] if sweep.runs_dir.is_dir() else []
    chosen = [] if parts else planned
    for part in parts:
        named = [run_id for run_id in planned if part in run_id] or [run_id for run_id in there if part in run_id]
        if not named:
            hint = did_you_mean(part, [*planned, *there], "its runs are")
            raise SweepError(f"no run of sweep '{sweep.name}' has '{part}' in its id; {hint}")
        chosen += named
    return list(dict.fromkeys(chosen))


ROOT = Path("aimscale-runs")
"""Default folder of sweeps."""


def print_next(verb: str, sweep: str, root: Path = ROOT, *more: str) -> None:
    """Print the command to run next, with the options that the user gave."""
    where = [] if root == ROOT else ["--root", str(root)]
    typer.echo(f"next: {shlex.join(['aimscale', verb, sweep, *more, *where])}")


SweepName = Annotated[
    str,
    typer.Argument(
        help="A sweep file, a preset's name (isoflop, ablation-orders, ...), or the name of a launched sweep."
    ),
]
Root = Annotated[Path, typer.Option(help="Folder that holds the sweep directories.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
