"""Status of every run of a sweep, from its directory, its locks and Slurm's jobs."""

from __future__ import annotations

import heapq
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import Status
from aimscale.sweeps.plan.costs import CostCard
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm.commands import JobInfo
from aimscale.sweeps.slurm.jobs import LiveJob, describe_failed_jobs, failed_jobs, live_jobs
from aimscale.sweeps.state.decision import RunState, State, read_states
from aimscale.sweeps.state.record import unplanned_runs

ENDED_STATES = ("finished", "cancelled", "failed", "diverged", "off-track", "damaged")
"""States in which nothing is executed until a person acts."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Line of `aimscale status`."""

    run_id: str
    cell: dict[str, Any]
    """Axis -> value."""
    state: State
    status: Status
    """Status that the run wrote, with Slurm's reason if it waits."""
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


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """Result of `aimscale status`."""

    sweep: str
    runs: tuple[RunStatus, ...]
    """Status of each run, in the order of the plan."""
    counts: dict[str, int]
    """Number of runs by state."""
    progress: float
    """Share of the sweep's FLOPs executed, 0..1."""
    given_up: float
    """Share of its FLOPs that remain in runs which failed or were cancelled, 0..1."""
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

    @property
    def is_active(self) -> bool:
        """Whether a worker or a Slurm job executes its runs, or will."""
        return self.num_jobs > 0 or any(state in self.counts for state in ("running", "starting", "queued"))


def sweep_status(sweep: Sweep, cards: Sequence[CostCard], jobs: dict[str, JobInfo] | None = None) -> SweepStatus:
    """Inspect every run; `jobs` are Slurm's jobs (`sweeps.slurm.commands.jobs`), None if Slurm cannot be asked."""
    live = live_jobs(sweep, jobs) if jobs else []
    pending, runs = _pending_jobs(live, cards), [card.run for card in cards]
    lines = [_inspect_run(found, card, pending) for found, card in zip(read_states(sweep, runs), cards, strict=True)]
    lines, eta_s, is_measured = time_left(cards, lines)
    flops = [card.flops_executed for card in cards]
    return SweepStatus(
        sweep=sweep.name,
        runs=tuple(lines),
        counts=dict(Counter(line.state for line in lines)),
        progress=sum(f * line.progress for f, line in zip(flops, lines, strict=True)) / sum(flops),
        given_up=sum(f * (1 - e.progress) for f, e in zip(flops, lines, strict=True) if e.state in ENDED_STATES)
        / sum(flops),
        eta_s=eta_s,
        eta_is_measured=is_measured,
        device_hours=sum(line.device_hours for line in lines),
        device_hours_planned=sum(card.device_hours for card in cards),
        unplanned=unplanned_runs(sweep, runs),
        failed_jobs=_describe_failed_jobs(sweep, jobs, lines),
        num_jobs=len(live),
    )


def time_left(cards: Sequence[CostCard], lines: Sequence[RunStatus]) -> tuple[list[RunStatus], float | None, bool]:
    """Add `eta_s` to the runs that are executed.

    A run takes as many times what the plan says as its own pace shows, or else the median of those measured.

    Returns:
        The lines; the time of the sweep, s, None if no device is in use; and whether a pace is measured.
    """
    slower = [
        card.images_executed / card.training_s / pace if (pace := line.status.images_per_s) else None
        for card, line in zip(cards, lines, strict=True)
    ]
    usual = statistics.median([each for each in slower if each] or [1.0])
    now: list[RunStatus] = []
    waiting: list[tuple[float, float, int]] = []
    free: list[float] = []
    for card, line, factor in zip(cards, lines, slower, strict=True):
        evaluated = line.evaluated / line.to_evaluate if line.to_evaluate else line.progress
        left_s = (1 - line.progress) * card.training_s + (1 - evaluated) * card.evaluation_s
        left_s *= factor or usual
        is_running = line.state in ("running", "starting")
        now.append(replace(line, eta_s=left_s) if is_running else line)
        if is_running:
            free += [left_s] * card.run.devices
        elif line.state not in ENDED_STATES:
            waiting.append((card.device_hours, left_s, card.run.devices))
    waiting.sort(key=lambda each: -each[0])
    ends = schedule_s(free, [(left_s, num_devices) for _, left_s, num_devices in waiting]) if free else []
    return now, max(ends, default=None), any(slower)


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


