"""`aimscale plan SWEEP`: its runs with a cost card each, what the times stand on, and what should be looked at."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import typer
from rich.console import Console
from rich.filesize import decimal

from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.words import Flag
from aimscale.harness.device.execution import NETWORK_BYTES_PER_S, NVLINK_BYTES_PER_S
from aimscale.harness.device.sheets import DECODED_PER_S
from aimscale.sweeps.cli.options import ROOT, AsJson, Root, SweepName, say_next
from aimscale.sweeps.plan.checks import Problem, check, refuse, together, whose
from aimscale.sweeps.plan.costs import BudgetCost, CostCard, cost_cards, not_identified, to_json, totals
from aimscale.sweeps.plan.planner import plan as plan_runs
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError, load_sweep
from aimscale.sweeps.table.views import Column, Line, axis_columns, duration, fitted_table, keyed, new_console, number


def plan(sweep: SweepName, root: Root = ROOT, as_json: AsJson = False) -> None:
    """List the runs of a sweep, what each costs, and what would stop it; nothing is written."""
    loaded = load_sweep(sweep, root)
    runs = plan_runs(loaded)
    cards, problems = cost_cards(loaded, runs), check(loaded, runs)
    plateau = in_plateau(loaded)
    if as_json:
        found = to_json(cards) | {"problems": [asdict(each) for each in problems], "flags": [*map(str, plateau)]}
        typer.echo(json.dumps(found, indent=1))
        refuse(loaded, runs, problems)
        return
    print_plan(loaded, cards, problems=problems, plateau=plateau)
    if problems:
        raise SweepError(f"{loaded.source}: its runs would fail; fix what the lines marked 'fail' name")
    say_next("launch", sweep, root)


def in_plateau(sweep: Sweep) -> tuple[Flag, ...]:
    """Flag budgets that the rows collected so far show to lie inside a first plateau."""
    if not (sweep.directory / "results.parquet").is_file():
        return ()
    from aimscale.analysis.effects.plateau import plateau_flags
    from aimscale.analysis.table.read import read_tables

    return plateau_flags(read_tables([sweep.directory]))


def print_plan(
    sweep: Sweep,
    cards: Sequence[CostCard],
    console: Console | None = None,
    *,
    problems: Sequence[Problem] = (),
    plateau: Sequence[Flag] = (),
) -> None:
    """What is in the way or needs care, the cost cards as a table, totals and assumptions."""
    console = console or new_console()
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    say(": ".join(part for part in (f"[bold]{sweep.name}[/]", sweep.file.description) if part))
    if flags := [*_flags(cards, problems), *(Line(level="warn", key="budgets", value=str(each)) for each in plateau)]:
        say(keyed(flags, console.width))
    say(fitted_table(_plan_columns(cards), cards, console.width))
    say(keyed(_facts(sweep, cards), console.width))


def _flags(cards: Sequence[CostCard], problems: Sequence[Problem]) -> Iterator[Line]:
    cautions = together((card.run_id, card.cautions) for card in cards)
    for level, found in (("fail", problems), ("warn", cautions)):
        for each in found:
            yield Line(level=level, key=each.key, value=f"{each.why} ({whose(each.run_ids, len(cards))})")
    if lost := not_identified(cards):
        words = f"{', '.join(lost)} of {CHINCHILLA.formula} are not identified"
        yield Line(level="warn", key="fit", value=f"{words}: take three values each of N and D, in all tables together")


def _facts(sweep: Sweep, cards: Sequence[CostCard]) -> list[Line]:
    """Sums, and what the times stand on."""
    total = totals(cards)
    images, during = number(total["images_executed"]), total["flops_during"]
    limits = " and ".join(sorted({card.limit for card in cards}))
    share = f"{100 * total['share_during']:.1f} % of the time"
    beside = f"; {during:.3g} of them during training, {share}" if during else ""
    stop = f"up to {duration(max(card.stop_s for card in cards))} for a last save"
    longest = duration(total["longest_wall_s"])
    facts = [
        ("runs", f"{total['num_runs']} with {total['num_rows']} rows; recipe {sweep.file.recipe}"),
        ("training", f"{images} images, {total['flops_executed']:.3g} FLOPs with decay branches; limited by {limits}"),
        ("evaluation", f"{total['flops_evaluation']:.3g} FLOPs{beside}"),
        ("time", f"{number(total['device_hours'])} device-hours; longest run {longest}; {stop}"),
        ("disk", f"{decimal(total['disk_bytes'])} of run directories"),
        *zip(("assumed", *[""] * 9), _assumptions(sweep, cards), strict=False),
    ]
    return [Line(key=key, value=value) for key, value in facts]


def _assumptions(sweep: Sweep, cards: Sequence[CostCard]) -> Iterator[str]:
    """The device, its speed, what loads for it, and how a step's time adds up."""
    device, cost = cards[0].device, sweep.file.cost
    peaks = {card.precision: device.flops_per_s(card.precision) for card in cards}
    rates = " and ".join(f"{peak / 1e12:.4g} TFLOP/s in {precision}" for precision, peak in peaks.items())
    beside = f" and {cost.step_ms:g} ms a step" if cost.step_ms else ""
    known = "measured here" if device.decoded_per_s else "see `aimscale bench data`"
    yield f"{device.name} ({device.why}), {decimal(device.memory_bytes)}"
    yield f"{rates}, MFU {100 * cards[0].rates.mfu:g} %{beside}"
    yield f"{device.decoded_per_s or DECODED_PER_S:,.0f} photographs/s a loader process ({known})"
    if device.is_gpu and any(card.devices > 1 for card in cards):
        within, between = NVLINK_BYTES_PER_S / 1e9, NETWORK_BYTES_PER_S / 1e9
        yield f"{within:g} GB/s within a node, {between:g} GB/s a rank between nodes"
    yield "memory of a rank: z ZeRO stage, m micro-batch, r activations recomputed"
    yield "step, ms: compute + exposed communication | loading; no start-up"


