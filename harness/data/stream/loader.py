"""Batches of the stream for one rank: any number of ranks, workers and micro-batches yields the same global stream.

Workers are asked for one micro-batch after the other over pipes that carry only numbers: pixels are written into the
slots of one ring of memory, allocated once and shared with the workers. New memory for every batch would cost its page
faults each time (150 us per image of 224 px, a fifth of its decoding). A batch is a view of its slot, which is used
again once the last reference to the view is gone.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import sys
import traceback
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.store.decoding import kernel_threads
from aimscale.harness.data.store.processes import start_fork_server, stop_signals_blocked, wait_for
from aimscale.harness.data.stream.stream import Batch, Stream
from aimscale.harness.run.failures import NoMemoryError

if TYPE_CHECKING:
    from aimscale.harness.distributed.group import Group

ANSWER_S = 900.0
"""Seconds for which a micro-batch is waited for, half of what other ranks wait: a shard of 500 MB at .6 MB/s."""
_MAX_BYTES = 2 << 30  # of the ring; beyond it, less is loaded ahead
_MAX_TASKS = 256  # that wait in a worker's pipe, which holds some 200 kB
_MAX_NAMED = 10  # undecodable samples that a loader names in the log
_SHARED_MEMORY = "/dev/shm"


class WorkerDiedError(NoMemoryError):
    """Loader process that ended without being asked to."""


def split_step(start: int, stop: int, *, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Split positions [start, stop) of one optimiser step into this rank's micro-batches.

    Every rank gets the same number of micro-batches, none larger than `micro_batch`; their sizes differ by at most one
    pair. Pairs (2i, 2i+1) stay on one rank, and in one micro-batch unless it holds a single image. A rank with fewer
    pairs than micro-batches gets empty ones.
    """
    unit = 2 if start % 2 == 0 and stop % 2 == 0 else 1
    first, last = _part_bounds((stop - start) // unit, world_size, rank)
    most = -(-((stop - start) // unit) // world_size)  # units of the first rank
    if unit == 2 and micro_batch == 1:
        first, last, most, unit = 2 * first, 2 * last, 2 * most, 1
    num_micro = max(1, -(-most // max(1, micro_batch // unit)))
    bounds = [_part_bounds(last - first, num_micro, number) for number in range(num_micro)]
    return [range(start + unit * (first + a), start + unit * (first + b)) for a, b in bounds]


def _part_bounds(number: int, parts: int, which: int) -> tuple[int, int]:
    """Return the bounds [first, last) of one of several nearly equal parts of `number` things; the first parts get one
    more."""
    each, more = divmod(number, parts)
    return which * each + min(which, more), (which + 1) * each + min(which + 1, more)


def train_batches(
    stream: Stream,
    *,
    start: int,
    stop: int,
    batch_size: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[list[Batch]]:
    """Yield this rank's micro-batches of each optimiser step, from position `start` (images seen) up to `stop`.

    With workers, at least one whole step is loaded ahead. Close the iterator if it is left before its end.

    Args:
        start: first position; a large one costs nothing.
        stop: end; the last step is shorter when `batch_size` does not divide the distance.
        batch_size: images per step, over all ranks.
        micro_batch: maximum images per item of the list.
        num_workers: loader processes; 0 loads in this one.
        pin_memory: page-lock the ring (needs CUDA), so that a GPU copies from it while it computes.

    Raises:
        DataError: a shard cannot be read, or sixteen replacements of an undecodable sample are undecodable too.
        WorkerDiedError: a loader process was killed.
        StandstillError: a loader process was stopped, or did not answer for `ANSWER_S`.
    """

    def split(first: int, rank: int) -> list[range]:
        last = min(first + batch_size, stop)
        return split_step(first, last, micro_batch=micro_batch, rank=rank, world_size=world_size)

    num_micro = len(split(start, 0))
    sizes: collections.deque[int] = collections.deque()  # micro-batches per step under way

    def parts() -> Iterator[range]:
        for first in range(start, stop, batch_size):
            step = split(first, rank)
            sizes.append(len(step))
            yield from step

    ring = _Ring(stream, micro_batch, num_micro, num_workers)
    with contextlib.closing(ring.load(parts())) as batches, _page_locked(ring.slots, pin_memory):
        step: list[Batch] = []
        for batch in batches:
            step.append(batch)
            if len(step) == sizes[0]:
                sizes.popleft()
                yield step
                step = []


Task = tuple[int, range]
"""Slot of the ring, and the positions of the micro-batch to write into it."""
Answer = tuple[str, ...] | Exception
"""Undecodable samples of a micro-batch, as in `Batch`, or why it could not be loaded."""


class _Ring:
    """Memory of the micro-batches that are being loaded, and of the two steps in use: the trainer's current and its
    next."""

    def __init__(self, stream: Stream, micro_batch: int, num_micro: int, num_workers: int) -> None:
        self._stream, self._num_workers = stream, num_workers
        slot_bytes = max(1, stream.num_bytes(micro_batch))
        most = _MAX_BYTES // slot_bytes
        per_worker = min(2 + -(-num_micro // max(1, num_workers)), most // max(1, num_workers), _MAX_TASKS)
        self._window = max(1, num_workers * max(1, per_worker))
        num_slots = max(self._window, min(self._window + 2 * num_micro, most))
        self.slots = torch.empty(num_slots, slot_bytes, dtype=torch.uint8)
        self._free = collections.deque(range(num_slots))
        self._num_named = 0
        if num_workers:
            room = os.statvfs(_SHARED_MEMORY)
            if self.slots.nbytes > room.f_bavail * room.f_frsize:
                raise DataError(
                    f"loader processes need {self.slots.nbytes / 1e6:,.0f} MB in {_SHARED_MEMORY}, which has "
                    f"{room.f_bavail * room.f_frsize / 1e6:,.0f}; give the container more (docker run --shm-size), or "
                    "lower runtime.num_workers or runtime.micro_batch"
                )
            self.slots.share_memory_()

    def load(self, parts: Iterable[range]) -> Generator[Batch]:
        """Yield the batch of each of `parts`, in order."""
        tasks = ((self._free.popleft(), part) for part in parts)
        if not self._num_workers:
            for task in tasks:
                yield self._batch(task, _loaded(self._stream, self.slots, task, upcoming=[task]))
            return
        with _workers(self._num_workers, self._stream, self.slots) as workers:
            turns = itertools.cycle(workers)
            under_way = collections.deque(
                (next(turns).ask(task), task) for task in itertools.islice(tasks, self._window)
            )
            while under_way:
                worker, task = under_way.popleft()
                batch = self._batch(task, worker.answer())
                under_way.extend((worker.ask(more), more) for more in itertools.islice(tasks, 1))
                yield batch

    def _batch(self, task: Task, answer: Answer) -> Batch:
        """Make the batch of a slot that was filled."""
        slot, part = task
        if isinstance(answer, Exception):
            raise answer
        for name in answer[: max(0, _MAX_NAMED - self._num_named)]:
            print(f"{name} cannot be decoded; another image takes its place", file=sys.stderr, flush=True)
        self._num_named += len(answer)
        if self._free:
            pixels = self._view(slot)
        else:  # the trainer holds so many batches that the next task needs this slot
            pixels = self.slots[slot].clone()
            self._free.append(slot)
        return self._stream.batch_in(pixels, part, answer)

    def _view(self, slot: int) -> torch.Tensor:
        """Return a view of a slot, which is free again once the last view of it is gone."""
        shown = self.slots[slot].numpy()
        weakref.finalize(shown, self._free.append, slot).atexit = False
        return torch.from_numpy(shown)


def _loaded(stream: Stream, slots: torch.Tensor, task: Task, upcoming: Iterable[Task]) -> Answer:
    """Write a micro-batch into its slot, once the bytes of upcoming ones are being read."""
    slot, part = task
    try:
        for _, later in upcoming:
            stream.read_ahead(later)
        with kernel_threads(1):
            return stream.fill(slots[slot], part)
    except Exception as error:
        return error


def _serve(stream: Stream, slots: torch.Tensor, connection: Connection) -> None:
    """Fill slots as asked, in a worker, until the trainer closes the connection or is gone."""
    torch.set_num_threads(1)
    waiting: collections.deque[Task] = collections.deque()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            known = len(waiting)
            while not waiting or connection.poll():
                waiting.append(connection.recv())
            upcoming = [*itertools.islice(waiting, known, None)]
            answer = _loaded(stream, slots, waiting.popleft(), upcoming)
            if isinstance(answer, Exception):
                answer.add_note("in a loader process:\n" + "".join(traceback.format_exception(answer)))
            connection.send(answer)


class _Worker:
    """Loader process, which answers in the order in which it is asked."""

    def __init__(self, context: ForkServerContext, stream: Stream, slots: torch.Tensor) -> None:
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(stream, slots, theirs), daemon=True)
        with stop_signals_blocked():
            self.process.start()
        assert self.process.pid is not None
        self._pid = self.process.pid
        theirs.close()  # so that the end of the worker is the end of the connection

    def ask(self, task: Task) -> _Worker:
        """Ask for a micro-batch, and return this worker."""
        with self._alive():
            self._connection.send(task)
        return self

    def answer(self) -> Answer:
        """Wait for the answer to the earliest question without one; raises StandstillError if none comes."""
        with self._alive():
            wait_for(self._connection.poll, [self._pid], ANSWER_S)
            answer: Answer = self._connection.recv()
        return answer

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Raise WorkerDiedError if the connection breaks in the block."""
        try:
            yield
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise WorkerDiedError(
                f"loader process {self.process.pid} ended (exit code {self.process.exitcode}), most likely for want of "
                "memory; lower runtime.num_workers or give the job more memory"
            ) from error


@contextlib.contextmanager
def _workers(number: int, stream: Stream, slots: torch.Tensor) -> Iterator[list[_Worker]]:
    """Start workers for the block.

    They never receive a stop signal, not even that by which Python ends what is left at its exit, before it waits for
    it: so they are killed, and if the block is never left (an error's traceback may hold it), before that.
    """
    context, started = start_fork_server(), list[_Worker]()
    kill = Finalize(None, _kill, args=[started], exitpriority=100)
    try:
        for _ in range(number):
            started.append(_Worker(context, stream, slots))
        yield started
    finally:
        kill()


def _kill(workers: Sequence[_Worker]) -> None:
    """Kill workers."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(5)


@contextlib.contextmanager
def _page_locked(slots: torch.Tensor, is_wanted: bool) -> Iterator[None]:
    """Register memory with CUDA for the block; if that fails, copies are slower and nothing else changes."""
    is_locked = is_wanted and int(torch.cuda.cudart().cudaHostRegister(slots.data_ptr(), slots.nbytes, 0)) == 0
    try:
        yield
    finally:
        if is_locked:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(slots.data_ptr())


def rank_batches(
    stream: Stream, *, group: Group, start: int, stop: int, batch_size: int, micro_batch: int, num_workers: int
) -> Generator[list[Batch]]:
    """Yield the micro-batches of a rank (`train_batches`), moved to its GPU, if any, one step ahead."""
    has_gpu = group.device.type == "cuda"
    batches = train_batches(
        stream,
        start=start,
        stop=stop,
        batch_size=batch_size,
        micro_batch=micro_batch,
        rank=group.rank,
        world_size=group.world_size,
        num_workers=num_workers,
        pin_memory=has_gpu,
    )
    return on_device_ahead(batches, group.device) if has_gpu else batches


def on_device_ahead(batches: Generator[list[Batch]], device: torch.device) -> Generator[list[Batch]]:
    """Copy each step's images to the CUDA device one step ahead, on a side stream."""
    side = torch.cuda.Stream(device)
    ahead: tuple[list[Batch], list[Batch], torch.cuda.Event] | None = None
    with contextlib.closing(batches):
        for step in batches:
            with torch.cuda.stream(side):
                moved = [batch.on(device) for batch in step]
                done = side.record_event()
            if ahead is not None:
                yield _taken(*ahead, device)
            ahead = step, moved, done
        if ahead is not None:
            yield _taken(*ahead, device)


def _taken(source: list[Batch], moved: list[Batch], done: torch.cuda.Event, device: torch.device) -> list[Batch]:
    """Make the training stream wait for the images, and tell the allocator that it reads them."""
    done.synchronize()  # copied during the previous step; only now may the source's memory be refilled
    source.clear()
    training = torch.cuda.current_stream(device)
    for batch in moved:
        batch.images.record_stream(training)
    return moved
