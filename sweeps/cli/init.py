"""`aimscale init FILE`: a sweep file for some data and hours."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated

import typer
import yaml

from aimscale.sweeps.cli.options import print_next
from aimscale.sweeps.planning.sweepfile import SweepError

PROGRAM = """\
name: {name}
trainer:
  directory: .                # where the command is executed; its git commit goes into every start and row
  command: {command}
  # {{run_dir}} is the folder of a run, {{budget}} its D, {{seed}} its seed; {{budget/1024}} and the like are computed.
  # The program writes lines {{"D": samples seen, "val_loss": ..., "loss": ..., "N": parameters}} into
  # {{run_dir}}/metrics.jsonl, the last one at D = budget. Or let a pattern find them in what it prints:
  # metrics: {{pattern: 'step (?P<step>\\d+): val loss (?P<val_loss>[\\d.]+)', D: step*1024}}
  # On SIGTERM it saves and exits with 75; started again, it goes on. If that takes a word more:
  # resume: {{if_exists: checkpoint.pt, add: --resume}}
  sizes:
    small: {{{small}}}
    middle: {{{middle}}}
    large: {{{large}}}
  # params: 12*depth*width**2 # N; without it the program tells N
  unit: tokens                # what D counts
  budgets: apart              # a run for each budget; together: one run, whose lines say "budget"
sizes: [small, middle, large]
budgets: [1M, 2M, 4M]
seeds: [0]
base: {{}}                      # further values; `axes` varies them
"""
"""Sweep file of a program."""


def command(
    file: Annotated[Path, typer.Argument(help="Sweep file to write, such as mysweep.yaml.")],
    data: Annotated[Path | None, typer.Option(help="Folder that `data pack --split` wrote: what to train on.")] = None,
    hours: Annotated[float | None, typer.Option(min=0.001, help="Hours until all runs have ended.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="GPU to plan for, such as A100: one of them; default: all devices here.")
    ] = None,
    command: Annotated[
        str | None,
        typer.Option(help="Command that trains, instead of aimscale: such as 'python train.py --width={width}'."),
    ] = None,
) -> None:
    """Write a sweep file: the largest grid that identifies a law within so many hours, or one for your own command."""
    if command is not None:
        write_program_sweep(file, command)
    elif data is None or hours is None:
        raise SweepError("give --data and --hours for aimscale's own trainer, or --command for yours")
    else:
        write_suggestion(file, data, hours, gpu)
    print_next("plan", str(file))


def write_program_sweep(file: Path, command: str) -> None:
    """Write a new sweep file around a command, each key of its section explained.

    Raises:
        SweepError: the file exists or is no YAML file, or the command is none.
    """
    from aimscale.harness.run.section import parse
    from aimscale.sweeps.planning.sweepfile import SweepFile
    from aimscale.sweeps.planning.trainer import TemplateError, names_of

    _refuse_file(file)
    try:
        names = names_of(command)
    except TemplateError as error:
        raise SweepError(f"--command: {error}") from error
    sizes = (", ".join(f"{name}: {number}" for name in names) for number in (64, 128, 256))
    text = PROGRAM.format(
        name=file.stem, command=json.dumps(command), **dict(zip(("small", "middle", "large"), sizes, strict=True))
    )
    parse(SweepFile, yaml.safe_load(text), str(file))
    file.write_text(text)
    typer.echo(f"wrote {file}: correct sizes, params and budgets in it", err=True)


def _refuse_file(file: Path) -> None:
    if file.suffix not in (".yaml", ".yml") or file.exists():
        problem = "exists already" if file.exists() else "is no name of a YAML file"
        raise SweepError(f"{file} {problem}; name a new sweep file, such as mysweep.yaml")


def write_suggestion(file: Path, data: Path, hours: float, gpu: str | None) -> None:
    """Write a new sweep file for these data and hours, on one GPU of a type or on all devices here.

    Raises:
        SweepError: the file exists or is no YAML file, the data lack a part, or the hours are too few.
    """
    from aimscale.sweeps.engine.devices import local_machine
    from aimscale.sweeps.planning.planner import plan
    from aimscale.sweeps.planning.speed import measure_here
    from aimscale.sweeps.planning.suggestion import Request, suggest
    from aimscale.sweeps.planning.sweepfile import Sweep

    _refuse_file(file)
    machine = local_machine([])
    is_gpu = gpu is not None or bool(machine.gpus)
    devices = 1 if gpu else machine.devices

    def measure(sweep: Sweep) -> bool:
        return measure_here(sweep, plan(sweep), devices, tell=functools.partial(typer.echo, err=True))

    request = Request(path=file, data=data, hours=hours, devices=devices, gpu=gpu, is_gpu=is_gpu)
    file.write_text(suggest(request, (lambda _: False) if is_gpu else measure))
    typer.echo(f"wrote {file}", err=True)
