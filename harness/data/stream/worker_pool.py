"""Loader processes that write whole micro-batches into one ring of shared memory, allocated once.

New shared memory for every batch would cost its page faults every time (measured: 150 us per image of 224 px, a fifth
of what decoding it takes); a slot that was written before costs none. A batch is handed out as a view of its slot,
without a copy, and the slot is used again when the last reference to the view is gone.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import mmap
import multiprocessing.util
import os
import pickle
import select
import signal
import struct
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkServerProcess
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data.processes import SharedMemory, ignore_signals, keep_freed_memory, start_process
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.data.stream.buffers import lent
from aimscale.harness.data.stream.crops import CropLayout
from aimscale.harness.data.stream.positions import Canvas, TrainStream

_MAX_BYTES = 2 << 30  # of the ring; what does not fit is loaded less far ahead, or handed out as a copy
_MAX_WINDOW = 256  # tasks under way: all fit into a pipe (64 KiB), so that sending one never blocks
_TASK = struct.Struct("=4q")  # so short that a pipe gives each reader a whole one: workers need no lock to share it
_DONE = struct.Struct("=q?")  # the task's number, and whether there is more to say of it than that its slot is filled
_HEADER_BYTES = mmap.PAGESIZE  # its first byte says: stop
_JOIN_S = 10.0


class WorkerDiedError(RuntimeError):
    """A loader process ended without being asked to."""


class _Task(NamedTuple):
    """A micro-batch to load."""

    number: int
    """In the order of handing out."""
    slot: int
    """Where its pixels go."""
    start: int
    """First position; a micro-batch holds consecutive ones."""
    stop: int
    """One behind the last."""


class _Loaded(NamedTuple):
    """What a worker says of a task, where there is anything to say; the pixels are in the slot."""

    bad_samples: tuple[str, ...] = ()
    """As in `Batch`."""
    layout: CropLayout | None = None
    """Which crops are in the slot, when the device resizes them."""
    error: Exception | None = None
    """Why there are no pixels."""


_PLAIN = _Loaded()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ring:
    """The slots, and a first byte that says: stop."""

    memory: SharedMemory
    slot_bytes: int
    """A multiple of the page's."""

    @classmethod
    def make(cls, num_slots: int, slot_bytes: int) -> _Ring:
        return cls(memory=SharedMemory(_HEADER_BYTES + num_slots * slot_bytes), slot_bytes=slot_bytes)

    @property
    def is_stopped(self) -> bool:
        return bool(self.memory.bytes[0])

    def stop(self) -> None:
        self.memory.bytes[0] = 1

    def slot(self, number: int) -> npt.NDArray[np.uint8]:
        return self.memory.array((self.slot_bytes,), _HEADER_BYTES + number * self.slot_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Worker:
    """What a loader process is given."""

    stream: TrainStream
    ring: _Ring
    tasks: Connection
    """Shared by all workers."""
    results: Connection
    """Its own."""
    micro_batch: int
    """Most images of a task."""

    def serve(self) -> None:
        """A worker's life."""
        ignore_signals()
        keep_freed_memory()
        torch.set_num_threads(1)
        canvas = functools.cache(self._canvas)
        with contextlib.suppress(BrokenPipeError):  # the trainer is gone
            while (message := os.read(self.tasks.fileno(), _TASK.size)) and not self.ring.is_stopped:
                task = _Task(*_TASK.unpack(message))
                loaded = self._load(canvas(task.slot), range(task.start, task.stop))
                has_more = loaded != _PLAIN
                os.write(self.results.fileno(), _DONE.pack(task.number, has_more))
                if has_more:
                    self.results.send_bytes(pickle.dumps(tuple(loaded)))

    def _canvas(self, slot: int) -> Canvas:
        return self.stream.canvas(torch.from_numpy(self.ring.slot(slot)), self.micro_batch)

    def _load(self, canvas: Canvas, where: range) -> _Loaded:
        try:
            layout, bad_samples = self.stream.fill(canvas, where)
        except Exception as error:
            error.add_note(f"in a loader process:\n{traceback.format_exc()}")
            return _Loaded(error=error)
        return _Loaded(bad_samples=bad_samples, layout=layout)


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
        slot_bytes = max(1, -(-stream.num_bytes(micro_batch) // page)) * page
        most = max(num_workers + 1, _MAX_BYTES // slot_bytes)
        self._window = min(2 * num_workers + num_micro, _MAX_WINDOW, most)
        # the step in use and the next one, being put together, are held by the trainer
        self._num_slots = max(self._window, min(self._window + 2 * num_micro, most))
        self._free = collections.deque(range(self._num_slots))
        self._ring = _Ring.make(self._num_slots, slot_bytes)
        task_reader, self._tasks = Pipe(duplex=False)
        self._results: list[Connection] = []
        self._processes: list[ForkServerProcess] = []
        # At the end of the program this comes before multiprocessing waits for processes that ignore its SIGTERM.
        self._finalizer = multiprocessing.util.Finalize(
            self, _stop, args=(self._ring, self._tasks, self._results, self._processes), exitpriority=10
        )
        for _ in range(num_workers):
            reader, writer = Pipe(duplex=False)
            worker = _Worker(stream=stream, ring=self._ring, tasks=task_reader, results=writer, micro_batch=micro_batch)
            self._processes.append(start_process(worker.serve))
            writer.close()
            self._results.append(reader)
        task_reader.close()
        self._ready = select.poll()
        self._reader_of = {reader.fileno(): reader for reader in self._results}
        for descriptor in (*self._reader_of, *(process.sentinel for process in self._processes)):
            self._ready.register(descriptor, select.POLLIN)

    def close(self) -> None:
        """End the processes; batches that were handed out stay as they are."""
        self._finalizer()

    def load(self, parts: Iterable[range]) -> Iterator[Batch]:
        """The batch of each of `parts`, in order; to be called once.

        Raises:
            DataError: a shard cannot be read.
            WorkerDiedError: a process was killed.
        """
        following = enumerate(parts)
        under_way: collections.deque[_Task] = collections.deque()
        loaded: dict[int, _Loaded] = {}
        while True:
            while len(under_way) < self._window and (entry := next(following, None)) is not None:
                number, part = entry
                task = _Task(number=number, slot=self._free.pop(), start=part.start, stop=part.stop)
                os.write(self._tasks.fileno(), _TASK.pack(*task))
                under_way.append(task)
            if not under_way:
                return
            while under_way[0].number not in loaded:
                loaded.update(self._receive())
            task = under_way.popleft()
            yield self._hand_out(task, loaded.pop(task.number), len(under_way))

    def _receive(self) -> Iterator[tuple[int, _Loaded]]:
        """Wait for results; gives them with their tasks' numbers."""
        ready = [descriptor for descriptor, _ in self._ready.poll()]
        for descriptor in ready:
            if (reader := self._reader_of.get(descriptor)) and (message := os.read(descriptor, _DONE.size)):
                number, has_more = _DONE.unpack(message)
                with contextlib.suppress(EOFError, ConnectionResetError):  # the process has ended: see below
                    yield number, _Loaded(*pickle.loads(reader.recv_bytes())) if has_more else _PLAIN
        for process in self._processes:
            if process.sentinel in ready:
                process.join()
                raise WorkerDiedError(_how_it_ended(process))

    def _hand_out(self, task: _Task, loaded: _Loaded, num_under_way: int) -> Batch:
        """The batch in a slot; a copy of it when so many others are held that the workers would run out of slots."""
        pixels = lent(self._ring.slot(task.slot), task.slot, self._free)
        if loaded.error is not None:
            raise loaded.error
        batch = self._stream.batch_in(pixels, range(task.start, task.stop), loaded.layout, loaded.bad_samples)
        num_lent = self._num_slots - len(self._free) - num_under_way  # with this one
        return batch.clone() if num_lent > self._num_slots - self._window else batch


def _stop(
    ring: _Ring, tasks: Connection, results: Sequence[Connection], processes: Sequence[ForkServerProcess]
) -> None:
    """Tell workers to end after the batch that they are at, and wait for it."""
    ring.stop()
    with contextlib.suppress(OSError):  # a dead worker reads nothing
        for _ in processes:
            os.write(tasks.fileno(), bytes(_TASK.size))
    tasks.close()
    for process in processes:
        process.join(_JOIN_S)
        if process.is_alive():
            process.kill()
            process.join()
    for result in results:
        result.close()


def _how_it_ended(process: ForkServerProcess) -> str:
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return (
            f"loader process {process.pid} was killed (SIGKILL), most likely out of memory; "
            "lower runtime.num_workers or give the job more memory"
        )
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"loader process {process.pid} {how}; look for its message in the run's log"
