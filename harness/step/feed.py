"""The images of every step, and one exchange per step of what all ranks must know before they train on them.

With loader processes, the next step's images are fetched and its exchange is made while a step is computed. A rank
whose shard is broken must not leave the others waiting in a collective: errors are part of the exchange, so that all
ranks end together, with the same sentence. The exchange also sums the undecodable samples, so that their share is that
of the whole run, over ranks and restarts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NoReturn, TypeVar

import torch

from aimscale.aim.errors import UserError
from aimscale.harness.data import refuse_bad
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.distributed.group import Group, met_by

T = TypeVar("T")

CLOSE_S = 5.0
"""Seconds to wait for a loader when its rank has failed; a loader that still waits for images then is not closed."""


class PeerFailedError(RuntimeError):
    """Failure of another rank that is no user's mistake."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StartedStep:
    """Step whose exchange is under way."""

    micro_batches: list[Batch]
    error: Exception | None
    sums: Callable[[], list[int]]


class Feed:
    """Source of steps, which ranks agree on; with loader processes, one step ahead."""

    def __init__(self, group: Group, *, num_tokens: int, max_bad_fraction: float, has_workers: bool) -> None:
        """Set up the feed; `reading` gives it a loader.

        Args:
            num_tokens: N of the model.
            max_bad_fraction: share of undecodable samples above which a run stops.
            has_workers: whether other processes load, so that a thread can wait for their images while a step is
                computed. Otherwise this one loads them, before their step.
        """
        self._group, self._num_tokens, self._max_bad_fraction = group, num_tokens, max_bad_fraction
        self._has_workers = has_workers
        self._batches: Iterator[list[Batch]] = iter(())
        self._request: Callable[[], RankRequest] = RankRequest
        self._ahead: concurrent.futures.Future[_StartedStep | None] | None = None

    @contextlib.contextmanager
    def reading(
        self, batches: Generator[list[Batch]], request: Callable[[], RankRequest] = RankRequest
    ) -> Iterator[None]:
        """Take steps from this loader during the block; it is closed at the end.

        Args:
            request: called once for every step, when its images are ready.
        """
        self._batches, self._request, self._ahead = batches, request, None
        try:
            yield
        finally:
            if self._ahead is None or concurrent.futures.wait([self._ahead], CLOSE_S).done:
                batches.close()

    def next(self, *, num_images: int, num_bad: int) -> Step:
        """Return the next step; with loader processes, the one after it is asked for.

        Args:
            num_images: images of the run after this step.
            num_bad: undecodable samples of the run before it.

        Raises:
            UserError: on every rank, if any cannot read its images or reports another UserError, or if too many of the
                run's samples cannot be decoded.
            PeerFailedError: another rank failed otherwise.
        """
        started = time.perf_counter()
        begun = self._ahead.result() if self._ahead else self._begin()
        wait_s = time.perf_counter() - started
        assert begun is not None, "a step was asked for behind the last one"
        num_targets, num_bad_now, num_stops, num_saves, num_errors = begun.sums()
        if num_errors:
            _raise_on_all_ranks(self._group, begun.error)
        refuse_bad(
            f"the run's first {num_images} images",
            num_bad + num_bad_now,
            num_images,
            self._max_bad_fraction,
            lambda: [*itertools.chain(*self._group.gather(_bad_samples(begun.micro_batches)))][-1],
        )
        if self._has_workers and not num_stops:
            self._ahead = concurrent.futures.Future()
            # A daemon: an executor's thread that waits for images would keep a failed rank from exiting.
            threading.Thread(target=self._begin_ahead, args=[self._ahead], name="feed", daemon=True).start()
        return Step(
            micro_batches=begun.micro_batches,
            num_targets=num_targets,
            num_bad_samples=num_bad_now,
            must_stop=num_stops > 0,
            must_save=num_saves > 0,
            wait_s=wait_s,
        )

    def _begin_ahead(self, ahead: concurrent.futures.Future[_StartedStep | None]) -> None:
        """Wait for the next step's images, in a thread, while a step is computed."""
        try:
            if self._group.device.type == "cuda":
                torch.cuda.set_device(self._group.device)  # per thread
            ahead.set_result(self._begin())
        except BaseException as error:
            ahead.set_exception(error)

    def _begin(self) -> _StartedStep | None:
        """Fetch a step's images and start its exchange; None after the last step."""
        micro_batches: list[Batch] | None = []
        error: Exception | None = None
        try:
            micro_batches = next(self._batches, None)
        except Exception as caught:
            error = caught
        if micro_batches is None:
            return None
        request = self._request()
        error = error or request.error
        counts = (count_targets(micro_batches, self._num_tokens), len(_bad_samples(micro_batches)))
        sums = self._group.sum_counts_async(*counts, int(request.stop), int(request.save), int(error is not None))
        return _StartedStep(micro_batches=micro_batches, error=error, sums=sums)


def _bad_samples(micro_batches: Sequence[Batch]) -> list[str]:
    """List the undecodable samples of these images."""
    return [name for batch in micro_batches for name in batch.bad_samples]


def count_targets(micro_batches: Sequence[Batch], num_tokens: int) -> int:
    """Count the scored targets of these images: all patches minus those that prefix lengths, or masks, sum up to."""
    return sum(num_tokens * len(batch.prefix_lengths) - int(batch.prefix_lengths.sum()) for batch in micro_batches)


def run_on_all_ranks(group: Group, action: Callable[[], T]) -> T:
    """Run an action that may fail on some ranks on every rank; if it fails on any, all raise.

    Raises:
        Exception: this rank's own failure, or else what another rank raised: a UserError of the same class, or a
            PeerFailedError.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if group.any(error is not None):
        _raise_on_all_ranks(group, error)
    return result


def _raise_on_all_ranks(group: Group, error: Exception | None) -> NoReturn:
    """Raise this rank's error, or else the first other rank's."""
    kind = type(error) if isinstance(error, UserError) else type(error).__name__
    reports = group.gather(None if error is None else (kind, str(error)))
    if error is not None:
        raise error
    rank = next(rank for rank, report in enumerate(reports) if report is not None)
    kind, sentence = reports[rank]
    if isinstance(kind, str):
        raise PeerFailedError(f"rank {rank} failed: {kind}: {sentence}")
    raise met_by(rank, kind(sentence))
