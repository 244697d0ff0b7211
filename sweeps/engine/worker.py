"""The worker: executes the runs of a sweep, on this machine, under any scheduler, or as a Slurm job.

It claims the next run that its machine and its remaining time allow, longest first, starts one process for it, and
keeps the claim until the end is recorded: workers that share the sweep's folder execute each run once. Stopping the
worker (Ctrl-C, SIGTERM, Slurm's warning) asks every run to save and exit. Damaged runs are reported and skipped.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import handling_stop_signals
from aimscale.harness.run.lock import Lock
from aimscale.sweeps.engine.active_run import ActiveRun, Command, Event
from aimscale.sweeps.engine.devices import DevicePool, Machine
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SWEEP_RECORD, Sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.attempts import Outcome, record_lost_attempt
from aimscale.sweeps.state.decision import RunState, read_state, read_states
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.table.on_track import write_expected

POLL_S, CANCEL_CHECK_S, RESCAN_S = 0.2, 1.0, 10.0
"""Intervals between looks at own processes, at cancellations, and at skipped runs, whose worker may have died, s."""
WAIT_TOLD_S = 600.0
"""Interval between messages about what a worker without runs waits for, s."""
SILENT_AFTER_S, LOST_AFTER_S = 60.0, 900.0
"""A run of another worker whose heartbeat is older than the first, s, may have lost its worker; the worker waits for it
until the age exceeds the second."""
MIN_START_TIME_S = 60.0
"""Minimum remaining time to start a run, s; twice the time that its last start took, if that is longer."""

Report = Callable[["Worker"], None]
"""Callback that receives the worker every few moments, to show its progress."""


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
    nodes: Sequence[str] = field(default_factory=lambda: [socket.gethostname()])
    """Names of this machine's nodes."""
    skip_failed_here: bool = False
    """Whether runs that failed on one of these nodes are left to other workers."""
    broken: str | None = None
    """Reason why this worker takes no more runs, if any."""
    planned: tuple[Run, ...] = field(init=False)
    """All runs of the sweep."""
    devices: DevicePool = field(init=False)
    active: list[ActiveRun] = field(default_factory=list)
    ended: list[tuple[str, Outcome]] = field(default_factory=list)
    """Run id and outcome of each attempt that ended here."""
    evaluated: dict[str, None] = field(default_factory=dict)
    """Ids of the runs that were evaluated here."""
    skipped: dict[str, RunState] = field(default_factory=dict)
    """Last state of each run that is not executed here."""
    events: list[Event] = field(default_factory=list)
    """Events that are not printed yet."""
    is_late: bool = False
    """Whether a run was not started because too little time is left."""
    stopping: bool = False
    stopped_by: int | None = None
    """First signal that requested a stop, if any."""

    def __post_init__(self) -> None:
        self.devices, self.planned = DevicePool(self.machine), tuple(self.waiting)
        if self.job_id:
            # Runs that this job executed before come first, then those of its own shape.
            own = self.machine.nodes * self.machine.devices
            claimants = {each.run_id: RunRecord(self.sweep.run_dir(each.run_id)).claimant() for each in self.planned}
            mine = {name for name, holder in claimants.items() if holder and holder.facts.get("job_id") == self.job_id}
            self.waiting.sort(key=lambda run: (run.run_id not in mine, run.devices != own))

    def read_state(self, run: Run) -> RunState:
        """Read the state of a run; `waiting` if it would start, but not here."""
        found = read_state(run, RunRecord(self.sweep.run_dir(run.run_id)))
        return replace(found, state="waiting", why=why) if found.startable and (why := self._obstacle(found)) else found

    def _obstacle(self, found: RunState) -> str | None:
        """Return why a run that can start does not start here."""
        if self.broken:
            return self.broken
        if not self.machine.can_run(found.run):
            return f"needs {found.run.devices} devices"
        starts = found.record.read_starts() if self.deadline < float("inf") else []
        startup_s = (starts[-1].get("startup_s") or 0.0) if starts else 0.0
        if self.deadline - time.time() < max(MIN_START_TIME_S, 2 * startup_s):
            self.is_late = True
            return "too little time is left here"
        failed_here = self.skip_failed_here and set(self.nodes) & set(found.record.failed_nodes())
        if failed_here or self.ended.count((found.run.run_id, "given back")) > 1:
            return f"failed on this node ({found.why})"
        return None


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """Result of a launch."""

    finished: tuple[str, ...] = ()
    """Runs that it finished."""
    evaluated: tuple[str, ...] = ()
    """Runs that it evaluated, in the process that trained them or later."""
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
            _stop_all(worker)  # let the runs save before the error is raised
            _run_until_idle(worker, lambda _: None)
            raise
    last = dict(worker.ended)

    def ended(*outcomes: Outcome) -> tuple[str, ...]:
        return tuple(run_id for run_id, outcome in last.items() if outcome in outcomes)

    left = [each.run for each in read_states(worker.sweep, worker.waiting) if each.startable]
    remaining = tuple(run.run_id for run in left if worker.machine.can_run(run))
    return LaunchResult(
        finished=ended("finished"),
        evaluated=tuple(worker.evaluated),
        failed=ended("failed", "given back"),
        stopped=ended("preempted"),
        skipped=tuple(found for run_id, found in worker.skipped.items() if run_id not in last),
        remaining=remaining,
        interrupted=worker.stopping or bool(remaining and worker.is_late),
        stopped_by=worker.stopped_by,
        broken=worker.broken,
    )


