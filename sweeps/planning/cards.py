"""The cost cards of a sweep, together: sums, what its grid cannot identify, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from aimscale.sweeps.planning.run import CostCard, PlanContext, Run, new_once
from aimscale.sweeps.planning.speed import planned_device
from aimscale.sweeps.planning.sweepfile import Sweep


def plan_context(sweep: Sweep, runs: Sequence[Run], *, takes_measured: bool = True) -> PlanContext:
    """Return what the runs of a plan share."""
    device = planned_device(sweep, runs)
    return PlanContext(sweep=sweep, device=device, once=new_once(), takes_measured=takes_measured)


def cost_cards(sweep: Sweep, runs: Sequence[Run], *, takes_measured: bool = True) -> list[CostCard]:
    """Return the cost card of each run, in the order of `runs`; see `PlanContext`."""
    context = plan_context(sweep, runs, takes_measured=takes_measured)
    return [run.card(context) for run in runs]


def totals(cards: Sequence[CostCard]) -> dict[str, Any]:
    """Return sums over the cards, and `longest_wall_s`: the sweep's time if each run has its own devices."""
    added = ("images_executed", "flops_executed", "flops_evaluation", "flops_during", "device_hours", "disk_bytes")
    sums = {name: sum(getattr(card, name) for card in cards) for name in added}
    return {
        "num_runs": len(cards),
        "num_rows": sum(len(card.budgets) for card in cards),
        "num_tuning_runs": sum(card.run.is_tuning for card in cards),
        **sums,
        "share_tuning": sum(card.device_hours for card in cards if card.run.is_tuning) / sums["device_hours"],
        "share_during": sum(card.share_during * card.device_hours for card in cards) / sums["device_hours"],
        "longest_wall_s": max(card.wall_s for card in cards),
    }


def not_identified(cards: Sequence[CostCard]) -> tuple[str, ...]:
    """Return the parameters of the joint law of N and D that the grid cannot identify at any noise level; none for a
    single point, to which no law is fitted."""
    rows = {(card.params_total, budget.images_seen) for card in cards if card.params_total for budget in card.budgets}
    if len(rows) < 2:
        return ()
    # The fit imports scipy, which verbs that only look at a sweep do without.
    import numpy as np

    from aimscale.analysis.fitting.diagnostics import unidentified
    from aimscale.analysis.laws import CHINCHILLA

    sizes, budgets = zip(*rows, strict=True)
    lost = unidentified(CHINCHILLA, {"N": np.array(sizes, float), "D": np.array(budgets, float)})
    return tuple(name for name in (*CHINCHILLA.names, *CHINCHILLA.derived) if name in lost)


def to_json(cards: Sequence[CostCard]) -> dict[str, Any]:
    """Return the plan as a JSON object."""
    return {"totals": totals(cards), "not_identified": not_identified(cards), "runs": [_fields(card) for card in cards]}


def _fields(card: CostCard) -> dict[str, Any]:
    """Return the fields of a card, and those of its run that a configuration does not hold."""
    of_run = {name: getattr(card.run, name) for name in ("run_id", "cell", "is_tuning", "devices")}
    of_run["probe_devices"] = card.run.evaluation_devices
    of_card = {name: value for name, value in asdict(card).items() if name != "run"}
    return of_run | of_card | {"cautions": [(each.key, each.text) for each in card.cautions]}
