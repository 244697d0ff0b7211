"""`aimscale plan SWEEP`: runs with their cost cards, assumptions of the estimates, problems and cautions."""

from __future__ import annotations

import functools
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from aimscale.aim.config import RELEASED_SIZES, known_sizes, model_config
from aimscale.aim.cost import param_count
from aimscale.analysis.laws import CHINCHILLA
from aimscale.harness.device.gpu_specs import DECODED_PER_S
from aimscale.sweeps.cli.init import write_suggestion
from aimscale.sweeps.cli.options import ROOT, AsJson, On, Root, SweepName, print_next, select_run_ids
from aimscale.sweeps.cli.sweep import print_next_step
from aimscale.sweeps.engine.devices import local_machine
from aimscale.sweeps.monitor.layout import (
    Column,
    KeyValue,
    axis_columns,
    fitted_table,
    format_duration,
    format_number,
    key_value_text,
    new_console,
    print_key_values,
)
from aimscale.sweeps.monitor.status import sweep_status
from aimscale.sweeps.monitor.view import describe_wall_time, format_price, launch_view
from aimscale.sweeps.planning.cards import not_identified, plan_context, to_json, totals
from aimscale.sweeps.planning.checks import check, raise_on_problems
from aimscale.sweeps.planning.costs import node_host_bytes
from aimscale.sweeps.planning.measuring import measure_here
from aimscale.sweeps.planning.notices import Notice, describe_runs, group_notices
from aimscale.sweeps.planning.run import BudgetCost, CostCard
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError
from aimscale.sweeps.state.planned_sweep import PlannedSweep, plan_sweep

if TYPE_CHECKING:
    from aimscale.harness.rehearsal.step import Rehearsal

OF_OUR_TRAINER = ("backbone", "epochs", "batch", "lr", "memory", "rehearsed", "disk", "step, ms", "limit")
"""Columns that nothing is known of where another program trains."""
MIN_MEASURED_S = 60
"""Assumed time of a sweep from which its runs are measured before its times are told."""
MAX_EVALUATION_SHARE = 0.5
"""Share of the time above which evaluation raises a caution."""
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
    root: Root = ROOT,
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
    chosen = {notice.run_id for notice in runs} if only is None else {*select_run_ids(planned, [only])}
    problems = check(loaded, runs)
    if measure or (measure is None and not problems and not as_json):
        planned = _measured(planned, again=bool(measure))
    rehearsals: dict[str, Rehearsal] = {}
    if rehearse:
        if loaded.file.trainer is not None:
            raise SweepError("--rehearse steps aimscale's own engine, and another program trains these runs")
        from aimscale.sweeps.cli.rehearsal import rehearse_runs

        rehearsals = rehearse_runs([card for card in planned.cards if card.run.run_id in chosen])
    if as_json:
        document = to_json(planned.cards)
        document["problems"] = [
            {"key": notice.key, "why": notice.text, "run_ids": notice.run_ids} for notice in problems
        ]
        document |= {"states": dict(Counter(notice.state for notice in planned.states)), "unplanned": planned.unplanned}
        price = loaded.file.cost.price(document["totals"]["device_hours"])
        document["price"] = price and {"amount": price[0], "currency": price[1]}
        if rehearse:
            document["rehearsals"] = {run_id: asdict(notice) for run_id, notice in rehearsals.items()}
        typer.echo(json.dumps(document, indent=1))
        raise_on_problems(loaded, runs, problems)
        return
    print_plan(planned, problems=problems, rehearsals=rehearsals)
    if only is not None:
        from aimscale.sweeps.cli.rehearsal import print_rehearsal

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


def _still_to_do(planned: PlannedSweep) -> list[KeyValue]:
    """Return what a launch would do with the runs that are there, and with those that the file adds."""
    num_devices = 0 if planned.sweep.is_for_slurm else local_machine(planned.runs).devices
    lines = launch_view(planned, planned.states, num_devices)
    return [replace(line, key={"runs": "there", "cost": "to do"}.get(line.key, line.key)) for line in lines]


