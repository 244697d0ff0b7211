"""What a sweep will do and cost: its plan, and the summary before a launch."""

from __future__ import annotations

import functools
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

from aimscale.aim.errors import some
from aimscale.analysis.laws import CHINCHILLA
from aimscale.harness.device.speed import DECODED_PER_S
from aimscale.sweeps.cli.layout import (
    Column,
    axis_columns,
    fitted_table,
    format_duration,
    format_number,
    key_value_text,
    new_console,
    notice_lines,
)
from aimscale.sweeps.engine.devices import local_machine
from aimscale.sweeps.planning.costs import node_host_bytes
from aimscale.sweeps.planning.run import BudgetCost, CostCard, Notice, caution, describe_runs, group_notices
from aimscale.sweeps.planning.speed import plan_context
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep, WorkLeft, not_identified, totals
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.run_state import RunState, State

if TYPE_CHECKING:
    from aimscale.harness.rehearsal.step import Rehearsal

MAX_COLUMNS = 11
OF_OUR_TRAINER = ("batch", "lr", "memory", "rehearsed", "step, ms")
"""Columns that nothing is known of where another program trains."""
OFTEN_ALIKE = ("batch", "lr", "devices")
"""Columns that become a note where all runs have the same."""
MAX_EVALUATION_SHARE = 0.5
"""Share of the time above which evaluation raises a caution."""


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
    columns, alike = _plan_columns(cards, rehearsals or {}, sweep.unit)
    say(fitted_table(columns, cards, console.width, MAX_COLUMNS))
    say(key_value_text(_facts(planned, alike), console.width))


def _flags(cards: Sequence[CostCard], problems: Sequence[Notice]) -> Iterator[Notice]:
    for notice in (*problems, *group_notices(each for card in cards for each in card.cautions)):
        runs = describe_runs(notice.run_ids, len(cards))
        yield replace(notice, text=f"{notice.text} ({runs})")
    if evaluation := _evaluation_caution(cards):
        yield caution("evaluation", evaluation)
    if lost := not_identified(cards):
        words = f"{', '.join(lost)} of {CHINCHILLA.formula} are not identified"
        yield caution("fit", f"{words}: take three values each of N and D, in all tables together")


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


def _facts(planned: PlannedSweep, alike: str) -> list[Notice]:
    """Return totals and assumptions as key-value lines, and what is alike in all runs."""
    sweep, cards = planned.sweep, planned.cards
    total = totals(cards)
    num, hours = f"{total['num_runs']} with {total['num_rows']} rows", float(total["device_hours"])
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
    time = f"{_wall_time(planned)}; {needed}"
    flops = f"{total['flops_executed']:.3g} FLOPs" if total["flops_executed"] else "FLOPs not known"
    if (trainer := sweep.file.trainer) is not None:
        facts = [
            ("runs", f"{num}{f'{alike} and' if alike else '; each with'} a command of its own, such as"),
            ("command", shlex.join(cards[0].run.config.program.words)),
            ("in", cards[0].run.config.program.directory),
            ("training", f"{images} {trainer.unit}, {flops} (C = {trainer.flops})"),
            ("time", time),
            *zip(("assumed", "", ""), _program_assumptions(cards), strict=False),
        ]
        return [Notice(key=key, text=value) for key, value in facts]
    passes = sorted(budget.epochs for card in cards for budget in card.budgets if budget.epochs is not None)
    epochs = f" ({_span([format_number(passes[0]), format_number(passes[-1])])} epochs)" if passes else ""
    num_tuning, share_tuning = total["num_tuning_runs"], f"{100 * total['share_tuning']:.2g} % of the sweep"
    facts = [
        ("runs", f"{num}; recipe {sweep.recipe.name}{alike}"),
        ("training", f"{images} images{epochs}, {flops} with decay branches; limited by {limits}"),
        *[("tuning", f"{share_tuning}: {num_tuning} of the runs")] * bool(num_tuning),
        ("evaluation", f"{total['flops_evaluation']:.3g} FLOPs{beside}{apart}"),
        ("time", time),
        ("disk", f"{decimal(total['disk_bytes'])} of run directories"),
        *[("host", _host_memory(sweep, cards))] * sweep.is_for_slurm,
        *zip(("assumed", "", ""), _assumptions(cards, sweep.file.cost.mfu), strict=True),
    ]
    return [Notice(key=key, text=value) for key, value in facts]


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


def _wall_time(planned: PlannedSweep) -> str:
    """Describe the time of a whole sweep, on all devices that a launch takes."""
    sweep, cards = planned.sweep, planned.cards
    num_devices, place, device = 1, "here", cards[0].device
    if device.is_gpu and not sweep.is_for_slurm and not local_machine([]).gpus:
        num_devices, place = max(card.run.devices for card in cards), f"of type {device.name}"
    elif not sweep.is_for_slurm:
        num_devices = local_machine([card.run for card in cards]).devices
    work = planned.work_left(num_devices)
    assert work is not None
    return _describe_wall_time(sweep, work, place)


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


