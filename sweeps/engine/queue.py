"""The queue of a worker: its runs at their stages, which of them can start here, and in what order.

Trainings start longest first. An evaluation starts where nothing is left to train; it goes before trainings, and beside
the training of its own run, if its results would come late otherwise, or if several runs can share one start of the
program.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from aimscale.aim.errors import UserError
from aimscale.harness.run.lock import Lock
from aimscale.harness.run.timeouts import EVALUATION_DELAY_S, MIN_START_TIME_S
from aimscale.sweeps.engine.active_run import ActiveRun, Command, Event, Part
from aimscale.sweeps.engine.devices import DevicePool, Machine
from aimscale.sweeps.engine.looks import Looks
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.attempts import Outcome, record_lost_attempt
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.run_state import RunState, State, damaged_state, read_stage

NUM_SHARING = 3
"""Number of runs that are worth a start of the program which evaluates them."""


@dataclass(kw_only=True)
class Worker:
    """State of one worker."""

    sweep: Sweep
    machine: Machine
    waiting: list[Run]
    """Stages of runs that are neither executed here nor known to have ended, in the order in which they start; of the
    runs given, also those that evaluate them."""
    command: Command | None = None
    """Replacement for the program that trains a run."""
    job_id: str | None = None
    """Id of this worker's Slurm job."""
    deadline: float = float("inf")
    """Unix time at which all runs are asked to save and exit."""
    nodes: Sequence[str] = field(default_factory=lambda: [socket.gethostname()])
    """Names of this machine's nodes."""
    avoid_failed_nodes: bool = False
    """Whether runs that failed on one of these nodes are left to other workers."""
    broken: str | None = None
    """Reason why this worker takes no more runs, if any."""
    planned: tuple[Run, ...] = field(init=False)
    """All runs of the sweep."""
    devices: DevicePool = field(init=False)
    looks: Looks = field(init=False)
    active: list[ActiveRun] = field(default_factory=list)
    ended: list[tuple[str, Outcome]] = field(default_factory=list)
    """Key of the run's stage, and outcome, of each attempt that ended here."""
    skipped: dict[str, RunState] = field(default_factory=dict)
    """Key -> last state of each stage of a run that is not executed here."""
    events: list[Event] = field(default_factory=list)
    """Events that are not printed yet."""
    is_late: bool = False
    """Whether a run was not started because too little time is left."""
    stopping: bool = False
    stopped_by: int | None = None
    """First signal that requested a stop, if any."""

    def __post_init__(self) -> None:
        self.devices, self.planned = DevicePool(self.machine), tuple(self.waiting)
        self.looks = Looks(sweep=self.sweep, job_id=self.job_id)
        if self.job_id:
            # Runs that this job executed before Slurm restarted it come first, then those of its own shape.
            num_here, restarted = self.machine.nodes * self.machine.devices, "SLURM_RESTART_COUNT" in os.environ
            claimants = {
                each.run_id: RunRecord(self.sweep.run_dir(each.run_id)).claimant()
                for each in (self.planned if restarted else ())
            }
            mine = {name for name, holder in claimants.items() if holder and holder.facts.get("job_id") == self.job_id}
            self.waiting.sort(key=lambda run: (run.run_id not in mine, run.devices != num_here))
        self.waiting += [run.evaluation for run in self.waiting]

    def skip_finished(self, states: Sequence[RunState]) -> None:
        """Take runs that are finished, by these states, as such, without another look."""
        finished = {each.record.name: each for each in states if each.state is State.FINISHED}
        self.skipped |= finished
        self.waiting = [run for run in self.waiting if run.run_id not in finished]

    def read_state(self, run: Run) -> RunState:
        """Read the state of a run; `waiting` if it would start, but not here."""
        run_state = self.looks.read_state(run)
        try:
            obstacle = self._obstacle(run_state) if run_state.state.startable else None
        except (OSError, UserError) as error:
            run_state, obstacle = damaged_state(run, run_state.record, error), None
        if run_state.may_pass:
            return replace(run_state, may_pass=self.looks.may_repeat(run.key))
        self.looks.succeed(run.key)
        return replace(run_state, state=State.WAITING, reason=obstacle) if obstacle else run_state

    def check_directory(self) -> None:
        """Stop if the sweep's directory was moved or removed; runs would make it anew, and begin again."""
        if not self.stopping and (problem := self.looks.find_problem()):
            self.broken = problem
            self.events.append(Event(text=problem))
            self.stop_all()

    def stop_all(self) -> None:
        """Ask every process to save and exit, once."""
        if not self.stopping:
            self.stopping = True
            self.events.append(Event(text="stopping: every run saves first (a second Ctrl-C kills)"))
            for active_run in self.active:
                active_run.stop(self.machine.stop_signal)

    def _obstacle(self, run_state: RunState) -> str | None:
        """Return why a run that can start does not start here."""
        if self.broken:
            return self.broken
        if not self.machine.can_run(run_state.run):
            return f"needs {run_state.run.devices} devices"
        if run_state.run.stage == "train" and run_state.status.state == "created" and run_state.run.awaited:
            return f"waits for {run_state.run.awaited}"
        starts = run_state.record.read_starts() if self.deadline < float("inf") else []
        startup_s = (starts[-1].get("startup_s") or 0.0) if starts else 0.0
        if self.deadline - time.time() < max(MIN_START_TIME_S, 2 * startup_s):
            self.is_late = True
            return "too little time is left here"
        failed_here = self.avoid_failed_nodes and set(self.nodes) & set(run_state.record.failed_nodes())
        if failed_here or self.ended.count((run_state.run.key, "released")) > 1:
            return f"failed on this node ({run_state.reason})"
        return None


