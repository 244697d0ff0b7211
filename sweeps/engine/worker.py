"""The worker: executes the runs of a sweep, on this machine, under any scheduler, or as a Slurm job.

It takes the next run that its machine and its remaining time allow, longest first, and starts one process per run. It
claims a run (`sweeps.state.record`) before the start and keeps the claim until the end is recorded, so that workers
that share the sweep's folder execute each run once. A run that needs more devices than are free is passed over, not
waited for. Stopping the worker (Ctrl-C, SIGTERM, Slurm's warning) asks every run to save and exit. A run whose
directory is damaged, or whose end cannot be recorded, is reported and skipped; the others continue.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import handling_stop_signals
from aimscale.harness.run.lock import Lock
from aimscale.sweeps.engine.devices import DevicePool, Machine
from aimscale.sweeps.engine.processes import Command, Process, RunProcesses
from aimscale.sweeps.plan.costs import grace_period_s
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.attempts import Outcome, record_end, record_lost_attempt
from aimscale.sweeps.state.decision import Decision, decide
from aimscale.sweeps.state.record import RunRecord

POLL_S = 0.2
CANCEL_CHECK_S = 1.0
"""Interval between checks for cancelled runs, s."""
RESCAN_S = 10.0
"""Interval between checks of skipped runs, s: another worker may have died."""
SILENT_AFTER_S, LOST_AFTER_S = 60.0, 900.0
"""A run of another worker whose heartbeat is older than the first, s, may have lost its worker; the worker waits for it
until the age exceeds the second."""
MIN_START_TIME_S = 60.0
"""Minimum remaining time to start a run, s."""

Report = Callable[["Worker"], None]
"""Callback that receives the worker every few moments, to show its progress."""


@dataclass(kw_only=True)
class ActiveRun:
    """Run that the worker executes."""

    run: Run
    record: RunRecord
    lock: Lock
    """Claim on the run."""
    claims: tuple[str, str | None]
    """Token of this claim, and of the claim of the attempt before."""
    attempt: int
    """Number of the attempt, 1 for the first."""
    evaluation_progress: list[int]
    """Progress of evaluation at the start, as `RunRecord.evaluation_progress`."""
    devices: tuple[int, ...]
    process: Process
    """Trainer, or the program that starts its ranks; leads its own process group."""
    started: float = field(default_factory=time.time)
    """Unix time of the start."""
    is_stopping: bool = False
    """Whether it was asked to save and exit."""


@dataclass(kw_only=True)
class Worker:
    """State of one worker."""

    sweep: Sweep
    machine: Machine
    waiting: list[Run]
    """Runs that are neither executed here nor known to have ended, in the order in which they start."""
    command: Command | None = None
    """Replacement for the program that executes a run."""
    job_id: str | None = None
    """Id of this worker's Slurm job."""
    deadline: float = float("inf")
    """Unix time at which all runs are asked to save and exit."""
    skip_failed_on: Sequence[str] = ()
    """Names of this machine's nodes; runs that failed on one of them are left to other workers."""
    devices: DevicePool = field(init=False)
    processes: RunProcesses = field(init=False)
    active: list[ActiveRun] = field(default_factory=list)
    ended: dict[str, Outcome] = field(default_factory=dict)
    """Run id -> outcome of its last attempt here."""
    evaluated: dict[str, None] = field(default_factory=dict)
    """Ids of the runs that were evaluated here."""
    skipped: dict[str, Decision] = field(default_factory=dict)
    """Last decision on each run that is not executed here."""
    events: list[str] = field(default_factory=list)
    """Messages that are not printed yet."""
    stopping: bool = False
    stopped_by: int | None = None
    """First signal that requested a stop, if any."""

    def __post_init__(self) -> None:
        self.devices = DevicePool(self.machine)
        self.processes = RunProcesses(self.machine, self.command, self.events.append)
        if self.job_id:  # runs that this job executed before come first
            self.waiting.sort(key=lambda run: _claiming_job_id(self.sweep, run) != self.job_id)


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """Result of a launch."""

    finished: tuple[str, ...] = ()
    """Runs that it finished."""
    evaluated: tuple[str, ...] = ()
    """Runs that it evaluated, in the process that trained them or later."""
    failed: tuple[str, ...] = ()
    """Runs that failed for good."""
    stopped: tuple[str, ...] = ()
    """Runs that exited on request, saved if there was anything to save."""
    skipped: tuple[Decision, ...] = ()
    """Decisions on runs that it did not execute."""
    unplanned: tuple[str, ...] = ()
    """Run directories outside the plan; they trained something else."""
    remaining: tuple[str, ...] = ()
    """Runs that this worker could continue with more time, or on another node."""
    interrupted: bool = False
    """Whether it was asked to stop, or its time was up, before all runs were done."""
    stopped_by: int | None = None
    """First signal that requested a stop, if any."""


