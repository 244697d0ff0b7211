"""A run directory as launchers see it: who claimed the run, and how its attempts ended.

Besides what `harness.run.directory` keeps, a run directory holds two files of the launchers: `launch.json`, the claim
of the launcher that started or queued the run, and `attempts.jsonl`, one line per ended attempt.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import STATUS_VERSION, RunDir, Status
from aimscale.harness.run.files import process_started, write_json, write_text
from aimscale.harness.run.lease import Holder
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import SweepError

EVALUATING = "evaluating"
"""Folder of the evaluation job within a run directory."""
CLAIM_GRACE_S = 300.0
"""A local claim from another machine holds this long, in which its worker takes the run's lease."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`launch.json`: who started or queued the run's present attempt."""

    version: int = 1
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
    nodes: str = ""
    """Slurm's nodes of that job, as it writes lists of them, once it has started."""


def own_claim(backend: Literal["local", "slurm"], devices: int, job_id: str | None = None) -> Claim:
    """A claim of this process, now."""
    pid = os.getpid()
    started = process_started(pid) or ""
    host = socket.gethostname()
    return Claim(
        backend=backend, host=host, pid=pid, process_started=started, time=time.time(), job_id=job_id, devices=devices
    )


T = TypeVar("T")
_STATUS, _CLAIM, _HOLDER = TypeAdapter(Status), TypeAdapter(Claim), TypeAdapter(Holder)


