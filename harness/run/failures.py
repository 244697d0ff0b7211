"""Processes of runs: how they are forked and stopped, the exceptions that end them on purpose, and the classification
of all others. Torch is not imported."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import (
    EXIT_CRASHED,
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    ReasonClass,
    RunDir,
)
from aimscale.harness.run.lock import LockLost
from aimscale.harness.run.timeouts import EXIT_TIMEOUT_S

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
"""Signals that stop a run: Slurm's end of a job, its warning before a time limit or a preemption, a closed terminal,
and Ctrl-C."""

LOST_PEER = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"),
    *("Timed out waiting", "timed out in blocking wait"),
)
"""Words of gloo and NCCL when the process at the other end died, or kept this one waiting for too long."""
WATCHDOG = (
    *("Watchdog caught collective operation timeout", "watchdog thread terminated with exception"),
    "DistBackendError",
)
"""Words in the log of a rank that NCCL's watchdog ended (SIGABRT), without an exception in Python."""
LOST_RANK = "another rank is gone or stands still"
"""Start of the reason of a rank that lost another."""

DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EXDEV, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.EFBIG),
}
"""Error numbers that are no fault of the program: a disk that is full, read-only, closed to the user, or failing."""


FULL_BYTES = 1 << 20
"""A disk with fewer bytes free is full, or one of less than a GB with less than a thousandth."""


class PreemptedError(Exception):
    """Stop requested by a signal; the run has saved."""


class DivergedError(UserError):
    """Too many non-finite steps in a row."""

    exit_code = EXIT_DIVERGED
    ended: ClassVar[dict[str, str]] = {"state": "diverged", "reason_class": "nan"}
    """How `status.json` says that the run ended."""


class NoMemoryError(UserError):
    """Memory ran out."""

    exit_code = EXIT_CRASHED


class StandstillError(UserError):
    """Process that this one waits for, and that stands still."""

    exit_code = EXIT_CRASHED


class TooLargeError(NoMemoryError):
    """Micro-batch for which memory ran out before the first checkpoint of a start; the next takes half of it."""

    def __init__(self, sentence: str, executed: dict[str, Any]) -> None:
        """Store how the step was executed, see `Status.too_large`."""
        super().__init__(sentence)
        self.executed = executed


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""Words of CUDA, torch's CPU allocator and cuBLAS when memory is short."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    is_kind = isinstance(error, MemoryError | NoMemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_kind or any(sign in str(error) for sign in OUT_OF_MEMORY)


@contextlib.contextmanager
def memory_advice(advice: str = "use more ranks, each of which then holds less") -> Iterator[None]:
    """Raise NoMemoryError, with advice on what to do, if memory runs out in the block."""
    try:
        yield
    except Exception as error:
        if isinstance(error, NoMemoryError) or not is_out_of_memory(error):
            raise
        raise NoMemoryError(f"{describe_out_of_memory(error)}; {advice}") from error


def describe_out_of_memory(error: BaseException) -> str:
    """Extract from an allocator's message how much memory was asked for."""
    text = " ".join(str(error).split()) or "out of memory"
    asked = re.search(r"[Tt]ried to allocate [\d.]+ \w+", text)
    return f"out of memory ({asked[0] if asked else text[:200]})"


class StopFlag:
    """Flag that a signal raises and the training loop reads; nothing else happens in the handler."""

    def __init__(self) -> None:
        self.is_raised = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal; a second Ctrl-C does not wait for the save."""
        if signum == signal.SIGINT and self.is_raised:
            raise KeyboardInterrupt
        self.is_raised = True


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Yield a flag that `STOP_SIGNALS` raise during the block."""
    flag = StopFlag()
    with handling_stop_signals(flag):
        yield flag


