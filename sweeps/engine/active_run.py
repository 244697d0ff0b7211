"""Run that a worker executes: the start of its process, its stop, and its progress."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aimscale.harness.run.lock import Lock
from aimscale.sweeps.plan.costs import grace_period_s
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.state.attempts import Outcome
from aimscale.sweeps.state.record import RunRecord

KILL_MARGIN_S = 30.0
"""Time beyond its grace period after which a run that does not stop is killed, s."""

Command = Callable[[Path, int], list[str]]
"""Function from (run directory, devices) to the command that executes the run."""


@dataclass(kw_only=True)
class ActiveRun:
    """Run that a worker executes."""

    run: Run
    record: RunRecord
    lock: Lock
    """Claim on the run."""
    claims: tuple[str, str | None]
    """Token of this claim, and of the claim of the attempt before."""
    attempt: int
    """Number of the attempt, 1 for the first."""
    progress: list[int]
    """Progress at the start, as `measure_progress`."""
    devices: tuple[int, ...]
    process: subprocess.Popen[bytes]
    """Trainer, or the program that starts its ranks; leads its own process group."""
    started: float = field(default_factory=time.time)
    """Unix time of the start."""
    kill_at: float | None = None
    """Unix time at which it is killed; None until it is asked to save and exit."""

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

    def describe_end(self, outcome: Outcome) -> str:
        """Say how the attempt ended."""
        if outcome == "finished":
            return f"finished {self.record.name} in {time.time() - self.started:.0f} s"
        if outcome == "elsewhere":
            return f"left {self.record.name}: another process executes it"
        if outcome == "preempted":
            return f"stopped {self.record.name}, saved"
        status, see = self.record.read_status(), f"see {self.record.attempt_log(self.attempt)}"
        what = {"retry": "trying again", "given back": f"it had not begun to train, and another node may try; {see}"}
        return f"failed {self.record.name} ({status.reason_class}: {status.reason}); {what.get(outcome, see)}"


def start_run(
    run: Run,
    record: RunRecord,
    command: Sequence[str],
    *,
    claim: Lock,
    claims: tuple[str, str | None],
    devices: tuple[int, ...],
    environment: Mapping[str, str],
) -> ActiveRun:
    """Start the process of a run in a session of its own, so that Ctrl-C on the terminal does not reach it.

    Args:
        environment: variables that confine the run to its devices.

    Raises:
        OSError: the log cannot be written, or no process can be created.
    """
    variables = {**os.environ, **environment, "AIMSCALE_CLAIM": claims[0]}
    variables["OMP_NUM_THREADS"] = str(run.config.runtime.num_threads)
    # srun may have started several workers; a run is not one of their ranks
    variables.pop("SLURM_STEP_NUM_TASKS", None)
    if len(devices) > 1:  # torchrun kills its ranks this long after SIGTERM; the default is 30 s
        variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_period_s(run))
    record.logs.mkdir(parents=True, exist_ok=True)
    attempt, progress = record.next_attempt(), measure_progress(record)
    with record.attempt_log(attempt).open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
    return ActiveRun(
        run=run,
        record=record,
        lock=claim,
        claims=claims,
        attempt=attempt,
        progress=progress,
        devices=devices,
        process=process,
    )


def measure_progress(record: RunRecord) -> list[int]:
    """Return the images done, and `RunRecord.saved_progress`."""
    return [record.read_status().images_done, *record.saved_progress()]
