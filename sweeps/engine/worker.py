"""The worker: executes the runs of a sweep, on this machine, under any scheduler, or as a Slurm job.

It claims the next run that its machine and its remaining time allow, longest first, starts one process for it, and
keeps the claim until the end is recorded: workers that share the sweep's folder execute each run once. Stopping the
worker (Ctrl-C, SIGTERM, Slurm's warning) asks every run to save and exit. Damaged runs are reported and skipped.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from aimscale.aim.errors import UserError
from aimscale.harness.run.failures import disk_sentence, handling_stop_signals
from aimscale.harness.run.files import may_pass
from aimscale.sweeps.engine import looks
from aimscale.sweeps.engine.active_run import ActiveRun, Event, Part
from aimscale.sweeps.engine.forecasts import write_forecasts
from aimscale.sweeps.engine.queue import Worker, start_waiting_runs, training_state
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import SWEEP_RECORD
from aimscale.sweeps.state.attempts import Outcome
from aimscale.sweeps.state.record import RunRecord, stage_record
from aimscale.sweeps.state.run_state import RunState, State, read_stage

POLL_S, CANCEL_CHECK_S = 0.2, 1.0
"""Intervals between looks at own processes and at cancellations, s."""
WAIT_TOLD_S = 600.0
"""Interval between messages about what a worker without runs waits for, s."""

GOES_ON = (None, "retry", "claim lost")
"""Outcomes of the last attempt at a stage here, if any, after which its state tells what became of it."""

Report = Callable[["Worker"], None]
"""Callback that receives the worker every few moments, to show its progress."""


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """Result of a launch."""

    finished: tuple[str, ...] = ()
    """Runs of which nothing is missing any more."""
    evaluated: tuple[str, ...] = ()
    """Runs that it evaluated."""
    failed: tuple[str, ...] = ()
    """Runs that failed for good, or here before their first step."""
    stopped: tuple[str, ...] = ()
    """Runs that exited on request, saved if there was anything to save."""
    skipped: tuple[RunState, ...] = ()
    """States of runs that it did not execute."""
    remaining: tuple[str, ...] = ()
    """Runs that this worker could continue with more time, or on another node."""
    interrupted: bool = False
    """Whether it was asked to stop, or its time was up, before all runs were done."""
    stopped_by: int | None = None
    """First signal that requested a stop, if any."""
    broken: str | None = None
    """Reason why it took no more runs before all were done, if any."""


def run_worker(worker: Worker, report: Report) -> LaunchResult:
    """Execute the waiting runs until none is left to start; call `report` every few moments."""
    with handling_stop_signals(functools.partial(_on_signal, worker)):
        try:
            _run_until_idle(worker, report)
        except BaseException:
            worker.stop_all()  # let the runs save before the error is raised
            _run_until_idle(worker, lambda _: None)
            raise
    return _result(worker)


def _result(worker: Worker) -> LaunchResult:
    """Summarise what a worker that has ended did, by runs: an outcome counts for a run whichever stage has it."""
    last = dict(worker.ended)
    runs = {run.run_id: (last.get(run.key), last.get(run.evaluation.key)) for run in worker.planned}
    states = [read_stage(run, stage_record(worker.sweep, run)) for run in worker.waiting]
    remaining = {each.run.run_id for each in states if each.state.startable and worker.machine.can_run(each.run)}

    def ended(*outcomes: Outcome) -> tuple[str, ...]:
        return tuple(run_id for run_id, of_stages in runs.items() if set(of_stages) & {*outcomes})

    stopped, failed = ended("preempted"), ended("failed", "released")
    skipped: list[RunState] = []
    for run in worker.planned:
        of_training, of_evaluation = (
            worker.skipped.get(key) if last.get(key) in GOES_ON else None for key in (run.key, run.evaluation.key)
        )
        if of_training and (of_training.state is not State.FINISHED or last.get(run.evaluation.key) in GOES_ON):
            is_trained = of_training.state is State.FINISHED
            skipped.append((of_evaluation if is_trained else None) or of_training)
        elif of_evaluation and of_evaluation.state.needs_person:
            skipped.append(of_evaluation)
    finished = [run_id for run_id in ended("finished") if run_id not in {*stopped, *failed, *remaining}]
    return LaunchResult(
        finished=tuple(finished),
        evaluated=tuple(run_id for run_id, (_, outcome) in runs.items() if outcome == "finished"),
        failed=failed,
        stopped=stopped,
        skipped=tuple(skipped),
        remaining=tuple(remaining),
        interrupted=worker.stopping or bool(remaining and worker.is_late),
        stopped_by=worker.stopped_by,
        broken=worker.broken,
    )


def _run_until_idle(worker: Worker, report: Report) -> None:
    scanned = checked = told = float("-inf")
    num_active, idle_since = -1, time.monotonic()
    while worker.active or not worker.stopping:
        if time.time() >= worker.deadline:
            worker.stop_all()
        if not worker.stopping and (num_active != len(worker.active) or time.monotonic() - scanned > looks.RESCAN_S):
            num_before = len(worker.active)
            start_waiting_runs(worker)
            if started := [each.run for each in worker.active[num_before:] if each.watch]:
                _write_forecasts(worker, started)  # while they start, which takes longer
            scanned, num_active = time.monotonic(), len(worker.active)
        if time.monotonic() - checked > CANCEL_CHECK_S:
            _signal_runs(worker)
            _watch_runs(worker)
            worker.check_directory()
            checked = time.monotonic()
        _collect_ended(worker)
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to stop
            report(worker)
        now = time.monotonic()
        if worker.active or num_active != 0:
            idle_since, told = now, float("-inf")
        elif not (awaited := [each for each in worker.skipped.values() if looks.may_become_free(each, worker.job_id)]):
            return
        elif now - told > WAIT_TOLD_S:
            worker.events.append(Event(text=looks.describe_wait(awaited[0], worker.devices.others, now - idle_since)))
            told = now
        time.sleep(POLL_S)


def _write_forecasts(worker: Worker, runs: Sequence[Run]) -> None:
    """Renew the forecasts of runs; whatever goes wrong with them, the runs go on."""
    try:
        write_forecasts(worker.sweep, worker.planned, runs)
    except Exception as error:  # numpy and scipy raise many types on odd losses
        worker.events.append(Event(text=f"no new forecasts of runs: {error}"))


def _collect_ended(worker: Worker) -> None:
    for active_run in list(worker.active):
        if (exit_code := active_run.process.poll()) is None:
            continue
        for part in list(active_run.parts):
            if (outcome := _record_end(worker, active_run, part, exit_code)) is None:
                continue
            active_run.parts.remove(part)
            part.lock.release()
            worker.ended.append((part.run.key, outcome))
            if outcome == "released":
                worker.waiting.append(part.run)
                _suspect_node(worker, part)
            elif outcome not in ("finished", "failed"):
                worker.waiting.insert(0, part.run)
            elif (
                outcome == "finished"
                and part.run.stage == "evaluate"
                and training_state(worker, part.run) != "finished"
            ):
                worker.waiting.append(part.run)  # it trains on, and there will be more to evaluate
        if active_run.parts:  # the end of some cannot be written down yet
            continue
        worker.active.remove(active_run)
        worker.devices.release(active_run.devices)
        if training := [each.run for each in worker.active if each.run.stage == "train"]:
            _write_forecasts(worker, training)


def _record_end(worker: Worker, active_run: ActiveRun, part: Part, exit_code: int) -> Outcome | None:
    """Record how an attempt at a run ended, and return what follows; None if it is to be tried again in a moment."""
    # A time limit of Slurm is no person's request: a run that it stops again and again has failed.
    try:
        stop_requested = (worker.stopping and not worker.job_id) or part.record.cancelled.exists()
        if not (worker.sweep.directory / SWEEP_RECORD).is_file():
            raise UserError(f"{worker.sweep.directory} is gone")
        outcome = active_run.record_end(
            part,
            exit_code,
            stop_requested=stop_requested,
            is_interrupted=worker.stopped_by == signal.SIGTERM,
            nodes=worker.nodes,
        )
        worker.events.append(active_run.end_event(part, outcome))
        return outcome
    except (OSError, UserError) as error:
        if may_pass(error) and worker.looks.may_repeat(part.run.key):
            return None
        worker.events.append(Event(text=f"left {part.record.name}: how it ended cannot be written down ({error})"))
        with contextlib.suppress(OSError):
            part.lock.note(ended=(isinstance(error, OSError) and disk_sentence(error)) or str(error))
        return "failed"


def _suspect_node(worker: Worker, part: Part) -> None:
    """Take no more runs after two in a row that failed on one node before their first step: it may be broken."""
    before = [key for key, outcome in worker.ended[-2:-1] if outcome == "released"]
    if before and before != [part.run.key] and not worker.broken:
        run_id, _, is_evaluation = before[0].partition("/")
        record = RunRecord(worker.sweep.run_dir(run_id))
        records = record.evaluation if is_evaluation else record, part.record
        with contextlib.suppress(OSError, UserError):
            nodes, others = (set(record.failed_nodes(given_back=True)) for record in records)
            for node in nodes & others:  # none, if another worker has ended the first of them since
                reason = part.record.read_status().reason
                worker.broken = f"two runs in a row failed on {node} before their first step ({reason})"
                worker.events.append(Event(text=f"{worker.broken}; no more runs are started here"))


def print_events(worker: Worker, tell: Callable[[Event], str | None] = str) -> None:
    """Print the worker's messages, one per line, as `tell` words them: a `Report` for logs."""
    for event in worker.events:
        if (line := tell(event)) is not None:
            print(line, flush=True)
    worker.events.clear()