def _plan_columns(cards: Sequence[CostCard]) -> list[Column]:
    def span(header: str, text: Callable[[BudgetCost], str], rank: int) -> Column:
        return Column(header=header, cell=lambda card: _span([text(each) for each in card.budgets]), rank=rank)

    return [
        Column(header="size", cell=lambda card: card.cell["size"], right=False),
        *axis_columns(cards),
        Column(header="params", cell=lambda card: number(card.params_total)),
        span("images", lambda budget: number(budget.images_seen), 0),
        span("epochs", lambda budget: number(budget.epochs), 5),
        span("FLOPs", lambda budget: f"{budget.flops:.2e}", 1),
        Column(header="batch", cell=lambda card: str(card.batch_size), rank=6),
        Column(header="lr", cell=lambda card: f"{card.lr_peak:.2g}", rank=7),
        Column(header="devices", cell=lambda card: str(card.devices), rank=3),
        Column(header="memory", cell=_memory, rank=4),
        Column(header="disk", cell=lambda card: decimal(card.disk_bytes), rank=8),
        Column(header="step, ms", cell=_step, rank=4),
        Column(header="limit", cell=lambda card: card.limit, rank=5, right=False),
        Column(header="time", cell=lambda card: duration(card.wall_s)),
        Column(header="device-h", cell=lambda card: number(card.device_hours)),
    ]


def _step(card: CostCard) -> str:
    """Compute, exposed communication where there is any, and loading."""
    times = card.rates.compute_s, card.rates.exposed_communication_s, card.rates.loading_s
    compute, communication, loading = (f"{1000 * each:,.{0 if each >= 0.01 else 1}f}" for each in times)
    return f"{compute} + {communication} | {loading}" if times[1] else f"{compute} | {loading}"


def _span(values: Sequence[str]) -> str:
    """First and last of an increasing row of values."""
    return values[0] if values[0] == values[-1] else f"{values[0]}..{values[-1]}"


def _memory(card: CostCard) -> str:
    """Bytes of a rank, with the ZeRO stage and the micro-batch that they belong to (r: activations recomputed)."""
    if (chosen := card.fit) is None:
        return "too large"
    recompute = "r" if chosen.activation_checkpointing else ""
    return f"{decimal(chosen.memory_bytes)} (z{chosen.zero_stage} m{chosen.micro_batch}{recompute})"
