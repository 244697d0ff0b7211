"""Status of every run of a sweep, from its directory, its locks and Slurm's jobs."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import Status
from aimscale.harness.run.failures import describe_full_disk
from aimscale.sweeps.planning.run import CostCard
from aimscale.sweeps.slurm.commands import JobInfo
from aimscale.sweeps.slurm.jobs import LiveJob, describe_failed_jobs, failed_jobs, live_jobs
from aimscale.sweeps.state.planned_sweep import PlannedSweep, left_s, schedule_s, work_done
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.run_state import RunState, State


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Line of `aimscale status`."""

    run_id: str
    cell: dict[str, Any]
    """Axis -> value."""
    state: State
    status: Status
    """Status that the run wrote; its reason is what there is to say of the state, or Slurm's if it waits."""
    log: str | None = None
    """Log of its last attempt."""
    to_evaluate: int = 0
    """Number of (task, budget) pairs to be probed."""
    progress: float = 0.0
    """Share of the planned images trained on, 0..1."""
    val_loss: float | None = None
    """Validation loss of the last recorded budget; of a running run, the last one measured during training."""
    eta_s: float | None = None
    """Time to its end, s, evaluation included, if it runs."""
    place: str = ""
    """Machine that executes it, or executed it last, with its Slurm job."""
    evaluated: int = 0
    """Number of `to_evaluate` that are done."""
    device_hours: float = 0.0
    """Device-hours spent so far, all attempts."""
    num_loss_spikes: int = 0
    """Number of training losses far above those before them, up to the last recorded budget."""
    is_normalised: bool = True
    """Whether its targets are normalised, so that a constant prediction has a loss of 1."""
    unit: str = "images"
    """What D counts."""


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """Result of `aimscale status`."""

    sweep: str
    runs: tuple[RunStatus, ...]
    """Status of each run, in the order of the plan."""
    counts: dict[str, int]
    """Number of runs by state."""
    progress: float
    """Share of the sweep's planned device time, evaluation included, whose work is done, 0..1."""
    given_up: float
    """Share of that time that remains in runs which failed or were cancelled, 0..1."""
    eta_s: float | None
    """Time to the end of all active and waiting runs, s, on the devices in use; None if none is."""
    eta_is_measured: bool
    """Whether `eta_s` follows from measured pace; else from the plan."""
    device_hours: float
    """Device-hours spent so far."""
    device_hours_planned: float
    """Device-hours by the cost cards."""
    unplanned: tuple[str, ...]
    """Run directories outside the plan, from an earlier version of the sweep file."""
    failed_jobs: tuple[str, ...] = ()
    """Why jobs of the last launch ended before they took a run, or with an error of their own."""
    num_jobs: int = 0
    """Number of the sweep's Slurm jobs that wait or run."""
    disk: str = ""
    """Why runs cannot be written now, if their disk is full."""

    @property
    def is_finished(self) -> bool:
        """Whether all runs are finished."""
        return all(line.state is State.FINISHED for line in self.runs)

    @property
    def is_active(self) -> bool:
        """Whether a worker or a Slurm job executes its runs, or will."""
        return self.num_jobs > 0 or any(line.state.active or line.state is State.QUEUED for line in self.runs)


def sweep_status(planned: PlannedSweep, jobs: dict[str, JobInfo] | None = None) -> SweepStatus:
    """Summarise the states of a sweep, as they were read last, with what the files of its runs tell.

    Args:
        jobs: Slurm's jobs (`sweeps.slurm.commands.jobs`), None if Slurm cannot be asked.
    """
    sweep, cards = planned.sweep, planned.cards
    live = live_jobs(sweep, jobs) if jobs else []
    pending = _pending_jobs(live, cards)
    lines = [_inspect_run(run_state, card, pending) for run_state, card in zip(planned.states, cards, strict=True)]
    lines, eta_s, is_measured = time_left(cards, lines)
    is_left = any(line.state.startable for line in lines)
    work = [card.wall_s * card.run.devices for card in cards]
    remaining = [_line_left_s(card, line) * card.run.devices for card, line in zip(cards, lines, strict=True)]
    return SweepStatus(
        sweep=sweep.name,
        runs=tuple(lines),
        counts=dict(Counter(line.state.value for line in lines)),
        progress=1 - sum(remaining) / sum(work),
        given_up=sum(each for each, line in zip(remaining, lines, strict=True) if line.state.over) / sum(work),
        eta_s=eta_s,
        eta_is_measured=is_measured,
        device_hours=sum(line.device_hours for line in lines),
        device_hours_planned=sum(card.device_hours for card in cards),
        unplanned=planned.unplanned,
        failed_jobs=tuple(describe_failed_jobs(failed_jobs(sweep, jobs))) if jobs is not None and is_left else (),
        num_jobs=len(live),
        disk=describe_full_disk(sweep.directory),
    )


