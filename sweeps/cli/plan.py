"""`aimscale plan SWEEP`: its runs with a cost card each, what the times stand on, and what should be looked at."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.filesize import decimal

from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.analysis.words import Flag
from aimscale.harness.device.execution import NETWORK_BYTES_PER_S, NVLINK_BYTES_PER_S
from aimscale.harness.device.sheets import DECODED_PER_S
from aimscale.harness.run.row import planned_columns
from aimscale.sweeps.cli.options import AsJson, Root, SweepName
from aimscale.sweeps.plan.checks import check, refuse
from aimscale.sweeps.plan.costs import BudgetCost, CostCard, cost_cards, not_identified, to_json, totals
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.planner import plan as plan_runs
from aimscale.sweeps.plan.sweepfile import Sweep, load_sweep
from aimscale.sweeps.table.views import Column, axis_columns, duration, fitted_table, new_console, number


def plan(sweep: SweepName, root: Root = Path("aimscale-runs"), as_json: AsJson = False) -> None:
    """List the runs of a sweep with a cost card each, and whatever would stop them; no side effect."""
    loaded = load_sweep(sweep, root)
    runs = plan_runs(loaded)
    cards, problems = cost_cards(loaded, runs), check(loaded, runs)
    flags = [str(flag) for flag in in_plateau(loaded, runs)]
    if as_json:
        found = to_json(cards) | {"problems": [asdict(problem) for problem in problems], "flags": flags}
        typer.echo(json.dumps(found, indent=1))
    else:
        print_plan(loaded, cards)
        for flag in flags:
            new_console().print(f"[yellow]! plateau[/] {flag}", highlight=False, soft_wrap=True)
    refuse(loaded, runs, problems)


def in_plateau(sweep: Sweep, runs: Sequence[Run]) -> tuple[Flag, ...]:
    """Which planned budgets the curves that were collected so far show to lie inside a first plateau."""
    if not (sweep.directory / "curves.parquet").is_file():
        return ()
    from aimscale.analysis.effects.plateau import plateau_flags
    from aimscale.analysis.table.read import read_curves
    from aimscale.analysis.table.schema import results_table

    same = [planned_columns(run.config) for run in runs]
    rows = [row | {"images_seen": each} for row, run in zip(same, runs, strict=True) for each in run.budgets]
    return plateau_flags(results_table(rows).to_pandas(), read_curves([sweep.directory]))


def print_plan(sweep: Sweep, cards: Sequence[CostCard], console: Console | None = None) -> None:
    """The cost cards as a table, with totals, assumptions and what should be looked at."""
    console = console or new_console()
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    say(f"[bold]{sweep.name}[/]: {sweep.file.description}")
    notes = list(dict.fromkeys(note for card in cards for note in card.cautions))
    table = fitted_table(_plan_columns(cards, notes), cards, console.width)
    console.print(table, highlight=False)
    total = totals(cards)
    say(
        "{num_runs} runs, {num_rows} rows; {images_executed:,} images and {flops_executed:.3g} FLOPs executed (decay "
        "branches included), {flops_evaluation:.3g} more in validation and probes, of which during training "
        "{flops_during:.3g} ({share_during:.1%} of the time); {device_hours:,.4g} device-hours; "
        "longest run ".format(**total)
        + f"{duration(total['longest_wall_s'])}; run directories {decimal(total['disk_bytes'])}; told to stop, a run "
        f"gets up to {duration(max(card.stop_s for card in cards))} to save"
    )
    say(f"{_assumptions(sweep, cards)}; start-up is not counted; recipe {sweep.file.recipe}", style="dim")
    for i, note in enumerate(notes, 1):
        say(f"[yellow]! {i}[/] {note}")
    if lost := not_identified(cards):
        say(
            f"[yellow]! fit[/] however small the noise, these sizes and budgets do not identify {', '.join(lost)} of "
            f"{CHINCHILLA.formula}; it takes three values each of N and D (sweeps read together count together)"
        )


def _assumptions(sweep: Sweep, cards: Sequence[CostCard]) -> str:
    """What the times stand on: the device, its speed and what loads for it."""
    device, cost = cards[0].device, sweep.file.cost
    peaks = {card.precision: device.flops_per_s(card.precision) for card in cards}
    rates = " and ".join(f"{peak / 1e12:.4g} TFLOP/s in {precision}" for precision, peak in peaks.items())
    beside = f" and {cost.step_ms:g} ms a step" if cost.step_ms else ""
    loading = f"{device.decoded_per_s or DECODED_PER_S:,.0f} photographs/s of a loader process"
    known = "measured here" if device.decoded_per_s else "assumed; `aimscale bench data` measures"
    network = f"{NVLINK_BYTES_PER_S / 1e9:g} GB/s within a node, {NETWORK_BYTES_PER_S / 1e9:g} a rank between nodes"
    sending = f"{network} (assumed); " if device.is_gpu and any(card.devices > 1 for card in cards) else ""
    limits = " and ".join(sorted({card.limit for card in cards}))
    return (
        f"on {device.name} ({device.why}) of {decimal(device.memory_bytes)}, {rates}, at MFU "
        f"{100 * cards[0].rates.mfu:g} %{beside}; {loading} ({known}); {sending}step: computing + exposed "
        f"communication | loading; limited by {limits}"
    )


def _plan_columns(cards: Sequence[CostCard], notes: list[str]) -> list[Column]:
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
        Column(header="!", cell=lambda card: ",".join(str(1 + notes.index(note)) for note in card.cautions)),
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
