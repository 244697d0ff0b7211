"""Arguments that the verbs of a sweep share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from aimscale.sweeps.plan.sweepfile import SWEEP_FILE, preset_names

EXIT_INTERRUPTED = 130


def complete_sweep(ctx: typer.Context, incomplete: str) -> list[str]:
    """What the shell offers for SWEEP: sweep files beside what was typed, presets, and sweeps under the root."""
    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    files = [*folder.glob("*.yaml"), *folder.glob("*.yml")]
    launched = Path(ctx.params.get("root") or "aimscale-runs").glob(f"*/{SWEEP_FILE}")
    names = [*map(str, files), *preset_names(), *(path.parent.name for path in launched)]
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete.removeprefix("./"))]


SweepName = Annotated[
    str,
    typer.Argument(
        help="A sweep file, a preset's name, or the name of a launched sweep.", autocompletion=complete_sweep
    ),
]
Root = Annotated[Path, typer.Option(help="Folder that holds the sweep directories.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BackEnd = Literal["local", "slurm"]
Slots = Annotated[
    int | None, typer.Option(help="Local processes at a time; by default one per card, or what the cores can feed.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
AllowDirty = Annotated[bool, typer.Option("--allow-dirty", help="Launch uncommitted code; it is copied and recorded.")]
Partition = Annotated[str | None, typer.Option(help="Instead of slurm.partition.")]
Account = Annotated[str | None, typer.Option(help="Instead of slurm.account.")]
Qos = Annotated[str | None, typer.Option(help="Instead of slurm.qos.")]
Constraint = Annotated[str | None, typer.Option(help="Instead of slurm.constraint.")]
TimeMin = Annotated[int | None, typer.Option(help="Minutes per job, instead of slurm.time_min.")]
