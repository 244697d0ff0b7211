"""The run directory: file names, status, lock and rows.

Everything about a run is rediscovered from this folder, so that another process can take over knowing only the path.
Torch is not imported: the planner and `aimscale status` read hundreds of run directories.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, TypeAdapter

from aimscale.aim.errors import UserError
from aimscale.harness.run.config import ConfigError, RunConfig, load_run_config
from aimscale.harness.run.files import CHECKSUM, flush, is_intact, read_as, read_file, sealed, write_json, write_text
from aimscale.harness.run.lock import become_writer, hold_lock, is_held
from aimscale.harness.run.program import ProgramConfig, load_program

State = Literal["created", "queued", "running", "preempted", "failed", "diverged", "off-track", "finished"]
ReasonClass = Literal["oom", "data", "nan", "node", "code", "timeout", "interrupted", "config"]

RESULTS_VERSION = 1
WEIGHTS_CRC32 = "weights_crc32"
"""Key in a budget's row of the CRC-32 of its weight file."""
SHARED = ""
"""Value of `failed_on` if no node is to blame: a disk or a checkpoint that all nodes share."""

EXIT_FINISHED = 0
EXIT_CRASHED = 1
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_OFF_TRACK = 4
"""Exit code after a save because the run left its forecast; of trainers that look at it themselves, as earlier ones."""
EXIT_PREEMPTED = 75
"""Exit code after a save on a signal; starting the same run directory again resumes (75 is EX_TEMPFAIL of
sysexits.h)."""


class RunDirError(UserError):
    """A run directory that cannot be used as asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Contents of `status.json`: what a run is doing, rewritten at every logging step."""

    version: Literal[1] = 1
    state: State = "created"
    """State of the run."""
    phase: str = ""
    """Phase of a running run: start, train, decay, measure (during training), validate, probe."""
    images_seen: int = 0
    """Position in the stream of the step last logged."""
    images_done: int = 0
    """Images trained on so far, decay branches included."""
    images_planned: int = 0
    """Images the whole run trains on, decay branches included."""
    step: int = 0
    """Optimiser steps, `images_seen` over the batch size."""
    loss: float | None = None
    """Training loss at that step."""
    images_per_s: float | None = None
    """Throughput of all ranks over the last ten metric lines."""
    data_wait: float | None = None
    """Share of that time in which the rank that waited longest waited for images, 0..1."""
    mfu_published: float | None = None
    """Model FLOPs utilisation over the last logging interval, 0..1: published FLOPs over the device's nominal peak."""
    mfu: float | None = None
    """FLOPs executed over the peak measured on the device; null before the first line."""
    num_skipped_steps: int = 0
    """Non-finite steps that were skipped."""
    deviation: float | None = None
    """Standard deviations of the last validation losses above their forecast (`harness.run.expected`), if any."""
    deviates_since: int | None = None
    """Images seen since which they do, if that raises an alarm."""
    heartbeat: float | None = None
    """Unix time of the last logging step."""
    started: float | None = None
    """Unix time at which this attempt started."""
    host: str | None = None
    """Host of rank 0."""
    pid: int | None = None
    """Process id of rank 0."""
    reason: str | None = None
    """Sentence that says why the run failed, diverged or was preempted."""
    reason_class: ReasonClass | None = None
    """Kind of reason, which decides whether the run is tried again."""
    failed_on: str | None = None
    """Node of the rank that failed first; `SHARED` if the cause lies outside of any node, null if unknown."""
    attempt: int = 0
    """Number of starts so far."""
    too_large: dict[str, Any] | None = None
    """Execution of a start that ran out of memory before its first checkpoint; the next takes half the micro-batch."""
    job_id: str | None = None
    """Id of the Slurm job, if there is one."""
    claim: str | None = None
    """Token of the worker's claim under which the last attempt started; null if started by hand."""


_STATUS = TypeAdapter(Status)


class _Probe(BaseModel, extra="allow", strict=True):
    """Fields that every entry of a row's probes has."""

    task: str
    kind: str
    evaluation: str | None = None


