"""Processes of runs: forked from a server that has imported everything, or started as new interpreters.

Importing PyTorch and the rest takes seconds, longer than all else in a small run. A worker with more than one run to
execute therefore starts a fork server (`harness.train.__main__`), which forks the process of each run that uses one
device. The forked process becomes a child of the worker: its parent exits at once, and the worker, as the nearest
subreaper, adopts it. It ends and receives signals like any other child, whatever happens to the fork server.
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
"""Function from (run directory, devices) to the command that executes the run."""
FORK_TIMEOUT_S = 300.0
"""Time to wait for the fork server, imports included, s; then runs start without it."""
_PR_SET_CHILD_SUBREAPER = 36  # of <sys/prctl.h>


class ForkedProcess:
    """Child that this process adopted; has the part of the interface of `subprocess.Popen` that is used."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        """Process id, which is also the id of its process group."""
        self.returncode: int | None = None
        """Exit code, negative for a signal; None while it runs."""

    def poll(self) -> int | None:
        """Return the exit code if the process has ended, else None."""
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):  # a signal handler polled in between and reaped it
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it is alive."""
        if self.poll() is None:
            os.kill(self.pid, number)


Process = subprocess.Popen[bytes] | ForkedProcess


class ForkServer:
    """Process that forks the processes of runs; it ends with this one."""

    def __init__(self, python: tuple[str, ...], environment: dict[str, str]) -> None:
        """Start the server, which answers once its imports are done.

        Args:
            environment: environment variables, including those that are read at import, such as `OMP_NUM_THREADS`.
        """
        self._process = subprocess.Popen(
            [*python, *TRAIN_COMMAND, "--warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # an import that fails here also fails in the run itself, whose log shows it
            env=environment,
            start_new_session=True,
        )

    def fork(self, arguments: list[str], environment: dict[str, str], log: Path) -> ForkedProcess | None:
        """Fork the process of a run and return it, or None if the server does not answer.

        Args:
            log: existing file to which the process appends its output.
        """
        request = {"arguments": arguments, "environment": environment, "log": str(log)}
        request_pipe, responses = self._process.stdin, self._process.stdout
        assert request_pipe is not None, "a pipe was asked for"
        assert responses is not None, "a pipe was asked for"
        with contextlib.suppress(BrokenPipeError):
            request_pipe.write(json.dumps(request).encode() + b"\n")
            request_pipe.flush()
            if select.select([responses], [], [], FORK_TIMEOUT_S)[0] and (answer := responses.readline()):
                return ForkedProcess(int(answer))
        return None

    def close(self) -> int:
        """Kill the server if it is alive, and return its exit code."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # unread requests are dropped
            pass
        return self._process.wait()


class RunProcesses:
    """Starter of the processes of runs on a machine; close it after all of them have ended."""

    def __init__(self, machine: Machine, command: Command | None, notify: Callable[[str], None]) -> None:
        """Prepare to start runs.

        Args:
            command: replaces the program that executes a run.
            notify: receives sentences for the user.
        """
        self._machine, self._command, self._notify = machine, command, notify
        self._servers: dict[str, ForkServer | None] = {}  # by OMP_NUM_THREADS; None: it ended

    def start(
        self, run_dir: Path, num_devices: int, environment: dict[str, str], log: Path, *, more_follow: bool
    ) -> Process:
        """Start the process of a run in its own process group, so that Ctrl-C on the terminal does not reach it.

        Args:
            more_follow: whether further runs may follow, for which a fork server is worth its start.

        Raises:
            OSError: the log cannot be written, or no process can be created.
        """
        can_fork = num_devices == 1 and self._machine.nodes == 1 and self._command is None
        with log.open("ab") as output:
            process = self._fork(run_dir, environment, log, more_follow) if can_fork else None
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
        if threads not in self._servers and more_follow and _set_subreaper(True):
            self._servers[threads] = ForkServer(self._machine.python, environment)
        server = self._servers.get(threads)
        process = server.fork([str(run_dir)], environment, log) if server else None
        if server and not process:
            self._servers[threads] = None
            self._notify(f"runs start slower now: the process that forked them ended (exit code {server.close()})")
        return process

    def close(self) -> None:
        """Kill the fork servers."""
        for server in filter(None, self._servers.values()):
            server.close()
        if self._servers:
            _set_subreaper(False)


def _set_subreaper(does: bool) -> bool:
    """Make this process the subreaper of its descendants, or no longer; return whether the system call succeeded."""
    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(does), 0, 0, 0) == 0)