def print_plan(
    planned: PlannedSweep,
    console: Console | None = None,
    *,
    problems: Sequence[Notice] = (),
    rehearsals: Mapping[str, Rehearsal] | None = None,
) -> None:
    """Print problems and cautions, a table of cost cards with what was rehearsed, totals and assumptions."""
    sweep, cards = planned.sweep, planned.cards
    console = console or new_console()
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    say(": ".join(part for part in (f"[bold]{sweep.name}[/]", sweep.file.description) if part))
    if flags := [*_flags(cards, problems)]:
        say(key_value_text(flags, console.width))
    say(fitted_table(_plan_columns(cards, rehearsals or {}, sweep.unit), cards, console.width))
    say(key_value_text(_facts(sweep, cards), console.width))


def _flags(cards: Sequence[CostCard], problems: Sequence[Notice]) -> Iterator[KeyValue]:
    for notice in (*problems, *group_notices(caution for card in cards for caution in card.cautions)):
        runs = describe_runs(notice.run_ids, len(cards))
        yield KeyValue(level=notice.level, key=notice.key, value=f"{notice.text} ({runs})")
    if evaluation := _evaluation_caution(cards):
        yield KeyValue(level="warn", key="evaluation", value=evaluation)
    if lost := not_identified(cards):
        words = f"{', '.join(lost)} of {CHINCHILLA.formula} are not identified"
        yield KeyValue(
            level="warn", key="fit", value=f"{words}: take three values each of N and D, in all tables together"
        )


def _evaluation_caution(cards: Sequence[CostCard]) -> str:
    """Name what evaluation costs where it takes more than half of the time, and how to lower it."""
    share = sum(card.evaluation_s for card in cards) / sum(card.wall_s for card in cards)
    if share <= MAX_EVALUATION_SHARE:
        return ""
    flops: Counter[str] = Counter()
    for card in cards:
        flops.update({probe.task: probe.flops * len(card.budgets) for probe in card.probes})
    task, most = max(flops.items(), key=lambda item: item[1], default=("", 0.0))
    if 2 * most < sum(card.flops_evaluation for card in cards):
        knob = "lower validation.num_images or num_prefixes, raise every_images, or probe fewer tasks"
    else:
        knob = f"most of it is the probes of {task}: fewer `kinds` (knn and linear are cheap), `epochs` or images"
    return f"takes {100 * share:.0f} % of the time; {knob}"


def _facts(sweep: Sweep, cards: Sequence[CostCard]) -> list[KeyValue]:
    """Return totals and assumptions as key-value lines."""
    total = totals(cards)
    hours: float = total["device_hours"]
    images, during = format_number(total["images_executed"]), total["flops_during"]
    limits = " and ".join(sorted({card.limit for card in cards}))
    share = f"{100 * total['share_during']:.1f} % of the time"
    beside = f"; {during:.3g} of them during training, {share}" if during else ""
    num_apart = sum(card.run.evaluation_devices < card.run.devices for card in cards)
    apart = f"; {num_apart} runs are evaluated on fewer devices" if num_apart else ""
    stop = f"up to {format_duration(max(card.stop_s for card in cards))} for a last save"
    longest, limit_s = format_duration(total["longest_wall_s"]), 60.0 * sweep.file.slurm.time_limit_min
    if sweep.is_for_slurm and total["longest_wall_s"] > limit_s:
        longest += f", in {math.ceil(total['longest_wall_s'] / limit_s)} jobs of {format_duration(limit_s)}"
        longest += _on_more_devices(sweep, max(cards, key=lambda card: card.wall_s), limit_s)
    needed = f"{format_number(hours)} device-hours{format_price(sweep, hours)}; longest run {longest}; {stop}"
    time = f"{_wall_time(sweep, cards)}; {needed}"
    if (trainer := sweep.file.trainer) is not None:
        flops = f"{total['flops_executed']:.3g} FLOPs" if total["flops_executed"] else "FLOPs not known"
        facts = [
            ("runs", f"{total['num_runs']} with {total['num_rows']} rows; each by its own command, such as"),
            ("command", shlex.join(cards[0].run.config.program.words)),
            ("in", cards[0].run.config.program.directory),
            ("training", f"{images} {trainer.unit}, {flops} (C = {trainer.flops})"),
            ("time", time),
            *zip(("assumed", "", ""), _program_assumptions(cards), strict=False),
        ]
        return [KeyValue(key=key, value=value) for key, value in facts]
    num_tuning, share_tuning = total["num_tuning_runs"], f"{100 * total['share_tuning']:.2g} % of the sweep"
    facts = [
        ("runs", f"{total['num_runs']} with {total['num_rows']} rows; recipe {sweep.recipe.name}"),
        ("training", f"{images} images, {total['flops_executed']:.3g} FLOPs with decay branches; limited by {limits}"),
        *[("tuning", f"{share_tuning}: {num_tuning} of the runs")] * bool(num_tuning),
        ("evaluation", f"{total['flops_evaluation']:.3g} FLOPs{beside}{apart}"),
        ("time", time),
        ("disk", f"{decimal(total['disk_bytes'])} of run directories"),
        *[("host", _host_memory(sweep, cards))] * sweep.is_for_slurm,
        *zip(("assumed", "", ""), _assumptions(cards, sweep.file.cost.mfu), strict=True),
    ]
    return [KeyValue(key=key, value=value) for key, value in facts]


