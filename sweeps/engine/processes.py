"""The processes of runs: forked from one that has imported everything, or started cold.

To import PyTorch and the rest costs seconds, more than all else in a small run. So once a queue has more than one run
to execute, it starts a warm parent (`harness.train.__main__`), and has that fork the process of each run of one device.
Such a process is the queue's own child: its parent ends at once, and the queue, as the nearest subreaper, takes it
over. It lives, dies and is told to save like one that was started cold, whatever becomes of the warm parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path

from aimscale.sweeps.engine.devices import TRAIN_COMMAND, Machine

Command = Callable[[Path, int], list[str]]
"""(run directory, devices) -> the program that executes the run."""
FORK_TIMEOUT_S = 300.0
"""A warm parent that takes longer, imports included, is given up."""
_PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>


class ForkedProcess:
    """A child of this process that it did not start: what is used of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        """Of the leader of a process group of its own."""
        self.returncode: int | None = None
        """Negative for a signal."""

    def poll(self) -> int | None:
        """`returncode`, when it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):  # a signal's handler asks while this function is about to tell
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it while the process lives."""
        if self.poll() is None:
            os.kill(self.pid, number)


Process = subprocess.Popen[bytes] | ForkedProcess


class ForkServer:
    """A process that forks the processes of runs; it ends with this one."""

    def __init__(self, python: tuple[str, ...], environment: dict[str, str]) -> None:
        """Start it; it works from when its imports are done.

        Args:
            environment: with what is read at imports, as `OMP_NUM_THREADS`.
        """
        self._process = subprocess.Popen(
            [*python, *TRAIN_COMMAND, "--warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what cannot be imported here cannot be in a cold run either, whose log says so
            env=environment,
            start_new_session=True,
        )

    def fork(self, arguments: list[str], environment: dict[str, str], log: Path) -> ForkedProcess | None:
        """The process of a run, which writes to `log`, a file that is there; None where there is no answer."""
        request = {"arguments": arguments, "environment": environment, "log": str(log)}
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None, "a pipe was asked for"
        assert answers is not None, "a pipe was asked for"
        with contextlib.suppress(BrokenPipeError):
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
            if select.select([answers], [], [], FORK_TIMEOUT_S)[0] and (answer := answers.readline()):
                return ForkedProcess(int(answer))
        return None

    def close(self) -> int:
        """End it, if it has not ended, and return how it did."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # a request that it did not read is lost
            pass
        return self._process.wait()


class RunProcesses:
    """Starts the process of each run on a machine; to be closed when all of them have ended."""

    def __init__(self, machine: Machine, command: Command | None, notify: Callable[[str], None]) -> None:
        """`command` replaces the program that executes a run; `say` takes a sentence for the user."""
        self._machine, self._command, self._say = machine, command, notify
        self._parents: dict[str, ForkServer | None] = {}  # by what OpenMP was told at their imports; None: it ended

    def start(
        self, run_dir: Path, num_devices: int, environment: dict[str, str], log: Path, *, more_follow: bool
    ) -> Process:
        """The process of a run, leader of its own process group; Ctrl-C on the terminal does not reach it.

        Args:
            are_more: whether others may follow, for which a warm parent is worth its start.

        Raises:
            OSError: the log cannot be written, or no process be made.
        """
        is_plain = num_devices == 1 and self._machine.nodes == 1 and self._command is None
        with log.open("ab") as output:
            process = self._fork(run_dir, environment, log, more_follow) if is_plain else None
            return process or subprocess.Popen(
                (self._command or self._machine.command)(run_dir, num_devices),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _fork(self, run_dir: Path, environment: dict[str, str], log: Path, more_follow: bool) -> ForkedProcess | None:
        threads = environment["OMP_NUM_THREADS"]
        if threads not in self._parents and more_follow and _set_subreaper(True):
            self._parents[threads] = ForkServer(self._machine.python, environment)
        parent = self._parents.get(threads)
        process = parent.fork([str(run_dir)], environment, log) if parent else None
        if parent and not process:
            self._parents[threads] = None
            self._say(f"runs start slower now: the process that forked them ended (exit code {parent.close()})")
        return process

    def close(self) -> None:
        """End the warm parents."""
        for parent in filter(None, self._parents.values()):
            parent.close()
        if self._parents:
            _set_subreaper(False)


def _set_subreaper(does: bool) -> bool:
    """Make this process the subreaper of those below it, or no longer; returns whether that was done."""
    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(does), 0, 0, 0) == 0)
