"""Batches of the stream for one rank: any number of ranks, workers and micro-batches yields the same global stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.utils.data

from harness.data.index import DataError
from harness.data.random_access import I64
from harness.data.stream import Batch, TrainStream

_MIN_SEEN = 1000  # images before the share of undecodable ones means something


def split_step(start: int, stop: int, *, micro_batch: int, rank: int, world_size: int) -> list[I64]:
    """Positions [start, stop) of one optimiser step to this rank's micro-batches.

    Every rank gets the same number of micro-batches, none above `micro_batch`; their sizes differ by one pair
    at most. Pairs (2i, 2i+1) stay on one rank, and in one micro-batch unless it holds a single image. A rank that has
    fewer pairs than micro-batches gets empty ones.
    """
    unit = 2 if start % 2 == 0 and stop % 2 == 0 else 1
    ranks = np.array_split(np.arange(start, stop, unit), world_size)
    if unit == 2 and micro_batch == 1:
        ranks = [np.stack([first, first + 1], axis=1).reshape(-1) for first in ranks]
        unit = 1
    num_micro = max(1, -(-max(map(len, ranks)) // max(1, micro_batch // unit)))
    parts = np.array_split(ranks[rank], num_micro)
    return [(part[:, None] + np.arange(unit)).reshape(-1).astype(np.int64) for part in parts]


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
    max_bad_fraction: float | None = None,
) -> Iterator[list[Batch]]:
    """One item per optimiser step: this rank's micro-batches, from position `start` (images seen) up to `stop`.

    Args:
        stream: the run's stream.
        start: first position, anything; costs nothing however large.
        stop: end; the last step is shorter when `batch_size` does not divide the distance.
        batch_size: images per step, over all ranks.
        micro_batch: most images per item of the list.
        rank: of this process.
        world_size: number of ranks.
        num_workers: loader processes; 0 loads in this one.
        pin_memory: hand out page-locked batches (needs CUDA).
        max_bad_fraction: share of undecodable images, counted by this rank since `start`, above which it stops;
            None takes the stream's configuration.

    Raises:
        DataError: a shard cannot be read, or too many images cannot be decoded (named by shard and key).
    """
    limit = stream.max_bad_fraction if max_bad_fraction is None else max_bad_fraction
    num_seen, bad = 0, 0
    steps = (
        split_step(first, min(first + batch_size, stop), micro_batch=micro_batch, rank=rank, world_size=world_size)
        for first in range(start, stop, batch_size)
    )
    sizes: list[int] = []  # micro-batches of the steps handed to the loader and not yet yielded

    def flat() -> Iterator[I64]:
        for parts in steps:
            sizes.append(len(parts))
            yield from parts

    step: list[Batch] = []
    for batch in _load(stream, flat(), num_workers, pin_memory):
        num_seen += len(batch)
        bad += len(batch.bad_samples)
        if bad > limit * max(num_seen, _MIN_SEEN):
            raise DataError(
                f"{bad} of the last {num_seen} images cannot be decoded, last {batch.bad_samples[-1]}; "
                f"repair the shard and index it again, or raise data.max_bad_fraction ({limit:g})"
            )
        step.append(batch)
        if len(step) == sizes[0]:
            sizes.pop(0)
            yield step
            step = []


class _StreamItems(torch.utils.data.Dataset[Batch | DataError]):
    """Maps an array of positions to their batch; an error travels as a value, to keep its one sentence."""

    def __init__(self, stream: TrainStream) -> None:
        self._stream = stream

    def __getitem__(self, positions: I64) -> Batch | DataError:
        try:
            return self._stream.batch(positions)
        except DataError as error:
            return error


def _load(stream: TrainStream, parts: Iterable[I64], num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches in the order of `parts`."""
    if num_workers == 0:
        for part in parts:
            batch = stream.batch(part)
            yield batch.pin_memory() if pin_memory else batch
        return
    loader = torch.utils.data.DataLoader(
        _StreamItems(stream),
        batch_size=None,
        sampler=parts,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_keep,  # type: ignore[arg-type]
    )
    for item in loader:
        if isinstance(item, DataError):
            raise item
        yield item


def _keep(item: Batch | DataError) -> Batch | DataError:
    return item
