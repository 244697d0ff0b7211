"""The images of every step, and what all ranks must know of them before they train on them: one exchange a step.

A rank whose shard is broken must not leave the others waiting in a collective: what went wrong is part of the exchange,
so that all ranks end together, with the same sentence. The same exchange adds up the samples that could not be decoded,
so that their share is that of the whole run, over ranks and restarts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar

from aimscale.harness.data import DataError
from aimscale.harness.data.stream.draws import Batch
from aimscale.harness.device.distributed import Group

T = TypeVar("T")

MIN_IMAGES = 1000
"""The share of undecodable samples is taken over this many images at least: the first bad one is no reason to stop."""


class PeerFailedError(RuntimeError):
    """Another rank failed, and not through its data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """This rank's images of one step, and what all ranks have in it."""

    micro_batches: list[Batch]
    """Of this rank."""
    num_targets: int
    """Scored targets, over all ranks."""
    num_bad_samples: int
    """Undecodable samples, over all ranks; replaced."""
    must_stop: bool
    """Whether any rank was asked to stop."""
    must_save: bool
    """Whether any rank wants a checkpoint behind it."""
    wait_s: float
    """How long this rank's loader let it wait."""


class Feed:
    """Takes steps from a loader and agrees on them with the other ranks."""

    def __init__(self, group: Group, *, num_tokens: int, max_bad_fraction: float) -> None:
        """`num_tokens`: N of the model; `max_bad_fraction`: share of undecodable samples above which a run stops."""
        self._group, self._num_tokens, self._max_bad_fraction = group, num_tokens, max_bad_fraction

    def next(
        self, batches: Iterator[list[Batch]], *, stop_asked: bool, save_asked: bool, num_images: int, num_bad: int
    ) -> Step:
        """The next step.

        Args:
            num_images: images of the run after this step.
            num_bad: undecodable samples of the run before it.

        Raises:
            DataError: on every rank, when any cannot read its images or too many of the run's cannot be decoded.
            PeerFailedError: another rank failed otherwise.
        """
        micro_batches: list[Batch] = []
        error: Exception | None = None
        started = time.perf_counter()
        try:
            micro_batches = next(batches)
        except Exception as caught:
            error = caught
        wait_s = time.perf_counter() - started
        bad_here = [name for batch in micro_batches for name in batch.bad_samples]
        num_targets, num_bad_now, num_stops, num_saves, num_errors = self._group.sum_counts(
            count_targets(micro_batches, self._num_tokens),
            len(bad_here),
            int(stop_asked),
            int(save_asked),
            int(error is not None),
        )
        if num_errors:
            _raise_on_all_ranks(self._group, error)
        if num_bad + num_bad_now > self._max_bad_fraction * max(num_images, MIN_IMAGES):
            last = next(name for names in reversed(self._group.gather(bad_here)) for name in reversed(names))
            raise DataError(
                f"{num_bad + num_bad_now} of the run's first {num_images} images cannot be decoded, last {last}; "
                f"repair the shard and index it again, or raise data.max_bad_fraction ({self._max_bad_fraction:g})"
            )
        return Step(
            micro_batches=micro_batches,
            num_targets=num_targets,
            num_bad_samples=num_bad_now,
            must_stop=num_stops > 0,
            must_save=num_saves > 0,
            wait_s=wait_s,
        )


def run_on_all_ranks(group: Group, action: Callable[[], T]) -> T:
    """Do on every rank what may fail on some: then all raise, and none waits for the others.

    Raises:
        Exception: this rank's own failure, or else a DataError or PeerFailedError that says what another rank raised.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if group.sum_counts(int(error is not None))[0]:
        _raise_on_all_ranks(group, error)
    return result


def count_targets(micro_batches: Sequence[Batch], num_tokens: int) -> int:
    """Scored targets of these images: patches S..N-1 of each."""
    return sum(num_tokens * len(batch.prefix_len) - int(batch.prefix_len.sum()) for batch in micro_batches)


def _raise_on_all_ranks(group: Group, error: Exception | None) -> NoReturn:
    reports = group.gather(None if error is None else (isinstance(error, DataError), f"{error}", type(error).__name__))
    if error is not None:
        raise error
    rank = next(rank for rank, report in enumerate(reports) if report is not None)
    is_data, sentence, name = reports[rank]
    raise DataError(sentence) if is_data else PeerFailedError(f"rank {rank} failed: {name}: {sentence}")
