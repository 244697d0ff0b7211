"""The queue, the only thing that executes a sweep: on this machine, under any scheduler, and in every Slurm job.

It takes the next run that its machine and its time can serve, the longest first, and executes one process per run. A
run is claimed (`sweeps.state.record`) before it is started and until its end is written down, so that any number of
queues on machines that share the sweep's folder execute each run once. A run that needs more devices than are free is
passed over, not waited for. Stopping the queue (Ctrl-C, SIGTERM, Slurm's warning) asks every run to save and end. A run
whose directory is damaged, or whose end cannot be written down, is named and left; the others go on.
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
from aimscale.harness.run.failures import calling
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
"""Active runs are looked at for a cancellation this often."""
RESCAN_S = 10.0
"""Runs that were left are looked at again this often: another worker may have died."""
SILENT_AFTER_S, LOST_AFTER_S = 60.0, 900.0
"""A run elsewhere that was not heard of for so long may come free, and is waited for up to the second."""
MIN_START_TIME_S = 60.0
"""With less time than this left, no run is started."""

Report = Callable[["Worker"], None]
"""Called every few moments with the queue, to show where it stands."""


@dataclass(kw_only=True)
class ActiveRun:
    """A run that the queue executes."""

    run: Run
    record: RunRecord
    lock: Lock
    """Its claim."""
    claims: tuple[str, str | None]
    """Token of the claim, and the one of the attempt before."""
    attempt: int
    """1 for the first start."""
    evaluation_progress: list[int]
    """What evaluation had written when it started."""
    devices: tuple[int, ...]
    process: Process
    """The trainer, or what starts its ranks: leader of its own process group."""
    started: float = field(default_factory=time.time)
    """Unix time."""
    is_stopping: bool = False
    """Whether it was asked to save and end."""


@dataclass(kw_only=True)
class Worker:
    """State of one worker."""

    sweep: Sweep
    machine: Machine
    waiting: list[Run]
    """Neither executed here nor known to be over, in the order in which they are started."""
    command: Command | None = None
    """Replaces the program that executes a run."""
    job_id: str | None = None
    """Of the Slurm job that this worker is."""
    deadline: float = float("inf")
    """Unix time at which everything saves and ends."""
    skip_failed_on: Sequence[str] = ()
    """Names of this machine's nodes: runs that failed on one of them are left to others."""
    devices: DevicePool = field(init=False)
    processes: RunProcesses = field(init=False)
    active: list[ActiveRun] = field(default_factory=list)
    ended: dict[str, Outcome] = field(default_factory=dict)
    """Run -> how its last attempt here ended."""
    evaluated: dict[str, None] = field(default_factory=dict)
    """Runs on which something was measured here."""
    skipped: dict[str, Decision] = field(default_factory=dict)
    """Why runs are not executed here, as last seen."""
    events: list[str] = field(default_factory=list)
    """Sentences that the display has not printed yet."""
    stopping: bool = False
    stopped_by: int | None = None
    """The first signal that asked, where one did."""

    def __post_init__(self) -> None:
        self.devices = DevicePool(self.machine)
        self.processes = RunProcesses(self.machine, self.command, self.events.append)
        if self.job_id:  # what this job had before comes first
            self.waiting.sort(key=lambda run: _claiming_job_id(self.sweep, run) != self.job_id)


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """What a launch did."""

    finished: tuple[str, ...] = ()
    """Runs it brought to their end."""
    evaluated: tuple[str, ...] = ()
    """Runs on which it measured something, in the process that trained them or later."""
    failed: tuple[str, ...] = ()
    """Runs it tried in vain."""
    stopped: tuple[str, ...] = ()
    """Runs that ended because they were told to, and saved if there was something to save."""
    skipped: tuple[Decision, ...] = ()
    """Runs it left alone."""
    unplanned: tuple[str, ...] = ()
    """Run directories that the plan does not name: what they trained differs from it."""
    to_do: tuple[str, ...] = ()
    """Runs that this machine could go on with, had it more time or were it another node."""
    interrupted: bool = False
    """Whether it was asked to stop, or its time was up, before it was through."""
    stopped_by: int | None = None
    """The signal that asked first, where one did."""


def run_worker(worker: Worker, report: Report) -> LaunchResult:
    """Execute the runs that wait until none is left to start; `report` is called every few moments."""
    with contextlib.closing(worker.processes), calling(functools.partial(_on_signal, worker)):
        try:
            _run_until_idle(worker, report)
        except BaseException:
            _stop_all(worker)  # whatever went wrong here, the runs save before it is said
            while worker.active:
                _collect_ended(worker)
                time.sleep(POLL_S)
            raise
    to_do = tuple(
        run.run_id for run in worker.waiting if worker.machine.can_run(run) and _decide(worker, run).startable
    )
    return LaunchResult(
        finished=tuple(run_id for run_id, outcome in worker.ended.items() if outcome == "finished"),
        evaluated=tuple(worker.evaluated),
        failed=tuple(run_id for run_id, outcome in worker.ended.items() if outcome == "stop"),
        stopped=tuple(run_id for run_id, outcome in worker.ended.items() if outcome == "preempted"),
        skipped=tuple(found for run_id, found in worker.skipped.items() if run_id not in worker.ended),
        to_do=to_do,
        interrupted=worker.stopping or bool(to_do and worker.deadline - time.time() < MIN_START_TIME_S),
        stopped_by=worker.stopped_by,
    )


