"""Batches of the stream for one rank: any number of ranks, workers and micro-batches yields the same global stream."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Generator, Iterator

import numpy as np

from aimscale.harness.data.random_access import I64
from aimscale.harness.data.stream.background import Background
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.data.stream.buffers import Buffers
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.data.stream.worker_pool import WorkerPool

PIXELS_AT_A_TIME = 2**18
"""The loader's thread reads as many micro-batches at once as have this many pixels, 256 images of 32 px: most of the
time of a small one goes to calls."""


def split_step(start: int, stop: int, *, micro_batch: int, rank: int, world_size: int) -> list[range]:
    """Positions [start, stop) of one optimiser step to this rank's micro-batches.

    Every rank gets the same number of micro-batches, none above `micro_batch`; their sizes differ by one pair
    at most. Pairs (2i, 2i+1) stay on one rank, and in one micro-batch unless it holds a single image. A rank that has
    fewer pairs than micro-batches gets empty ones.
    """
    unit = 2 if start % 2 == 0 and stop % 2 == 0 else 1
    first, last = _share((stop - start) // unit, world_size, rank)
    most = -(-((stop - start) // unit) // world_size)  # what the first rank has
    if unit == 2 and micro_batch == 1:
        first, last, most, unit = 2 * first, 2 * last, 2 * most, 1
    num_micro = max(1, -(-most // max(1, micro_batch // unit)))
    bounds = [_share(last - first, num_micro, number) for number in range(num_micro)]
    return [range(start + unit * (first + a), start + unit * (first + b)) for a, b in bounds]


def _share(number: int, parts: int, which: int) -> tuple[int, int]:
    """First, and one behind the last, of `number` things that go to one of some parts; the first get one more."""
    each, more = divmod(number, parts)
    return which * each + min(which, more), (which + 1) * each + min(which + 1, more)


def train_batches(
    stream: TrainStream,
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
    """One item per optimiser step: this rank's micro-batches, from position `start` (images seen) up to `stop`.

    At least one whole step is loaded ahead. Close the iterator when it is left before its end.

    Args:
        start: first position, anything; costs nothing however large.
        stop: end; the last step is shorter when `batch_size` does not divide the distance.
        batch_size: images per step, over all ranks.
        micro_batch: most images per item of the list.
        num_workers: loader processes; 0 loads in a thread of this one.
        pin_memory: hand out page-locked batches (needs CUDA).

    Raises:
        DataError: a shard cannot be read, or sixteen replacements of an undecodable sample are undecodable too.
        WorkerDiedError: a loader process was killed.
    """
    steps = (
        split_step(first, min(first + batch_size, stop), micro_batch=micro_batch, rank=rank, world_size=world_size)
        for first in range(start, stop, batch_size)
    )
    sizes: collections.deque[int] = collections.deque()  # micro-batches of the steps under way

    def flat() -> Iterator[range]:
        for parts in steps:
            sizes.append(len(parts))
            yield from parts

    first_step = split_step(
        start, min(start + batch_size, stop), micro_batch=micro_batch, rank=0, world_size=world_size
    )
    with _loading(stream, flat(), num_workers, pin_memory, micro_batch, len(first_step)) as batches:
        step: list[Batch] = []
        for batch in batches:
            step.append(batch)
            if len(step) == sizes[0]:
                sizes.popleft()
                yield step
                step = []


@contextlib.contextmanager
def _loading(
    stream: TrainStream, parts: Iterator[range], num_workers: int, pin_memory: bool, micro_batch: int, num_micro: int
) -> Iterator[Iterator[Batch]]:
    """Batches in the order of `parts`, loaded ahead; what loads them ends with the block."""
    batches: Iterator[Batch]
    with contextlib.ExitStack() as stack:
        if num_workers == 0:
            at_a_time = PIXELS_AT_A_TIME // (micro_batch * stream.image_size**2) if stream.can_be_split else 1
            batches = _several_at_a_time(stream, parts, max(1, at_a_time), micro_batch)
        else:
            pool = WorkerPool(stream, num_workers=num_workers, micro_batch=micro_batch, num_micro=num_micro)
            stack.callback(pool.close)
            batches = pool.load(parts)
        if pin_memory:
            batches = map(Batch.pin_memory, batches)
        if num_workers == 0 or pin_memory:
            ahead = Background(batches, depth=num_micro + 1)
            stack.callback(ahead.close)
            batches = ahead
        yield batches


def _several_at_a_time(stream: TrainStream, parts: Iterator[range], num: int, micro_batch: int) -> Iterator[Batch]:
    """`map(stream.batch, parts)`, so many of them in one call."""
    buffers = Buffers(stream.num_bytes(num * micro_batch))
    while several := list(itertools.islice(parts, num)):
        whole = stream.batch(_joined(several), into=buffers.take())
        if len(several) == 1:
            yield whole
        elif whole.bad_samples:
            yield from map(stream.batch, several)  # each says which of its own were replaced
        else:
            yield from whole.split([len(part) for part in several])
        del whole  # its memory is free when the next one is made


def _joined(parts: list[range]) -> range | I64:
    """All positions of some micro-batches: those of a single rank follow each other."""
    if all(before.stop == after.start for before, after in itertools.pairwise(parts)):
        return range(parts[0].start, parts[-1].stop)
    return np.concatenate(parts)
