"""`aimscale plan SWEEP`: runs with their cost cards, assumptions of the estimates, problems and cautions."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from aimscale.aim.config import RELEASED_SIZES, known_sizes, model_config
from aimscale.aim.cost import param_count
from aimscale.sweeps.cli.init import write_suggestion
from aimscale.sweeps.cli.layout import Column, fitted_table, format_number, new_console, print_key_values
from aimscale.sweeps.cli.options import AsJson, On, Root, SweepName, print_next, select_run_ids
from aimscale.sweeps.cli.plan_view import launch_view, print_plan
from aimscale.sweeps.cli.sweep import print_next_step
from aimscale.sweeps.engine.devices import local_machine
from aimscale.sweeps.planning import DEFAULT_ROOT
from aimscale.sweeps.planning.checks import check, raise_on_problems
from aimscale.sweeps.planning.run import CostCard, Notice
from aimscale.sweeps.planning.speed import measure_here
from aimscale.sweeps.planning.sweepfile import SweepError
from aimscale.sweeps.state.planned_sweep import PlannedSweep, plan_sweep, to_json
from aimscale.sweeps.sweep_status import sweep_status

if TYPE_CHECKING:
    from aimscale.harness.rehearsal.step import Part, Rehearsal

MIN_MEASURED_S = 60
"""Assumed time of a sweep from which its runs are measured before its times are told."""
Rehearse = Annotated[
    bool,
    typer.Option(
        help="Step the real engine on fake tensors and ranks: memory by phase and every collective, without a GPU; "
        "seconds per shape."
    ),
]
Suggest = Annotated[
    float | None,
    typer.Option(
        "--suggest",
        metavar="HOURS",
        min=0.001,
        help="Old name of `aimscale init SWEEP --data DIR --hours HOURS`; goes with the next release.",
    ),
]


def list_sizes(wanted: bool) -> None:
    """Print the named sizes with their shapes and parameters, if that is asked for."""
    if not wanted:
        return
    models = [
        model_config(name, head_rule="released" if name in RELEASED_SIZES else "proportional") for name in known_sizes()
    ]
    columns = [
        Column(header="size", cell=lambda model: model.name, align_right=False),
        Column(header="width", cell=lambda model: str(model.width)),
        Column(header="depth", cell=lambda model: str(model.depth)),
        Column(header="heads", cell=lambda model: str(model.num_heads)),
        Column(header="backbone", cell=lambda model: format_number(param_count(model).trunk)),
        Column(header="params (N)", cell=lambda model: format_number(param_count(model).total)),
    ]
    console = new_console()
    console.print(fitted_table(columns, models, console.width))
    typer.echo("N: with the head (of aim-*: the paper's), at 224 px in patches of 14")
    typer.echo("other shapes: w<width>-d<depth>, or w<width>-d<depth>-h<heads>")
    raise typer.Exit


Sizes = Annotated[
    bool, typer.Option("--sizes", callback=list_sizes, is_eager=True, help="List the named sizes and their parameters.")
]


def print_schema(wanted: bool) -> None:
    """Print the JSON Schema of a sweep file, if that is asked for."""
    if wanted:
        from aimscale.sweeps.planning.schema import sweep_schema

        typer.echo(json.dumps(sweep_schema(), indent=1))
        raise typer.Exit


AsSchema = Annotated[
    bool,
    typer.Option(
        "--schema", callback=print_schema, is_eager=True, help="Print the JSON Schema of sweep files, for editors."
    ),
]
Measure = Annotated[
    bool | None,
    typer.Option(
        help="Time steps, loading and evaluation of each size on the cores here, a second of each; by default once, if "
        "the sweep takes minutes.",
        show_default=False,
    ),
]
Only = Annotated[str | None, typer.Option("--run", help="Rehearse this run alone, and print all of it.")]


def plan(
    sweep: SweepName,
    root: Root = DEFAULT_ROOT,
    on: On = None,
    rehearse: Rehearse = False,
    only: Only = None,
    measure: Measure = None,
    hours: Suggest = None,
    data: Annotated[Path | None, typer.Option(help="As in `init`, with --suggest.")] = None,
    gpu: Annotated[str | None, typer.Option(help="As in `init`, with --suggest.")] = None,
    sizes: Sizes = False,
    schema: AsSchema = False,
    as_json: AsJson = False,
) -> None:
    """List the runs of a sweep, what each costs, what is there already, and what would stop it; nothing is written."""
    if hours is not None or data is not None or gpu is not None:
        if hours is None or data is None:
            raise SweepError("give both --data DIR and --hours HOURS to `aimscale init`")
        typer.echo("`plan --suggest` is called `aimscale init` now, and will go", err=True)
        write_suggestion(Path(sweep), data, hours, gpu)
    planned = plan_sweep(sweep, root, on)
    loaded, runs = planned.sweep, planned.runs
    if only is not None and not rehearse:
        raise SweepError("--run chooses the run that --rehearse steps; add --rehearse")
    chosen = {run.run_id for run in runs} if only is None else {*select_run_ids(planned, [only])}
    problems = check(loaded, runs)
    if measure or (measure is None and not problems and not as_json):
        planned = _measured(planned, again=bool(measure))
    rehearsals: dict[str, Rehearsal] = {}
    if rehearse:
        if loaded.file.trainer is not None:
            raise SweepError("--rehearse steps aimscale's own engine, and another program trains these runs")
        rehearsals = rehearse_runs([card for card in planned.cards if card.run.run_id in chosen])
    if as_json:
        document = to_json(planned.cards)
        document["problems"] = [
            {"key": notice.key, "why": notice.text, "run_ids": notice.run_ids} for notice in problems
        ]
        document |= {"states": dict(Counter(each.state for each in planned.states)), "unplanned": planned.unplanned}
        price = loaded.file.cost.price(document["totals"]["device_hours"])
        document["price"] = price and {"amount": price[0], "currency": price[1]}
        if rehearse:
            document["rehearsals"] = {run_id: asdict(rehearsed) for run_id, rehearsed in rehearsals.items()}
        typer.echo(json.dumps(document, indent=1))
        raise_on_problems(loaded, runs, problems)
        return
    print_plan(planned, problems=problems, rehearsals=rehearsals)
    if only is not None:
        for run_id, rehearsed in rehearsals.items():
            print_rehearsal(run_id, rehearsed)
    if loaded.runs_dir.is_dir():
        print_key_values(_still_to_do(planned))
    if problems:
        raise SweepError(f"{loaded.source}: its runs would fail; fix what the lines marked 'fail' name")
    options = ["--on", on] if on else []
    if planned.startable():
        print_next("launch", sweep, root, *options)
    else:
        print_next_step(sweep_status(planned), loaded, sweep, root, *options)


def _measured(planned: PlannedSweep, *, again: bool) -> PlannedSweep:
    """Return the sweep with the times that its runs take here, measured if they take minutes, or `again`."""
    num_devices = local_machine(planned.runs).devices
    is_short = sum(card.wall_s for card in planned.cards) / num_devices < MIN_MEASURED_S
    if not again and (is_short or all(card.rates.clock for card in planned.cards)):
        return planned
    tell = functools.partial(typer.echo, err=True)
    if measure_here(planned.sweep, planned.runs, num_devices, again=again, tell=tell):
        planned = PlannedSweep(planned.sweep, is_thorough=planned.is_thorough)
    return planned


def _still_to_do(planned: PlannedSweep) -> list[Notice]:
    """Return what a launch would do with the runs that are there, and with those that the file adds."""
    num_devices = 0 if planned.sweep.is_for_slurm else local_machine(planned.runs).devices
    lines = launch_view(planned, planned.states, planned.work_left(num_devices, planned.states))
    return [replace(line, key={"runs": "there", "cost": "to do"}.get(line.key, line.key)) for line in lines]


def rehearse_runs(cards: Sequence[CostCard]) -> dict[str, Rehearsal]:
    """Map the ids of runs that fit their devices to their rehearsed steps; equal steps are rehearsed once."""
    from aimscale.harness.data.stream.loader import split_step  # torch, which a plan does without
    from aimscale.harness.device.execution import EngineOptions
    from aimscale.harness.log.progress import Bar
    from aimscale.harness.rehearsal.step import rehearse
    from aimscale.harness.run.row import build_model_config

    rehearsals = {}
    with Bar() as bar:
        for number, card in enumerate(cards):
            bar("rehearsing", number, len(cards), "runs")
            if (plan := card.fit) is None or card.batch_size is None:
                continue
            run, recompute = card.run, plan.activation_checkpointing
            training, init = run.config.training, run.config.training.init
            parts = split_step(0, card.batch_size, micro_batch=plan.micro_batch, rank=0, world_size=run.devices)
            rehearsals[run.run_id] = rehearse(
                build_model_config(training),
                precision=training.optimiser.precision,
                options=EngineOptions(
                    zero_stage=plan.zero_stage,
                    activation_checkpointing=recompute,
                    freezes_backbone=init is not None and init.freeze_images > 0,
                ),
                world_size=run.devices,
                micro_batches=tuple(map(len, parts)),
                prefix=training.objective.prefix,
                on_gpu=card.device.is_gpu,
            )
    return rehearsals


def print_rehearsal(run_id: str, rehearsal: Rehearsal) -> None:
    """Print the memory of a step by phase and part, and its collectives."""
    from aimscale.harness.rehearsal.step import PARTS

    memory: list[tuple[str, dict[Part, int]]] = []
    for phase in rehearsal.phases:
        memory += [(f"{phase.phase}, at most", phase.peak), (f"{phase.phase}, at its end", phase.held)]

    def column(part: Part) -> Column:
        return Column(header=part, cell=lambda row: decimal(row[1].get(part, 0)))

    parts = [
        Column(header="memory", cell=lambda row: row[0], align_right=False),
        *map(column, PARTS),
        Column(header="sum", cell=lambda row: decimal(sum(row[1].values()))),
    ]
    calls = [
        Column(
            header="collective", cell=lambda collective: f"{collective.phase}: {collective.name}", align_right=False
        ),
        Column(header="calls", cell=lambda collective: f"{collective.count:,}"),
        Column(header="bytes", cell=lambda collective: decimal(collective.num_bytes)),
    ]
    console = new_console()
    print(f"\n{run_id}: one step of a rank, rehearsed")
    console.print(fitted_table(parts, memory, console.width))
    console.print(fitted_table(calls, rehearsal.collectives, console.width))
    print(f"checkpoint: the rank writes {decimal(rehearsal.checkpoint_bytes)}, copied to its host if that has room")