def _on_more_devices(sweep: Sweep, card: CostCard, limit_s: float) -> str:
    """Say how long a run takes on as many more devices as end it within a job, or on eight times as many."""
    context = plan_context(sweep, [card.run])
    for number in (2 * card.run.devices, 4 * card.run.devices, 8 * card.run.devices):
        wall_s = replace(card.run, devices=number).card(context).wall_s
        if wall_s <= limit_s:
            break
    return f" (on {number} devices {format_duration(wall_s)})" if wall_s < card.wall_s else ""


def _host_memory(sweep: Sweep, cards: Sequence[CostCard]) -> str:
    """Describe the memory that a job needs of its node's host."""
    most = max(node_host_bytes(card, sweep.file.slurm.devices_per_node) for card in cards)
    return f"about {decimal(round(most))} of a node's memory: processes, loaders, a copy of the checkpoint (extra: mem)"


def _wall_time(sweep: Sweep, cards: Sequence[CostCard]) -> str:
    """Describe the time of a whole sweep, on all devices that a launch takes."""
    num_devices, place, device = 1, "here", cards[0].device
    if device.is_gpu and not sweep.is_for_slurm and not local_machine([]).gpus:
        num_devices, place = max(card.run.devices for card in cards), f"of type {device.name}"
    elif not sweep.is_for_slurm:
        num_devices = local_machine([card.run for card in cards]).devices
    return describe_wall_time(sweep, [(card, 1.0) for card in cards], num_devices, place)


def _assumptions(cards: Sequence[CostCard], stated: float | None) -> Iterator[str]:
    """Yield the assumptions: device, speed and loading."""
    device = cards[0].device
    peaks = {card.precision: device.flops_per_s(card.precision) for card in cards}
    rates = " and ".join(f"{peak / 1e12:.4g} TFLOP/s in {precision}" for precision, peak in peaks.items())
    yield f"{device.name} ({device.why}), {decimal(device.memory_bytes)}"
    if measured := [card for card in cards if card.rates.clock]:
        num_scaled = sum(not card.rates.clock.is_measured for card in measured if card.rates.clock)
        yield "times measured here: steps, loading, evaluation and start of each size (`plan --measure` renews them)"
        yield f"{num_scaled} runs in proportion to smaller ones" if num_scaled else "cores that are otherwise idle"
        return
    low, high = (100 * each(card.rates.mfu for card in cards) for each in (min, max))
    share = f"{low:.0f} to {high:.0f} %" if round(high) > round(low) else f"{low:.2g} %"
    is_roofline = device.is_gpu and stated is None
    yield f"{rates}, MFU {share}{' by a roofline over the operations of a step' if is_roofline else ''}"
    yield f"{DECODED_PER_S:,.0f} photographs/s a loader process (see `aimscale bench data`)"


