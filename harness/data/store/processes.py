"""Work in other processes: results in order, and no endless wait for a process that was killed or stands still."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

import psutil

from aimscale.harness.run.failures import STOP_SIGNALS, NoMemoryError, StandstillError

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL_S = 5.0
"""Seconds between looks at the processes that are waited for."""
STOPPED_S = 60.0
"""Seconds for which a process may be stopped by a signal."""
RESULT_S = 3600.0
"""Seconds for which a result is waited for: a shard of 20 GB, scanned at 6 MB/s."""

_PRELOAD = ("aimscale.harness.data.stream.loader",)
_function: Callable[[Any], Any]
"""Function that this process was started for."""


def start_fork_server() -> ForkServerContext:
    """Start the server that workers are forked from; if started early, it imports PyTorch in the meantime.

    A fork of the trainer itself would copy locks that its other threads happen to hold, and about one in thousands
    would then wait for ever; the server has a single thread.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    resource_tracker.ensure_running()  # the server starts it anyway, but it does not inherit two of the blocked signals
    with stop_signals_blocked():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block stop signals for the block, so that processes started in it inherit the blocking and never receive them.

    Slurm sends a step's signals to all of its processes: the trainer saves, and ends its workers itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def map_in_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_processes: int
) -> Generator[Result]:
    """Apply a function to tasks in other processes, each a few tasks ahead; yields the results in order.

    Raises:
        NoMemoryError: a process was killed.
        StandstillError: a process was stopped, or no result came for `RESULT_S`.
    """
    context, rest = start_fork_server(), iter(tasks)
    pool = concurrent.futures.ProcessPoolExecutor(num_processes, context, _start, (function,))
    try:
        futures = (pool.submit(_call, task) for task in rest)
        under_way = collections.deque(itertools.islice(futures, 3 * num_processes))
        while under_way:
            wait_for(lambda seconds: _is_done(under_way[0], seconds), [*pool._processes], RESULT_S)
            result: Result = under_way.popleft().result()
            under_way.extend(itertools.islice(futures, 1))
            yield result
    except BrokenProcessPool as error:
        raise NoMemoryError(
            f"one of {num_processes} processes was killed, most likely for want of memory; free some, or use fewer"
        ) from error
    finally:
        for process in [*pool._processes.values()]:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _is_done(future: concurrent.futures.Future[Any], seconds: float) -> bool:
    """Wait so many seconds for a result."""
    return bool(concurrent.futures.wait([future], seconds).done)


def _start(function: Callable[[Any], Any]) -> None:
    """Start a process, which the pool may terminate."""
    global _function
    _function = function
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _call(task: Any) -> Any:
    """Apply the function, in its process."""
    return _function(task)


def wait_for(poll: Callable[[float], bool], pids: Collection[int], limit_s: float) -> None:
    """Call `poll` with a number of seconds to wait until it returns that the processes have answered.

    Turns are counted, not seconds: whoever suspends all processes together, as Slurm can, stops the count, too.

    Raises:
        StandstillError: one of the processes was stopped for `STOPPED_S`, or no answer came for `limit_s`.
    """
    num_turns = num_stopped = 0
    while not poll(POLL_S):
        stopped = [pid for pid in pids if is_stopped(pid)]
        num_turns, num_stopped = num_turns + 1, num_stopped + 1 if stopped else 0
        if num_stopped * POLL_S >= STOPPED_S:
            raise StandstillError(
                f"process {stopped[0]} on {os.uname().nodename}, whose images are waited for, was stopped by a signal "
                f"and did not go on for {STOPPED_S:.0f} s; find out who stopped it, then start again"
            )
        if num_turns * POLL_S >= limit_s:
            raise StandstillError(
                f"no images came from process {' or '.join(map(str, pids))} on {os.uname().nodename} for "
                f"{limit_s:.0f} s; see to its disk or file server, then start again"
            )


def is_stopped(pid: int) -> bool:
    """Return whether a process of this machine was stopped by a signal (`kill -STOP`, Ctrl-Z)."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False
