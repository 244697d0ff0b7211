"""Processes beside a trainer: forked from a server of their own, which has no threads, never from the trainer.

A fork copies one thread and every lock that another thread holds at that moment. A trainer is full of threads
(PyTorch's, MKL's allocator, an object store's event loop, the lease), and loader processes forked from it waited for
such a lock for ever, one in some thousands. What a process needs is pickled; the memory that it shares is a file
without a name.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from multiprocessing.util import get_temp_dir
from typing import Any

import numpy as np
import numpy.typing as npt

from aimscale.aim.errors import UserError

_TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Slurm sends a step's signals to every process of it: the trainer saves, and ends its processes itself."""

_PRELOAD = (  # what a loader process needs, imported once; nothing of it may start a thread
    "aimscale.harness.data.stream.worker_pool",
    "aimscale.harness.data.stream.unindexed",
)
_MIN_SHARED = 1 << 20  # bytes: each takes a descriptor, of which a process can be given some 250
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT_PIECE_BYTES, _KEPT_BYTES = 32 << 20, 128 << 20  # the most that glibc allows; 200 decoded photographs
_MAX_FOLDER = 70  # bytes of the temporary folder's name: a socket's path holds 107, 32 of them Python's


def server_context(*preload: str) -> ForkServerContext:
    """The context of a server that will start with its first process, if none has, and import these modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _short_temporary_folder():
        get_temp_dir()
    return context


def start_server() -> ForkServerContext:
    """The context in which `start_process` starts; asked for early, the server imports PyTorch meanwhile."""
    context = server_context(*_PRELOAD)
    with held_back():
        resource_tracker.ensure_running()  # the server starts it anyway, and it lets two of the signals through
    with held_back():
        forkserver.ensure_running()
    return context


def start_process(function: Callable[..., object], *args: Any) -> ForkServerProcess:
    """A daemon process that calls `function(*args)`; signals are held back until it ignores or heeds them.

    It imports what `function` needs, and not the program's main module, which costs seconds and would start a program
    again that has no `if __name__ == "__main__"`.

    Raises:
        UserError: the arguments share more pieces of memory than can be passed.
    """
    process = start_server().Process(target=function, args=args, daemon=True)
    main = sys.modules["__main__"]
    with held_back():
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            process.start()
        except ValueError as error:
            if "too many fds" not in str(error):
                raise
            raise UserError(
                "the sources of this run share more pieces of memory than a process can be given (some 250); index "
                "several of them as one data set, or set runtime.num_workers to 0"
            ) from error
        finally:
            sys.modules["__main__"] = main
    return process


@contextmanager
def held_back() -> Iterator[None]:
    """Signals for the trainer wait meanwhile; the server and what it starts inherit that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """The server's socket does not fit into one with a long name, such as a job's scratch folder may have."""
    before = tempfile.tempdir
    if len(os.fsencode(tempfile.gettempdir())) > _MAX_FOLDER:
        tempfile.tempdir = "/tmp"
    try:
        yield
    finally:
        tempfile.tempdir = before


def ignore_signals() -> None:
    """For a process of `start_process`: what the trainer is told is none of its business."""
    for signum in _TRAINERS_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    heed_signals()


def heed_signals() -> None:
    """For a process of `start_process`: take the signals that were held back, as any process does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINERS_SIGNALS)


def keep_freed_memory() -> None:
    """For a loader process: let glibc keep what a batch frees for the next one.

    It gives memory back at once when more than twice the largest piece so far is free, an image's: 32 decoded
    photographs, whose crops wait for the end of their batch, were given back and taken anew with every batch, 50 to 90
    page faults for each image.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has other habits
        mallopt(_M_MMAP_THRESHOLD, _KEPT_PIECE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class SharedMemory:
    """Zeroed memory that is shared with a process to which it is passed at its start.

    No limit on /dev/shm applies to it, it cannot outlive the processes, and pages take memory once they are written.
    """

    def __init__(self, num_bytes: int) -> None:
        descriptor = os.memfd_create("aimscale")
        os.truncate(descriptor, max(1, num_bytes))
        self._map(descriptor)

    def _map(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self.bytes = mmap.mmap(descriptor, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (DupFd(self._file.fileno()),)

    def array(
        self, shape: tuple[int, ...], offset: int = 0, dtype: npt.DTypeLike = np.uint8
    ) -> np.ndarray[Any, np.dtype[Any]]:
        """A view of some bytes; the memory stays as long as any view."""
        return np.frombuffer(self.bytes, dtype, math.prod(shape), offset).reshape(shape)


class SharedArray:
    """A read-only array that a process to which it is passed shares, once it is large."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self.values, self._memory = values, None
        if values.nbytes >= _MIN_SHARED:
            self._memory = SharedMemory(values.nbytes)
            self.values = self._memory.array(values.shape, dtype=values.dtype)
            self.values[...] = values
        self.values.flags.writeable = False

    def __getstate__(self) -> tuple[Any, ...]:
        values = self.values
        return (None, values) if self._memory is None else (self._memory, values.shape, values.dtype)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._memory, what, *dtype = state
        self.values = what if self._memory is None else self._memory.array(what, dtype=dtype[0])


def _attach(descriptor: Any) -> SharedMemory:
    memory = SharedMemory.__new__(SharedMemory)
    memory._map(descriptor.detach())
    return memory
