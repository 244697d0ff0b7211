"""Arguments that the verbs of a sweep share, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError

EXIT_INTERRUPTED = 130


def some_runs(sweep: Sweep, parts: Sequence[str], most: int | None = None) -> list[str]:
    """Run ids that contain any of the parts; all runs of the plan where no part is given.

    Raises:
        SweepError: a part that names no run, or more runs than `most`.
    """
    planned = [run.run_id for run in plan(sweep)]
    there = [path.name for path in sweep.runs_dir.iterdir()] if sweep.runs_dir.is_dir() else []
    if not parts:
        return planned
    chosen: list[str] = []
    for part in parts:
        named = [run_id for run_id in planned if part in run_id] or [run_id for run_id in there if part in run_id]
        if not named:
            raise SweepError(f"no run of sweep '{sweep.name}' has '{part}' in its id; `aimscale status` lists them")
        if most is not None and len(named) > most:
            raise SweepError(f"'{part}' is part of {len(named)} run ids ({named[0]}, {named[1]}, ...); give more of it")
        chosen += named
    return list(dict.fromkeys(chosen))


SweepName = Annotated[str, typer.Argument(help="A sweep file, a preset's name, or the name of a launched sweep.")]
Root = Annotated[Path, typer.Option(help="Folder that holds the sweep directories.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