def _claiming_job_id(sweep: Sweep, run: Run) -> str | None:
    """The Slurm job that claims a run, or claimed it last."""
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


def _may_become_free(found: Decision) -> bool:
    """Whether a run elsewhere is silent: its machine may be lost, and nobody but this worker be there to go on."""
    heartbeat = None
    if found.verdict == "running":
        with contextlib.suppress(UserError):
            heartbeat = found.record.read_status().heartbeat
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
        found = _try_to_start(worker, run, acquired)
        if found is None or found.verdict in ("finished", "failed", "damaged"):
            worker.waiting.remove(run)
        if found is None:
            worker.skipped.pop(run.run_id, None)
        else:
            worker.devices.release(acquired)
            worker.skipped[run.run_id] = found


def _waiting_decision(worker: Worker, run: Run, why: str) -> Decision:
    return Decision(run=run, record=RunRecord(worker.sweep.run_dir(run.run_id)), verdict="waiting", why=why)


def _decide(worker: Worker, run: Run) -> Decision:
    return decide(run, RunRecord(worker.sweep.run_dir(run.run_id)))


def _try_to_start(worker: Worker, run: Run, acquired: tuple[int, ...]) -> Decision | None:
    """Claim a run and start it; else why not."""
    found = _decide(worker, run)
    if not found.startable:
        return found
    if worker.deadline - time.time() < MIN_START_TIME_S:
        return _waiting_decision(worker, run, "too little time is left here")
    record = found.record
    claim = Lock(record.claim)
    try:
        if set(worker.skip_failed_on) & set(record.failed_nodes()):
            return _waiting_decision(worker, run, "failed on this node")
        before, status = record.claimant(), record.read_status()
        nodes = os.environ.get("SLURM_JOB_NODELIST", "") if worker.job_id else ""
        mine = claim.take(job_id=worker.job_id, devices=len(acquired) * worker.machine.nodes, nodes=nodes)
        if mine is None:
            return _decide(worker, run)
        record_lost_attempt(record, before, slurm.job_state)
        found = decide(run, record, holds_claim=True)
        if found.startable:
            RunDir.create(record.path, run.config)
            record.write_status(state="queued", reason=None, reason_class=None)
            active_run = _start(worker, run, record, claim, (mine.token, status.claim), acquired)
    except (OSError, UserError) as error:
        found = Decision(run=run, record=record, verdict="damaged", why=str(error))
    if not found.startable:
        claim.release()
        return found
    worker.active.append(active_run)
    if worker.stopping:  # the signal came while it was being started
        _send_stop(worker, active_run)
    worker.events.append(
        f"{'started' if active_run.attempt == 1 else f'resumed (attempt {active_run.attempt})'} {record.name}"
    )
    return None


def _start(
    worker: Worker, run: Run, record: RunRecord, claim: Lock, claims: tuple[str, str | None], acquired: tuple[int, ...]
) -> ActiveRun:
    attempt = record.next_attempt()
    environment = os.environ | worker.devices.environment(acquired) | {"AIMSCALE_CLAIM": claims[0]}
    environment["OMP_NUM_THREADS"] = str(run.config.runtime.num_threads)
    environment.pop("SLURM_STEP_NUM_TASKS", None)  # srun may have started several queues; no run is a rank of theirs
    if len(acquired) > 1:  # torchrun kills its workers so long after it was told to stop; by default after 30 s
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_period_s(worker.sweep, run))
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
            # Slurm's limits are nobody's wish: a run that they stop again and again before it saves has failed.
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
            outcome = "stop"
            worker.events.append(f"left {active_run.record.name}: how it ended cannot be written down ({error})")
        active_run.lock.release()
        worker.ended[active_run.run.run_id] = outcome
        if outcome not in ("finished", "stop"):
            worker.waiting.insert(0, active_run.run)


def print_events(worker: Worker) -> None:
    """Print what happened, line by line: a `Report` for logs."""
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
    what = "trying again" if outcome == "again" else f"see {active_run.record.attempt_log(active_run.attempt)}"
    return f"failed {active_run.record.name} ({status.reason_class}: {status.reason}); {what}"


def _on_signal(worker: Worker, number: int, frame: FrameType | None) -> None:
    """A polite stop; a second Ctrl-C kills."""
    if worker.stopping and number == signal.SIGINT:
        for active_run in worker.active:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(active_run.process.pid, signal.SIGKILL)
    worker.stopped_by = worker.stopped_by or number
    _stop_all(worker)


def _stop_all(worker: Worker) -> None:
    """Ask every process to save and end, once."""
    if not worker.stopping:
        worker.stopping = True
        worker.events.append("stopping: every run saves first (a second Ctrl-C kills)")
        for active_run in worker.active:
            _send_stop(worker, active_run)


def _send_stop(worker: Worker, active_run: ActiveRun) -> None:
    """Ask a run to save and end: the process alone, which then ends its loader processes itself."""
    active_run.is_stopping = True
    with contextlib.suppress(ProcessLookupError):
        active_run.process.send_signal(worker.machine.stop_signal)
