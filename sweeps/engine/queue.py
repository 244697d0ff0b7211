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
from aimscale.sweeps.engine.processes import Command, Process, Processes
from aimscale.sweeps.plan.costs import stop_seconds
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.attempts import Outcome, conclude, note_lost
from aimscale.sweeps.state.decision import Decision, decide
from aimscale.sweeps.state.record import RunRecord

POLL_S = 0.2
LOOK_S = 1.0
"""Active runs are looked at for a cancellation this often."""
SCAN_S = 10.0
"""Runs that were left are looked at again this often: another worker may have died."""
DOUBT_S, GIVE_UP_S = 60.0, 900.0
"""A run elsewhere that was not heard of for so long may come free, and is waited for up to the second."""
MIN_TIME_S = 60.0
"""With less time than this left, no run is started."""

Report = Callable[["Queue"], None]
"""Called every few moments with the queue, to show where it stands."""


@dataclass(kw_only=True)
class Job:
    """A run that the queue executes."""

    run: Run
    record: RunRecord
    lock: Lock
    """Its claim."""
    claims: tuple[str, str | None]
    """Token of the claim, and the one of the attempt before."""
    attempt: int
    """1 for the first start."""
    measured: list[int]
    """What evaluation had written when it started."""
    devices: tuple[int, ...]
    process: Process
    """The trainer, or what starts its ranks: leader of its own process group."""
    started: float = field(default_factory=time.time)
    """Unix time."""
    is_told: bool = False
    """Whether it was asked to save and end."""


@dataclass(kw_only=True)
class Queue:
    """State of one worker."""

    sweep: Sweep
    machine: Machine
    waiting: list[Run]
    """Neither executed here nor known to be over, in the order in which they are started."""
    command: Command | None = None
    """Replaces the program that executes a run."""
    job_id: str | None = None
    """Of the Slurm job that this worker is."""
    until: float = float("inf")
    """Unix time at which everything saves and ends."""
    avoided_on: Sequence[str] = ()
    """Names of this machine's nodes: runs that failed on one of them are left to others."""
    devices: DevicePool = field(init=False)
    processes: Processes = field(init=False)
    active: list[Job] = field(default_factory=list)
    ended: dict[str, Outcome] = field(default_factory=dict)
    """Run -> how its last attempt here ended."""
    evaluated: dict[str, None] = field(default_factory=dict)
    """Runs on which something was measured here."""
    left: dict[str, Decision] = field(default_factory=dict)
    """Why runs are not executed here, as last seen."""
    events: list[str] = field(default_factory=list)
    """Sentences that the display has not printed yet."""
    stopping: bool = False
    stopped_by: int | None = None
    """The first signal that asked, where one did."""

    def __post_init__(self) -> None:
        self.devices = DevicePool(self.machine)
        self.processes = Processes(self.machine, self.command, self.events.append)
        if self.job_id:  # what this job had before comes first
            self.waiting.sort(key=lambda run: _worker_of(self.sweep, run) != self.job_id)


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
    left: tuple[Decision, ...] = ()
    """Runs it left alone."""
    unplanned: tuple[str, ...] = ()
    """Run directories that the plan does not name: what they trained differs from it."""
    to_do: tuple[str, ...] = ()
    """Runs that this machine could go on with, had it more time or were it another node."""
    interrupted: bool = False
    """Whether it was asked to stop, or its time was up, before it was through."""
    stopped_by: int | None = None
    """The signal that asked first, where one did."""


