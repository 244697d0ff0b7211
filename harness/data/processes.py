"""Processes beside a trainer: forked from a server of their own, which has no threads, never from the trainer.

A fork copies one thread and every lock that another thread holds at that moment. A trainer is full of threads
(PyTorch's, MKL's allocator, an object store's event loop, the lease), and loader processes forked from it waited for
such a lock for ever, one in some thousands. What a process needs is pickled; the memory that it shares is a file
without a name.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
"""Slurm sends a step's signals to every process of it: the trainer saves, and ends its processes itself."""

_PRELOAD = "aimscale.harness.data.stream.worker_pool"  # what a loader process needs, imported once


def start_server() -> ForkServerContext:
    """The context of processes that ignore no signal yet but hold `TRAINERS_SIGNALS` back.

    Returns at once; the first process waits until the server has imported PyTorch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    with held_back():
        resource_tracker.ensure_running()  # the server starts it anyway, and it lets two of the signals through
    with held_back():
        forkserver.ensure_running()
    return context


@contextmanager
def held_back() -> Iterator[None]:
    """Signals for the trainer wait meanwhile; what is started here inherits that."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINERS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_trainers_signals() -> None:
    """For a process of `start_server`'s context."""
    for signum in TRAINERS_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TRAINERS_SIGNALS)


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

    def array(self, shape: tuple[int, ...], offset: int = 0) -> npt.NDArray[np.uint8]:
        """A view of some bytes; the memory stays as long as any view."""
        return np.frombuffer(self.bytes, np.uint8, math.prod(shape), offset).reshape(shape)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; the lock of a process that dies is free."""
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def _attach(descriptor: Any) -> SharedMemory:
    memory = SharedMemory.__new__(SharedMemory)
    memory._map(descriptor.detach())
    return memory
