"""Summary of a launch before it spends: runs that are new or there, and the bill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aimscale.sweeps.plan.costs import CostCard
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.state.decision import RunState
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.sweep_dir import unplanned_runs
from aimscale.sweeps.table.status import schedule_s
from aimscale.sweeps.table.views import KeyValue, format_duration, format_number, group_notices

ADVICE = {
    "failed": "; --retry tries again",
    "diverged": "; --retry tries again",
    "cancelled": "--retry starts it again",
    "off-track": "",
    "damaged": "",
}
"""State of runs that a launch leaves alone -> what to do about them."""


def launch_view(
    sweep: Sweep, states: Sequence[RunState], cards: Sequence[CostCard], num_devices: int
) -> list[KeyValue]:
    """Describe what a launch on so many devices will do and cost, what is there already, and what needs a person."""
    counts = Counter(_word(each) for each in states)
    parts = ", ".join(f"{num} {word}" for word, num in counts.most_common())
    lines = [KeyValue(key="runs", value=f"{len(states)}: {parts}")]
    if starting := [
        (card, _share_left(card, each)) for card, each in zip(cards, states, strict=True) if each.startable
    ]:
        lines.append(KeyValue(key="cost", value=_bill(sweep, starting, num_devices)))
    if others := unplanned_runs(sweep, [each.run for each in states]):
        num_running = sum(RunRecord(sweep.run_dir(name)).is_held() for name in others)
        running = f", {num_running} of them running" if num_running else ""
        value = f"{len(others)} run directories{running}, such as {others[0]}; they stay as they are"
        lines.append(KeyValue(key="unplanned", value=value))
    named = [each for each in states if each.state in ADVICE]
    return [*lines, *group_notices((each.state, f"{each.why}{ADVICE[each.state]}", each.record.name) for each in named)]


def _word(found: RunState) -> str:
    """Return what a launch does with a run, or its state."""
    if found.state == "paused" and found.status.state == "finished":
        return "to extend" if any(each.what == "training" for each in found.missing) else "to evaluate"
    words = {"not started": "new", "lost": "to resume", "paused": "to resume", "starting": "running"}
    return words.get(found.state, found.state)


def _share_left(card: CostCard, found: RunState) -> float:
    """Return the share of a run's time that training and evaluation have left, 0..1."""
    pending = Counter(each.what for each in found.missing)
    trained = min(1.0, found.status.images_done / card.images_executed) if pending["training"] else 1.0
    num_tasks = 1 + len(card.probes)
    evaluations = pending["training"] * num_tasks + pending["validation"] + pending["probe"]
    evaluated = 1 - evaluations / (num_tasks * len(card.budgets))
    return ((1 - trained) * card.training_s + (1 - evaluated) * card.evaluation_s) / card.wall_s


def _bill(sweep: Sweep, starting: Sequence[tuple[CostCard, float]], num_devices: int) -> str:
    """Describe device-hours, money and time of what is left of runs that start (cards, shares)."""
    hours = sum(share * card.device_hours for card, share in starting)
    if sweep.is_for_slurm:
        num_jobs = min(len(starting), sweep.file.slurm.max_jobs)
        where, num_devices = f"in {num_jobs} jobs at once", num_jobs
        needs = [(share * card.wall_s, 1) for card, share in starting]
    else:
        where = f"on {num_devices} device{'s' if num_devices > 1 else ''} here"
        needs = [(share * card.wall_s * max(1.0, card.devices / num_devices), card.devices) for card, share in starting]
    longest_first = sorted(needs, key=lambda need: -need[0] * need[1])
    whole_s = max(schedule_s([0.0] * num_devices, longest_first))
    longest = format_duration(max(share * card.wall_s for card, share in starting))
    return (
        f"up to {format_number(hours)} device-hours{format_price(sweep, hours)}; {format_duration(whole_s)} {where}; "
        f"longest run {longest}"
    )


def format_price(sweep: Sweep, device_hours: float) -> str:
    """Format the price of device-hours, as the continuation of a sentence; empty without a price."""
    price = sweep.file.cost.price(device_hours)
    return "" if price is None else f" ({format_number(price[0])} {price[1]})"
