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
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimscale.analysis.formulas import FormulaError, parse_formula
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
from aimscale.harness.program.process import Process, program_environment
from aimscale.harness.program.provenance import start_facts
from aimscale.harness.run.directory import (
    EXIT_CRASHED,
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    ReasonClass,
    RunDir,
    probe_key,
)
from aimscale.harness.run.failures import StopFlag, classify, stop_signals
from aimscale.harness.run.files import flush, read_object, write_json
from aimscale.harness.run.lock import check_writer
from aimscale.harness.run.program import PROGRAM_FILE, ProgramConfig, ProgramSection, load_program
from aimscale.harness.run.provenance import record_start
from aimscale.harness.run.timeouts import HEARTBEAT_S

LOOK_S = 0.2
RECENT_LINES = 10
"""Number of last lines over which the rate is taken."""
LAST_WORDS_BYTES = 4096


def program_words(run: RunDir, program: ProgramSection) -> tuple[str, ...]:
    """Return the command that starts the run, or goes on with it."""
    resumes = program.resume_if_exists is not None and (run.path / program.resume_if_exists).exists()
    return (*program.words, *(program.resume_words if resumes else ()))


class Stopped(Exception):
    """The program was asked to end, and ended; the sentence says how."""


def supervise(path: Path) -> int:
    """Train and evaluate what the run in `path` lacks; returns the exit code (`harness.run.directory`).

    Raises:
        LockHeld: another process executes this run, or its program still does.
    """
    run = RunDir(path)
    config = load_program(run.config)
    with stop_signals() as flag, run.hold():
        run.write_start()
        try:
            Supervisor(run, config, flag).work()
        except Stopped as stopped:
            run.write_status(state="preempted", phase="", reason=str(stopped))
            return EXIT_PREEMPTED
        except Exception as error:
            return _note_failure(run, error)
        run.write_status(state="finished", phase="", heartbeat=time.time())
    return EXIT_FINISHED


def _note_failure(run: RunDir, error: Exception) -> int:
    """Write why the attempt failed, and return the exit code; an error of aimscale itself goes on."""
    kind, reason = classify(error)
    if isinstance(error, ProgramFailed):
        kind, reason = error.reason_class, str(error)
    with contextlib.suppress(OSError):
        state = "diverged" if kind == "nan" else "failed"
        run.write_status(state=state, phase="", reason=reason, reason_class=kind)
    if not isinstance(error, ProgramError | OSError):
        raise error
    print(f"aimscale: {reason}", file=sys.stderr, flush=True)
    return EXIT_DIVERGED if kind == "nan" else EXIT_CRASHED


class ProgramFailed(ProgramError):
    """Attempt that failed for a reason of some class."""

    def __init__(self, reason: str, reason_class: ReasonClass) -> None:
        super().__init__(reason)
        self.reason_class = reason_class


