"""Ranks of a run on one node: `python -m aimscale.harness.distributed.ranks NUM_RANKS -m MODULE ARGUMENTS`.

Before torch 2.10, torchrun passes on no SIGUSR2; before 2.12, it kills ranks 30 s after a signal, whatever they save.
It writes nothing about a rank that a signal ended. Torch is not imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from aimscale.harness.run.directory import EXIT_DIVERGED, EXIT_FINISHED, EXIT_OFF_TRACK, EXIT_PREEMPTED
from aimscale.harness.run.failures import handling_stop_signals
from aimscale.harness.run.timeouts import EXIT_TIMEOUT_S

FAILED_RANK = "AIMSCALE_FAILED_RANK"
"""Environment variable with the file to write after a failure: first `rank` to fail, its `exit_code`, `time`."""
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def run_ranks(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run Python with these arguments as every rank of a group on this host.

    Signals that ask a run to stop are passed on; ranks take the time that they need to save. Once one has failed, the
    others are asked to end, and killed `EXIT_TIMEOUT_S` later. All are killed when this process is.

    Returns:
        Exit code of the first rank to fail, 128 plus the signal's number if a signal ended it; 0 if none failed.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    die_with_parent = functools.partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
    ranks: list[subprocess.Popen[bytes]] = []

    def send(number: int, frame: FrameType | None = None) -> None:
        for rank in ranks:
            rank.send_signal(number)

    with handling_stop_signals(send):
        for i in range(num_ranks):
            environment = os.environ | group | {"RANK": str(i), "LOCAL_RANK": str(i)}
            command = [sys.executable, "-u", *arguments]
            ranks.append(subprocess.Popen(command, env=environment, preexec_fn=die_with_parent))
        if (failure := _first_failure(ranks)) is None:
            return EXIT_FINISHED
        exit_code, i = failure
        _record_failure(i, exit_code)
        has_crashed = exit_code not in (EXIT_PREEMPTED, EXIT_DIVERGED, EXIT_OFF_TRACK)  # where all ranks end together
        if has_crashed:
            send(signal.SIGTERM)
        kill_at = time.monotonic() + EXIT_TIMEOUT_S
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, kill_at - time.monotonic()) if has_crashed else None)
            rank.kill()
            rank.wait()
    return exit_code if exit_code > 0 else 128 - exit_code


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Wait for the first rank that fails and return its exit code, negative for a signal, and its number; None if all
    end well. Of several at once, it is one that a signal ended."""
    while True:
        exit_codes = [rank.poll() for rank in ranks]
        failures = [(exit_code, i) for i, exit_code in enumerate(exit_codes) if exit_code]
        if failures or None not in exit_codes:
            return min(failures, default=None)
        time.sleep(POLL_S)


def _record_failure(rank: int, exit_code: int) -> None:
    """Write which rank failed first to the file of `FAILED_RANK`, if it is set."""
    if FAILED_RANK in os.environ:
        with contextlib.suppress(OSError):  # the exit code still tells that the run failed
            text = json.dumps({"rank": rank, "exit_code": exit_code, "time": time.time()})
            Path(os.environ[FAILED_RANK]).write_text(text)


if __name__ == "__main__":
    sys.exit(run_ranks(int(sys.argv[1]), sys.argv[2:]))
