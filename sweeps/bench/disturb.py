"""What `aimscale bench faults` does to the processes of a sweep: kill, stop and crowd them at random moments."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import Sweep
from aimscale.sweeps.state.claims import RunRecord
from aimscale.sweeps.state.probe_record import EvaluationRecord, ProbeRecord

PATIENCE_S = 600.0
"""What is so small and has not ended by then hangs."""
IMAGES, PACKED = "images", "packed"
"""Folders that are packed, and packed into."""

Victim = Literal["training", "evaluation", "probes", "collect", "pack"]


@dataclass(kw_only=True)
class Disturbed:
    """A sweep in the making, and what is done to it."""

    sweep: Sweep
    """Its root is a folder of its own."""
    victim: Victim
    """Whose processes are disturbed."""
    random: random.Random
    work_s: float = 0.0
    """How long the victim works when nothing disturbs it."""
    moments: list[str] = field(default_factory=list)
    """What it was doing each time."""
    num_kills: int = 0
    """SIGKILLs that met a living process."""

    @property
    def root(self) -> Path:
        """The sweep's folder lies here, and the logs of what was started."""
        return self.sweep.root

    @property
    def runs(self) -> list[RunRecord]:
        """The sweep's runs."""
        return [RunRecord(self.sweep.run_dir(run.run_id)) for run in plan(self.sweep)]

    @property
    def jobs(self) -> list[RunRecord]:
        """Where the victim keeps its lease and status: in the run, or in the folder of a job on it."""
        kinds = {"evaluation": EvaluationRecord, "probes": ProbeRecord}
        return [kinds[self.victim].of(run.path) if self.victim in kinds else run for run in self.runs]

    def start(self, verb: str | None = None) -> subprocess.Popen[bytes]:
        """Start the command that brings the victim to its end, or another verb on its sweep."""
        verb = verb or {"training": "launch", "evaluation": "launch", "probes": "probe"}.get(self.victim, self.victim)
        words = [verb, str(self.sweep.source), "--root", str(self.root)]
        if verb == "pack":
            words = ["data", "pack", str(self.sweep.base_dir / IMAGES), str(self.root / PACKED), "--shard-mb", "0.03"]
        self.root.mkdir(exist_ok=True)
        with (self.root / f"{verb}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "aimscale", *words],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait_for_work(self, launcher: subprocess.Popen[bytes]) -> int | None:
        """Wait until the one job is executed; the process that does it, None where the launcher ended before."""
        (job,) = self.jobs
        until = time.monotonic() + PATIENCE_S
        while (holder := job.read_holder()) is None or not job.is_held():
            if launcher.poll() is not None or time.monotonic() > until:
                return None
            time.sleep(0.02)
        return holder.pid

    def wait_for_moment(self, launcher: subprocess.Popen[bytes], share: float = 0.8) -> int | None:
        """Wait for work and then for a random moment within this share of it, and note what it was doing."""
        pid = self.wait_for_work(launcher)
        if pid is not None:
            time.sleep(self.random.uniform(0, share * self.work_s))
            self.moments.append((self.jobs[0].checked_status().phase or "end").split()[0])
        return pid

    def kill(self, pid: int | None) -> None:
        """SIGKILL to a process, unless it ended."""
        if pid is not None:
            self.num_kills += _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> bool:
    """Whether there was a process to be told."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def _kill_worker_twice(disturbed: Disturbed) -> None:
    launcher = disturbed.start()
    for share in (0.8, 0.5):
        disturbed.kill(disturbed.wait_for_moment(launcher, share))
    launcher.wait(PATIENCE_S)


def _kill_in_a_save(disturbed: Disturbed) -> None:
    """Kill the trainer while a checkpoint, which is prepared in the lease holder's folder, is there in part."""
    launcher = disturbed.start()
    pid = disturbed.wait_for_work(launcher)
    (run,) = disturbed.runs
    until = time.monotonic() + disturbed.random.uniform(0, 0.5 * disturbed.work_s)
    while pid is not None and run.is_held():
        if time.monotonic() > until and any(run.path.glob(".writer-*/writing-checkpoints-*")):
            disturbed.kill(pid)
            disturbed.moments.append("save")
            break
        time.sleep(0.001)
    launcher.wait(PATIENCE_S)


def _kill_launcher(disturbed: Disturbed) -> None:
    launcher = disturbed.start(disturbed.random.choice(["launch", "work"]))
    if disturbed.random.random() < 0.5:
        time.sleep(disturbed.random.uniform(0, 3.0))
        disturbed.moments.append("launch")
    else:
        disturbed.wait_for_moment(launcher)
    disturbed.kill(launcher.pid)
    launcher.wait()


def _kill_both(disturbed: Disturbed) -> None:
    launcher = disturbed.start()
    pid = disturbed.wait_for_moment(launcher)
    disturbed.kill(launcher.pid)
    launcher.wait()
    disturbed.kill(pid)


def _close_terminal(disturbed: Disturbed) -> None:
    launcher = disturbed.start()
    disturbed.wait_for_moment(launcher)
    _signal(launcher.pid, signal.SIGHUP)
    launcher.wait(PATIENCE_S)


def _stop_and_continue(disturbed: Disturbed) -> None:
    launcher = disturbed.start()
    pid = disturbed.wait_for_moment(launcher)
    if pid is not None:
        _signal(pid, signal.SIGSTOP)
        time.sleep(disturbed.random.uniform(0.1, 3.0))
        _signal(pid, signal.SIGCONT)
    launcher.wait(PATIENCE_S)


def _crowd(disturbed: Disturbed) -> None:
    crowd = [disturbed.start(verb) for verb in ("launch", "work") * 3]
    for process in crowd:
        process.wait(PATIENCE_S)
    disturbed.moments.append("start")


def _kill_command_twice(disturbed: Disturbed) -> None:
    """Kill a command that starts no process of its own."""
    for _ in range(2):
        command = disturbed.start()
        time.sleep(disturbed.random.uniform(0.2, 1.0) * disturbed.work_s)
        disturbed.moments.append(disturbed.victim if command.poll() is None else "end")
        disturbed.kill(command.pid if command.poll() is None else None)
        command.wait()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A way to disturb."""

    name: str
    act: Callable[[Disturbed], None]
    victim: Victim = "training"
    num_runs: int = 1
    times: int = 1
    """Tries of it in a round."""


CROWD = "three launches and three workers at once"
FAULTS = (
    Fault(name="kill the trainer twice", act=_kill_worker_twice),
    Fault(name="kill the trainer in a save", act=_kill_in_a_save),
    Fault(name="kill the launcher or worker", act=_kill_launcher),
    Fault(name="kill launcher and trainer", act=_kill_both),
    Fault(name="close the terminal", act=_close_terminal),
    Fault(name="stop the trainer, go on", act=_stop_and_continue),
    Fault(name="kill an evaluation job twice", act=_kill_worker_twice, victim="evaluation"),
    Fault(name="kill a probe job twice", act=_kill_worker_twice, victim="probes"),
    Fault(name="kill collect twice", act=_kill_command_twice, victim="collect"),
    Fault(name="kill data pack twice", act=_kill_command_twice, victim="pack"),
    Fault(name=CROWD, act=_crowd, num_runs=3, times=2),
)
