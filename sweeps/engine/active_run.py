"""Process that a worker starts for a run, or to evaluate several: its start, its stop, and its runs' progress."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aimscale.harness.distributed.ranks import FAILED_RANK
from aimscale.harness.run.directory import EXIT_CRASHED
from aimscale.harness.run.lock import Lock
from aimscale.harness.run.timeouts import EARLY_S, KILL_MARGIN_S
from aimscale.sweeps.engine.forecasts import Watch
from aimscale.sweeps.engine.fork_server import ForkedProgram, can_fork
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.state.attempts import EXIT_CODES, Outcome, record_end
from aimscale.sweeps.state.record import RUN_BEGINS, RunRecord

PLACEMENT = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"),
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
"""Environment variables that say which rank a process is."""

Command = Callable[[Path, int], list[str]]
"""Function from (run directory, devices) to the command that trains the run."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a worker tells while it executes runs."""

    text: str
    """Line to print."""
    kind: Literal["started", "finished", "other"] = "other"
    """Start or end of a run; anything else is `other`."""

    def __str__(self) -> str:
        return self.text


class Part:
    """Run that a process executes: the only one of a training, one of several of an evaluation.

    Attributes:
        run: the run at its stage.
        lock: claim on it.
        claims: token of this claim, and of the claim of the attempt before.
        attempt: number of the attempt, 1 for the first.
        progress_before: `progress` at the start.
    """

    def __init__(self, run: Run, record: RunRecord, *, lock: Lock, claims: tuple[str, str | None]) -> None:
        self.run, self.record, self.lock, self.claims = run, record, lock, claims
        self.attempt, self.progress_before = record.next_attempt(), self.progress()

    def progress(self) -> list[int]:
        """Return the images done, and `RunRecord.saved_progress`."""
        return [self.record.read_status().images_done, *self.record.saved_progress()]

    def exit_code(self, exit_code: int) -> int | None:
        """Return the exit code that the status implies, of a process that executed several runs in turn and ended with
        this one; None if it ended before this one's turn."""
        status = self.record.read_status()
        if status.claim != self.claims[0]:
            return None
        return EXIT_CODES.get(status.state, exit_code)


class ActiveRun:
    """Process that executes a run, or evaluates several; its constructor starts it.

    Attributes:
        parts: runs whose end is not recorded yet.
        num_parts: number of runs at the start.
        process: trainer, evaluation, or the program that starts its ranks.
        watch: comparison of a training with its forecast.
        off_track: why it was asked to end before its time, if it was.
        started: Unix time of the start.
        kill_at: Unix time at which it is to be killed; None until it is asked to save and exit.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        command: Sequence[str],
        *,
        devices: tuple[int, ...],
        environment: Mapping[str, str],
        may_fork: bool = False,
    ) -> None:
        """Start the process.

        Args:
            environment: variables that confine the process to its devices.
            may_fork: whether the process may be a fork of one that has imported what it needs.
        """
        self.parts, self.devices, self.num_parts = list(parts), devices, len(parts)
        self.run, self.record = parts[0].run, parts[0].record
        self.started, self.off_track = time.time(), ""
        self.watch = Watch(self.run, self.record) if self.run.stage == "train" else None
        self.kill_at: float | None = None
        log, failed_rank = self.record.attempt_log(parts[0].attempt), self.record.failed_rank(parts[0].attempt)
        variables = {**os.environ, **environment, "AIMSCALE_CLAIM": ",".join(part.claims[0] for part in parts)}
        variables["OMP_NUM_THREADS"] = str(self.run.threads)
        for name in PLACEMENT:  # srun, torchrun or mpirun may have started this worker; a run is not one of their ranks
            variables.pop(name, None)
        variables[FAILED_RANK] = str(failed_rank)
        self.record.logs.mkdir(parents=True, exist_ok=True)
        failed_rank.unlink(missing_ok=True)
        self.process = _start(command, variables, log, may_fork=may_fork)
        for part in parts[1:]:  # one log for all of them
            part.record.logs.mkdir(parents=True, exist_ok=True)
            part.record.attempt_log(part.attempt).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without hard links
                os.link(log, part.record.attempt_log(part.attempt))

    def stop(self, number: signal.Signals) -> None:
        """Ask the process to save and exit; only its main process is signalled, which stops its loader processes
        itself."""
        self.kill_at = time.time() + self.run.grace_s + KILL_MARGIN_S
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill its processes."""
        self.kill_at = float("inf")
        if self.process.poll() is not None:  # its end is still to be recorded
            return
        for send in (os.kill, os.killpg):  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError):
                send(self.process.pid, signal.SIGKILL)

    def record_end(
        self, part: Part, exit_code: int, *, stop_requested: bool, is_interrupted: bool, nodes: Sequence[str]
    ) -> Outcome:
        """Record how the attempt at a run ended, and return what follows (`state.attempts.record_end`)."""
        if self.num_parts > 1:
            code = part.exit_code(exit_code)
            if code is None and len(self.parts) < self.num_parts:
                part.record.write_status(state="preempted", reason="its process ended before its turn came")
                return "retry"
            # The first answers for a start that failed.
            exit_code = (exit_code or EXIT_CRASHED) if code is None else code
        progress = part.progress()
        is_early = progress == part.progress_before and time.time() - self.started < EARLY_S
        return record_end(
            part.record,
            part.attempt,
            exit_code,
            claims=part.claims,
            stop_requested=stop_requested,
            is_interrupted=is_interrupted,
            nodes=nodes,
            is_early=is_early,
            off_track=self.off_track,
        )

    def start_event(self) -> Event:
        """Say that the attempt began."""
        part, is_evaluation = self.parts[0], self.run.stage == "evaluate"
        again = f" (attempt {part.attempt})" if part.attempt > 1 else ""
        others = f" and {self.num_parts - 1} more" if self.num_parts > 1 else ""
        begins = "evaluating " if is_evaluation else RUN_BEGINS[bool(again)]
        return Event(text=f"{begins}{self.record.name}{others}{again}", kind="other" if is_evaluation else "started")

    def end_event(self, part: Part, outcome: Outcome) -> Event:
        """Say how the attempt at a run ended."""
        return Event(text=self._describe_end(part, outcome), kind="finished" if outcome == "finished" else "other")

    def _describe_end(self, part: Part, outcome: Outcome) -> str:
        name, status = part.record.name, part.record.read_status()
        match outcome:
            case "finished" if part.run.stage == "evaluate":
                return f"evaluated {name} in {time.time() - (status.started or self.started):.0f} s"
            case "finished":
                return f"finished {name} in {time.time() - self.started:.0f} s"
            case "claim lost":
                return f"left {name}: another process executes it"
            case "preempted":
                return f"stopped {name}: {status.reason}" if part.record.is_of_program else f"stopped {name}, saved"
            case "retry" if status.state == "preempted":
                return f"left {name}: {status.reason}"
        if status.state == "off-track":
            return f"ended {name}: {status.reason}"
        see = f"see {part.record.attempt_log(part.attempt)}"
        what = {"retry": "trying again", "released": f"it had not begun to train, and another node may try; {see}"}
        return f"failed {name} ({status.reason_class}: {status.reason}); {what.get(outcome, see)}"


def _start(
    command: Sequence[str], variables: Mapping[str, str], log: Path, *, may_fork: bool
) -> subprocess.Popen[bytes] | ForkedProgram:
    """Start a process in a session of its own, so that Ctrl-C on the terminal does not reach it."""
    if may_fork and can_fork(command, variables):
        return ForkedProgram(command[1:], variables, log)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
