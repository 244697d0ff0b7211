"""Batches of the stream for one rank, and one exchange per step of what all ranks must know before they train on them.

Any number of ranks, workers and micro-batches yields the same global stream. Workers are told positions and answer when
their pixels are written into a slot of one ring of memory, allocated once and shared with them. New memory for every
batch would cost its page faults each time (150 us per image of 224 px, a fifth of its decoding). A batch is a view of
its slot, which is used again once the last reference to it is gone.

A rank whose shard is broken must not leave the others waiting in a collective: errors are part of the exchange, so that
all ranks end together, with the same sentence. The exchange also sums the undecodable samples, so that their share is
that of the whole run, over ranks and restarts.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from aimscale.harness.data import DataError, refuse_bad
from aimscale.harness.data.images import kernel_threads
from aimscale.harness.data.store.processes import map_in_processes
from aimscale.harness.data.stream.stream import Batch, Stream
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.timeouts import BATCH_TIMEOUT_S

_log = logging.getLogger(__name__)

_MAX_BYTES = 2 << 30  # of the ring; beyond it, less is loaded ahead
_MAX_TASKS = 256  # that wait in a worker's pipe, which holds some 200 kB
_MAX_NAMED = 10  # undecodable samples that a loader names in the log
_SHARED_MEMORY = "/dev/shm"
Task = tuple[int, range]
"""Slot of the ring, and the positions of the micro-batch to write into it."""
T = TypeVar("T")


def free_shared_bytes() -> int:
    """Return the size of the shared memory of this host that is free."""
    free = os.statvfs(_SHARED_MEMORY)
    return free.f_bavail * free.f_frsize


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
    """Return the bounds [first, last) of one of several nearly equal parts; the first get one more."""
    length, more = divmod(number, parts)
    return which * length + min(which, more), (which + 1) * length + min(which + 1, more)


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
    shared_bytes: int | None = None,
) -> Generator[list[Batch]]:
    """Yield this rank's micro-batches of each optimiser step, from position `start` (images seen) up to `stop`.

    With workers, at least one whole step is loaded ahead. Close the iterator if it is left before its end. The last
    step is shorter when `batch_size`, over all ranks, does not divide the distance.

    Args:
        micro_batch: maximum images per item of the list.
        num_workers: loader processes; 0 loads in this one.
        pin_memory: page-lock the ring (needs CUDA), so that a GPU copies from it while it computes.
        shared_bytes: shared memory for this rank's ring with workers; by default, all that is free.

    Raises:
        DataError: a shard cannot be read, or sixteen replacements of an undecodable sample are undecodable too.
        WorkerDiedError, StandstillError: a worker was killed; was stopped, or did not answer for `BATCH_TIMEOUT_S`.
    """

    def split(first: int) -> list[range]:
        last = min(first + batch_size, stop)
        return split_step(first, last, micro_batch=micro_batch, rank=rank, world_size=world_size)

    starts = range(start, stop, batch_size)
    ring = _Ring(stream, micro_batch, len(split(start)), num_workers, shared_bytes)
    parts = (part for first in starts for part in split(first))
    with contextlib.closing(ring.load(parts)) as batches, _page_locked(ring.slots, pin_memory):
        for first in starts:
            yield list(itertools.islice(batches, len(split(first))))


class _Ring:
    """Memory of the micro-batches that are being loaded, and of the current and the next step."""

    def __init__(self, stream: Stream, micro_batch: int, num_micro: int, num_workers: int, room: int | None) -> None:
        self._stream, self._num_workers = stream, num_workers
        slot_bytes, workers = max(1, stream.num_bytes(micro_batch)), max(1, num_workers)
        most = _MAX_BYTES // slot_bytes
        self._num_ahead = max(1, min(2 + -(-num_micro // workers), most // workers, _MAX_TASKS))  # per worker
        window = max(1, num_workers * self._num_ahead)
        num_slots = max(window, min(window + 2 * num_micro, most))
        self.slots = torch.empty(num_slots, slot_bytes, dtype=torch.uint8)
        self._free = collections.deque(range(num_slots))
        self._num_named = 0
        if num_workers:
            room = free_shared_bytes() if room is None else room
            if self.slots.nbytes > room:
                raise DataError(
                    f"loader processes need {self.slots.nbytes / 1e6:,.0f} MB in {_SHARED_MEMORY} for each rank, which "
                    f"has {room / 1e6:,.0f}; give the container more (docker run --shm-size), or lower "
                    "runtime.num_workers or runtime.micro_batch"
                )
            self.slots.share_memory_()

    def load(self, parts: Iterable[range]) -> Generator[Batch]:
        """Yield the batch of each of `parts`, in order."""
        under_way: collections.deque[Task] = collections.deque()

        def tasks() -> Iterator[Task]:
            for part in parts:
                under_way.append((self._free.popleft(), part))
                yield under_way[-1]

        with contextlib.closing(self._filled(tasks())) as filled:
            for bad_samples in filled:
                yield self._batch(*under_way.popleft(), bad_samples)

    def _filled(self, tasks: Iterable[Task]) -> Generator[tuple[str, ...]]:
        """Fill slots, here or in workers, and yield the undecodable samples of each micro-batch."""
        fill = functools.partial(_fill, self._stream, self.slots)
        read_ahead = functools.partial(_read_ahead, self._stream)
        if self._num_workers:
            yield from map_in_processes(
                fill, tasks, self._num_workers, num_ahead=self._num_ahead, prepare=read_ahead, limit_s=BATCH_TIMEOUT_S
            )
            return
        for task in tasks:
            read_ahead(task)
            yield fill(task)

    def _batch(self, slot: int, part: range, bad_samples: tuple[str, ...]) -> Batch:
        """Make the batch of a slot that was filled."""
        for name in bad_samples[: max(0, _MAX_NAMED - self._num_named)]:
            _log.warning("%s cannot be decoded; another image takes its place", name)
        self._num_named += len(bad_samples)
        if self._free:
            pixels = self._view(slot)
        else:  # the trainer holds so many batches that the next task needs this slot
            pixels = self.slots[slot].clone()
            self._free.append(slot)
        return self._stream.batch_in(pixels, part, bad_samples)

    def _view(self, slot: int) -> torch.Tensor:
        """Return a view of a slot, which is free again once the last view of it is gone."""
        shown = self.slots[slot].numpy()
        weakref.finalize(shown, self._free.append, slot).atexit = False
        return torch.from_numpy(shown)


def _read_ahead(stream: Stream, task: Task) -> None:
    """Start to read the bytes of a micro-batch."""
    stream.read_ahead(task[1])


def _fill(stream: Stream, slots: torch.Tensor, task: Task) -> tuple[str, ...]:
    """Write a micro-batch into its slot; returns its undecodable samples."""
    slot, part = task
    with kernel_threads(1):
        return stream.fill(slots[slot], part)


@contextlib.contextmanager
def _page_locked(slots: torch.Tensor, is_wanted: bool) -> Iterator[None]:
    """Register memory with CUDA for the block; if that fails, copies are slower and nothing else changes."""
    problem = int(torch.cuda.cudart().cudaHostRegister(slots.data_ptr(), slots.nbytes, 0)) if is_wanted else 0
    is_locked = is_wanted and not problem
    if problem:
        _log.warning(
            "CUDA does not page-lock %d MB (error %d); copies to the GPU are slower", slots.nbytes >> 20, problem
        )
        with contextlib.suppress(RuntimeError):  # CUDA remembers the error, and the next kernel would raise it
            torch.ones(1, device="cuda")
    try:
        yield
    finally:
        if is_locked:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(slots.data_ptr())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRequest:
    """Requests of this rank to all others, exchanged with its images."""

    stop: bool = False
    """Whether this rank was asked to stop."""
    save: bool = False
    """Whether this rank wants a checkpoint."""
    error: Exception | None = None
    """Error other than in loading images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """This rank's images of one step, and the totals of all ranks."""

    micro_batches: list[Batch]
    """Micro-batches of this rank. Empty the list after the step: the loader refills memory that nobody holds."""
    num_targets: int
    """Scored targets of all ranks."""
    num_bad_samples: int
    """Undecodable samples of all ranks; replaced."""
    must_stop: bool
    """Whether any rank had been asked to stop when its images were ready."""
    must_save: bool
    """Whether any rank wanted a checkpoint after this step when its images were ready."""
    wait_s: float
    """Seconds that this rank waited for its loader."""


