"""One attempt at what a run of a program lacks: the commands that it executes, and how it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from aimscale.harness.program.metrics import ProgramError
from aimscale.harness.program.process import Process, program_environment
from aimscale.harness.run.directory import (
    EXIT_CRASHED,
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    SHARED,
    ReasonClass,
    RunDir,
)
from aimscale.harness.run.failures import StopFlag, classify, describe_full_disk, stop_signals, work_in_turn
from aimscale.harness.run.program import ProgramConfig, load_program
from aimscale.harness.run.timeouts import HEARTBEAT_S

LOOK_S = 0.2
LAST_WORDS_BYTES = 4096
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
"""Words of programs that found a disk full."""


class Stopped(Exception):
    """The program was asked to end, and ended; the sentence says how."""


class ProgramFailed(ProgramError):
    """Attempt that failed for a reason of some class."""

    def __init__(self, reason: str, reason_class: ReasonClass) -> None:
        super().__init__(reason)
        self.reason_class = reason_class


class Attempt:
    """One attempt at the training or the evaluation of a run; a subclass says what is executed.

    Attributes:
        left_behind: words about processes that the last command left behind; empty for none.
    """

    def __init__(self, run: RunDir, config: ProgramConfig, flag: StopFlag) -> None:
        self.run, self.program, self.flag = run, config.program, flag
        self.environment = program_environment()
        self.started = self._beaten = time.monotonic()
        self.left_behind, self._words, self._was_asked_to_end = "", b"", False

    def work(self) -> None:
        """Do what the run lacks.

        Raises:
            Stopped: it was asked to end.
            ProgramError: the program does not do what the run needs.
        """
        raise NotImplementedError

    def beat(self) -> None:
        """Tell how far it is."""
        self.write_beat()

    def write_beat(self, **changes: Any) -> None:
        """Write the heartbeat, with other fields of the status."""
        self._beaten = time.monotonic()
        self.run.write_status(durable=False, heartbeat=time.time(), **changes)

    def raise_if_asked_to_end(self) -> None:
        """Raise Stopped for a program that ended with success before its work was done, since it was asked to, as
        Lightning's trainer does."""
        if self._was_asked_to_end:
            raise Stopped("ended with exit code 0 when it was asked to; it goes on from its last checkpoint")

    def execute(self, words: Sequence[str], look: Callable[[bytes], None]) -> int:
        """Execute a command, call `look` with its output every few moments, and return its exit code.

        Raises:
            Stopped: it was asked to end.
        """
        process = Process(words, self.program.directory, self.environment, self.program.stop)
        try:
            while (code := process.poll()) is None:
                self._after_output(process.read_output(LOOK_S), look)
                if self.flag.is_raised:
                    process.stop()
                elif time.monotonic() - self._beaten > HEARTBEAT_S:
                    self.beat()
            while piece := process.read_output():
                self._after_output(piece, look)
            look(b"\n")
        except BaseException:
            process.end()
            raise
        finally:
            if process_ids := process.end_leftovers():
                self.left_behind = f"; it left process {', '.join(map(str, process_ids))} behind, which was ended"
                print(f"aimscale: the command ended{self.left_behind}: let it wait for what it starts", flush=True)
        self._was_asked_to_end = process.stop_requested_at is not None
        if self._was_asked_to_end and code != 0:
            raise Stopped(self._how_stopped(process, code))
        if code == EXIT_PREEMPTED:
            raise Stopped("it saved and ended by itself (exit code 75)")
        return code

    def _after_output(self, piece: bytes, look: Callable[[bytes], None]) -> None:
        self._words = (self._words + piece)[-LAST_WORDS_BYTES:]
        look(piece)

    def _how_stopped(self, process: Process, code: int) -> str:
        if code == EXIT_PREEMPTED:
            return "saved when it was asked to"
        name = process.stop_signal.name
        if process.was_killed:
            seconds = self.program.stop.seconds
            return f"did not end within {seconds} s of {name} and was killed; it goes on from its last checkpoint"
        return f"ended by {name}; it goes on from its last checkpoint"

    def failure(self, code: int, what: str) -> ProgramFailed:
        """Say how a command failed."""
        if code == -signal.SIGKILL:
            sentence = "was killed by the system (SIGKILL), usually out of memory; give it more, or a smaller batch"
            return ProgramFailed(f"{what} {sentence}", "oom")
        lines = [line.strip() for line in self._words.decode(errors="replace").splitlines() if line.strip()]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last_line = f": {lines[-1][:300]}" if lines else ""
        if full := next((line for line in reversed(lines) if any(words in line for words in FULL)), None):
            return ProgramFailed(f"{what} found a disk full ({full[:300]}); free some", "node")
        return ProgramFailed(f"{what} ended with {how}{last_line}", "code")


def make_attempts(kind: type[Attempt], runs: Sequence[RunDir]) -> int:
    """Make an attempt at each run, and return the exit code (`work_in_turn`).

    Raises:
        LockHeld: another process works on this part of the only run, or its program still does.
    """
    with stop_signals() as flag:
        return work_in_turn(runs, lambda run: _attempt(kind, run, flag))


def _attempt(kind: type[Attempt], run: RunDir, flag: StopFlag) -> int:
    """Make an attempt at a run, note how it ended, and return the exit code."""
    config = load_program(run.config)
    with run.hold():
        run.write_start()
        try:
            kind(run, config, flag).work()
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
    if full := describe_full_disk(run.root):
        kind, reason = "node", f"{reason}; {full}"
    with contextlib.suppress(OSError):
        state = "diverged" if kind == "nan" else "failed"
        failed_on = SHARED if kind == "node" else None
        run.write_status(state=state, phase="", reason=reason, reason_class=kind, failed_on=failed_on)
    if not isinstance(error, ProgramError | OSError):
        raise error
    print(f"aimscale: {reason}", file=sys.stderr, flush=True)
    return EXIT_DIVERGED if kind == "nan" else EXIT_CRASHED