class RunRecord(RunDir):
    """A run directory as launchers see it, or `RUN/evaluating/`, where the evaluation job of a run keeps the same."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.claim = self.path / "launch.json"
        self.attempts = self.path / "attempts.jsonl"
        self.evaluates = self.path.parent if self.path.name == EVALUATING else None
        """The run directory that an evaluation job works on; null of training."""

    @property
    def title(self) -> str:
        """What a person calls the work."""
        return f"the evaluation of {self.evaluates.name}" if self.evaluates else self.path.name

    @property
    def home(self) -> Path:
        """Folder of the launch lock and of Slurm's logs: the sweep's."""
        return (self.evaluates or self.path).parent.parent

    def saved_progress(self) -> list[int]:
        """What an attempt that resumes now would start from: rows, images of the furthest checkpoint, and evaluation.

        The last counts what is on disk of budgets whose row is still to come: weights, validation losses,
        probed tasks and the parts of unfinished ones.

        Raises:
            SweepError: `results.json` is damaged.
        """
        if self.evaluates:
            return evaluation_progress(self.evaluates)
        images = [0]
        for path in self.checkpoints.glob("[0-9]*"):
            with contextlib.suppress(ValueError):
                images.append(int(path.name.split("-")[0]))
        try:
            num_rows = len(self.read_rows())
        except (OSError, ValueError, TypeError, KeyError, UserError) as error:
            raise self.damaged(self.results, error) from error
        return [num_rows, max(images), *evaluation_progress(self.path)]

    def checked_status(self) -> Status:
        """The run's status.

        Raises:
            SweepError: it is damaged or of another version; the sentence says what to do.
        """
        status = self._read(self.status, _STATUS)
        if status is not None and status.version != STATUS_VERSION:
            raise SweepError(
                f"{self.path} is of version {status.version}, this aimscale reads {STATUS_VERSION}; use the one that "
                f"made it"
            )
        return status or Status()

    def read_claim(self) -> Claim | None:
        """The launcher's claim, or None.

        Raises:
            SweepError: it is damaged.
        """
        return self._read(self.claim, _CLAIM)

    def find_claim(self) -> Claim | None:
        """The launcher's claim, or None also where it is damaged."""
        with contextlib.suppress(SweepError):
            return self.read_claim()
        return None

    def is_held(self) -> bool:
        """Whether a live process holds the lease.

        Raises:
            SweepError: `lease.json` is damaged.
        """
        try:
            return super().is_held()
        except UserError as error:
            raise SweepError(str(error)) from error

    def read_holder(self) -> Holder | None:
        """Who holds the lease, alive or not.

        Raises:
            SweepError: `lease.json` is damaged.
        """
        return self._read(self.lease, _HOLDER)

    def damaged(self, path: Path, error: Exception) -> SweepError:
        """The sentence about a file of the run that cannot be used."""
        if isinstance(error, UserError):
            return SweepError(str(error))  # it says so itself
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        return SweepError(f"{path} is damaged ({said}); repair it or move {self.path} away")

    def _read(self, path: Path, kind: TypeAdapter[T]) -> T | None:
        """A JSON file as what it should hold; None where there is none."""
        try:
            return kind.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise self.damaged(path, error) from error

    def write_claim(self, claim: Claim) -> None:
        """Claim the run; hold the launch lock and look first."""
        write_json(self.claim, asdict(claim))

    def drop_claim(self) -> None:
        """Give the run back."""
        self.claim.unlink(missing_ok=True)

    def read_attempts(self) -> list[dict[str, Any]]:
        """Ended attempts, first to last; a last line cut off by a crash is left out.

        Raises:
            SweepError: the file is damaged.
        """
        try:
            lines = self.attempts.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self.damaged(self.attempts, error) from error
        ended: list[dict[str, Any]] = []
        for i, line in enumerate(lines):
            try:
                values = json.loads(line)
                if not values.get("forgiven") and not {"reason_class", "saved"} <= values.keys():
                    raise ValueError(f"line {i + 1} tells of no attempt")
                ended.append(values)
            except (ValueError, AttributeError, RecursionError) as error:
                if i + 1 < len(lines):
                    raise self.damaged(self.attempts, error) from error
        return ended

    def failed_nodes(self) -> list[str]:
        """Nodes that ended attempts of this run since a person last cleared its failure."""
        found: dict[str, None] = {}
        for ended in self.read_attempts():
            found = {} if ended.get("forgiven") else found | dict.fromkeys(ended.get("failed_nodes") or ())
        return list(found)

    def hours_since_start(self, now: float) -> float:
        """Device-hours of the attempt under way, or that just ended; 0 where it never started."""
        started, claim = self.checked_status().started, self.find_claim()
        last = max((ended["ended"] for ended in self.read_attempts() if "ended" in ended), default=0.0)
        return (claim.devices if claim else 1) * (now - started) / 3600 if started and started > last else 0.0

    def next_attempt(self) -> int:
        """Number of the attempt that comes next, 1 for the first."""
        return 1 + sum(not ended.get("forgiven") for ended in self.read_attempts())

    def append_attempt(self, **values: Any) -> None:
        """Record how an attempt ended; a line that was cut off before goes, or this one would be lost with it."""
        write_text(self.attempts, "".join(json.dumps(each) + "\n" for each in [*self.read_attempts(), values]))

    def log_file(self, attempt: int, rank: int = 0) -> Path:
        """Output of one attempt's process."""
        return self.logs / (f"attempt-{attempt}.log" if rank == 0 else f"attempt-{attempt}.rank-{rank}.log")

    def job_log(self, job_id: str | None) -> Path:
        """Output of a Slurm job's batch script, watcher and slurmstepd."""
        return self.home / "slurm" / f"{job_id}_0_log.out"

    def last_log(self) -> Path | None:
        """Output of the last attempt's first rank."""
        logs = {path.stem.removeprefix("attempt-"): path for path in self.logs.glob("attempt-*.log")}
        return max(((int(number), path) for number, path in logs.items() if number.isdecimal()), default=(0, None))[1]


def claim_run(record: RunRecord, run: Run, claim: Claim) -> None:
    """Make the run's directory and claim it; hold the launch lock and decide first."""
    RunDir.create(record.path, run.config)
    record.write_status(state="queued", reason=None, reason_class=None)
    record.write_claim(claim)


def records_of(run_dir: Path) -> list[RunRecord]:
    """Training of a run and, where it had one, its evaluation job."""
    job = RunRecord(run_dir / EVALUATING)
    return [RunRecord(run_dir), *([job] if job.path.is_dir() else [])]


def local_claim_is_live(claim: Claim) -> bool:
    """Whether a local queue still stands behind its claim."""
    if claim.host == socket.gethostname():
        return process_started(claim.pid) == claim.process_started
    return time.time() - claim.time < CLAIM_GRACE_S


def evaluation_progress(run: Path) -> list[int]:
    """Files that evaluation has finished in a run, and when a task's file was last written.

    That is written again only when more kinds of its probes are done.
    """
    kinds = ("budgets/*/model.safetensors", "validation/*.npz", "probes/*/*.json")
    times = [0]
    for path in run.glob("probes/*/*.json"):
        with contextlib.suppress(OSError):  # removed meanwhile
            times.append(path.stat().st_mtime_ns)
    return [sum(1 for kind in kinds for _ in run.glob(kind)), max(times)]