def _plan_columns(
    cards: Sequence[CostCard], rehearsals: Mapping[str, Rehearsal], unit: str
) -> tuple[list[Column], str]:
    """Return the columns of the table, and a note of those in which all runs are alike."""

    def span(header: str, text: Callable[[BudgetCost], str], drop_order: int) -> Column:
        return Column(
            header=header, cell=lambda card: _span([text(each) for each in card.budgets]), drop_order=drop_order
        )

    columns = [
        Column(header="size", cell=lambda card: card.run.cell["size"], align_right=False),
        *axis_columns(cards, lambda card: card.run.cell),
        Column(header="params", cell=lambda card: format_number(card.params_total)),
        span(unit, lambda budget: format_number(budget.images_seen), 0),
        span("FLOPs", lambda budget: "-" if budget.flops is None else f"{budget.flops:.2e}", 1),
        Column(header="batch", cell=lambda card: str(card.batch_size), drop_order=5),
        Column(header="lr", cell=lambda card: f"{card.lr_peak or 0:.2g}", drop_order=6),
        Column(header="devices", cell=lambda card: str(card.run.devices), drop_order=2),
        Column(
            header="memory",
            cell=_memory,
            drop_order=3,
            legend="of a rank; z ZeRO stage, m micro-batch, r activations recomputed",
        ),
        Column(
            header="rehearsed",
            cell=lambda card: _rehearsed(rehearsals.get(card.run.run_id), card),
            legend="peak of a step | while a point of the curve copies the weights, before it evaluates the copy",
        ),
        Column(
            header="step, ms",
            cell=_step,
            drop_order=4,
            legend="computing | loading; the slower one counts, without start-up",
        ),
        Column(header="time", cell=lambda card: format_duration(card.wall_s)),
        Column(header="device-h", cell=lambda card: format_number(card.device_hours)),
    ]
    columns = [each for each in columns if cards[0].batch_size is not None or each.header not in OF_OUR_TRAINER]
    alike = [each for each in columns if each.header in OFTEN_ALIKE and len({*map(each.cell, cards)}) == 1 < len(cards)]
    note = ", ".join(f"{each.header} {each.cell(cards[0])}" for each in alike)
    return [each for each in columns if each not in alike], note and f"; each with {note}"


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


def launch_view(planned: PlannedSweep, states: Sequence[RunState], work: WorkLeft | None) -> list[Notice]:
    """Describe what a launch will do and cost, what is there already, and what needs a person.

    Args:
        states: states of the runs, with failures cleared if the launch clears them.
        work: what is left of the runs that it starts, if any.
    """
    sweep = planned.sweep
    counts = Counter(each.planned_action for each in states)
    parts = ", ".join(f"{num} {action}" for action, num in counts.most_common())
    lines = [Notice(key="runs", text=f"{len(states)}: {parts}")]
    if work is not None:
        if sweep.file.trainer is not None:
            run = next(each.run for each in states if each.state.startable)
            program = run.config.program
            value = f"{shlex.join(program.words)} (in {program.directory}; the values of {run.run_id})"
            lines.append(Notice(key="command", text=value))
        cost = f"up to {format_number(work.device_hours)} device-hours{format_price(sweep, work.device_hours)}"
        longest = format_duration(work.longest_s)
        lines.append(Notice(key="cost", text=f"{cost}; {_describe_wall_time(sweep, work)}; longest run {longest}"))
    if added := Counter(str(part) for each in states if each.is_extended for part in each.missing):
        value = some([f"{what} ({num} run{'s' if num > 1 else ''})" for what, num in added.items()])
        lines.append(Notice(key="added", text=value))
    if others := planned.unplanned:
        num_running = sum(RunRecord(sweep.run_dir(name)).is_held() for name in others)
        running = f", {num_running} of them running" if num_running else ""
        value = f"{len(others)} run directories{running}, such as {others[0]}; they stay as they are"
        lines.append(Notice(key="unplanned", text=value))
    if ended := [each for each in states if each.state.over and each.state is not State.FINISHED]:
        lines += notice_lines(Notice(level=each.state, text=each.sentence).of(each.record.name) for each in ended)
    return lines


def _describe_wall_time(sweep: Sweep, work: WorkLeft, place: str = "here") -> str:
    """Describe the time to the end of runs on devices of a place, or in Slurm's jobs."""
    several = "s" if work.num_devices > 1 else ""
    where = (
        f"in {work.num_devices} jobs at once"
        if sweep.is_for_slurm
        else f"on {work.num_devices} device{several} {place}"
    )
    return f"about {format_duration(work.wall_s)} {where}"


def format_price(sweep: Sweep, device_hours: float) -> str:
    """Format the price of device-hours, as the continuation of a sentence; empty without a price."""
    price = sweep.file.cost.price(device_hours)
    return "" if price is None else f" ({format_number(price[0])} {price[1]})"