def _describe_failed_jobs(sweep: Sweep, jobs: dict[str, JobInfo] | None, lines: Sequence[RunStatus]) -> tuple[str, ...]:
    """Return why jobs failed, if a run could start and no worker executes it."""
    is_left = any(line.state in ("not started", "lost", "paused") for line in lines)
    return () if jobs is None or not is_left else tuple(describe_failed_jobs(failed_jobs(sweep, jobs)))


def _pending_jobs(live: Sequence[LiveJob], cards: Sequence[CostCard]) -> dict[int, JobInfo]:
    """Return devices of a run -> a pending job that will execute such runs."""
    found: dict[int, JobInfo] = {}
    needed = {num for card in cards for num in (card.run.devices, card.run.probe_devices)}
    for job in live:
        if job.info.phase == "pending":
            shape = job.shape
            served = (n for n in needed if shape.nodes == 1 and n <= shape.devices)
            found |= dict.fromkeys([*served, shape.nodes * shape.devices], job.info)
    return found


def _inspect_run(found: RunState, card: CostCard, pending: Mapping[int, JobInfo]) -> RunStatus:
    log = found.record.last_log() if found.state != "not started" else None
    line = RunStatus(
        run_id=found.run.run_id,
        cell=found.run.cell,
        state=found.state,
        status=replace(found.status, reason=_reason(found)),
        log=str(log) if log else None,
    )
    try:
        return line if line.state == "damaged" else _inspect_files(line, found, card, pending.get(found.run.devices))
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return replace(line, state="damaged", status=Status(reason=str(error)))


def _inspect_files(line: RunStatus, found: RunState, card: CostCard, pending: JobInfo | None) -> RunStatus:
    """Add what the files of a run tell to its line."""
    run, record, status = found.run, found.record, found.status
    if found.startable and pending is not None:
        line = replace(line, state="queued", status=replace(status, reason=pending.reason or status.reason))
    worker = found.worker if found.is_active and record.is_claimed() else None
    if place := (worker.host if worker else status.host) or "":
        job_id = (worker.facts.get("job_id") if worker else None) or status.job_id
        place += f" (job {job_id})" if job_id else ""
    is_held, rows = found.state == "running", record.read_rows()
    losses = {
        row["images_seen"]: row["val_loss"]
        for row in [*(record.read_curve() if is_held else []), *rows]
        if row.get("val_loss")
    }
    spent = sum(each.get("device_hours", 0.0) for each in found.attempts)
    unprobed, to_evaluate = Counter(each.what for each in found.missing), len(run.budgets) * len(card.probes)
    return replace(
        line,
        to_evaluate=to_evaluate,
        progress=min(1.0, status.images_done / card.images_executed) if unprobed["training"] else 1.0,
        val_loss=losses[max(losses)] if losses else None,
        place=place,
        evaluated=to_evaluate - unprobed["probe"] - unprobed["training"] * len(card.probes),
        device_hours=spent + (record.attempt_device_hours(time.time()) if is_held else 0.0),
        num_loss_spikes=max((row.get("num_loss_spikes") or 0 for row in rows), default=0),
        is_normalised=run.config.training.objective.target == "normalised",
    )


def _reason(found: RunState) -> str | None:
    """Return what is said of a state beside its name."""
    match found.state:
        case "lost" | "paused":
            why = found.status.reason if found.status.reason_class else found.why
            return "; ".join(part for part in (why, "`aimscale launch` resumes it") if part)
        case "cancelled":
            return "`aimscale launch --retry` resumes it"
        case "running" | "starting":
            return None
        case "damaged":
            return found.why
    return found.status.reason