def _run_until_idle(worker: Worker, report: Report) -> None:
    scanned = checked = told = float("-inf")
    num_active, idle_since = -1, time.monotonic()
    while worker.active or not worker.stopping:
        if time.time() >= worker.deadline:
            _stop_all(worker)
        if not worker.stopping and (num_active != len(worker.active) or time.monotonic() - scanned > RESCAN_S):
            _start_waiting_runs(worker)
            scanned, num_active = time.monotonic(), len(worker.active)
        if time.monotonic() - checked > CANCEL_CHECK_S:
            _signal_runs(worker)
            _check_directory(worker)
            checked = time.monotonic()
        _collect_ended(worker)
        with contextlib.suppress(OSError):  # a log on a full disk is no reason to stop
            report(worker)
        now = time.monotonic()
        if worker.active or num_active != 0:
            idle_since, told = now, float("-inf")
        elif not (awaited := [found for found in worker.skipped.values() if _may_become_free(found)]):
            return
        elif now - told > WAIT_TOLD_S:
            worker.events.append(Event(text=_describe_wait(worker, awaited[0], now - idle_since)))
            told = now
        time.sleep(POLL_S)


def _describe_wait(worker: Worker, awaited: RunState, seconds: float) -> str:
    """Say what a worker without runs waits for, and since when."""
    what = f"{awaited.run.run_id} is silent on {awaited.status.host}, and is taken over once its process is gone"
    if awaited.startable:
        pids = " and ".join(worker.devices.others)
        what = f"other launches of this user (process {pids}) use all devices of this machine, and runs start as "
        what += "these become free (to share, give each launch --devices)"
    since = f", for {seconds / 60:.0f} minutes" if seconds >= 60 else ""
    return f"waiting{since}: {what}; Ctrl-C ends this launch"


def _check_directory(worker: Worker) -> None:
    """Stop if the sweep's directory was moved or removed; runs would make it anew, and begin again."""
    if not worker.stopping and not (worker.sweep.directory / SWEEP_RECORD).is_file():
        worker.broken = f"{worker.sweep.directory} was moved or removed while it was in use"
        worker.events.append(Event(text=worker.broken))
        _stop_all(worker)


def _may_become_free(found: RunState) -> bool:
    """Return whether this worker may yet start a run: no device was free for it, or its own worker is silent."""
    heartbeat = found.status.heartbeat
    is_silent = heartbeat is not None and SILENT_AFTER_S < time.time() - heartbeat < LOST_AFTER_S
    return found.startable or (found.is_active and is_silent)


def _start_waiting_runs(worker: Worker) -> None:
    _check_directory(worker)
    for run in list(worker.waiting):
        if worker.stopping or not worker.devices.num_free:
            return
        found = worker.read_state(run)
        if found.startable:
            if (acquired := worker.devices.acquire(found.run)) is not None:
                if (refused := _try_to_start(worker, found, acquired)) is None:
                    worker.waiting.remove(run)
                    worker.skipped.pop(run.run_id, None)
                    continue
                worker.devices.release(acquired)
                found = refused
            elif worker.job_id and found.run.devices > worker.devices.num_free:
                return  # the job was sized for this run, which smaller ones would delay
        elif found.state in ("finished", "failed", "diverged", "off-track", "damaged"):
            worker.waiting.remove(run)
        worker.skipped[run.run_id] = found