def time_left(cards: Sequence[CostCard], lines: Sequence[RunStatus]) -> tuple[list[RunStatus], float | None, bool]:
    """Add `eta_s` to the runs that are executed.

    A run takes as many times what the plan says as its own pace shows, or else the median of those measured.

    Returns:
        The lines; the time of the sweep, s, None if no device is in use; and whether a pace is measured.
    """
    slower = [card.slowdown(line.status.images_per_s) for card, line in zip(cards, lines, strict=True)]
    usual = statistics.median([entry for entry in slower if entry] or [1.0])
    now: list[RunStatus] = []
    waiting: list[tuple[float, float, int]] = []
    free: list[float] = []
    for card, line, factor in zip(cards, lines, slower, strict=True):
        left_s = _line_left_s(card, line) * (factor or usual)
        now.append(replace(line, eta_s=left_s) if line.state.active else line)
        if line.state.active:
            free += [left_s] * card.run.devices
        elif not line.state.over:
            waiting.append((card.device_hours, left_s, card.run.devices))
    waiting.sort(key=lambda entry: -entry[0])
    ends = schedule_s(free, [(left_s, num_devices) for _, left_s, num_devices in waiting]) if free else []
    return now, max(ends, default=None), any(slower)


def _line_left_s(card: CostCard, line: RunStatus) -> float:
    return left_s(card, line.progress, line.evaluated, line.to_evaluate)


def _pending_jobs(live: Sequence[LiveJob], cards: Sequence[CostCard]) -> dict[int, JobInfo]:
    """Return devices of a run -> a pending job that will execute such runs."""
    pending: dict[int, JobInfo] = {}
    needed = {num for card in cards for num in (card.run.devices, card.run.evaluation_devices)}
    for job in live:
        if job.info.phase == "pending":
            shape = job.shape
            served = (n for n in needed if shape.nodes == 1 and n <= shape.devices)
            pending |= dict.fromkeys([*served, shape.nodes * shape.devices], job.info)
    return pending


def _inspect_run(run_state: RunState, card: CostCard, pending: Mapping[int, JobInfo]) -> RunStatus:
    log = run_state.record.last_log() if run_state.state not in (State.NOT_STARTED, State.FINISHED) else None
    if run_state.state is State.FINISHED and (num := sum(not each.get("forgiven") for each in run_state.attempts)):
        log = run_state.record.attempt_log(num)  # without a look at its folder
    reason = None if run_state.state.active else run_state.sentence or None
    line = RunStatus(
        run_id=run_state.run.run_id,
        cell=run_state.run.cell,
        state=run_state.state,
        status=replace(run_state.status, reason=reason),
        log=str(log) if log else None,
        unit=run_state.run.unit,
    )
    if line.state is State.DAMAGED:
        return line
    try:
        return _inspect_files(line, run_state, card, pending.get(run_state.run.devices))
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return replace(line, state=State.DAMAGED, status=Status(reason=str(error)))


def _inspect_files(line: RunStatus, run_state: RunState, card: CostCard, pending: JobInfo | None) -> RunStatus:
    """Add what the files of a run tell to its line."""
    run, record, status = run_state.run, run_state.record, run_state.status
    if line.state.startable and pending is not None:
        reason = pending.reason or run_state.reason or None
        line = replace(line, state=State.QUEUED, status=replace(status, reason=reason))
    if line.state is State.RUNNING:  # afterwards its status says so
        line = replace(line, status=replace(line.status, **record.read_deviation()))
    worker = run_state.worker if line.state.active and record.is_claimed() else None
    if place := (worker.host if worker else status.host) or "":
        job_id = (worker.facts.get("job_id") if worker else None) or status.job_id
        place += f" (job {job_id})" if job_id else ""
    is_held, rows = line.state is State.RUNNING, record.read_rows()
    losses = {
        row["images_seen"]: row["val_loss"]
        for row in [*(record.read_curve() if is_held else []), *rows]
        if row.get("val_loss")
    }
    other_stage = RunRecord(record.root) if run.stage == "evaluate" else record.evaluation
    attempts = (*run_state.attempts, *other_stage.read_attempts())
    spent = sum(each.get("device_hours", 0.0) for each in attempts)
    progress, evaluated, to_evaluate = work_done(card, run_state)
    return replace(
        line,
        to_evaluate=to_evaluate,
        progress=progress,
        val_loss=losses[max(losses)] if losses else None,
        place=place,
        evaluated=evaluated,
        device_hours=spent + (record.attempt_device_hours(time.time()) if is_held else 0.0),
        num_loss_spikes=max((row.get("num_loss_spikes") or 0 for row in rows), default=0),
        is_normalised=run.is_normalised,
    )