def start_waiting_runs(worker: Worker) -> None:
    """Start what the free devices allow."""
    worker.check_directory()
    evaluations = [run for run in worker.waiting if run.stage == "evaluate" and _has_begun(worker, run)]
    to_evaluate = [each for run in evaluations if (each := _look(worker, run))]
    training = {each.run.run_id for each in worker.active if each.run.stage == "train"}
    ended = [each for each in to_evaluate if each.run.run_id not in training]
    is_shared = len(ended) >= NUM_SHARING
    due = [each for each in to_evaluate if _is_overdue(each) or (is_shared and each in ended)]
    _start_evaluations(worker, due)
    if _start_trainings(worker):
        _start_evaluations(worker, [each for each in ended if each not in due])


def _look(worker: Worker, run: Run) -> RunState | None:
    """Return the state of a waiting run if it can start; else put it with those that are skipped."""
    if worker.stopping or not worker.devices.num_free:
        return None
    run_state = worker.read_state(run)
    if run_state.state.startable:
        return run_state
    if run_state.state.over and run_state.state is not State.CANCELLED and not run_state.may_pass:
        worker.waiting.remove(run)
    worker.skipped[run.key] = run_state
    return None


def _has_begun(worker: Worker, run: Run) -> bool:
    """Return whether the training of a run has begun, by one look at its status; a damaged run counts as one that has
    not, which its training tells of."""
    of_training = worker.skipped.get(run.run_id)
    if of_training is not None and of_training.state is State.DAMAGED:
        return False
    return training_state(worker, run) not in (None, "created")


def training_state(worker: Worker, run: Run) -> str | None:
    """Return the state that the training of a run wrote last, by one look; None if it cannot be read now."""
    with contextlib.suppress(OSError, UserError):
        return RunRecord(worker.sweep.run_dir(run.run_id)).read_status().state
    return None


def _is_overdue(run_state: RunState) -> bool:
    """Return whether the training of a run to evaluate began so long ago that results should not wait for others."""
    started = RunRecord(run_state.record.root).read_status().started
    return started is not None and time.time() - started > EVALUATION_DELAY_S


def _start_trainings(worker: Worker) -> bool:
    """Start trainings; return whether no device has to stay free for one that needs more of them."""
    for run in [run for run in worker.waiting if run.stage == "train"]:
        if (run_state := _look(worker, run)) is None:
            continue
        if (acquired := worker.devices.acquire(run_state.run)) is not None:
            _start(worker, [run_state], acquired)
        else:
            worker.skipped[run.key] = run_state
            if worker.job_id and run_state.run.devices > worker.devices.num_free:
                return False  # the job was sized for this run, which smaller ones would delay
        # Elsewhere smaller runs go ahead: to keep devices idle for a wide one would end no sweep sooner.
    return True


