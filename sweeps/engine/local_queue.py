"""The local queue: one process per run over a number of slots, longest runs first.

Each process is started under the sweep's lock after looking at the run's directory again, so that two queues, also
on two machines with a shared file system, never start one run twice. Stopping the queue (Ctrl-C, SIGTERM) asks every
process to save and end; nothing else is needed to go on later than the same command. A run whose directory is damaged,
or whose end cannot be written down, is named and left; the others go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from aimscale.aim.errors import UserError
from aimscale.sweeps.engine.devices import Devices
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SweepError
from aimscale.sweeps.state.claims import Claim, RunRecord, own_claim
from aimscale.sweeps.state.decision import Decision, JobKind, note_finished
from aimscale.sweeps.state.retries import Outcome, conclude, note_lost
from aimscale.sweeps.state.sweep_dir import lock_file

POLL_S = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""Ctrl-C, the end of a machine or a job, a terminal that closes, and Slurm's warning before a time limit."""

Command = Callable[[Path, int], list[str]]
"""(run directory, devices) -> the program that executes the run."""
Report = Callable[["Queue"], None]
"""Called every few moments with the queue, to show where it stands."""


def worker_command(
    run_dir: Path, devices: int, worker: tuple[str, ...] = ("-m", "aimscale.harness.train")
) -> list[str]:
    """`python -m aimscale.harness.train RUN_DIR`, by torchrun where it has several devices."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"] if devices > 1 else []
    return [sys.executable, *launcher, *worker, str(run_dir)]


@dataclass(kw_only=True)
class Job:
    """A run that the queue executes."""

    run: Run
    record: RunRecord
    attempt: int
    """1 for the first start."""
    devices: tuple[int, ...]
    process: subprocess.Popen[bytes]
    """The worker, leader of its own process group."""
    started: float = field(default_factory=time.time)
    """Unix time."""


@dataclass(kw_only=True)
class Queue:
    """State of one launch on this machine."""

    kind: JobKind
    runs: Sequence[Run]
    pending: list[Run]
    """To be started, longest first."""
    devices: Devices
    job_id: str | None = None
    """Of the Slurm job that this queue is; its runs stay claimed by the job until they end."""
    active: list[Job] = field(default_factory=list)
    ended: list[tuple[Run, Outcome]] = field(default_factory=list)
    """Attempts that ended, in order."""
    left: list[Decision] = field(default_factory=list)
    """Runs that were left alone, and why."""
    events: list[str] = field(default_factory=list)
    """Sentences that the display has not printed yet."""
    stopping: bool = False
    stopped_by: int | None = None
    """The first signal that asked, where one did."""


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """What a launch, or a worker, did."""

    finished: tuple[str, ...] = ()
    """Runs it brought to their end: trained, and evaluated."""
    failed: tuple[str, ...] = ()
    """Runs it tried in vain."""
    left: tuple[Decision, ...] = ()
    """Runs it left alone."""
    unplanned: tuple[str, ...] = ()
    """Run directories that the plan does not name: what they trained differs from it."""
    interrupted: bool = False
    """Whether it was asked to stop, or its time was up, before it was through."""
    stopped_by: int | None = None
    """The signal that asked first, where one did."""


def run_queue(
    runs: Sequence[Run],
    *,
    kind: JobKind,
    slots: int,
    gpus: Sequence[str] = (),
    command: Command = worker_command,
    report: Report = lambda queue: None,
    is_queued: Callable[[Claim], bool] = lambda claim: True,
    job_id: str | None = None,
    until: float = float("inf"),
) -> LaunchResult:
    """Do to runs (longest first as given) what `kind` says until none is left to start.

    Args:
        slots: processes at a time; more than there are cards share the cards.
        gpus: cards, of which each run sees its own alone.
        command: the program that does it.
        report: called every few moments.
        is_queued: whether Slurm still knows a job that an earlier launch submitted.
        job_id: of the Slurm job that this queue is.
        until: Unix time at which everything saves and ends.

    Raises:
        SweepError: no slot.
    """
    if slots < 1:
        raise SweepError(f"--slots must be 1 or more, not {slots}")
    devices = Devices(gpus, slots)
    queue = Queue(kind=kind, runs=runs, pending=list(runs), devices=devices, job_id=job_id)
    with _stop_requests(queue):
        try:
            _work_through(queue, command, report, is_queued, until)
        except BaseException:
            _stop(queue)  # whatever went wrong here, the runs save before it is said
            while queue.active:
                _gather(queue)
                time.sleep(POLL_S)
            raise
    with contextlib.suppress(OSError):
        report(queue)
    last = {run.run_id: outcome for run, outcome in queue.ended}
    return LaunchResult(
        finished=tuple(run_id for run_id, outcome in last.items() if outcome == "finished"),
        failed=tuple(run_id for run_id, outcome in last.items() if outcome == "stop"),
        left=tuple(queue.left),
        interrupted=queue.stopping,
        stopped_by=queue.stopped_by,
    )


def _work_through(
    queue: Queue, command: Command, report: Report, is_queued: Callable[[Claim], bool], until: float
) -> None:
    while queue.active or (queue.pending and not queue.stopping):
        if time.time() >= until and not queue.stopping:
            _stop(queue)
        while queue.pending and not queue.stopping and _start_next(queue, command, is_queued):
            pass
        _gather(queue)
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to stop
            report(queue)
        if queue.active:
            time.sleep(POLL_S)


def _start_next(queue: Queue, command: Command, is_queued: Callable[[Claim], bool]) -> bool:
    """Start the next run, or leave it; False while no device is free."""
    run = queue.pending[0]
    taken = queue.devices.take(min(run.devices, queue.devices.num))
    if taken is None:
        return False
    queue.pending.pop(0)
    record = queue.kind.record(run)
    try:
        with lock_file(queue.kind.lock):
            note_lost(record)
            decision = queue.kind.decide(run, record, is_queued)
            note_finished(decision)
            if decision.startable:
                claim = own_claim("slurm" if queue.job_id else "local", len(taken), queue.job_id)
                queue.kind.claim(record, run, claim)
        job = _start(queue, run, record, taken, command) if decision.startable else None
    except (OSError, UserError) as error:
        decision, job = Decision(run=run, record=record, verdict="damaged", why=_words(error)), None
    if job is None:
        queue.devices.give_back(taken)
        queue.left.append(decision)
        return True
    queue.active.append(job)
    if queue.stopping:  # the signal came while it was being started
        _signal(job, signal.SIGTERM)
    verb = "started" if job.attempt == 1 else f"resumed (attempt {job.attempt})"
    queue.events.append(f"{verb} {record.title}")
    return True


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'its folder'}: {error.strerror}"
    return str(error)


def _start(queue: Queue, run: Run, record: RunRecord, taken: tuple[int, ...], command: Command) -> Job:
    attempt = record.next_attempt()
    threads = str(run.config.runtime.num_threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "AIMSCALE_ATTEMPT": str(attempt)}
    environment |= queue.devices.environment(taken)
    environment.pop("SLURM_STEP_NUM_TASKS", None)  # srun may have started several queues; no run is a rank of theirs
    if len(taken) > 1:  # torchrun kills its workers so long after it was told to stop; by default after 30 s
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(queue.kind.stop_s(run))
    record.logs.mkdir(parents=True, exist_ok=True)
    with record.log_file(attempt).open("ab") as log:
        process = subprocess.Popen(
            command(record.path, len(taken)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C on the terminal reaches the queue alone, which then asks politely
        )
    return Job(run=run, record=record, attempt=attempt, devices=taken, process=process)


def _gather(queue: Queue) -> None:
    for job in [job for job in queue.active if job.process.poll() is not None]:
        queue.active.remove(job)
        queue.devices.give_back(job.devices)
        try:
            outcome = _conclude(queue, job)
            queue.events.append(_sentence(job, outcome))
        except (OSError, UserError) as error:
            outcome = "stop"
            queue.events.append(f"left {job.record.title}: how it ended cannot be written down ({_words(error)})")
        queue.ended.append((job.run, outcome))
        if outcome in ("again", "preempted") and not queue.stopping:
            queue.pending.insert(0, job.run)


def _conclude(queue: Queue, job: Job) -> Outcome:
    where = f"slurm {queue.job_id}" if queue.job_id else f"local {socket.gethostname()}"
    # A person cancels a run of a Slurm job by taking its claim away, and a local queue by stopping it.
    asked = job.record.read_claim() is None if queue.job_id else queue.stopping
    outcome = conclude(job.record, job.attempt, job.process.returncode, where, asked=asked)
    if not queue.job_id or outcome in ("finished", "stop", "held"):
        job.record.drop_claim()
    return outcome


def print_events(queue: Queue) -> None:
    """Print what happened, line by line: a `Report` for logs."""
    for event in queue.events:
        print(event, flush=True)
    queue.events.clear()


def _sentence(job: Job, outcome: Outcome) -> str:
    if outcome == "finished":
        return f"finished {job.record.title} in {time.time() - job.started:.0f} s"
    if outcome == "held":
        return f"left {job.record.title}: another process executes it"
    if outcome == "preempted":
        return f"stopped {job.record.title}, saved"
    status = job.record.checked_status()
    what = "trying again" if outcome == "again" else f"see {job.record.log_file(job.attempt)}"
    return f"failed {job.record.title} ({status.reason_class}: {status.reason}); {what}"


@contextlib.contextmanager
def _stop_requests(queue: Queue) -> Iterator[None]:
    """Turn `STOP_SIGNALS` into a polite stop; a second Ctrl-C kills. Outside the main thread, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if queue.stopping and number == signal.SIGINT:
            for job in queue.active:
                _signal(job, signal.SIGKILL)
        queue.stopped_by = queue.stopped_by or number
        _stop(queue)

    # Under nohup a closing terminal is to be ignored.
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(queue: Queue) -> None:
    """Ask every process to save and end, once."""
    if not queue.stopping:
        queue.stopping = True
        for job in queue.active:
            _signal(job, signal.SIGTERM)


def _signal(job: Job, number: signal.Signals) -> None:
    """Ask the worker alone, which then ends its loader processes itself; kill the whole group."""
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(job.process.pid, number)
        else:
            job.process.send_signal(number)