class _Row(BaseModel, extra="allow", strict=True):
    """Fields of a row that are relied on before it is in a table."""

    images_seen: int
    run_id: str | None = None
    val_loss: float | None = None
    images_per_s: float | None = None
    probes: list[_Probe] | None = None


class _Results(BaseModel, extra="allow", strict=True):
    """Contents of `results.json`."""

    starts: list[dict[str, Any]] = []
    rows: list[_Row] = []
    curve: dict[str, int] = {}


_RESULTS = TypeAdapter(_Results)
_ROW = TypeAdapter(_Row)


def probe_key(entry: dict[str, Any]) -> tuple[str, str, str | None]:
    """Return what identifies a probe within a row: task, kind and evaluation."""
    return entry["task"], entry["kind"], entry.get("evaluation")


class RunDir:
    """Paths and small files of one run directory."""

    def __init__(self, path: Path | str, root: Path | None = None) -> None:
        """Name the files of a run, or with `root`, its folder, those of the program that works on it in `path`."""
        self.path = Path(path)
        self.root = root or self.path
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.curve = self.root / "curve.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.status = self.path / "status.json"
        self.results = self.path / "results.json"
        self.lock = self.path / "lock"
        self.logs = self.path / "logs"

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def evaluation(self) -> Self:
        """The run with the status, lock, logs and results of the program that evaluates it, beside its training."""
        return type(self)(self.root / "evaluation", self.root)

    def model_file(self, images_seen: int) -> Path:
        """Return the path of a budget's final weights."""
        return self.root / "budgets" / str(images_seen) / "model.safetensors"

    def validation_file(self, images_seen: int) -> Path:
        """Return the path of a budget's per-image validation losses."""
        return self.root / "validation" / f"{images_seen}.npz"

    def probes_dir(self, images_seen: int) -> Path:
        """Return the folder of a budget's probes, with one JSON file per evaluation of a task."""
        return self.root / "probes" / str(images_seen)

    def checkpoint_dir(self, images_seen: int, branch: int | None = None) -> Path:
        """Return the folder of a resumable state on the trunk, or on the decay branch of the budget `branch`."""
        return self.checkpoints / (str(images_seen) if branch is None else f"{images_seen}-decay-{branch}")

    @classmethod
    def create(cls, path: Path | str, config: RunConfig | ProgramConfig) -> RunDir:
        """Make the directory with its `config.yaml` and a status.

        An existing run keeps its results. Its configuration (budgets, validation, probes, data paths, execution) is
        replaced by the new one, unless a process executes the run.
        """
        run = cls(path)
        if run.config.exists():
            existing = load_program(run.config) if isinstance(config, ProgramConfig) else run.load_config()
            if existing.run_id != config.run_id:
                raise RunDirError(f"{path} holds run {existing.run_id}, not {config.run_id}; choose another directory")
            if existing != config and not run.is_held():
                write_text(run.config, config.to_yaml())
            return run
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.config, config.to_yaml())
        if not run.status.exists():
            write_json(run.status, dataclasses.asdict(Status()))
        return run

    def load_config(self) -> RunConfig:
        """Read `config.yaml`."""
        if not self.config.exists():
            raise ConfigError(f"{self.path} is no run directory: it has no config.yaml")
        return load_run_config(self.config)

    def read_status(self) -> Status:
        """Read the last status written; a directory without one counts as created."""
        return read_as(self.status, _STATUS) or Status()

    def write_start(self) -> Status:
        """Record in `status.json` that this process begins another attempt."""
        return self.write_status(
            state="running",
            phase="start",
            host=socket.gethostname(),
            pid=os.getpid(),
            started=time.time(),
            heartbeat=time.time(),
            attempt=self.read_status().attempt + 1,
            job_id=os.environ.get("SLURM_JOB_ID"),
            claim=os.environ.get("AIMSCALE_CLAIM"),
            reason=None,
            reason_class=None,
            failed_on=None,
        )

    def write_status(self, *, durable: bool = True, **changes: Any) -> Status:
        """Replace some fields of the status; `durable=False` skips the fsync (heartbeats)."""
        status = dataclasses.replace(self.read_status(), **changes)
        write_json(self.status, dataclasses.asdict(status), durable=durable)
        return status

    def read_rows(self) -> list[dict[str, Any]]:
        """Read the rows recorded so far, one per budget, by images seen: what training knows of each, and what was
        measured of it, unless of other weights; without the first, only one that evaluation made whole again counts."""
        rows, measured = RunDir(self.root).read_own_rows(), self.evaluation.read_own_rows()
        for images_seen, row in measured.items():
            trained = rows.get(images_seen, {} if "run_id" in row else None)
            if trained is not None and trained.get(WEIGHTS_CRC32) in (None, row.get(WEIGHTS_CRC32)):
                rows[images_seen] = trained | row
        return [rows[images_seen] for images_seen in sorted(rows)]

    def read_own_rows(self) -> dict[int, dict[str, Any]]:
        """Read what one program recorded of each row, by images seen."""
        return {row["images_seen"]: row for row in self._read_results()["rows"]}

    def read_starts(self) -> list[dict[str, Any]]:
        """Read how each start of the run was executed (`harness.run.provenance`)."""
        return self._read_results()["starts"]

    def _read_results(self) -> dict[str, Any]:
        results = read_as(self.results, _RESULTS)
        return {"starts": [], "rows": []} | (results.model_dump(exclude_unset=True) if results else {})

    def read_curve(self) -> list[dict[str, Any]]:
        """Read what was measured during training: one point per position of the trunk, ascending; the last measurement
        at a position counts, and lines cut off by a kill do not."""
        points: dict[int, dict[str, Any]] = {}
        whole, recorded = read_file(self.curve) if self.curve.exists() else b"", self._read_results().get("curve", {})
        if zlib.crc32(whole[: recorded.get("size", 0)]) != recorded.get("crc32", 0):
            raise RunDirError(
                f"{self.curve} is damaged (its first {recorded['size']} bytes are not those that were measured); "
                f"restore it from a copy, or move it and {self.results.name} away and launch to go on without it"
            )
        for text in whole.splitlines():
            with contextlib.suppress(ValueError):
                line = _ROW.validate_json(text).model_dump(exclude_unset=True)
                if not is_intact(json.loads(text)):
                    raise RunDirError(f"a line of {self.curve} is damaged (its checksum is another); restore it")
                numbers = {key: value for key, value in line.items() if value is not None and key != CHECKSUM}
                points.setdefault(line["images_seen"], {}).update(numbers)
        return [points[position] for position in sorted(points)]

    def record_curve(self) -> None:
        """Record size and CRC-32 of what was measured so far, by which `read_curve` finds lines that were lost."""
        if self.curve.exists():
            flush(self.curve)
            whole = read_file(self.curve)
            self._write_results(curve={"size": len(whole), "crc32": zlib.crc32(whole)})

    def record_row(self, row: dict[str, Any]) -> None:
        """Add what this program knows of a budget's row, or replace it; the caller holds the lock."""
        rows = self.read_own_rows() | {row["images_seen"]: row}
        self._write_results(rows=[rows[key] for key in sorted(rows)])

    def record_start(self, facts: dict[str, Any]) -> None:
        """Add a record of how a start executes the run."""
        self._write_results(starts=[*self.read_starts(), facts])

    def _write_results(self, **changes: Any) -> None:
        write_json(self.results, sealed({"version": RESULTS_VERSION, **self._read_results(), **changes}))

    def is_held(self) -> bool:
        """Return whether a live process trains the run, or evaluates it for `evaluation`."""
        return is_held(self.lock)

    @contextlib.contextmanager
    def hold(self) -> Iterator[Path]:
        """Hold the lock for the block, so that no other process does the same work; yields the writer's own folder."""
        with hold_lock(self.lock) as holder, become_writer(self.root, holder.token, self.path) as folder:
            yield folder