def _start_evaluations(worker: Worker, states: Sequence[RunState]) -> None:
    """Evaluate runs in as many processes as the free devices allow, each of which is started once for its share."""
    pending = list(states)
    while pending and not worker.stopping:
        run = pending[0].run
        alike = [each for each in pending if each.run.devices == run.devices]
        num_processes = max(1, worker.devices.num_free // run.devices)
        share = alike[: math.ceil(len(alike) / num_processes)]
        pending = [each for each in pending if each not in share]
        if (acquired := worker.devices.acquire(run)) is not None:
            _start(worker, share, acquired)
        else:
            worker.skipped |= {each.run.key: each for each in share}


def _start(worker: Worker, states: Sequence[RunState], acquired: tuple[int, ...]) -> None:
    """Claim runs and start one process for them on these devices; those that do not start are skipped."""
    parts: list[Part] = []
    for run_state in states:
        claim = Lock(run_state.record.claim)
        claimed = _claim(worker, run_state, claim, num_devices=len(acquired) * worker.machine.nodes)
        if isinstance(claimed, Part):
            parts.append(claimed)
            continue
        claim.release()
        worker.skipped[run_state.run.key] = claimed
    try:
        active_run = _start_process(worker, parts, acquired) if parts else None
    except (OSError, UserError) as error:
        active_run = None
        for part in parts:
            worker.skipped[part.run.key] = _failed_start(worker, part.run, part.record, error)
            part.lock.release()
    if active_run is None:
        worker.devices.release(acquired)
        return
    worker.active.append(active_run)
    for part in parts:
        worker.waiting.remove(next(run for run in worker.waiting if run.key == part.run.key))
        worker.skipped.pop(part.run.key, None)
    if worker.stopping:  # the signal came while it was being started
        active_run.stop(worker.machine.stop_signal)
    worker.events.append(active_run.start_event())


def _start_process(worker: Worker, parts: Sequence[Part], acquired: tuple[int, ...]) -> ActiveRun:
    run, run_dirs = parts[0].run, [part.record.root for part in parts]
    if worker.command and run.stage == "train":
        command = worker.command(run_dirs[0], len(acquired))
    else:
        command = worker.machine.command(run, run_dirs, len(acquired))
    environment, may_fork = worker.devices.environment(acquired), not (worker.machine.gpus or worker.job_id)
    return ActiveRun(parts, command, devices=acquired, environment=environment, may_fork=may_fork)


def _claim(worker: Worker, run_state: RunState, claim: Lock, *, num_devices: int) -> Part | RunState:
    """Claim a run and make it ready to start, or return the state that explains why it does not start."""
    run, record = run_state.run, run_state.record
    try:
        before, status = record.claimant(), record.read_status()
        nodes = os.environ.get("SLURM_JOB_NODELIST", "") if worker.job_id else ""
        holder = claim.take(job_id=worker.job_id, devices=num_devices, nodes=nodes)
        if holder is None:
            return worker.read_state(run)
        lost_job = before.facts.get("job_id") if before and run_state.state is State.LOST else None
        record_lost_attempt(record, before, slurm.job_states([lost_job]).get(lost_job) if lost_job else None)
        run_state = read_stage(run, record, holds_claim=True)
        if not run_state.state.startable:
            return run_state
        run.create(record.root)
        record.write_status(state="queued", reason=None, reason_class=None, failed_on=None)
        return Part(run, record, lock=claim, claims=(holder.token, status.claim))
    except (OSError, UserError) as error:
        return _failed_start(worker, run, record, error)


def _failed_start(worker: Worker, run: Run, record: RunRecord, error: Exception) -> RunState:
    """Return the state of a run that an error kept from being started, and tell of it once."""
    run_state = damaged_state(run, record, error)
    run_state = replace(run_state, may_pass=run_state.may_pass and worker.looks.may_repeat(f"start {run.key}"))
    told = worker.skipped.get(run.key)
    if not run_state.may_pass and (told is None or told.reason != run_state.reason):
        worker.events.append(Event(text=f"could not start {record.name}: {run_state.reason}"))
    return run_state
