"""The supervisor of a run that a program trains: `python -m aimscale.harness.program RUN_DIR`.

It stands where aimscale's own trainer stands: it holds the run's lock, which the program shares, follows what the
program tells into status, curve and rows, passes on the request to stop, and says how the attempt ended. Neither torch
nor pandas is imported.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import json
import shlex
import time
from collections.abc import Sequence
from typing import Any

from aimscale.analysis.formulas import FormulaError, parse_formula
from aimscale.harness.program.attempt import Attempt, ProgramFailed
from aimscale.harness.program.metrics import (
    KNOWN_KEYS,
    POINT_DISTANCE,
    FileReader,
    Line,
    LineReader,
    Measurements,
    ProgramError,
    is_number,
    probe_entries,
)
from aimscale.harness.program.process import start_facts
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import StopFlag
from aimscale.harness.run.files import flush, read_object, write_json
from aimscale.harness.run.lock import check_writer
from aimscale.harness.run.program import PROGRAM_FILE, ProgramConfig
from aimscale.harness.run.provenance import record_start

RECENT_LINES = 10
"""Number of last lines over which the rate is taken."""


class Supervisor(Attempt):
    """Supervisor of one attempt at the training."""

    def __init__(self, run: RunDir, config: ProgramConfig, flag: StopFlag) -> None:
        super().__init__(run, config, flag)
        before = read_object(run.path / PROGRAM_FILE) or {}
        self._wall_before = float(before.get("wall_s", 0.0))
        self._measurements = Measurements(
            program=config.program, num_params=before.get("N"), furthest=before.get("D", 0)
        )
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=RECENT_LINES)
        points = run.read_curve()
        self._points = {point["images_seen"]: point["val_loss"] for point in points if "val_loss" in point}
        self._facts = start_facts(config.program, self.environment)

    def work(self) -> None:
        """Train the missing budgets."""
        facts = {"world_size": self.program.devices, "num_threads": self.program.threads}
        record_start(self.run, facts | self._facts)
        if missing := self._missing_budgets():
            self._train(missing)

    def _train(self, missing: Sequence[int]) -> None:
        words, program, pattern = self.program.words, self.program, self.program.metrics.pattern
        if program.resume_if_exists is not None and (self.run.path / program.resume_if_exists).exists():
            words += program.resume_words
        follower = FileReader(self.run.metrics) if pattern is None else None
        if follower is not None:
            while lines := follower.read():  # of earlier attempts, whose times tell nothing of this one
                self._take(lines, is_old=True)
        self.beat("train" if self._measurements.last else "no line yet")
        print(f"aimscale: {shlex.join(words)} (in {self.program.directory})", flush=True)
        output, code = LineReader(), 0
        try:
            code = self.execute(words, lambda piece: self._look(output, follower, piece))
        finally:
            with contextlib.suppress(OSError):
                self.beat()
        if code != 0:
            raise self.failure(code, "its command")
        for budget in missing:
            if (line := self._measurements.row_at_end(budget)) is not None:
                self._record_row(budget, line)
        self._refuse_missing()

    def _missing_budgets(self) -> list[int]:
        """Return the budgets without a row, ascending."""
        rows = {row["images_seen"] for row in self.run.read_rows()}
        return [budget for budget in self.program.budgets if budget not in rows]

    def _refuse_missing(self) -> None:
        if missing := self._missing_budgets():
            self.raise_if_asked_to_end()
            if self._measurements.not_finite_at is not None:
                raise ProgramFailed(f"the validation loss at {self._measurements.not_finite_at:,} is not finite", "nan")
            raise ProgramFailed(self._measurements.missing_row_reason(missing[0]) + self.left_behind, "config")

    def _look(self, output: LineReader, follower: FileReader | None, piece: bytes) -> None:
        """Take the lines that are new."""
        if follower is None:
            self._take(output.split(piece))
            return
        while lines := follower.read():
            self._take(lines)

    def _take(self, lines: list[bytes], *, is_old: bool = False) -> None:
        """Take lines into curve, rows and the rate."""
        points: list[Line] = []
        for line in self._measurements.read(lines):
            if "val_loss" in line and self._measurements.measured is line:
                points.append(line)
                if (budget := line.get("budget")) and round(budget) in self._measurements.rows:
                    self._record_row(round(budget), line)
            if not is_old:
                self._recent.append((line["time"] if is_number(line.get("time")) else time.time(), line["D"]))
        self._append_points(points)

    def _append_points(self, lines: Sequence[Line]) -> None:
        """Add points to the curve, those that are new and far enough from the one before."""
        texts = []
        for line in lines:
            at, loss = line["D"], float(line["val_loss"])
            last = max((each for each in self._points if each < at), default=0)
            if self._points.get(at) == loss or at < last * (1 + POINT_DISTANCE) or "budget" in line:
                continue
            self._points[at] = loss
            texts.append(json.dumps({"images_seen": at, "val_loss": loss, "time": time.time()}) + "\n")
        if texts:
            check_writer(self.run.curve)
            with self.run.curve.open("a") as file:
                file.write("".join(texts))
            flush(self.run.curve)

    def beat(self, phase: str | None = None) -> None:
        """Write the heartbeat, the last line of the program, and the pace."""
        measurements, pace = self._measurements, None
        if len(self._recent) > 1 and self._recent[-1][0] > self._recent[0][0]:
            (first_s, first), (last_s, last) = self._recent[0], self._recent[-1]
            pace = (last - first) / (last_s - first_s) if last > first else None
        changes: dict[str, Any] = {"phase": phase} if phase else {"phase": "train"} if measurements.last else {}
        if measurements.last:
            changes |= {"images_seen": measurements.last, "images_done": measurements.furthest}
        changes |= {"loss": measurements.loss, "images_per_s": pace, "images_planned": self.program.budgets[-1]}
        self.write_beat(**changes)
        values = {"N": measurements.num_params, "D": measurements.furthest, "wall_s": self._wall_s()}
        write_json(self.run.path / PROGRAM_FILE, values, durable=False)

    def _wall_s(self) -> float:
        return self._wall_before + time.monotonic() - self.started

    def _record_row(self, budget: int, line: Line) -> None:
        """Write the row of a budget."""
        measurements, program = self._measurements, self.program
        values = {**program.values, "N": measurements.num_params, "D": budget}
        flops = line.get("C")
        if flops is None and measurements.num_params is not None:
            try:
                flops = float(parse_formula(program.flops)(values))
            except FormulaError as error:
                raise ProgramError(f"trainer.flops: {error}") from error
        commit, is_dirty = self._facts["git_commit"], self._facts["git_dirty"]
        wall_s = self._wall_s()
        row = {
            **{key: value for key, value in line.items() if key not in KNOWN_KEYS},
            "run_id": program.run_id,
            "size": program.size,
            "seed": program.seed,
            "unit": program.unit,
            "images_seen": budget,
            "params_total": measurements.num_params,
            "flops_train": flops,
            "val_loss": float(line["val_loss"]),
            "val_loss_se": line.get("val_loss_se"),
            "train_loss": line.get("loss", measurements.loss),
            "wall_s": wall_s,
            "device_hours": wall_s * program.devices / 3600,
            "images_per_s": line["D"] / wall_s,
            "world_size": program.devices,
            "git_commit": f"{commit}{'+dirty' if is_dirty else ''}" if commit else None,
            "setup": program.setup,
            "probes": probe_entries(line.get("accuracy") or ({} if program.together else measurements.accuracies)),
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self.run.record_row(row | ({"D": line["D"]} if line["D"] != budget else {}))
        self.run.record_curve()
