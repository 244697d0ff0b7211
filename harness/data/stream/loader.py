"""Batches of the stream for one rank: any number of ranks, workers and micro-batches yields the same global stream.

torch's DataLoader runs the workers and keeps the order, but carries only numbers: pixels are written into the slots of
one ring of memory, allocated once and shared with the workers. New memory for every batch would cost its page faults
each time (150 us per image of 224 px, a fifth of its decoding). A batch is a view of its slot, which is reused once the
last reference to the view is gone.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from aimscale.harness.data import DataError
from aimscale.harness.data.store.decoding import kernel_threads
from aimscale.harness.data.stream.base import Batch, Stream
from aimscale.harness.run.failures import STOP_SIGNALS

if TYPE_CHECKING:
    from aimscale.harness.device.distributed import Group

_MAX_BYTES = 2 << 30  # of the ring; beyond it, less is loaded ahead, or in new memory
_IMAGES_AHEAD = 256  # requested by a worker before it decodes them; `remote.MAX_AHEAD_BYTES` limits large ones
_SHARED_MEMORY = "/dev/shm"
_PRELOAD = ("aimscale.harness.data.stream.loader", "aimscale.harness.data.stream.unindexed")


class WorkerDiedError(RuntimeError):
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


class _Task(NamedTuple):
    """Task of a worker."""

    slot: int
    """Slot of the ring; -1 if none is free."""
    part: range
    """Positions of a micro-batch."""
    upcoming: tuple[range, ...]
    """Micro-batches, newly known, that the same worker will fill later: to be read ahead."""


class _Filled(NamedTuple):
    """Result of loading a micro-batch."""

    bad_samples: tuple[str, ...] = ()
    """Undecodable samples, as in `Batch`."""
    pixels: torch.Tensor | None = None
    """Pixels, if no slot was free."""
    error: Exception | None = None
    """Error, if there are no pixels."""


class _Slots(Dataset[_Filled]):
    """Dataset whose items fill a slot with a micro-batch, in a worker or in the trainer."""

    def __init__(self, stream: Stream, slots: torch.Tensor) -> None:
        self._stream, self._slots = stream, slots

    def __getitem__(self, task: _Task) -> _Filled:
        slot, where, upcoming = task
        own = None if slot >= 0 else torch.empty(self._slots.shape[1], dtype=torch.uint8)
        try:
            for each in upcoming:
                self._stream.read_ahead(each)
            with kernel_threads(1):
                return _Filled(self._stream.fill(self._slots[slot] if own is None else own, where), own)
        except Exception as error:
            if torch.utils.data.get_worker_info() is not None:
                error.add_note(f"in a loader process:\n{traceback.format_exc()}")
            return _Filled(error=error)


class _Ring:
    """Memory of the micro-batches that are being loaded, and of the two steps in use: the trainer's current and its
    next."""

    def __init__(self, stream: Stream, micro_batch: int, num_micro: int, num_workers: int) -> None:
        self._stream, self._num_workers = stream, num_workers
        self._parts_ahead = -(-_IMAGES_AHEAD // micro_batch)
        slot_bytes = max(1, stream.num_bytes(micro_batch))
        most = _MAX_BYTES // slot_bytes
        self._per_worker = max(1, min(2 + -(-num_micro // max(1, num_workers)), most // max(1, num_workers)))
        window = max(1, num_workers * self._per_worker)
        num_slots = max(window, min(window + 2 * num_micro, most))
        self.slots = torch.empty(num_slots, slot_bytes, dtype=torch.uint8)
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
        free = collections.deque(range(len(self.slots)))
        under_way: collections.deque[_Task] = collections.deque()

        def tasks() -> Iterator[_Task]:
            for part, upcoming in self._with_upcoming(iter(parts)):
                under_way.append(_Task(free.pop() if free else -1, part, upcoming))
                yield under_way[-1]

        others = multiprocessing.active_children()
        loaded = _start(_Slots(self._stream, self.slots), tasks(), self._num_workers, self._per_worker)
        kill = functools.partial(_kill, [each for each in multiprocessing.active_children() if each not in others])
        atexit.register(kill)  # a program that exits now would wait for workers that block its SIGTERM
        try:
            while (filled := _next_result(loaded)) is not None:
                slot, part, _ = under_way.popleft()
                if filled.error is not None:
                    raise filled.error
                pixels = _slot_view(self.slots[slot], slot, free) if filled.pixels is None else filled.pixels
                yield self._stream.batch_in(pixels, part, filled.bad_samples)
        finally:
            del loaded  # ends the workers
            atexit.unregister(kill)

    def _with_upcoming(self, parts: Iterator[range]) -> Iterator[tuple[range, tuple[range, ...]]]:
        """Yield each part with the later parts that its worker will fill: workers take turns, so every `num_workers`-th
        part."""
        turn = max(1, self._num_workers)
        reach = turn * self._parts_ahead
        upcoming = collections.deque(itertools.islice(parts, reach))
        for number in itertools.count():
            if not upcoming:
                return
            part = upcoming.popleft()
            upcoming.extend(itertools.islice(parts, 1))
            if number < turn:
                yield part, (part, *itertools.islice(upcoming, turn - 1, None, turn))
            else:
                yield part, (upcoming[-1],) if len(upcoming) == reach else ()


def _kill(processes: Sequence[BaseProcess]) -> None:
    """Kill processes."""
    for process in processes:
        process.kill()


def _start(slots: _Slots, tasks: Iterator[_Task], num_workers: int, per_worker: int) -> Iterator[_Filled]:
    """Start the workers, and return their results in the order of the tasks."""
    loader = DataLoader(
        slots,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        prefetch_factor=per_worker if num_workers else None,
        multiprocessing_context=start_fork_server() if num_workers else None,
        collate_fn=_identity,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # the default would draw from torch's global generator
    )
    with _stop_signals_blocked():
        return iter(loader)


def _next_result(loaded: Iterator[_Filled]) -> _Filled | None:
    """Return the next result, None at the end; a task's own error is inside its `_Filled`."""
    try:
        return next(loaded, None)
    except RuntimeError as error:
        raise WorkerDiedError(
            f"{error}; most likely for want of memory: lower runtime.num_workers or give the job more memory"
        ) from error


def _identity(filled: Any) -> Any:
    """Return a result unchanged, in place of a collate function."""
    return filled


def _init_worker(number: int) -> None:
    """Start a thread that ends this worker when the trainer is gone: torch only notices the fork server, which waits
    for its workers."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None, "a worker has a parent"

    def end() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def start_fork_server() -> ForkServerContext:
    """Start the server that workers are forked from; if started early, it imports PyTorch in the meantime.

    A fork of the trainer itself would copy locks that its other threads happen to hold, and about one in thousands
    would then wait for ever; the server has a single thread.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    resource_tracker.ensure_running()  # the server starts it anyway, but it does not inherit two of the blocked signals
    with _stop_signals_blocked():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals for the block, so that processes started in it inherit the blocking and never receive them.

    Slurm sends a step's signals to all of its processes: the trainer saves, and ends its workers itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _slot_view(slot: torch.Tensor, number: int, free: collections.deque[int]) -> torch.Tensor:
    """Return a view of a slot; its number is free again once the last view of it is gone."""
    shown = slot.numpy()
    weakref.finalize(shown, free.append, number).atexit = False
    return torch.from_numpy(shown)


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
