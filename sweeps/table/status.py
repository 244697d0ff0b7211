"""Where every run of a sweep stands: its directory, joined with what the queue knows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from aimscale.aim.errors import UserError
from aimscale.harness.probe.files import is_probed
from aimscale.harness.run.directory import Status
from aimscale.sweeps.plan.costs import CostCard
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm.commands import JobInfo
from aimscale.sweeps.state.decision import in_words, to_do
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.sweep_dir import unplanned

Shown = Literal["not started", "queued", "running", "dead", "preempted", "failed", "diverged", "finished", "damaged"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One line of `aimscale status`."""

    run_id: str
    cell: dict[str, Any]
    """Axis -> value."""
    state: Shown
    """`dead`: it says running, and no process does; the next launch resumes it."""
    status: Status
    """What the run says of itself, with why it waits where Slurm says that."""
    progress: float
    """Share of the planned images trained on, 0..1."""
    val_loss: float | None
    """Validation loss of the last budget recorded."""
    eta_s: float | None
    """To the end, at the present speed, without validation and probes."""
    heartbeat_age_s: float | None
    """Since its last sign of life."""
    job_id: str | None
    log: str | None
    """Output of its last attempt."""
    evaluated: int
    """Probed (task, budget) pairs."""
    to_evaluate: int
    """Such pairs in all."""
    device_hours: float
    """Spent so far, all attempts."""


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """All of `aimscale status`."""

    sweep: str
    runs: tuple[RunStatus, ...]
    """In the order of the plan."""
    counts: dict[str, int]
    """Runs by state."""
    progress: float
    """Share of the sweep's FLOPs executed, 0..1."""
    eta_s: float | None
    """To the end of all that did not fail, evaluation included, at the pace so far, on the devices that run now."""
    device_hours: float
    """Spent so far."""
    device_hours_planned: float
    """By the cost cards."""
    unplanned: tuple[str, ...]
    """Run directories that are not in the plan any more: of an earlier version of the sweep file."""


def sweep_status(
    sweep: Sweep, runs: Sequence[Run], cards: Sequence[CostCard], jobs: Mapping[str, JobInfo] | None = None
) -> SweepStatus:
    """Look at every run; `jobs` is what Slurm knows (`sweeps.slurm.commands.jobs`), None where it cannot be asked."""
    now = time.time()
    lines = tuple(
        _run_status(run, card, RunRecord(sweep.run_dir(run.run_id)), jobs, now)
        for run, card in zip(runs, cards, strict=True)
    )
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.state] = counts.get(line.state, 0) + 1
    flops = [card.flops_executed for card in cards]
    done = sum(f * (1.0 if line.state == "finished" else line.progress) for f, line in zip(flops, lines, strict=True))
    return SweepStatus(
        sweep=sweep.name,
        runs=lines,
        counts=counts,
        progress=done / sum(flops),
        eta_s=_eta(lines, cards),
        device_hours=sum(line.device_hours for line in lines),
        device_hours_planned=sum(card.device_hours for card in cards),
        unplanned=unplanned(sweep, runs),
    )


def _run_status(
    run: Run, card: CostCard, record: RunRecord, jobs: Mapping[str, JobInfo] | None, now: float
) -> RunStatus:
    try:
        return _undamaged(run, card, record, jobs, now)
    except UserError as error:
        why = str(error)
    except OSError as error:
        why = f"{error.filename or record.path} cannot be read ({error.strerror})"
    return _line(run, card, record, Status(reason=why), "damaged", now)


def _undamaged(
    run: Run, card: CostCard, record: RunRecord, jobs: Mapping[str, JobInfo] | None, now: float
) -> RunStatus:
    status = record.checked_status()
    if status.state == "finished" and (missing := to_do(run, record)):
        status = replace(status, state="preempted", reason=in_words(missing))
    state: Shown
    if status.state in ("finished", "created"):
        state = _shown(status)
    elif record.is_held():
        state = "running"
    elif record.is_claimed():
        state = "queued"
    else:
        state = "dead" if status.state in ("running", "queued") else _shown(status)
    return _line(run, card, record, status, state, now)


def _shown(status: Status) -> Shown:
    return "not started" if status.state == "created" else status.state


def _line(run: Run, card: CostCard, record: RunRecord, status: Status, state: Shown, now: float) -> RunStatus:
    log = record.last_log() if state != "not started" else None
    evaluated, hours = _evaluation(run, record, state, now)
    worker = record.claimant()
    left = max(0, card.images_executed - status.images_done)
    speed = status.images_per_s if state == "running" else None
    return RunStatus(
        run_id=run.run_id,
        cell=run.cell,
        state=state,
        status=status,
        progress=1.0 if state == "finished" else 1.0 - left / card.images_executed,
        val_loss=_validation_loss(record) if state not in ("not started", "damaged") else None,
        eta_s=left / speed if speed else None,
        heartbeat_age_s=max(0.0, now - status.heartbeat) if status.heartbeat else None,
        job_id=(worker.facts.get("job_id") if worker else None) or status.job_id,
        log=str(log) if log else None,
        evaluated=evaluated,
        to_evaluate=len(run.budgets) * len(run.config.evaluation.probes),
        device_hours=hours,
    )


def _validation_loss(record: RunRecord) -> float | None:
    """Of the largest budget that has been validated."""
    losses = {row["images_seen"]: row["val_loss"] for row in record.read_rows() if row.get("val_loss") is not None}
    return losses[max(losses)] if losses else None


def _evaluation(run: Run, record: RunRecord, state: Shown, now: float) -> tuple[int, float]:
    """Probed pairs, and device-hours of all attempts."""
    if state in ("not started", "damaged"):
        return 0, 0.0
    saved = [budget for budget in run.budgets if record.model_file(budget).exists()]
    wanted = [(budget, task) for budget in saved for task in run.config.evaluation.probes]
    done = sum(is_probed(record, run.config, budget, task) for budget, task in wanted)
    return done, _hours(record, now, is_running=state == "running")


def _hours(record: RunRecord, now: float, *, is_running: bool) -> float:
    spent = sum(float(ended.get("device_hours") or 0.0) for ended in record.read_attempts())
    return spent + (record.hours_since_start(now) if is_running else 0.0)


def _eta(lines: Sequence[RunStatus], cards: Sequence[CostCard]) -> float | None:
    """Seconds in which the devices of the running runs do what is left of all, as fast as what is done was done."""
    done = left = devices = 0.0
    for line, card in zip(lines, cards, strict=True):
        share = line.evaluated / line.to_evaluate if line.to_evaluate else line.progress
        rest_s = card.training_s * (1 - line.progress) + card.evaluation_s * (1 - share)
        rest = rest_s * card.devices / 3600
        done += card.device_hours - rest
        if line.state not in ("failed", "diverged", "damaged"):
            left += rest
        if line.state == "running":
            devices += card.devices
    spent = sum(line.device_hours for line in lines)
    return 3600 * left * spent / (done * devices) if done > 0 and spent and devices else None