@contextlib.contextmanager
def handling_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle `STOP_SIGNALS` by this handler during the block, then restore the previous handlers.

    Ignored signals stay ignored: `nohup` ignores SIGHUP. Outside the main thread, which alone may handle signals,
    nothing is changed.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (STOP_SIGNALS if is_main else ())}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block stop signals for the block and for processes that start in it: Slurm signals all processes of a step, and
    the trainer saves and ends its workers itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server(preload: Sequence[str]) -> ForkServerContext:
    """Start the server that processes are forked from; if started early, it imports these modules in the meantime.

    A fork of the trainer itself would copy locks that its other threads happen to hold, and about one in thousands
    would then wait for ever; the server has a single thread.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # the server starts it anyway, but it does not inherit two of the blocked signals
    with stop_signals_blocked():
        forkserver.ensure_running()
    return context


def disk_sentence(error: OSError) -> str | None:
    """Say what failed on a disk, and where; None for other kinds of `OSError`."""
    if error.errno not in DISK_ERRORS:
        return None
    where = error.filename2 or error.filename  # the target of a rename
    return f"{where or 'a file'}: {error.strerror}; mend that, then give the same command again: saved work is whole"


def describe_full_disk(folder: Path) -> str:
    """Say that the disk of a folder has no space, or no room for more files; empty if it has, or does not tell."""
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        if disk.f_blocks and disk.f_bavail < max(1, min(disk.f_blocks // 1000, FULL_BYTES // disk.f_frsize)):
            return f"the disk of {folder} is full ({disk.f_bavail * disk.f_frsize:,} bytes free); free some"
        if disk.f_files and disk.f_favail == 0:
            return f"the disk of {folder} holds as many files as it can; remove some"
    return ""


LIMITS = (
    *("Cannot allocate memory", "failed to map segment", "Too many open files", "Resource temporarily unavailable"),
    "can't start new thread",
)
"""Words of the system and of Python when a limit on memory, files, processes or threads is reached."""


def limit_sentence(error: BaseException) -> str | None:
    """Say that a limit of the shell or the container was reached; None for other errors."""
    text = " ".join(str(error).split())[:200]
    if not isinstance(error, MemoryError) and not any(words in text for words in LIMITS):
        return None
    return f"{text or 'out of memory'}; a limit of this shell or container is too low (`ulimit -a`, cgroup): raise it"


def classify(error: BaseException) -> tuple[ReasonClass, str]:
    """Return the kind of a failure and one sentence about it."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    sentence = text if isinstance(error, UserError) else f"{name}: {text}"
    if is_out_of_memory(error):
        return "oom", sentence
    if isinstance(error, UserError):
        kinds: dict[str, ReasonClass] = dict.fromkeys(("CheckpointError", "LaunchError", "StandstillError"), "node")
        kinds |= dict.fromkeys(("DataError", "ProbeError", "WeightsError"), "data")
        return kinds.get(name, "config"), sentence
    if isinstance(error, OSError):
        return "node", disk_sentence(error) or sentence
    if any(sign in text for sign in LOST_PEER):
        return "node", f"{LOST_RANK}, and its own entry in logs/ may say why ({sentence})"
    if isinstance(error, LockLost) or is_of_network(error):
        return "node", sentence
    return "code", sentence


def is_of_network(error: BaseException) -> bool:
    """Return whether an error says that ranks cannot reach each other, whichever of them is to blame."""
    text = str(error)
    is_user_error = isinstance(error, UserError | OSError)
    words = "onnection" in text or "NCCL" in text or "gloo" in text
    return not is_user_error and (type(error).__name__.startswith("Dist") or words)


def is_shared(error: BaseException, run: Path) -> bool:
    """Return whether the cause of a failure lies outside of the node that met it, as the disk of `run` does."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        named = error.filename2 or error.filename
        return named is None or _device_of(Path(os.fsdecode(named))) == _device_of(run)
    return isinstance(error, LockLost) or type(error).__name__ == "CheckpointError"


def _device_of(path: Path) -> int | None:
    """Return the file system that holds a path or would; None if that cannot be read."""
    existing = next((each for each in (path, *path.absolute().parents) if each.exists()), None)
    return None if existing is None else existing.stat().st_dev


def exit_after(seconds: float) -> threading.Timer:
    """End this process after a time, even if its exit hangs; cancel the timer to let it go on."""
    timer = threading.Timer(seconds, os._exit, [EXIT_CRASHED])
    timer.daemon = True
    timer.start()
    return timer


def blames_another_rank(sentence: str) -> bool:
    """Return whether a failure only reports that another rank failed."""
    return sentence.startswith(LOST_RANK) or re.search(r"\brank \d+ failed", sentence) is not None


def work_in_turn(runs: Sequence[RunDir], work: Callable[[RunDir], int], *, raises: bool = False) -> int:
    """Work on runs one after the other; returns the first exit code that tells of no good end, or else 0.

    A run that fails does not keep those after it from their turn, unless `raises`; a request to stop does.
    """
    tokens, exit_code = os.environ.get("AIMSCALE_CLAIM", "").split(","), EXIT_FINISHED
    for number, run in enumerate(runs):
        if len(tokens) > 1:  # of each run in turn, if a worker started this
            os.environ["AIMSCALE_CLAIM"] = tokens[number]
        try:
            code = work(run)
        except Exception as error:
            if raises or len(runs) == 1:
                raise
            code = EXIT_CRASHED
            print(f"aimscale: {run.root}: {error}", file=sys.stderr, flush=True)
        exit_code = exit_code or code
        if code == EXIT_PREEMPTED:
            break
    return exit_code


def run_worker(work: Callable[..., int], usage: str, max_paths: float = float("inf")) -> NoReturn:
    """Run `work` on the folders that are the arguments, and end the process, the entry point of what launchers start:
    mistakes, lost locks and failing disks in one sentence, everything else with a traceback."""
    if not 1 <= len(sys.argv) - 1 <= max_paths:
        sys.exit(f"usage: python -m {usage}")
    try:
        sys.exit(work(*map(Path, sys.argv[1:])))
    except Exception as error:
        exit_after(EXIT_TIMEOUT_S)
        sentence = disk_sentence(error) if isinstance(error, OSError) else error
        if sentence is None or not isinstance(error, UserError | LockLost | OSError):
            raise
        print(f"aimscale: {sentence}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, UserError) else EXIT_CRASHED)