def run_worker(worker: Worker, report: Report) -> LaunchResult:
    """Execute the waiting runs until none is left to start; call `report` every few moments."""
    with contextlib.closing(worker.processes), handling_stop_signals(functools.partial(_on_signal, worker)):
        try:
            _run_until_idle(worker, report)
        except BaseException:
            _stop_all(worker)  # let the runs save before the error is raised
            while worker.active:
                _collect_ended(worker)
                time.sleep(POLL_S)
            raise
    remaining = tuple(
        run.run_id for run in worker.waiting if worker.machine.can_run(run) and _decide(worker, run).startable
    )
    return LaunchResult(
        finished=tuple(run_id for run_id, outcome in worker.ended.items() if outcome == "finished"),
        evaluated=tuple(worker.evaluated),
        failed=tuple(run_id for run_id, outcome in worker.ended.items() if outcome == "failed"),
        stopped=tuple(run_id for run_id, outcome in worker.ended.items() if outcome == "preempted"),
        skipped=tuple(decision for run_id, decision in worker.skipped.items() if run_id not in worker.ended),
        remaining=remaining,
        interrupted=worker.stopping or bool(remaining and worker.deadline - time.time() < MIN_START_TIME_S),
        stopped_by=worker.stopped_by,
    )


def _claiming_job_id(sweep: Sweep, run: Run) -> str | None:
    """Return the id of the Slurm job that claims a run, or claimed it last."""
    claimant = RunRecord(sweep.run_dir(run.run_id)).claimant()
    return claimant.facts.get("job_id") if claimant else None


def _run_until_idle(worker: Worker, report: Report) -> None:
    scanned = checked = float("-inf")
    num_active = -1
    while worker.active or not worker.stopping:
        if time.time() >= worker.deadline:
            _stop_all(worker)
        if not worker.stopping and (num_active != len(worker.active) or time.monotonic() - scanned > RESCAN_S):
            _start_waiting_runs(worker)
            scanned, num_active = time.monotonic(), len(worker.active)
        if time.monotonic() - checked > CANCEL_CHECK_S:
            for active_run in worker.active:
                if not active_run.is_stopping and active_run.record.cancelled.exists():
                    _send_stop(worker, active_run)
            checked = time.monotonic()
        _collect_ended(worker)
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to stop
            report(worker)
        if not worker.active and num_active == 0 and not any(map(_may_become_free, worker.skipped.values())):
            return
        time.sleep(POLL_S)


def _may_become_free(decision: Decision) -> bool:
    """Return whether a run of another worker is silent and may be lost.

    This worker may then be the only one left to resume it.
    """
    heartbeat = None
    if decision.verdict == "running":
        with contextlib.suppress(UserError):
            heartbeat = decision.record.read_status().heartbeat
    return heartbeat is not None and SILENT_AFTER_S < time.time() - heartbeat < LOST_AFTER_S


def _start_waiting_runs(worker: Worker) -> None:
    for run in list(worker.waiting):
        if worker.stopping:
            return
        if not worker.machine.can_run(run):
            worker.skipped[run.run_id] = _waiting_decision(worker, run, f"needs {run.devices} devices")
            continue
        acquired = worker.devices.acquire(run)
        if acquired is None:
            continue
        decision = _try_to_start(worker, run, acquired)
        if decision is None or decision.verdict in ("finished", "failed", "damaged"):
            worker.waiting.remove(run)
        if decision is None:
            worker.skipped.pop(run.run_id, None)
        else:
            worker.devices.release(acquired)
            worker.skipped[run.run_id] = decision


def _waiting_decision(worker: Worker, run: Run, why: str) -> Decision:
    return Decision(run=run, record=RunRecord(worker.sweep.run_dir(run.run_id)), verdict="waiting", why=why)


def _decide(worker: Worker, run: Run) -> Decision:
    return decide(run, RunRecord(worker.sweep.run_dir(run.run_id)))


def _try_to_start(worker: Worker, run: Run, acquired: tuple[int, ...]) -> Decision | None:
    """Claim a run and start it; return None, or the decision that explains why it was not started."""
    decision = _decide(worker, run)
    if not decision.startable:
        return decision
    if worker.deadline - time.time() < MIN_START_TIME_S:
        return _waiting_decision(worker, run, "too little time is left here")
    record = decision.record
    claim = Lock(record.claim)
    try:
        if set(worker.skip_failed_on) & set(record.failed_nodes()):
            return _waiting_decision(worker, run, "failed on this node")
        before, status = record.claimant(), record.read_status()
        nodes = os.environ.get("SLURM_JOB_NODELIST", "") if worker.job_id else ""
        holder = claim.take(job_id=worker.job_id, devices=len(acquired) * worker.machine.nodes, nodes=nodes)
        if holder is None:
            return _decide(worker, run)
        record_lost_attempt(record, before, slurm.job_state)
        decision = decide(run, record, holds_claim=True)
        if decision.startable:
            RunDir.create(record.path, run.config)
            record.write_status(state="queued", reason=None, reason_class=None)
            active_run = _start(worker, run, record, claim, (holder.token, status.claim), acquired)
    except (OSError, UserError) as error:
        decision = Decision(run=run, record=record, verdict="damaged", why=str(error))
    if not decision.startable:
        claim.release()
        return decision
    worker.active.append(active_run)
    if worker.stopping:  # the signal came while it was being started
        _send_stop(worker, active_run)
    started = "started" if active_run.attempt == 1 else f"resumed (attempt {active_run.attempt})"
    worker.events.append(f"{started} {record.name}")
    return None


