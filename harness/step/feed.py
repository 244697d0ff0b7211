"""The images of every step, and one exchange per step of what all ranks must know before they train on them.

A rank whose shard is broken must not leave the others waiting in a collective: errors are part of the exchange, so that
all ranks end together, with the same sentence. The exchange also sums the undecodable samples, so that their share is
that of the whole run, over ranks and restarts.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar

from aimscale.aim.errors import UserError
from aimscale.harness.data import refuse_bad
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.distributed.group import Group, tag_failed_rank

T = TypeVar("T")


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
        _raise_on_all_ranks(group, error)
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
    reports = group.all_gather_object(None if error is None else (kind, str(error)))
    if error is not None:
        raise error
    rank = next(rank for rank, report in enumerate(reports) if report is not None)
    kind, sentence = reports[rank]
    if isinstance(kind, str):
        raise PeerFailedError(f"rank {rank} failed: {kind}: {sentence}")
    raise tag_failed_rank(rank, kind(sentence))
