"""Directories of a sweep and of its runs, with the files of launchers: claim, attempts and cancellation.

Beside the files of `harness.run.directory` there are `claim`, a lock that a worker holds from its decision to start the
run until it has recorded how the attempt ended; `attempts.jsonl`, one line per ended attempt; `deviation.json`, how far
the run is from its forecast; and `cancelled`, a marker that keeps workers from the run until the next launch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import disk_sentence
from aimscale.harness.run.files import read_file, read_object, write_json, write_text
from aimscale.harness.run.lock import Holder, is_held, read_holder
from aimscale.harness.run.program import PROGRAM_FILE
from aimscale.harness.run.provenance import is_imported
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import SWEEP_FILE, SWEEP_RECORD, Sweep, SweepError, read_record

WORKER_BEGINS = "worker begins"
"""First words of the line that a Slurm job's worker prints when it begins."""
RUN_BEGINS = ("started ", "resumed ")
"""First words of the lines that a worker prints when it starts a run."""


class RunRecord(RunDir):
    """Run directory with the files of launchers, which are others for its training and for its `evaluation`."""

    def __init__(self, path: Path | str, root: Path | None = None) -> None:
        super().__init__(path, root)
        self.claim = self.path / "claim"
        self.attempts = self.path / "attempts.jsonl"
        self.cancelled = self.root / "cancelled"
        self.deviation = self.path / "deviation.json"

    @property
    def name(self) -> str:
        """Run id."""
        return self.root.name

    @property
    def is_of_program(self) -> bool:
        """Whether a program of the user trains it."""
        return (self.root / PROGRAM_FILE).exists()

    def job_log(self, job_id: str) -> Path:
        """Return the log of a Slurm job: output of its worker and of slurmstepd."""
        return self.root.parent.parent / "slurm" / f"{job_id}.out"

    def read_deviation(self) -> dict[str, Any]:
        """Return `deviation` and `deviates_since` of the status, as the worker that watches the run saw them last."""
        deviation = read_object(self.deviation) or {}
        return {name: deviation[name] for name in ("deviation", "deviates_since") if name in deviation}

    def is_claimed(self) -> bool:
        """Return whether a live worker executes the run, or is about to."""
        return is_held(self.claim)

    def claimant(self) -> Holder | None:
        """Return the worker that holds the claim, or held it last."""
        return read_holder(self.claim)

    def saved_progress(self) -> list[int]:
        """Return a measure of progress, which grows with everything that a resumed attempt need not repeat: numbers of
        rows, images of the furthest checkpoint, budgets with weights, files of evaluation, and the time of the last of
        these, ns. Of a program it is the largest D that it has told, and the number of its evaluations."""
        if measurements := read_object(self.root / PROGRAM_FILE):
            rows = self.read_rows()
            num_evaluated = sum(len(row.get("evaluated") or ()) for row in rows)
            return [len(rows), int(measurements.get("D", 0)), num_evaluated, 0, 0]
        checkpoints = [path.name.split("-")[0] for path in self.checkpoints.glob("[0-9]*")]
        num_budgets = len(list(self.root.glob("budgets/*/model.safetensors")))
        times = []
        for path in (*self.root.glob("validation/*.npz"), *self.root.glob("probes/*/*.json")):
            with contextlib.suppress(OSError):  # removed meanwhile
                times.append(path.stat().st_mtime_ns)
        furthest = max((int(images) for images in checkpoints if images.isdecimal()), default=0)
        return [len(self.read_rows()), furthest, num_budgets, len(times), max(times, default=0)]

    def read_attempts(self) -> list[dict[str, Any]]:
        """Read the ended attempts, first to last; a last line that was cut off by a crash is skipped."""
        lines, ended = list[bytes](), list[dict[str, Any]]()
        with contextlib.suppress(FileNotFoundError):
            lines = read_file(self.attempts).splitlines()
        for i, line in enumerate(lines):
            try:
                values = json.loads(line)
                if not values.get("forgiven"):
                    if not {"reason_class", "saved"} <= values.keys():
                        raise ValueError(f"line {i + 1} tells of no attempt")
                    values["device_hours"], values["ended"] = float(values["device_hours"]), float(values["ended"])
                ended.append(values)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                if i + 1 < len(lines):
                    raise SweepError(f"{self.attempts} is damaged ({error}); repair it or move it away") from error
        return ended

    def failed_nodes(self, *, given_back: bool = False) -> list[str]:
        """Return the nodes on which attempts failed since a person last cleared the run's failure.

        Args:
            given_back: whether to return only nodes that gave the run back before its first step.
        """
        nodes: dict[str, None] = {}
        for ended in self.read_attempts():
            if ended.get("forgiven"):
                nodes = {}
            elif ended.get("given_back") or not given_back:
                nodes |= dict.fromkeys(ended.get("failed_nodes") or ())
        return list(nodes)

    def attempt_device_hours(self, now: float) -> float:
        """Return the device-hours of the current attempt, or of one that just ended; 0 if it never started."""
        started, worker = self.read_status().started, self.claimant()
        # By the start and not by the order of times: a clock may have been set back.
        if started is None or any(ended.get("started") == started for ended in self.read_attempts()):
            return 0.0
        return (worker.facts.get("devices", 1) if worker else 1) * max(0.0, now - started) / 3600

    def next_attempt(self) -> int:
        """Return the number of the next attempt, 1 for the first."""
        return 1 + sum(not ended.get("forgiven") for ended in self.read_attempts())

    def append_attempt(self, **values: Any) -> None:
        """Append an attempt to the record, dropping a last line that was cut off; the caller holds the claim."""
        write_text(self.attempts, "".join(json.dumps(each) + "\n" for each in [*self.read_attempts(), values]))

    def attempt_log(self, attempt: int) -> Path:
        """Return the log of an attempt, with the output of all ranks."""
        return self.logs / f"attempt-{attempt}.log"

    def failed_rank(self, attempt: int) -> Path:
        """Return the file that says which rank of an attempt on one node failed first (`harness.distributed.ranks`)."""
        return self.logs / f"attempt-{attempt}.failed-rank.json"

    def last_log(self) -> Path | None:
        """Return the log of the last attempt, or None if there is none."""
        logs = [path for path in self.logs.glob("attempt-*.log") if path.stem.partition("-")[2].isdecimal()]
        return max(logs, key=lambda path: int(path.stem.partition("-")[2]), default=None)