def _program_assumptions(cards: Sequence[CostCard]) -> Iterator[str]:
    """Yield the assumptions of the times of a program's runs."""
    device, rates = cards[0].device, cards[0].rates
    if rates.num_measured:
        yield f"the median speed of {rates.num_measured} rows of this sweep, FLOP/s of a device"
    else:
        peak = device.flops_per_s(cards[0].precision) / 1e12
        what = f"{peak:.4g} TFLOP/s in {cards[0].precision}, MFU {100 * rates.mfu:g} %"
        yield f"{device.name} ({device.why}), {what}; the measured speed once a run has finished"
    if any(card.params_total is None for card in cards):
        yield "an hour for each run of a size whose N no run has told yet, and `trainer.params` does not say"
    yield "memory and disk of the program are not known"


def _plan_columns(cards: Sequence[CostCard], rehearsals: Mapping[str, Rehearsal], unit: str) -> list[Column]:
    def span(header: str, text: Callable[[BudgetCost], str], drop_order: int) -> Column:
        return Column(
            header=header, cell=lambda card: _span([text(each) for each in card.budgets]), drop_order=drop_order
        )

    columns = [
        Column(header="size", cell=lambda card: card.run.cell["size"], align_right=False),
        *axis_columns(cards, lambda card: card.run.cell),
        Column(header="params", cell=lambda card: format_number(card.params_total)),
        Column(header="backbone", cell=lambda card: format_number(card.params_trunk), drop_order=6),
        span(unit, lambda budget: format_number(budget.images_seen), 0),
        span("epochs", lambda budget: format_number(budget.epochs), 5),
        span("FLOPs", lambda budget: "-" if budget.flops is None else f"{budget.flops:.2e}", 1),
        Column(header="batch", cell=lambda card: str(card.batch_size), drop_order=6),
        Column(header="lr", cell=lambda card: f"{card.lr_peak or 0:.2g}", drop_order=7),
        Column(header="devices", cell=lambda card: str(card.run.devices), drop_order=3),
        Column(
            header="memory",
            cell=_memory,
            drop_order=4,
            legend="of a rank; z ZeRO stage, m micro-batch, r activations recomputed",
        ),
        Column(
            header="rehearsed",
            cell=lambda card: _rehearsed(rehearsals.get(card.run.run_id), card),
            legend="peak of a step | while a point of the curve copies the weights, before it evaluates the copy",
        ),
        Column(header="disk", cell=lambda card: decimal(card.disk_bytes), drop_order=8),
        Column(
            header="step, ms",
            cell=_step,
            drop_order=5,
            legend="computing | loading; the slower one counts, without start-up",
        ),
        Column(header="limit", cell=lambda card: card.limit, drop_order=5, align_right=False),
        Column(header="time", cell=lambda card: format_duration(card.wall_s)),
        Column(header="device-h", cell=lambda card: format_number(card.device_hours)),
    ]
    return [each for each in columns if cards[0].batch_size is not None or each.header not in OF_OUR_TRAINER]


def _step(card: CostCard) -> str:
    """Format the time of computing a step and of loading its images, ms."""
    times = (1000 * (card.batch_size or 0) / rate for rate in (card.rates.compute_per_s, card.rates.loaded_per_s))
    return " | ".join(f"{each:,.{0 if each >= 10 else 1}f}" for each in times)


def _span(values: Sequence[str]) -> str:
    """Format the first and last of increasing values as a range."""
    return values[0] if values[0] == values[-1] else f"{values[0]}..{values[-1]}"


def _rehearsed(rehearsal: Rehearsal | None, card: CostCard) -> str:
    """Format the rehearsed peak of a step, and of the copy where the run measures during training."""
    if rehearsal is None:
        return ""
    measures = card.fit is not None and card.fit.measures
    points = (False, True) if measures else (False,)
    return " | ".join(decimal(rehearsal.peak_bytes(point=each)) for each in points)


def _memory(card: CostCard) -> str:
    """Format the memory of a rank with its ZeRO stage and micro-batch (r: activations recomputed)."""
    if (chosen := card.fit) is None:
        return "too large"
    recompute = "r" if chosen.activation_checkpointing else ""
    return f"{decimal(chosen.memory_bytes)} (z{chosen.zero_stage} m{chosen.micro_batch}{recompute})"
