"""Processes of runs on this machine's cores, forked from a server that has imported PyTorch and DeepSpeed once.

A start of its own takes each run two to three seconds of a core, as long as hundreds of steps of a small one. GPUs are
left to starts of their own: CUDA cannot be initialised again in a fork. A fork imports this module, which therefore
needs nothing else of sweeps.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from aimscale.harness.run.failures import STOP_SIGNALS, start_fork_server

PROGRAMS = ("aimscale.harness.train", "aimscale.harness.evaluate")
"""Programs that may be forked."""
_PRELOAD = ("aimscale.harness.distributed.preloaded", *(f"{program}.run" for program in PROGRAMS))
_READ_AT_IMPORT = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "DS_", "LD_", "CUDA")
"""Beginnings of the names of variables that interpreters and libraries read when they are loaded."""
_server_variables: dict[str, str] | None = None


class ForkedProgram:
    """Process of a program, with the methods of a `subprocess.Popen` that a worker uses."""

    def __init__(self, words: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        """Start a program (`-m NAME ARGUMENTS`) in a session of its own, with these environment variables alone."""
        global _server_variables
        with _start_of_server({**variables, "DS_ACCELERATOR": "cpu"}):  # else it tells its choice
            context = start_fork_server(_PRELOAD)
            arguments = (words[1:], dict(variables), log, os.getcwd())
            self._process = context.Process(target=_execute, args=arguments, name=words[1])
            self._process.start()
        _server_variables = _read_at_import(variables)
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def can_fork(command: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Return whether a command is one of this interpreter's programs, and its environment that of the server, if there
    is one already."""
    is_program = list(command[:2]) == [sys.executable, "-m"] and command[2] in PROGRAMS
    return is_program and _server_variables in (None, _read_at_import(variables))


def _read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(_READ_AT_IMPORT)}


def _execute(words: Sequence[str], variables: Mapping[str, str], log: Path, directory: str) -> None:
    """Become the program."""
    os.setsid()
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(directory)
    _set_environment(variables)
    sys.argv = list(words)
    sys.orig_argv = [sys.executable, "-m", *words]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def _start_of_server(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these environment variables alone for the block, which the server starts with, and no script in `__main__`:
    a child would run the user's once more."""
    environment, script = dict(os.environ), sys.modules["__main__"]
    _set_environment(variables)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        _set_environment(environment)
        sys.modules["__main__"] = script


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
