"""Work in other processes: results in order, and no endless wait for a process that was killed or stands still."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import psutil

from aimscale.harness.run.failures import NoMemoryError, StandstillError, start_fork_server, stop_signals_blocked
from aimscale.harness.run.timeouts import STOPPED_S, TASK_TIMEOUT_S

Task = TypeVar("Task")
Result = TypeVar("Result")

POLL_S = 5.0
"""Seconds between looks at the processes that are waited for."""
PRELOADED = "aimscale.harness.data.stream.loader"
"""Module that workers find imported."""


class WorkerDiedError(NoMemoryError):
    """Worker process that ended without being asked to."""


def map_in_processes(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_processes: int,
    *,
    num_ahead: int = 3,
    prepare: Callable[[Task], None] | None = None,
    limit_s: float = TASK_TIMEOUT_S,
) -> Generator[Result]:
    """Apply a function to tasks in other processes, which take turns; yields the results in order.

    Args:
        num_ahead: tasks that each process is given in advance.
        prepare: called in the process for each task as soon as it is known; what it raises is ignored.
        limit_s: seconds for which a result is waited for.

    Raises:
        WorkerDiedError, StandstillError: a process was killed; was stopped, or gave no result for `limit_s`.
    """
    rest = iter(tasks)
    with _workers(function, prepare, num_processes) as workers:
        turns = itertools.cycle(workers)
        under_way = collections.deque(
            next(turns).ask(task) for task in itertools.islice(rest, num_ahead * len(workers))
        )
        while under_way:
            yield under_way.popleft().answer(limit_s)
            under_way.extend(next(turns).ask(task) for task in itertools.islice(rest, 1))


class _Worker:
    """Process that answers in the order in which it is asked."""

    def __init__(self, context: ForkServerContext, function: Callable[[Any], Any], prepare: Any) -> None:
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, prepare, theirs), daemon=True)
        with stop_signals_blocked():
            self.process.start()
        theirs.close()  # so that the end of the worker is the end of the connection

    def ask(self, task: Any) -> _Worker:
        """Send a task, and return this worker."""
        with self._alive():
            self._connection.send(task)
        return self

    def answer(self, limit_s: float) -> Any:
        """Wait for the result of the earliest task without one, and return it, or raise what the task raised."""
        assert self.process.pid is not None
        with self._alive():
            wait_for(self._connection.poll, self.process.pid, limit_s)
            answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Raise WorkerDiedError if the connection breaks in the block."""
        try:
            yield
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise WorkerDiedError(
                f"loader process {self.process.pid} ended (exit code {self.process.exitcode}), most likely killed for "
                "want of memory; use fewer (runtime.num_workers), or give the job more memory"
            ) from error


@contextlib.contextmanager
def _workers(function: Callable[[Any], Any], prepare: Any, number: int) -> Iterator[list[_Worker]]:
    """Start workers for the block.

    They never receive a stop signal, not even that by which Python ends what is left at its exit, before it waits for
    it: so they are killed, and if the block is never left (an error's traceback may hold it), before that.
    """
    context, started = start_fork_server([PRELOADED]), list[_Worker]()
    kill = Finalize(None, _kill, args=[started], exitpriority=100)
    try:
        for _ in range(number):
            started.append(_Worker(context, function, prepare))
        yield started
    finally:
        kill()


def _kill(workers: Sequence[_Worker]) -> None:
    """Kill workers."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(5)


def _serve(function: Callable[[Any], Any], prepare: Callable[[Any], None] | None, connection: Connection) -> None:
    """Answer tasks, in a worker, until the trainer closes the connection or is gone."""
    import torch  # a parent that only starts the server need not wait for it

    torch.set_num_threads(1)
    waiting: collections.deque[Any] = collections.deque()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            while not waiting or connection.poll():
                waiting.append(connection.recv())
                with contextlib.suppress(Exception):  # raised by the function, too
                    if prepare is not None:
                        prepare(waiting[-1])
            try:
                answer = function(waiting.popleft())
            except Exception as error:
                error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
                answer = error
            connection.send(answer)


def wait_for(poll: Callable[[float], bool], pid: int, limit_s: float) -> None:
    """Call `poll` with a number of seconds to wait until it returns that a process has answered.

    Turns are counted, not seconds: whoever suspends all processes together, as Slurm can, stops the count, too.

    Raises:
        StandstillError: the process was stopped for `STOPPED_S`, or no answer came for `limit_s`.
    """
    num_turns = num_stopped = 0
    while not poll(POLL_S):
        num_turns, num_stopped = num_turns + 1, num_stopped + 1 if _is_stopped(pid) else 0
        if num_stopped * POLL_S >= STOPPED_S:
            raise StandstillError(
                f"process {pid} on {os.uname().nodename}, whose images are waited for, was stopped by a signal and did "
                f"not go on for {STOPPED_S:.0f} s; find out who stopped it, then start again"
            )
        if num_turns * POLL_S >= limit_s:
            raise StandstillError(
                f"no images came from process {pid} on {os.uname().nodename} for {limit_s:.0f} s; see to its disk or "
                "file server, then start again"
            )


def _is_stopped(pid: int) -> bool:
    """Return whether a process of this machine was stopped by a signal (`kill -STOP`, Ctrl-Z)."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False