def _try_to_start(worker: Worker, found: RunState, acquired: tuple[int, ...]) -> RunState | None:
    """Claim a run and start it; return None, or the state that explains why it was not started."""
    run, record = found.run, found.record
    claim = Lock(record.claim)
    try:
        before, status = record.claimant(), record.read_status()
        nodes = os.environ.get("SLURM_JOB_NODELIST", "") if worker.job_id else ""
        holder = claim.take(job_id=worker.job_id, devices=len(acquired) * worker.machine.nodes, nodes=nodes)
        if holder is None:
            return worker.read_state(run)
        lost_job = before.facts.get("job_id") if before and found.state == "lost" else None
        record_lost_attempt(record, before, slurm.job_states([lost_job] if lost_job else []).get(str(lost_job)))
        found = read_state(run, record, holds_claim=True)
        if found.startable:
            RunDir.create(record.path, run.config)
            _write_forecasts(worker, [run])
            record.write_status(state="queued", reason=None, reason_class=None, failed_on=None)
            probes = {"AIMSCALE_PROBES": "apart"} if run.probe_devices < run.devices else {}
            active_run = ActiveRun(
                run,
                record,
                (worker.command or worker.machine.command)(record.path, len(acquired)),
                lock=claim,
                claims=(holder.token, status.claim),
                devices=acquired,
                environment=worker.devices.environment(acquired) | probes,
            )
    except (OSError, UserError) as error:
        found = replace(found, state="damaged", why=str(error))
    if not found.startable:
        claim.release()
        return found
    worker.active.append(active_run)
    if worker.stopping:  # the signal came while it was being started
        active_run.stop(worker.machine.stop_signal)
    worker.events.append(active_run.start_event())
    return None


def _write_forecasts(worker: Worker, runs: Sequence[Run]) -> None:
    """Renew the forecasts of runs; a damaged file of another run is no reason to leave these alone."""
    try:
        write_expected(worker.sweep, worker.planned, runs)
    except (OSError, UserError) as error:
        worker.events.append(Event(text=f"no new forecasts of runs: {error}"))


def _collect_ended(worker: Worker) -> None:
    for active_run in list(worker.active):
        if (exit_code := active_run.process.poll()) is None:
            continue
        run = active_run.run
        worker.active.remove(active_run)
        worker.devices.release(active_run.devices)
        # A time limit of Slurm is no person's request: a run that it stops again and again has failed.
        stop_requested = (worker.stopping and not worker.job_id) or active_run.record.cancelled.exists()
        try:
            if not (worker.sweep.directory / SWEEP_RECORD).is_file():
                raise UserError(f"{worker.sweep.directory} is gone")
            outcome = active_run.record_end(exit_code, stop_requested=stop_requested, nodes=worker.nodes)
            worker.events.append(active_run.end_event(outcome))
        except (OSError, UserError) as error:
            outcome = "failed"
            worker.events.append(Event(text=f"left {run.run_id}: how it ended cannot be written down ({error})"))
        if active_run.has_evaluated:
            worker.evaluated[run.run_id] = None
        active_run.lock.release()
        worker.ended.append((run.run_id, outcome))
        if outcome == "finished" and worker.active:
            _write_forecasts(worker, [each.run for each in worker.active])
        elif outcome == "given back":
            worker.waiting.append(run)
            _suspect_node(worker, active_run)
        elif outcome not in ("finished", "failed"):
            worker.waiting.insert(0, run)


def _suspect_node(worker: Worker, active_run: ActiveRun) -> None:
    """Take no more runs after two in a row that failed on one node before their first step: it may be broken."""
    before = [run_id for run_id, outcome in worker.ended[-2:-1] if outcome == "given back"]
    if before and before != [active_run.run.run_id] and not worker.broken:
        records = RunRecord(worker.sweep.run_dir(before[0])), active_run.record
        (node,), (other,) = (record.read_attempts()[-1]["failed_nodes"] for record in records)
        if node == other:
            why = active_run.record.read_status().reason
            worker.broken = f"two runs in a row failed on {node} before their first step ({why})"
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
    _stop_all(worker)


def _stop_all(worker: Worker) -> None:
    """Ask every run to save and exit, once."""
    if not worker.stopping:
        worker.stopping = True
        worker.events.append(Event(text="stopping: every run saves first (a second Ctrl-C kills)"))
        for active_run in worker.active:
            active_run.stop(worker.machine.stop_signal)


def _signal_runs(worker: Worker) -> None:
    """Ask runs that were cancelled to stop, and kill those that have not stopped in time."""
    for active_run in worker.active:
        if active_run.kill_at is None and active_run.record.cancelled.exists():
            active_run.stop(worker.machine.stop_signal)
        elif active_run.kill_at is not None and time.time() > active_run.kill_at:
            worker.events.append(Event(text=f"killing {active_run.record.name}, which did not stop"))
            active_run.kill()
