"""Run directory with the files of launchers: claim, attempts and cancellation.

Beside the files of `harness.run.directory` there are `claim`, a lock that a worker holds from its decision to start the
run until it has recorded how the attempt ended; `attempts.jsonl`, one line per ended attempt; and `cancelled`, a marker
that keeps workers from the run until the next launch.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from aimscale.harness.run import lock
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import read_file, write_text
from aimscale.sweeps.plan.sweepfile import SweepError

WORKER_BEGINS = "worker begins"
"""First words of the line that a Slurm job's worker prints when it begins."""
RUN_BEGINS = ("started ", "resumed ")
"""First words of the lines that a worker prints when it starts a run."""


class RunRecord(RunDir):
    """Run directory with the files of launchers."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.claim = self.path / "claim"
        self.attempts = self.path / "attempts.jsonl"
        self.cancelled = self.path / "cancelled"

    @property
    def name(self) -> str:
        """Run id."""
        return self.path.name

    def job_log(self, job_id: str) -> Path:
        """Return the log of a Slurm job: output of its worker and of slurmstepd."""
        return self.path.parent.parent / "slurm" / f"{job_id}.out"

    def is_claimed(self) -> bool:
        """Return whether a live worker executes the run, or is about to."""
        return lock.is_held(self.claim)

    def claimant(self) -> lock.Holder | None:
        """Return the worker that holds the claim, or held it last."""
        return lock.read_holder(self.claim)

    def saved_progress(self) -> list[int]:
        """Return a measure of progress, which grows with everything that a resumed attempt need not repeat: numbers of
        rows, images of the furthest checkpoint, budgets with weights, files of evaluation, and the time of the last of
        these, ns."""
        checkpoints = [path.name.split("-")[0] for path in self.checkpoints.glob("[0-9]*")]
        num_budgets = len(list(self.path.glob("budgets/*/model.safetensors")))
        times = []
        for path in (*self.path.glob("validation/*.npz"), *self.path.glob("probes/*/*.json")):
            with contextlib.suppress(OSError):  # removed meanwhile
                times.append(path.stat().st_mtime_ns)
        furthest = max((int(images) for images in checkpoints if images.isdecimal()), default=0)
        return [len(self.read_rows()), furthest, num_budgets, len(times), max(times, default=0)]

    def read_attempts(self) -> list[dict[str, Any]]:
        """Read the ended attempts, first to last; a last line that was cut off by a crash is skipped."""
        lines = read_file(self.attempts).splitlines() if self.attempts.exists() else []
        ended: list[dict[str, Any]] = []
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
        found: dict[str, None] = {}
        for ended in self.read_attempts():
            if ended.get("forgiven"):
                found = {}
            elif ended.get("given_back") or not given_back:
                found |= dict.fromkeys(ended.get("failed_nodes") or ())
        return list(found)

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

    def last_log(self) -> Path | None:
        """Return the log of the last attempt, or None if there is none."""
        logs = [path for path in self.logs.glob("attempt-*.log") if path.stem.partition("-")[2].isdecimal()]
        return max(logs, key=lambda path: int(path.stem.partition("-")[2]), default=None)