def run_queue(queue: Queue, report: Report) -> LaunchResult:
    """Execute the runs that wait until none is left to start; `report` is called every few moments."""
    with contextlib.closing(queue.processes), calling(functools.partial(_on_signal, queue)):
        try:
            _work_through(queue, report)
        except BaseException:
            _stop(queue)  # whatever went wrong here, the runs save before it is said
            while queue.active:
                _gather(queue)
                time.sleep(POLL_S)
            raise
    to_do = tuple(run.run_id for run in queue.waiting if queue.machine.serves(run) and _look(queue, run).startable)
    return LaunchResult(
        finished=tuple(run_id for run_id, outcome in queue.ended.items() if outcome == "finished"),
        evaluated=tuple(queue.evaluated),
        failed=tuple(run_id for run_id, outcome in queue.ended.items() if outcome == "stop"),
        stopped=tuple(run_id for run_id, outcome in queue.ended.items() if outcome == "preempted"),
        left=tuple(found for run_id, found in queue.left.items() if run_id not in queue.ended),
        to_do=to_do,
        interrupted=queue.stopping or bool(to_do and queue.until - time.time() < MIN_TIME_S),
        stopped_by=queue.stopped_by,
    )


def _worker_of(sweep: Sweep, run: Run) -> str | None:
    """The Slurm job that claims a run, or claimed it last."""
    worker = RunRecord(sweep.run_dir(run.run_id)).claimant()
    return worker.facts.get("job_id") if worker else None


def _work_through(queue: Queue, report: Report) -> None:
    scanned = looked = float("-inf")
    num_active = -1
    while queue.active or not queue.stopping:
        if time.time() >= queue.until:
            _stop(queue)
        if not queue.stopping and (num_active != len(queue.active) or time.monotonic() - scanned > SCAN_S):
            _start_what_fits(queue)
            scanned, num_active = time.monotonic(), len(queue.active)
        if time.monotonic() - looked > LOOK_S:
            for job in queue.active:
                if not job.is_told and job.record.cancelled.exists():
                    _tell(queue, job)
            looked = time.monotonic()
        _gather(queue)
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to stop
            report(queue)
        if not queue.active and num_active == 0 and not any(map(_may_come_free, queue.left.values())):
            return
        time.sleep(POLL_S)


def _may_come_free(found: Decision) -> bool:
    """Whether a run elsewhere is silent: its machine may be lost, and nobody but this worker be there to go on."""
    heartbeat = None
    if found.verdict == "running":
        with contextlib.suppress(UserError):
            heartbeat = found.record.read_status().heartbeat
    return heartbeat is not None and DOUBT_S < time.time() - heartbeat < GIVE_UP_S


def _start_what_fits(queue: Queue) -> None:
    for run in list(queue.waiting):
        if queue.stopping:
            return
        if not queue.machine.serves(run):
            queue.left[run.run_id] = _left(queue, run, f"needs {run.devices} devices")
            continue
        taken = queue.devices.acquire(run)
        if taken is None:
            continue
        found = _try_to_start(queue, run, taken)
        if found is None or found.verdict in ("finished", "failed", "damaged"):
            queue.waiting.remove(run)
        if found is None:
            queue.left.pop(run.run_id, None)
        else:
            queue.devices.release(taken)
            queue.left[run.run_id] = found


def _left(queue: Queue, run: Run, why: str) -> Decision:
    return Decision(run=run, record=RunRecord(queue.sweep.run_dir(run.run_id)), verdict="waiting", why=why)


def _look(queue: Queue, run: Run) -> Decision:
    return decide(run, RunRecord(queue.sweep.run_dir(run.run_id)))


def _try_to_start(queue: Queue, run: Run, taken: tuple[int, ...]) -> Decision | None:
    """Claim a run and start it; else why not."""
    found = _look(queue, run)
    if not found.startable:
        return found
    if queue.until - time.time() < MIN_TIME_S:
        return _left(queue, run, "too little time is left here")
    record = found.record
    claim = Lock(record.claim)
    try:
        if set(queue.avoided_on) & set(record.failed_nodes()):
            return _left(queue, run, "failed on this node")
        before, status = record.claimant(), record.read_status()
        nodes = os.environ.get("SLURM_JOB_NODELIST", "") if queue.job_id else ""
        mine = claim.take(job_id=queue.job_id, devices=len(taken) * queue.machine.nodes, nodes=nodes)
        if mine is None:
            return _look(queue, run)
        note_lost(record, before, slurm.state_of)
        found = decide(run, record, is_mine=True)
        if found.startable:
            RunDir.create(record.path, run.config)
            record.write_status(state="queued", reason=None, reason_class=None)
            job = _start(queue, run, record, claim, (mine.token, status.claim), taken)
    except (OSError, UserError) as error:
        found = Decision(run=run, record=record, verdict="damaged", why=str(error))
    if not found.startable:
        claim.release()
        return found
    queue.active.append(job)
    if queue.stopping:  # the signal came while it was being started
        _tell(queue, job)
    queue.events.append(f"{'started' if job.attempt == 1 else f'resumed (attempt {job.attempt})'} {record.name}")
    return None