def _start(
    worker: Worker, run: Run, record: RunRecord, claim: Lock, claims: tuple[str, str | None], acquired: tuple[int, ...]
) -> ActiveRun:
    attempt = record.next_attempt()
    environment = os.environ | worker.devices.environment(acquired) | {"AIMSCALE_CLAIM": claims[0]}
    environment["OMP_NUM_THREADS"] = str(run.config.runtime.num_threads)
    # srun may have started several workers; a run is not one of their ranks
    environment.pop("SLURM_STEP_NUM_TASKS", None)
    if len(acquired) > 1:  # torchrun kills its ranks this long after SIGTERM; the default is 30 s
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_period_s(run))
    record.logs.mkdir(parents=True, exist_ok=True)
    log, more_follow = record.attempt_log(attempt), len(worker.waiting) > 1
    process = worker.processes.start(record.path, len(acquired), environment, log, more_follow=more_follow)
    return ActiveRun(
        run=run,
        record=record,
        lock=claim,
        claims=claims,
        attempt=attempt,
        evaluation_progress=record.evaluation_progress(),
        devices=acquired,
        process=process,
    )


def _collect_ended(worker: Worker) -> None:
    for active_run in list(worker.active):
        if (exit_code := active_run.process.poll()) is None:
            continue
        worker.active.remove(active_run)
        worker.devices.release(active_run.devices)
        try:
            # A time limit of Slurm is no person's request: a run that it stops again and again has failed.
            stop_requested = (worker.stopping and not worker.job_id) or active_run.record.cancelled.exists()
            outcome = record_end(
                active_run.record,
                active_run.attempt,
                exit_code,
                claims=active_run.claims,
                stop_requested=stop_requested,
            )
            worker.events.append(_describe_end(active_run, outcome))
            if active_run.record.evaluation_progress() != active_run.evaluation_progress:
                worker.evaluated[active_run.run.run_id] = None
        except (OSError, UserError) as error:
            outcome = "failed"
            worker.events.append(f"left {active_run.record.name}: how it ended cannot be written down ({error})")
        active_run.lock.release()
        worker.ended[active_run.run.run_id] = outcome
        if outcome not in ("finished", "failed"):
            worker.waiting.insert(0, active_run.run)


def print_events(worker: Worker) -> None:
    """Print the worker's messages, one per line: a `Report` for logs."""
    for event in worker.events:
        print(event, flush=True)
    worker.events.clear()


def _describe_end(active_run: ActiveRun, outcome: Outcome) -> str:
    if outcome == "finished":
        return f"finished {active_run.record.name} in {time.time() - active_run.started:.0f} s"
    if outcome == "elsewhere":
        return f"left {active_run.record.name}: another process executes it"
    if outcome == "preempted":
        return f"stopped {active_run.record.name}, saved"
    status = active_run.record.read_status()
    what = "trying again" if outcome == "retry" else f"see {active_run.record.attempt_log(active_run.attempt)}"
    return f"failed {active_run.record.name} ({status.reason_class}: {status.reason}); {what}"


def _on_signal(worker: Worker, number: int, frame: FrameType | None) -> None:
    """Ask all runs to stop; kill them on a second Ctrl-C."""
    if worker.stopping and number == signal.SIGINT:
        for active_run in worker.active:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(active_run.process.pid, signal.SIGKILL)
    worker.stopped_by = worker.stopped_by or number
    _stop_all(worker)


def _stop_all(worker: Worker) -> None:
    """Ask every run to save and exit, once."""
    if not worker.stopping:
        worker.stopping = True
        worker.events.append("stopping: every run saves first (a second Ctrl-C kills)")
        for active_run in worker.active:
            _send_stop(worker, active_run)


def _send_stop(worker: Worker, active_run: ActiveRun) -> None:
    """Ask a run to save and exit; only its main process is signalled, which stops its loader processes itself."""
    active_run.is_stopping = True
    with contextlib.suppress(ProcessLookupError):
        active_run.process.send_signal(worker.machine.stop_signal)
