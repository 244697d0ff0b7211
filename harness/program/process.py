"""A process of the user: its start, its output into the log, its stop, what it leaves behind, and its provenance.

Of the program's own code are recorded the commit of its folder and the packages of its interpreter, or nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from aimscale.aim.errors import UserError
from aimscale.harness.program.metrics import ProgramError
from aimscale.harness.run.lock import held_descriptors
from aimscale.harness.run.program import ProgramSection, StopSection
from aimscale.harness.run.provenance import SOURCE, git, package_versions

MAX_LOG_BYTES = 50_000_000
"""Bytes of output that an attempt's log keeps."""
READ_BYTES = 1 << 20
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of <sys/prctl.h>
INTERPRETER = re.compile(r"python[\d.]*")
PACKAGES_TIMEOUT_S = 60
_LIST = (
    "import importlib.metadata as m, json, platform; "
    "print(json.dumps([platform.python_version(), {d.name: d.version for d in m.distributions() if d.name}]))"
)


def program_environment() -> dict[str, str]:
    """Return the environment of a program: the worker's, without what only aimscale's processes need."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("AIMSCALE_")}
    sources = {str(SOURCE), str(SOURCE / "src")}
    paths = [path for path in variables.pop("PYTHONPATH", "").split(os.pathsep) if path and path not in sources]
    # Lines are read as they come, so none may stay in a buffer.
    return variables | {"PYTHONUNBUFFERED": "1"} | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


class Process:
    """Process of the user; its constructor starts it.

    It keeps the run's lock as long as it lives, also when its supervisor is killed, and is asked to end then. Its
    children stay known when it leaves them behind.

    Attributes:
        stop_requested_at: monotonic time of the request to end, s; None before.
        was_killed: whether it was killed since it did not end in time.
    """

    def __init__(self, words: Sequence[str], directory: str, environment: Mapping[str, str], stop: StopSection) -> None:
        """Start it.

        Raises:
            ProgramError: there is no such program or folder.
        """
        self._stop = stop
        self.stop_requested_at: float | None = None
        self.was_killed = False
        self._num_written = 0
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        locks = [os.dup(descriptor) for descriptor in held_descriptors()]  # Python closes its own in a child
        try:
            self._process = subprocess.Popen(
                words,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=locks,
                preexec_fn=functools.partial(libc.prctl, _PR_SET_PDEATHSIG, self.stop_signal),
            )
        except OSError as error:
            raise ProgramError(f"cannot start {words[0]} in {directory} ({error.strerror}); correct trainer") from error
        finally:
            for descriptor in locks:
                os.close(descriptor)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._is_open = True

    @property
    def stop_signal(self) -> signal.Signals:
        """Signal that asks it to save and end."""
        return signal.Signals[f"SIG{self._stop.signal}"]

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it goes on."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to save and end, once; and kill it if that takes too long."""
        if self.stop_requested_at is None:
            self.stop_requested_at = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(self.stop_signal)
        elif not self.was_killed and time.monotonic() - self.stop_requested_at > self._stop.seconds:
            self.was_killed = True
            self._process.kill()

    def read_output(self, wait_s: float = 0.0) -> bytes:
        """Return what it writes within some time, and copy it to the log, up to `MAX_LOG_BYTES`."""
        if not self._is_open:
            time.sleep(wait_s)
            return b""
        whole = b""
        if select.select([self._output], [], [], wait_s)[0]:
            with contextlib.suppress(BlockingIOError):
                whole = os.read(self._output, READ_BYTES)
                self._is_open = bool(whole)
        if room := max(0, MAX_LOG_BYTES - self._num_written):
            sys.stdout.buffer.write(whole[:room])
            if len(whole) >= room:
                sys.stdout.buffer.write(f"\naimscale: {MAX_LOG_BYTES:,} bytes; no more are kept\n".encode())
            sys.stdout.buffer.flush()
        self._num_written += len(whole)
        return whole

    def end(self) -> None:
        """End it: ask, wait, and kill."""
        while self.poll() is None:
            self.stop()
            self.read_output(0.1)

    def end_leftovers(self) -> list[int]:
        """End the processes that it left behind, and return their ids: two writers may not be in one folder."""
        children = psutil.Process().children(recursive=True)
        processes = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(processes, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return [process.pid for process in processes]


def start_facts(program: ProgramSection, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what is recorded of a start in place of aimscale's own code and packages."""
    commit, is_dirty = folder_commit(program.directory)
    python, packages = _packages(program, environment)
    return {
        "argv": list(program.words),
        "git_commit": commit,
        "git_dirty": is_dirty,
        "packages": packages,
        "python": python,
        "supervisor": {"aimscale": package_versions().get("aimscale")},
    }


def folder_commit(directory: str) -> tuple[str | None, bool | None]:
    """Return the commit of a folder and whether files that git knows were changed since; nulls outside of git."""
    try:
        commit = git(Path(directory), "rev-parse", "HEAD").strip()
        return commit, bool(git(Path(directory), "status", "--porcelain", "--untracked-files=no").strip())
    except UserError:
        return None, None


def _packages(program: ProgramSection, environment: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
    """Return version and packages of the Python that the command starts with, if it is one."""
    first = program.words[0]
    interpreter = shutil.which(first, path=environment.get("PATH")) if os.sep not in first else first
    if interpreter is None or not INTERPRETER.fullmatch(os.path.basename(first)):
        return None, {}
    command = [interpreter, "-c", _LIST]
    try:
        done = subprocess.run(
            command, capture_output=True, check=True, timeout=PACKAGES_TIMEOUT_S, env=environment, cwd=program.directory
        )
        python, packages = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, {}
    return python, dict(sorted(packages.items()))