def write_error(sweep: Sweep, error: OSError) -> SweepError:
    """Say why a sweep's directory cannot be written."""
    where = f"cannot write into {sweep.directory} ({error.strerror}); choose another --root"
    return SweepError(disk_sentence(error) or where)


def prepare_directory(sweep: Sweep, runs: Sequence[Run] = ()) -> None:
    """Create the sweep's directory and record its base directory and the fingerprints of its data; a sweep that was
    moved goes on."""
    directory = sweep.directory
    try:
        sweep.runs_dir.mkdir(parents=True, exist_ok=True)
        record = read_record(directory)
        write_text(directory / SWEEP_FILE, sweep.text)
        data = {sweep.relative_path(path): content for run in runs for path, content in run.data.items()}
        values = {"version": 1, "name": sweep.name, "directory": str(directory), "base_dir": str(sweep.base_dir)}
        values |= {"data": {**(record or {}).get("data", {}), **data}}
        if record != values:
            write_json(directory / SWEEP_RECORD, values)
    except OSError as error:
        raise write_error(sweep, error) from error


def stage_record(sweep: Sweep, run: Run) -> RunRecord:
    """Return the record of a run at its stage."""
    record = RunRecord(sweep.run_dir(run.run_id))
    return record if run.stage == "train" else record.evaluation


def imported_runs(sweep: Sweep, runs: Sequence[Run]) -> list[RunRecord]:
    """Return the finished runs outside the plan whose weights were imported (`aimscale weights import`)."""
    return [record for record in _unplanned_records(sweep, runs) if is_imported(record)]


def unplanned_runs(sweep: Sweep, runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the ids of run directories outside the plan, except imported ones: they trained something else."""
    return tuple(record.path.name for record in _unplanned_records(sweep, runs) if not is_imported(record))


def _unplanned_records(sweep: Sweep, runs: Sequence[Run]) -> list[RunRecord]:
    planned = {run.run_id for run in runs}
    return [RunRecord(path) for path in sorted(sweep.runs_dir.glob("*/")) if path.name not in planned]