def _start(
    queue: Queue, run: Run, record: RunRecord, claim: Lock, claims: tuple[str, str | None], taken: tuple[int, ...]
) -> Job:
    attempt = record.next_attempt()
    environment = os.environ | queue.devices.environment(taken) | {"AIMSCALE_CLAIM": claims[0]}
    environment["OMP_NUM_THREADS"] = str(run.config.runtime.num_threads)
    environment.pop("SLURM_STEP_NUM_TASKS", None)  # srun may have started several queues; no run is a rank of theirs
    if len(taken) > 1:  # torchrun kills its workers so long after it was told to stop; by default after 30 s
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(stop_seconds(queue.sweep, run))
    record.logs.mkdir(parents=True, exist_ok=True)
    log, are_more = record.log_file(attempt), len(queue.waiting) > 1
    process = queue.processes.start(record.path, len(taken), environment, log, are_more=are_more)
    return Job(
        run=run,
        record=record,
        lock=claim,
        claims=claims,
        attempt=attempt,
        measured=record.measured(),
        devices=taken,
        process=process,
    )


def _gather(queue: Queue) -> None:
    for job in list(queue.active):
        if (exit_code := job.process.poll()) is None:
            continue
        queue.active.remove(job)
        queue.devices.release(job.devices)
        try:
            # Slurm's limits are nobody's wish: a run that they stop again and again before it saves has failed.
            asked = (queue.stopping and not queue.job_id) or job.record.cancelled.exists()
            outcome = conclude(job.record, job.attempt, exit_code, claims=job.claims, asked=asked)
            queue.events.append(_sentence(job, outcome))
            if job.record.measured() != job.measured:
                queue.evaluated[job.run.run_id] = None
        except (OSError, UserError) as error:
            outcome = "stop"
            queue.events.append(f"left {job.record.name}: how it ended cannot be written down ({error})")
        job.lock.release()
        queue.ended[job.run.run_id] = outcome
        if outcome not in ("finished", "stop"):
            queue.waiting.insert(0, job.run)


def print_events(queue: Queue) -> None:
    """Print what happened, line by line: a `Report` for logs."""
    for event in queue.events:
        print(event, flush=True)
    queue.events.clear()


def _sentence(job: Job, outcome: Outcome) -> str:
    if outcome == "finished":
        return f"finished {job.record.name} in {time.time() - job.started:.0f} s"
    if outcome == "elsewhere":
        return f"left {job.record.name}: another process executes it"
    if outcome == "preempted":
        return f"stopped {job.record.name}, saved"
    status = job.record.read_status()
    what = "trying again" if outcome == "again" else f"see {job.record.log_file(job.attempt)}"
    return f"failed {job.record.name} ({status.reason_class}: {status.reason}); {what}"


def _on_signal(queue: Queue, number: int, frame: FrameType | None) -> None:
    """A polite stop; a second Ctrl-C kills."""
    if queue.stopping and number == signal.SIGINT:
        for job in queue.active:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
    queue.stopped_by = queue.stopped_by or number
    _stop(queue)


def _stop(queue: Queue) -> None:
    """Ask every process to save and end, once."""
    if not queue.stopping:
        queue.stopping = True
        queue.events.append("stopping: every run saves first (a second Ctrl-C kills)")
        for job in queue.active:
            _tell(queue, job)


def _tell(queue: Queue, job: Job) -> None:
    """Ask a run to save and end: the process alone, which then ends its loader processes itself."""
    job.is_told = True
    with contextlib.suppress(ProcessLookupError):
        job.process.send_signal(queue.machine.stop_signal)
