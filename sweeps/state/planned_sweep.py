"""A planned sweep: its file, runs, cost cards and states, made once by a verb and handed on; sums over the cards."""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aimscale.harness.results import NOTE
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import CostCard, Run
from aimscale.sweeps.planning.sweepfile import Place, Sweep, SweepError, load_sweep
from aimscale.sweeps.state.record import RunRecord, unplanned_runs
from aimscale.sweeps.state.run_state import RunState, State, read_state


@dataclass(frozen=True, kw_only=True)
class WorkLeft:
    """What is left of some runs, evaluation included."""

    device_hours: float
    longest_s: float
    """Time of the run that takes longest, s."""
    wall_s: float
    """Time to the end of all of them, s, if the longest start first."""
    num_devices: int
    """Devices that they use; on Slurm, the jobs at the same time."""


class PlannedSweep:
    """Sweep with its runs, what each costs, and how each stands; all in the order of the sweep file.

    Each part is made when it is first used, and once; `look` reads the states again.

    Attributes:
        sweep: sweep file with its directories.
        is_thorough: whether the files of finished runs are read as well: some may be lost or changed.
    """

    def __init__(self, sweep: Sweep, *, is_thorough: bool = False) -> None:
        self.sweep, self.is_thorough = sweep, is_thorough

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sweep.name!r}, {len(self.runs)} runs)"

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """Runs of the sweep."""
        return tuple(plan(self.sweep))

    @functools.cached_property
    def cards(self) -> tuple[CostCard, ...]:
        """Cost card of each run."""
        return tuple(cost_cards(self.sweep, self.runs))

    @functools.cached_property
    def states(self) -> tuple[RunState, ...]:
        """State of each run, as it was read last."""
        return self._read_states(())

    @functools.cached_property
    def unplanned(self) -> tuple[str, ...]:
        """Ids of run directories outside the plan, from an earlier version of the sweep file."""
        return unplanned_runs(self.sweep, self.runs)

    @property
    def longest_first(self) -> list[Run]:
        """Runs in the order in which they start."""
        cards = sorted(self.cards, key=lambda card: (-card.device_hours, -card.flops_executed))
        return [card.run for card in cards]

    def launch_states(self, *, retry: bool = False) -> tuple[RunState, ...]:
        """Return the states from which a launch starts: with `retry`, failures and cancellations are cleared first."""
        return tuple(
            replace(each, state=State.PAUSED) if retry and each.state.retryable else each for each in self.states
        )

    def startable(self, *, retry: bool = False) -> list[Run]:
        """Return the runs that a launch would start, longest first; with `retry`, those that it would try again too."""
        run_ids = {each.record.name for each in self.launch_states(retry=retry) if each.state.startable}
        return [run for run in self.longest_first if run.run_id in run_ids]

    def card(self, run_id: str) -> CostCard:
        """Return the cost card of a run."""
        return self._cards[run_id]

    @functools.cached_property
    def _cards(self) -> dict[str, CostCard]:
        return {card.run.run_id: card for card in self.cards}

    def look(self) -> tuple[RunState, ...]:
        """Read the states of the runs again; runs that were finished are not looked at again."""
        self.states = self._read_states(self.__dict__.get("states", ()))
        return self.states

    def _read_states(self, before: Sequence[RunState]) -> tuple[RunState, ...]:
        finished = {each.record.name: each for each in before if each.state is State.FINISHED}
        return tuple(
            finished.get(run.run_id)
            or read_state(run, RunRecord(self.sweep.run_dir(run.run_id)), trust_note=not self.is_thorough)
            for run in self.runs
        )

    def work_left(self, num_devices: int, states: Sequence[RunState] | None = None) -> WorkLeft | None:
        """Add up what is left of the runs that these states let start, or else all work of the sweep; None for no run.

        Args:
            num_devices: devices on which the runs are executed; not used of runs on Slurm.
        """
        shares = [(card, 1.0) for card in self.cards]
        if states is not None:
            both = zip(self.cards, states, strict=True)
            shares = [
                (card, left_s(card, *work_done(card, each)) / card.wall_s)
                for card, each in both
                if each.state.startable
            ]
        if not shares:
            return None
        if self.sweep.is_for_slurm:
            num_devices = min(len(shares), self.sweep.file.slurm.max_jobs)
            needs = [(share * card.wall_s, 1) for card, share in shares]
        else:
            needs = [
                (share * card.wall_s * max(1.0, card.run.devices / num_devices), card.run.devices)
                for card, share in shares
            ]
        needs.sort(key=lambda need: -need[0] * need[1])
        return WorkLeft(
            device_hours=sum(share * card.device_hours for card, share in shares),
            longest_s=max(share * card.wall_s for card, share in shares),
            wall_s=max(schedule_s([0.0] * num_devices, needs)),
            num_devices=num_devices,
        )

    def of_run(self, run_id: str) -> PlannedSweep:
        """Return the sweep with one of its runs alone.

        Raises:
            SweepError: it is not planned, but a directory of an earlier version of the sweep file.
        """
        if not (runs := tuple(run for run in self.runs if run.run_id == run_id)):
            raise SweepError(f"{run_id} is no longer planned by {self.sweep.source}; print its log without --follow")
        part = PlannedSweep(self.sweep, is_thorough=self.is_thorough)
        part.runs = runs
        return part

    def forget_notes(self) -> None:
        """Remove the notes that nothing is missing from runs that miss something, for workers, which trust them."""
        for state in self.states:
            if state.missing:
                (state.record.root / NOTE).unlink(missing_ok=True)


def plan_sweep(name: str | Path, root: Path, place: Place | None = None, *, is_thorough: bool = False) -> PlannedSweep:
    """Load a sweep as a planned one.

    Args:
        name, root: as in `load_sweep`.
        place: replaces where the file says that its runs are executed.
        is_thorough: see `PlannedSweep`.
    """
    sweep = load_sweep(name, root)
    return PlannedSweep(sweep if place is None else sweep.with_target(place), is_thorough=is_thorough)


def work_done(card: CostCard, run_state: RunState) -> tuple[float, int, int]:
    """Return the share of a run's planned images that are trained on, 0..1, the number of its (task, budget) pairs that
    are probed, and of those that are to be."""
    missing, num_pairs = Counter(each.what for each in run_state.missing), len(card.budgets) * len(card.probes)
    trained = min(1.0, run_state.status.images_done / card.images_executed) if missing["training"] else 1.0
    return trained, num_pairs - missing["probe"] - missing["training"] * len(card.probes), num_pairs


def left_s(card: CostCard, trained: float, num_probed: int, num_pairs: int) -> float:
    """Return the planned time of what a run has left to train and to evaluate, s, by its `work_done`."""
    evaluated = num_probed / num_pairs if num_pairs else trained
    return (1 - trained) * (card.start_s + card.training_s) + (1 - evaluated) * card.evaluation_s


def schedule_s(free: Sequence[float], waiting: Sequence[tuple[float, int]]) -> list[float]:
    """Return when each device has done its part of some runs that start in order, each as soon as it can, s.

    Args:
        free: when each device becomes free, s.
        waiting: duration, s, and devices of each run; one that wants more devices than there are takes all.
    """
    ends = list(free)
    heapq.heapify(ends)
    for duration_s, num_devices in waiting:
        taken = [heapq.heappop(ends) for _ in range(min(num_devices, len(ends)))]
        for _ in taken:
            heapq.heappush(ends, max(taken) + duration_s)
    return ends


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
