"""The sweep's directory: its record, the lock under which launches decide, and each run's claim and attempts.

Besides what `harness.run.directory` keeps, a run directory holds two files of the launchers: `launch.json`, the claim
of the launcher that started or queued the run, and `attempts.jsonl`, one line per ended attempt.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from aimscale.harness.run.directory import STATUS_VERSION, RunDir, Status
from aimscale.harness.run.files import locked, process_started, write_json, write_text
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SWEEP_FILE, SWEEP_RECORD, Sweep, SweepError, read_record

MAX_CLOCK_SKEW_S = 30.0
"""Leases and heartbeats compare clocks; beyond this a launch is refused."""
CLAIM_GRACE_S = 300.0
"""A local claim from another machine holds this long, in which its worker takes the run's lease."""


def prepare(sweep: Sweep, runs: Sequence[Run] = ()) -> None:
    """Make the sweep's directory and record where its relative paths start and what its data sets hold.

    A sweep that lies elsewhere now, or whose file does, goes on: runs are known by what they train.

    Raises:
        SweepError: it cannot be written, or the clock is off.
    """
    directory = sweep.directory
    try:
        sweep.runs_dir.mkdir(parents=True, exist_ok=True)
        record = read_record(directory)
        write_text(directory / SWEEP_FILE, sweep.text)
        sources = [source for run in runs for source in run.config.training.data.sources]
        data = {sweep.relative(source.path): source.fingerprint for source in sources if source.fingerprint}
        values = {"version": 1, "name": sweep.name, "directory": str(directory), "base_dir": str(sweep.base_dir)}
        values |= {"data": {**(record or {}).get("data", {}), **data}}
        if record != values:
            write_json(directory / SWEEP_RECORD, values)
        skew = (directory / SWEEP_FILE).stat().st_mtime - time.time()
    except OSError as error:
        raise SweepError(f"cannot write into {directory} ({error.strerror}); choose another --root") from error
    if abs(skew) > MAX_CLOCK_SKEW_S:
        raise SweepError(
            f"the clock of {socket.gethostname()} is {-skew:+.0f} s off that of the file system of {directory}, so "
            f"heartbeats could not be trusted; synchronise the clocks"
        )


@contextlib.contextmanager
def launch_lock(sweep: Sweep) -> Iterator[None]:
    """Serialise the decisions of launches, between processes and (flock over NFS) machines."""
    with lock_file(sweep.directory / "launch.lock"):
        yield


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold an exclusive flock for the block; the kernel drops it when the process dies.

    Raises:
        SweepError: the file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except OSError as error:
            raise SweepError(
                f"the file system of {path.parent} has no flock ({error.strerror}), without which two launches "
                f"could start a run twice; mount it with flock or choose another --root"
            ) from error
        yield


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`launch.json`: who started or queued the run's present attempt."""

    version: int = 1
    """Of this file format."""
    backend: Literal["local", "slurm"]
    """What executes it."""
    host: str
    """Machine of the launcher."""
    pid: int
    """Process of the launcher."""
    process_started: str
    """Start time of that process, which makes the pid unique."""
    time: float
    """Unix time of the claim."""
    job_id: str | None = None
    """Slurm's job (`123_4` for an array element)."""
    restarts: int = 0
    """How often Slurm had restarted that job when it last took the run over."""
    devices: int = 1
    """Data-parallel ranks."""


def own_claim(backend: Literal["local", "slurm"], devices: int, job_id: str | None = None) -> Claim:
    """A claim of this process, now."""
    pid = os.getpid()
    started = process_started(pid) or ""
    host = socket.gethostname()
    return Claim(
        backend=backend,
        host=host,
        pid=pid,
        process_started=started,
        time=time.time(),
        job_id=job_id,
        devices=devices,
    )


class RunRecord(RunDir):
    """A run directory as launchers see it."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.claim = self.path / "launch.json"
        self.attempts = self.path / "attempts.jsonl"

    @property
    def home(self) -> Path:
        """Folder of the launch lock and of Slurm's logs: the sweep's."""
        return self.path.parent.parent

    def saved_progress(self) -> list[int]:
        """What an attempt that resumes now would start from: rows recorded, and images of the furthest checkpoint."""
        images = [0]
        for path in self.checkpoints.glob("[0-9]*"):
            with contextlib.suppress(ValueError):
                images.append(int(path.name.split("-")[0]))
        return [len(self.read_rows()), max(images)]

    def checked_status(self) -> Status:
        """The run's status.

        Raises:
            SweepError: it is damaged or of another version; the sentence says what to do.
        """
        try:
            values = json.loads(self.status.read_text())
            version = values["version"]
            if version != STATUS_VERSION:
                raise SweepError(
                    f"{self.path} is of version {version!r}, this aimscale reads {STATUS_VERSION}; use the one that "
                    f"made it"
                )
            known = {field.name for field in fields(Status)}
            return Status(**{key: value for key, value in values.items() if key in known})
        except FileNotFoundError:
            return Status()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SweepError(f"{self.status} is damaged ({error}); repair it or move {self.path} away") from error

    def read_claim(self) -> Claim | None:
        """The launcher's claim, or None; one half-written by hand counts as none."""
        try:
            values = json.loads(self.claim.read_text())
            return Claim(**values)
        except (OSError, ValueError, TypeError):
            return None

    def write_claim(self, claim: Claim) -> None:
        """Claim the run; hold `launch_lock` and look first."""
        write_json(self.claim, asdict(claim))

    def drop_claim(self) -> None:
        """Give the run back."""
        self.claim.unlink(missing_ok=True)

    def read_attempts(self) -> list[dict[str, Any]]:
        """Ended attempts, first to last; a last line cut off by a crash is left out."""
        try:
            lines = self.attempts.read_text().splitlines()
        except FileNotFoundError:
            return []
        ended = []
        for line in lines:
            with contextlib.suppress(ValueError):
                ended.append(json.loads(line))
        return ended

    def append_attempt(self, **values: Any) -> None:
        """Record how an attempt ended."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.attempts.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def log_file(self, attempt: int, rank: int = 0) -> Path:
        """Output of one attempt's process."""
        return self.logs / (f"attempt-{attempt}.log" if rank == 0 else f"attempt-{attempt}.rank-{rank}.log")

    def job_log(self, job_id: str | None) -> Path:
        """Output of a Slurm job's batch script, watcher and slurmstepd."""
        return self.home / "slurm" / f"{job_id}_0_log.out"

    def last_log(self) -> Path | None:
        """Output of the last attempt's first rank."""
        logs = [path for path in self.logs.glob("attempt-*.log") if ".rank-" not in path.name]
        return max(logs, key=lambda path: int(path.stem.removeprefix("attempt-")), default=None)


def claim_run(record: RunRecord, run: Run, claim: Claim) -> None:
    """Make the run's directory and claim it; hold `launch_lock` and decide first."""
    RunDir.create(record.path, run.config)
    record.write_status(state="queued", reason=None, reason_class=None)
    record.write_claim(claim)


def local_claim_is_live(claim: Claim) -> bool:
    """Whether a local queue still stands behind its claim."""
    if claim.host == socket.gethostname():
        return process_started(claim.pid) == claim.process_started
    return time.time() - claim.time < CLAIM_GRACE_S