def next_step(
    group: Group,
    batches: Iterator[list[Batch]],
    request: Callable[[], RankRequest] = RankRequest,
    *,
    num_tokens: int,
    max_bad_fraction: float,
    num_images: int,
    num_bad: int,
) -> Step:
    """Take the next step from this rank's loader and agree on it; all ranks call this together.

    Args:
        request: called when the images are ready.
        num_tokens: N of the model.
        max_bad_fraction: share of undecodable samples above which a run stops.
        num_images: images of the run after this step.
        num_bad: undecodable samples of the run before it.

    Raises:
        UserError: on every rank, if any cannot read its images or reports another UserError, or if too many of the
            run's samples cannot be decoded.
        PeerFailedError: another rank failed otherwise.
    """
    started = time.perf_counter()
    micro_batches: list[Batch] = []
    error: Exception | None = None
    try:
        micro_batches = next(batches)
    except Exception as caught:
        error = caught
    wait_s = time.perf_counter() - started
    asked = request()
    error = error or asked.error
    bad = [name for batch in micro_batches for name in batch.bad_samples]
    counts = (count_targets(micro_batches, num_tokens), len(bad), asked.stop, asked.save, error is not None)
    num_targets, num_bad_now, num_stops, num_saves, num_errors = group.sum_counts(*map(int, counts))
    if num_errors:
        group.raise_on_all_ranks(error)
    if num_bad + num_bad_now:
        refuse_bad(
            f"the run's first {num_images} images",
            num_bad + num_bad_now,
            num_images,
            max_bad_fraction,
            lambda: [*itertools.chain(*group.all_gather_object(bad))][-1],
        )
    return Step(
        micro_batches=micro_batches,
        num_targets=num_targets,
        num_bad_samples=num_bad_now,
        must_stop=num_stops > 0,
        must_save=num_saves > 0,
        wait_s=wait_s,
    )


def count_targets(micro_batches: Sequence[Batch], num_tokens: int) -> int:
    """Count the scored targets of these images: all patches minus those that prefix lengths, or masks, sum up to."""
    return sum(num_tokens * len(batch.prefix_lengths) - int(batch.prefix_lengths.sum()) for batch in micro_batches)