def _on_signal(worker: Worker, number: int, frame: FrameType | None) -> None:
    """Ask all runs to stop; kill them on a second Ctrl-C."""
    if worker.stopping and number == signal.SIGINT:
        for active_run in worker.active:
            active_run.kill()
    worker.stopped_by = worker.stopped_by or number
    worker.stop_all()


def _watch_runs(worker: Worker) -> None:
    """Compare runs with their forecasts, and ask those to stop whose alarm is as large as the launch said."""
    for active_run in worker.active:
        with contextlib.suppress(OSError, UserError):  # looked at again in a second
            watch = active_run.watch
            if watch and active_run.kill_at is None and (reason := watch.look()):
                active_run.off_track = reason
                active_run.stop(worker.machine.stop_signal)


def _signal_runs(worker: Worker) -> None:
    """Ask runs that were cancelled to stop, and kill those that have not stopped in time."""
    for active_run in worker.active:
        if active_run.kill_at is None:
            with contextlib.suppress(OSError):  # looked at again in a second
                if any(part.record.cancelled.exists() for part in active_run.parts):
                    active_run.stop(worker.machine.stop_signal)
        elif time.time() > active_run.kill_at:
            worker.events.append(Event(text=f"killing {active_run.record.name}, which did not stop"))
            active_run.kill()
