"""Run that a worker executes: the start of its process, its stop, and its progress."""

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

from aimscale.harness.run.lock import Lock
from aimscale.sweeps.engine.devices import TORCHRUN_ENVIRONMENT
from aimscale.sweeps.plan.costs import grace_period_s
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.state.attempts import EARLY_S, Outcome, record_end
from aimscale.sweeps.state.record import RUN_BEGINS, RunRecord

KILL_MARGIN_S = 30.0
"""Time beyond its grace period after which a run that does not stop is killed, s."""

PLACEMENT = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
"""Environment variables that say which rank a process is."""

Command = Callable[[Path, int], list[str]]
"""Function from (run directory, devices) to the command that executes the run."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a worker tells while it executes runs."""

    text: str
    """Line to print."""
    kind: Literal["started", "finished", "other"] = "other"
    """Start or end of a run; anything else is `other`."""

    def __str__(self) -> str:
        return self.text


class ActiveRun:
    """Run that a worker executes; its constructor starts the process.

    Attributes:
        lock: claim on the run.
        claims: token of this claim, and of the claim of the attempt before.
        attempt: number of the attempt, 1 for the first.
        progress_before: `progress` at the start.
        process: trainer, or the program that starts its ranks.
        has_evaluated: whether evaluation has written files, known after the end.
        started: Unix time of the start.
        kill_at: Unix time at which it is to be killed; None until it is asked to save and exit.
    """

    def __init__(
        self,
        run: Run,
        record: RunRecord,
        command: Sequence[str],
        *,
        lock: Lock,
        claims: tuple[str, str | None],
        devices: tuple[int, ...],
        environment: Mapping[str, str],
    ) -> None:
        """Start the process of a run in a session of its own, so that Ctrl-C on the terminal does not reach it.

        Args:
            environment: variables that confine the run to its devices.
        """
        self.run, self.record, self.lock, self.claims, self.devices = run, record, lock, claims, devices
        self.attempt, self.progress_before = record.next_attempt(), self.progress()
        self.started, self.has_evaluated = time.time(), False
        self.kill_at: float | None = None
        variables = {**os.environ, **environment, "AIMSCALE_CLAIM": claims[0]}
        variables["OMP_NUM_THREADS"] = str(run.config.runtime.num_threads)
        for name in PLACEMENT:  # srun, torchrun or mpirun may have started this worker; a run is not one of their ranks
            variables.pop(name, None)
        if len(devices) > 1:  # torchrun kills its ranks this long after SIGTERM; the default is 30 s
            variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_period_s(run))
            variables |= TORCHRUN_ENVIRONMENT
        record.logs.mkdir(parents=True, exist_ok=True)
        with record.attempt_log(self.attempt).open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )

    def progress(self) -> list[int]:
        """Return the images done, and `RunRecord.saved_progress`."""
        return [self.record.read_status().images_done, *self.record.saved_progress()]

    def stop(self, number: signal.Signals) -> None:
        """Ask the run to save and exit; only its main process is signalled, which stops its loader processes itself."""
        self.kill_at = time.time() + grace_period_s(self.run) + KILL_MARGIN_S
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill its processes; ranks that torchrun started die with it."""
        self.kill_at = float("inf")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def record_end(self, exit_code: int, *, stop_requested: bool, nodes: Sequence[str]) -> Outcome:
        """Record how the attempt ended and return what follows (`sweeps.state.attempts.record_end`).

        Args:
            nodes: nodes that executed it.
        """
        progress = self.progress()
        self.has_evaluated = progress[-2:] != self.progress_before[-2:]
        is_early = progress == self.progress_before and time.time() - self.started < EARLY_S
        return record_end(
            self.record,
            self.attempt,
            exit_code,
            claims=self.claims,
            stop_requested=stop_requested,
            early_on=nodes if is_early else (),
        )

    def start_event(self) -> Event:
        """Say that the attempt began."""
        started, resumed = RUN_BEGINS
        again = f" (attempt {self.attempt})" if self.attempt > 1 else ""
        return Event(text=f"{resumed if again else started}{self.record.name}{again}", kind="started")

    def end_event(self, outcome: Outcome) -> Event:
        """Say how the attempt ended."""
        return Event(text=self._describe_end(outcome), kind="finished" if outcome == "finished" else "other")

    def _describe_end(self, outcome: Outcome) -> str:
        name, status = self.record.name, self.record.read_status()
        match outcome:
            case "finished":
                return f"finished {name} in {time.time() - self.started:.0f} s"
            case "elsewhere":
                return f"left {name}: another process executes it"
            case "preempted":
                return f"stopped {name}, saved"
        if status.state == "off-track":
            return f"ended {name}: {status.reason}"
        see = f"see {self.record.attempt_log(self.attempt)}"
        what = {"retry": "trying again", "given back": f"it had not begun to train, and another node may try; {see}"}
        return f"failed {name} ({status.reason_class}: {status.reason}); {what.get(outcome, see)}"
