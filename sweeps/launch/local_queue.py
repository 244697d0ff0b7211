"""The local queue: one process a run over a number of slots, longest runs first.

Each process is started under the sweep's lock after looking at the run's directory again, so that two queues, also
on two machines with a shared file system, never start one run twice. Stopping the queue (Ctrl-C, SIGTERM) asks every
process to save and end; nothing else is needed to go on later than the same command.
"""

from __future__ import annotations

import contextlib
import os
import shutil
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

from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.runs.claims import Claim, RunRecord, launch_lock, own_claim
from aimscale.sweeps.runs.decision import Decision
from aimscale.sweeps.runs.job_kind import JobKind, training_jobs
from aimscale.sweeps.runs.retries import Outcome, conclude

POLL_S = 0.2

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
    """The planned run."""
    record: RunRecord
    """Its directory."""
    attempt: int
    """1 for the first start."""
    slots: tuple[int, ...]
    """Slots it occupies."""
    process: subprocess.Popen[bytes]
    """The worker, leader of its own process group."""
    started: float = field(default_factory=time.time)
    """Unix time."""


@dataclass(kw_only=True)
class Queue:
    """State of one launch on this machine."""

    sweep: Sweep
    """The sweep."""
    kind: JobKind
    """What is done with its runs."""
    runs: Sequence[Run]
    """All its runs."""
    pending: list[Run]
    """To be started, longest first."""
    free: list[int]
    """Slots without a process."""
    num_slots: int
    """All slots."""
    active: list[Job] = field(default_factory=list)
    """Processes running."""
    ended: list[tuple[Run, Outcome]] = field(default_factory=list)
    """Attempts that ended, in order."""
    left: list[Decision] = field(default_factory=list)
    """Runs that were left alone, and why."""
    events: list[str] = field(default_factory=list)
    """Sentences that the display has not printed yet."""
    stopping: bool = False
    """Asked to stop."""


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """What a launch did."""

    finished: tuple[str, ...]
    """Runs it brought to their end."""
    failed: tuple[str, ...]
    """Runs it tried in vain."""
    left: tuple[Decision, ...]
    """Runs it left alone."""
    interrupted: bool
    """Whether it was asked to stop before it was through."""


def run_queue(
    sweep: Sweep,
    runs: Sequence[Run],
    *,
    slots: int,
    gpus: Sequence[str] = (),
    command: Command = worker_command,
    report: Report = lambda queue: None,
    is_queued: Callable[[Claim], bool] = lambda claim: True,
    kind: JobKind | None = None,
) -> LaunchResult:
    """Execute runs (longest first as given) until none is left to start.

    With `gpus`, slot i sees the card `gpus[i]` alone. `is_queued` tells whether Slurm still knows a job that an earlier
    launch submitted; `kind` is what is done with the runs, training by default.

    Raises:
        SweepError: no slot.
    """
    if slots < 1:
        raise SweepError(f"--slots must be 1 or more, not {slots}")
    kind = kind or training_jobs(sweep)
    queue = Queue(sweep=sweep, kind=kind, runs=runs, pending=list(runs), free=list(range(slots)), num_slots=slots)
    with _stop_requests(queue):
        try:
            while queue.active or (queue.pending and not queue.stopping):
                _start_what_fits(queue, gpus, command, is_queued)
                _gather(queue)
                report(queue)
                if queue.active:
                    time.sleep(POLL_S)
        finally:
            for job in queue.active:
                _signal(job, signal.SIGKILL)
    report(queue)
    last = {run.run_id: outcome for run, outcome in queue.ended}
    return LaunchResult(
        finished=tuple(run_id for run_id, outcome in last.items() if outcome == "finished"),
        failed=tuple(run_id for run_id, outcome in last.items() if outcome == "stop"),
        left=tuple(queue.left),
        interrupted=queue.stopping,
    )


def _start_what_fits(queue: Queue, gpus: Sequence[str], command: Command, is_queued: Callable[[Claim], bool]) -> None:
    while queue.pending and not queue.stopping:
        run = queue.pending[0]
        devices = min(run.devices, queue.num_slots)
        if devices > len(queue.free):
            return
        queue.pending.pop(0)
        record = queue.kind.record(run)
        with launch_lock(queue.sweep):
            decision = queue.kind.decide(run, record, is_queued)
            if decision.startable:
                queue.kind.claim(record, run, own_claim("local", devices))
        if not decision.startable:
            queue.left.append(decision)
            continue
        taken, queue.free = tuple(queue.free[:devices]), queue.free[devices:]
        job = _start(run, record, taken, [gpus[slot] for slot in taken] if gpus else [], command)
        queue.active.append(job)
        verb = "started" if job.attempt == 1 else f"resumed (attempt {job.attempt})"
        queue.events.append(f"{verb} {run.run_id}")


def _start(run: Run, record: RunRecord, slots: tuple[int, ...], gpus: Sequence[str], command: Command) -> Job:
    attempt = 1 + sum(not ended.get("forgiven") for ended in record.read_attempts())
    threads = str(run.config.runtime.num_threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "AIMSCALE_ATTEMPT": str(attempt)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    record.logs.mkdir(parents=True, exist_ok=True)
    with record.log_file(attempt).open("ab") as log:
        process = subprocess.Popen(
            command(record.path, len(slots)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C on the terminal reaches the queue alone, which then asks politely
        )
    return Job(run=run, record=record, attempt=attempt, slots=slots, process=process)


def _gather(queue: Queue) -> None:
    for job in [job for job in queue.active if job.process.poll() is not None]:
        queue.active.remove(job)
        queue.free = sorted([*queue.free, *job.slots])
        code = job.process.returncode
        outcome = conclude(job.record, job.attempt, code, f"local {socket.gethostname()}", asked=queue.stopping)
        job.record.drop_claim()
        queue.ended.append((job.run, outcome))
        if outcome in ("again", "preempted") and not queue.stopping:
            queue.pending.insert(0, job.run)
        queue.events.append(_sentence(job, outcome))


def _sentence(job: Job, outcome: Outcome) -> str:
    if outcome == "finished":
        return f"finished {job.run.run_id} in {time.time() - job.started:.0f} s"
    if outcome == "held":
        return f"left {job.run.run_id}: another process executes it"
    if outcome == "preempted":
        return f"stopped {job.run.run_id}, saved"
    status = job.record.checked_status()
    what = "trying again" if outcome == "again" else f"see {job.record.log_file(job.attempt)}"
    return f"failed {job.run.run_id} ({status.reason_class}: {status.reason}); {what}"


@contextlib.contextmanager
def _stop_requests(queue: Queue) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a polite stop; a second one kills. Outside the main thread, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        again, queue.stopping = queue.stopping, True
        for job in queue.active:
            _signal(job, signal.SIGKILL if again else signal.SIGTERM)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(job: Job, number: signal.Signals) -> None:
    """Ask the worker alone, which then ends its loader processes itself; kill the whole group."""
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(job.process.pid, number)
        else:
            job.process.send_signal(number)


def visible_gpus() -> list[str]:
    """Cards that a local launch may use: CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [card for card in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if card]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def default_slots(runs: Sequence[Run], gpus: Sequence[str]) -> int:
    """A slot a card, or as many processes as the cores feed."""
    threads = max(run.config.runtime.num_threads for run in runs)
    return len(gpus) or max(1, len(os.sched_getaffinity(0)) // threads)
