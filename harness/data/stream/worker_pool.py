"""Loader processes that write whole micro-batches into one ring of shared memory, allocated once.

New shared memory for every batch would cost its page faults every time (measured: 150 us per image of 224 px, a fifth
of what decoding it takes); a slot that was written before costs none. A batch is handed out as a view of its slot,
without a copy, and the slot is used again when the last reference to the view is gone. The memory is anonymous: no
limit on /dev/shm applies to it, and it cannot outlive the processes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import mmap
import multiprocessing
import multiprocessing.util
import pickle
import signal
import traceback
import weakref
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Lock

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data.random_access import I64
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.data.stream.crops import CropLayout, Crops
from aimscale.harness.data.stream.positions import TrainStream

_MAX_BYTES = 2 << 30  # of the ring; what does not fit is loaded less far ahead, or handed out as a copy
_MAX_WINDOW = 256  # tasks under way: all fit into a pipe (64 KiB), so that sending one never blocks
_HEADER_BYTES = mmap.PAGESIZE  # its first byte says: stop
# Slurm sends a step's signals to every process of it: the trainer saves and ends its workers itself.
_TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
_JOIN_S = 10.0


class WorkerDiedError(RuntimeError):
    """A loader process ended without being asked to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Task:
    """A micro-batch to load."""

    number: int
    """In the order of handing out."""
    slot: int
    """Where its pixels go."""
    start: int
    """First position; a micro-batch holds consecutive ones."""
    stop: int
    """One behind the last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loaded:
    """What a worker says of a task; the pixels are in the slot."""

    number: int
    bad_samples: tuple[str, ...] = ()
    """As in `Batch`."""
    layout: CropLayout | None = None
    """Which crops are in the slot, when the device resizes them."""
    error: Exception | None = None
    """Why there are no pixels."""


class WorkerPool:
    """Processes that load micro-batches ahead, handed out in the order in which they are asked for."""

    def __init__(self, stream: TrainStream, *, num_workers: int, micro_batch: int, num_micro: int) -> None:
        """Start the processes.

        Args:
            stream: every process has a copy of it.
            micro_batch: most images of one batch.
            num_micro: batches of one optimiser step. A whole step is loaded ahead, and two more batches per process.
        """
        self._stream = stream
        page = mmap.PAGESIZE
        self._slot_bytes = max(1, -(-stream.num_bytes(micro_batch) // page)) * page
        most = max(num_workers + 1, _MAX_BYTES // self._slot_bytes)
        self._window = min(2 * num_workers + num_micro, _MAX_WINDOW, most)
        # the step in use and the next one, being put together, are held by the trainer
        self._num_slots = max(self._window, min(self._window + 2 * num_micro, most))
        self._free = collections.deque(range(self._num_slots))
        self._ring = mmap.mmap(-1, _HEADER_BYTES + self._num_slots * self._slot_bytes)
        context = multiprocessing.get_context("fork")
        task_reader, self._tasks = context.Pipe(duplex=False)
        pipes = [context.Pipe(duplex=False) for _ in range(num_workers)]
        self._results = [reader for reader, _ in pipes]
        writers = [writer for _, writer in pipes]
        lock = context.Lock()
        self._processes = [
            context.Process(target=self._serve, args=(task_reader, lock, writers, number), daemon=True)
            for number in range(num_workers)
        ]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
        try:
            for process in self._processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        task_reader.close()
        for writer in writers:
            writer.close()
        # At the end of the program this comes before multiprocessing waits for processes that ignore its SIGTERM.
        self._finalizer = multiprocessing.util.Finalize(
            self, _stop, args=(self._ring, self._tasks, self._results, self._processes), exitpriority=10
        )

    def close(self) -> None:
        """End the processes; batches that were handed out stay as they are."""
        self._finalizer()

    def load(self, parts: Iterable[I64]) -> Iterator[Batch]:
        """The batch of each of `parts` (consecutive positions), in order; to be called once.

        Raises:
            DataError: a shard cannot be read.
            WorkerDiedError: a process was killed.
        """
        following = enumerate(parts)
        under_way: collections.deque[_Task] = collections.deque()
        loaded: dict[int, _Loaded] = {}
        while True:
            while len(under_way) < self._window and (entry := next(following, None)) is not None:
                number, positions = entry
                start = int(positions[0]) if len(positions) else 0
                task = _Task(number=number, slot=self._free.pop(), start=start, stop=start + len(positions))
                self._tasks.send_bytes(pickle.dumps(task))
                under_way.append(task)
            if not under_way:
                return
            while under_way[0].number not in loaded:
                for result in self._receive():
                    loaded[result.number] = result
            task = under_way.popleft()
            yield self._hand_out(task, loaded.pop(task.number), len(under_way))

    def _receive(self) -> Iterator[_Loaded]:
        """Wait for results."""
        ready = wait([*self._results, *(process.sentinel for process in self._processes)])
        for each in ready:
            if isinstance(each, Connection):
                with contextlib.suppress(EOFError, ConnectionResetError):  # the process has ended: see below
                    yield pickle.loads(each.recv_bytes())
        for process in self._processes:
            if process.sentinel in ready:
                process.join()
                raise WorkerDiedError(_how_it_ended(process))

    def _hand_out(self, task: _Task, loaded: _Loaded, num_under_way: int) -> Batch:
        """The batch in a slot; a copy of it when so many others are held that the workers would run out of slots."""
        slot = self._slot(task.slot)
        weakref.finalize(slot, self._free.append, task.slot).atexit = False  # once no tensor shows it any more
        if loaded.error is not None:
            raise loaded.error
        positions = np.arange(task.start, task.stop)
        batch = self._stream.batch_in(torch.from_numpy(slot), positions, loaded.layout, loaded.bad_samples)
        num_lent = self._num_slots - len(self._free) - num_under_way  # with this one
        return batch.clone() if num_lent > self._num_slots - self._window else batch

    def _slot(self, number: int) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._ring, np.uint8, self._slot_bytes, _HEADER_BYTES + number * self._slot_bytes)

    def _serve(self, tasks: Connection, lock: Lock, writers: Sequence[Connection], number: int) -> None:
        """A worker's life."""
        for signum in _TRAINERS_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINERS_SIGNALS)
        torch.set_num_threads(1)
        gc.enable()  # the trainer held it off
        # Ends that this process does not use: while they are open, the other side's end goes unnoticed.
        self._tasks.close()
        for other in (*self._results, *(writer for writer in writers if writer is not writers[number])):
            other.close()
        with contextlib.suppress(EOFError, BrokenPipeError):  # the trainer is gone
            while True:
                with lock:
                    message = tasks.recv_bytes()
                if self._ring[0]:
                    return
                writers[number].send_bytes(pickle.dumps(self._load_one(pickle.loads(message))))

    def _load_one(self, task: _Task) -> _Loaded:
        try:
            into = torch.from_numpy(self._slot(task.slot))
            batch = self._stream.batch(np.arange(task.start, task.stop), into=into)
        except Exception as error:
            error.add_note(f"in a loader process:\n{traceback.format_exc()}")
            return _Loaded(number=task.number, error=error)
        layout = batch.images.layout if isinstance(batch.images, Crops) else None
        return _Loaded(number=task.number, bad_samples=batch.bad_samples, layout=layout)


def _stop(ring: mmap.mmap, tasks: Connection, results: Sequence[Connection], processes: Sequence[ForkProcess]) -> None:
    """Tell workers to end after the batch that they are at, and wait for it."""
    ring[0] = 1
    with contextlib.suppress(OSError):  # a dead worker reads nothing
        for _ in processes:
            tasks.send_bytes(b"")
    tasks.close()
    for process in processes:
        process.join(_JOIN_S)
        if process.is_alive():
            process.kill()
            process.join()
    for result in results:
        result.close()


def _how_it_ended(process: ForkProcess) -> str:
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return (
            f"loader process {process.pid} was killed (SIGKILL), most likely out of memory; "
            "lower runtime.num_workers or give the job more memory"
        )
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"loader process {process.pid} {how}; look for its message in the run's log"