class Supervisor:
    """Supervisor of one attempt."""

    def __init__(self, run: RunDir, config: ProgramConfig, flag: StopFlag) -> None:
        self._run, self._program, self._flag = run, config.program, flag
        self._environment = program_environment()
        before = read_object(run.path / PROGRAM_FILE) or {}
        self._wall_before = float(before.get("wall_s", 0.0))
        self._measurements = Measurements(
            program=config.program, num_params=before.get("N"), furthest=before.get("D", 0)
        )
        self._started = self._beaten = time.monotonic()
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=RECENT_LINES)
        points = run.read_curve()
        self._points = {point["images_seen"]: point["val_loss"] for point in points if "val_loss" in point}
        self._facts = start_facts(config.program, self._environment)
        self._words, self._left_behind, self._was_asked_to_end = b"", "", False

    def work(self) -> None:
        """Train the missing budgets, then evaluate them.

        Raises:
            Stopped: it was asked to end.
            ProgramError: the program does not do what the run needs.
        """
        facts = {"world_size": self._program.devices, "num_threads": self._program.threads}
        record_start(self._run, facts | self._facts)
        if missing := self._missing_budgets():
            self._train(missing)
        for name, commands in self._program.evaluate.items():
            for budget, words in commands.items():
                self._evaluate(name, budget, words)

    def _train(self, missing: Sequence[int]) -> None:
        words, pattern = program_words(self._run, self._program), self._program.metrics.pattern
        follower = FileReader(self._run.metrics) if pattern is None else None
        if follower is not None:
            while lines := follower.read():  # of earlier attempts, whose times tell nothing of this one
                self._take(lines, is_old=True)
        self._beat("train" if self._measurements.last else "no line yet")
        print(f"aimscale: {shlex.join(words)} (in {self._program.directory})", flush=True)
        output, code = LineReader(), 0
        try:
            code = self._execute(words, lambda piece: self._look(output, follower, piece))
        finally:
            with contextlib.suppress(OSError):
                self._beat()
        if code != 0:
            raise self._failure(code, "its command")
        for budget in missing:
            if (line := self._measurements.row_at_end(budget)) is not None:
                self._record_row(budget, line)
        self._refuse_missing()

    def _raise_if_asked_to_end(self) -> None:
        """Raise Stopped for a program that ended with success before its work was done, since it was asked to, as
        Lightning's trainer does."""
        if self._was_asked_to_end:
            raise Stopped("ended with exit code 0 when it was asked to; it goes on from its last checkpoint")

    def _missing_budgets(self) -> list[int]:
        """Return the budgets without a row, ascending."""
        rows = {row["images_seen"] for row in self._run.read_rows()}
        return [budget for budget in self._program.budgets if budget not in rows]

    def _refuse_missing(self) -> None:
        if missing := self._missing_budgets():
            self._raise_if_asked_to_end()
            if self._measurements.not_finite_at is not None:
                raise ProgramFailed(f"the validation loss at {self._measurements.not_finite_at:,} is not finite", "nan")
            raise ProgramFailed(self._measurements.missing_row_reason(missing[0]) + self._left_behind, "config")

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
            check_writer(self._run.curve)
            with self._run.curve.open("a") as file:
                file.write("".join(texts))
            flush(self._run.curve)

    def _execute(self, words: Sequence[str], look: Any) -> int:
        """Execute a command, call `look` with its output every few moments, and return its exit code.

        Raises:
            Stopped: it was asked to end.
        """
        process = Process(words, self._program.directory, self._environment, self._program.stop)
        try:
            while (code := process.poll()) is None:
                self._after_output(process.read_output(LOOK_S), look)
                if self._flag.is_raised:
                    process.stop()
                elif time.monotonic() - self._beaten > HEARTBEAT_S:
                    self._beat()
            while piece := process.read_output():
                self._after_output(piece, look)
            look(b"\n")
        except BaseException:
            process.end()
            raise
        finally:
            if process_ids := process.end_leftovers():
                self._left_behind = f"; it left process {', '.join(map(str, process_ids))} behind, which was ended"
                print(f"aimscale: the command ended{self._left_behind}: let it wait for what it starts", flush=True)
        self._was_asked_to_end = process.stop_requested_at is not None
        if self._was_asked_to_end and code != 0:
            raise Stopped(self._how_stopped(process, code))
        if code == EXIT_PREEMPTED:
            raise Stopped("it saved and ended by itself (exit code 75)")
        return code

    def _after_output(self, piece: bytes, look: Any) -> None:
        self._words = (self._words + piece)[-LAST_WORDS_BYTES:]
        look(piece)

    def _how_stopped(self, process: Process, code: int) -> str:
        if code == EXIT_PREEMPTED:
            return "saved when it was asked to"
        name = process.stop_signal.name
        if process.was_killed:
            seconds = self._program.stop.seconds
            return f"did not end within {seconds} s of {name} and was killed; it goes on from its last checkpoint"
        return f"ended by {name}; it goes on from its last checkpoint"

    def _failure(self, code: int, what: str) -> ProgramFailed:
        """Say how a command failed."""
        if code == -signal.SIGKILL:
            sentence = "was killed by the system (SIGKILL), usually out of memory; give it more, or a smaller batch"
            return ProgramFailed(f"{what} {sentence}", "oom")
        lines = [line.strip() for line in self._words.decode(errors="replace").splitlines() if line.strip()]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last_line = f": {lines[-1][:300]}" if lines else ""
        return ProgramFailed(f"{what} ended with {how}{last_line}", "code")

    def _beat(self, phase: str | None = None) -> None:
        """Write the heartbeat, the last line of the program, and the pace."""
        self._beaten = time.monotonic()
        measurements, pace = self._measurements, None
        if len(self._recent) > 1 and self._recent[-1][0] > self._recent[0][0]:
            (first_s, first), (last_s, last) = self._recent[0], self._recent[-1]
            pace = (last - first) / (last_s - first_s) if last > first else None
        changes: dict[str, Any] = {"phase": phase} if phase else {"phase": "train"} if measurements.last else {}
        if measurements.last:
            changes |= {"images_seen": measurements.last, "images_done": measurements.furthest}
        self._run.write_status(
            durable=False,
            heartbeat=time.time(),
            loss=measurements.loss,
            images_per_s=pace,
            images_planned=self._program.budgets[-1],
            **changes,
        )
        self._save_measurements()

    def _wall_s(self) -> float:
        return self._wall_before + time.monotonic() - self._started

    def _save_measurements(self) -> None:
        values = {"N": self._measurements.num_params, "D": self._measurements.furthest, "wall_s": self._wall_s()}
        write_json(self._run.path / PROGRAM_FILE, values, durable=False)

    def _record_row(self, budget: int, line: Line) -> None:
        """Write the row of a budget."""
        measurements, program = self._measurements, self._program
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
        self._run.record_row(row | ({"D": line["D"]} if line["D"] != budget else {}))
        self._run.record_curve()

    def _evaluate(self, name: str, budget: int, words: Sequence[str]) -> None:
        """Measure what another program measures of a budget, and add it to its row."""
        (row,) = [each for each in self._run.read_rows() if each["images_seen"] == budget]
        evaluated = row.get("evaluated") or []
        if name in evaluated:
            return
        self._beat(f"{name} at {budget:,}")
        result = self._run.path / "evaluations" / str(budget) / f"{name}.json"
        result.parent.mkdir(parents=True, exist_ok=True)
        if code := self._execute(words, lambda piece: None):
            raise self._failure(code, f"trainer.evaluate.{name}")
        if (evaluation := read_object(result)) is None:
            self._raise_if_asked_to_end()
            raise ProgramFailed(f"trainer.evaluate.{name} ended with exit code 0 and wrote no {result}", "config")
        entries = probe_entries(evaluation.get("accuracy") or {}, name)
        measured = {probe_key(entry) for entry in entries}
        kept = [entry for entry in row.get("probes") or () if probe_key(entry) not in measured]
        self._run.record_row(row | {"probes": [*kept, *entries], "evaluated": [*evaluated, name]})
