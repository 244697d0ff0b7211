"""Saving of checkpoints: the state is copied, then written, verified and published while training goes on.

A rank stops only while it copies its share of the state into host memory. A thread writes the copy, reads it back, and
leaves the part's manifest beside it. The first rank's thread publishes the checkpoint, by renaming its folder, once the
manifests of all parts are there: whatever has the final name is complete. At most one checkpoint is under way.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from aimscale.harness.distributed.group import Group, write_timeout_s
from aimscale.harness.run.files import (
    file_crc32,
    new_partial_dir,
    partial_dir,
    publish_dir,
    remove_dir,
    sealed,
    write_json,
)
from aimscale.harness.run.lock import check_writer
from aimscale.harness.run.timeouts import LAST_SAVE_TIMEOUT_S
from aimscale.harness.step.checkpoint import CheckpointError, Manifest, read_manifest, read_parts, write_safetensors
from aimscale.harness.step.engine import Engine

T = TypeVar("T")

POLL_S = 0.5
"""Seconds between the first rank's checks for the other ranks' parts."""
_CHUNK_VALUES = 1 << 24  # 64 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PendingCheckpoint:
    """Checkpoint that is being written."""

    final: Path
    """Final path."""
    part: concurrent.futures.Future[Manifest]
    """This rank's part, done when it is on the disk."""
    published: concurrent.futures.Future[Any]
    """Publication on the first rank, done when older checkpoints are removed; on the others, `part`."""


class CheckpointWriter:
    """Writer of one engine's checkpoints; all ranks call `save` and `finish` together."""

    def __init__(self, engine: Engine, group: Group) -> None:
        self._engine, self._group = engine, group
        self.pending: _PendingCheckpoint | None = None
        """Checkpoint under way, if any."""
        self._stop = threading.Event()
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        num_values = sum(values.numel() for values in checkpoint_shard(self._engine).values())
        self._limit_s = write_timeout_s(2 * 4 * num_values)  # it is written, and read back

    def save(
        self,
        final: Path,
        *,
        run_id: str,
        images_seen: int,
        branch: int | None,
        progress: dict[str, Any],
        keep: Collection[Path],
    ) -> None:
        """Copy the engine's state and start to write it; a checkpoint under way is finished first.

        A complete checkpoint that is already there is kept: the same position of the same run holds the same values.

        Args:
            final: final folder of the checkpoint; `Manifest` explains the following arguments.
            keep: checkpoints that stay; the others go once this one is complete.
        """
        self.finish()
        with self._group.collective_timeout(self._limit_s):
            keep = {final, *keep}
            if self._group.broadcast_from_rank0(lambda: _is_complete(final, keep)):
                return
            about = {"run_id": run_id, "images_seen": images_seen, "branch": branch, "progress": progress}
            self.pending = self._begin(final, about, keep)
            self._group.barrier()  # here and not in the next step's collectives, whose time is short

    def _begin(self, final: Path, about: dict[str, Any], keep: Collection[Path]) -> _PendingCheckpoint:
        """Copy this rank's share of the state, and start to write it; see `save`."""
        share = checkpoint_shard(self._engine)
        pieces = [piece.to("cpu", copy=True) for values in share.values() for piece in values.split(_CHUNK_VALUES)]
        manifest = Manifest(
            **about, adam_step=int(self._engine.adam_state(self._engine.optimiser_tensors()[0])["step"]), files={}
        )
        path = partial_dir(final) / f"part-{self._group.rank:05d}-of-{self._group.world_size:05d}.safetensors"
        lengths = {key: len(values) for key, values in share.items()}
        published: concurrent.futures.Future[Any]
        write = _naming_checkpoint(final)(_write_part)
        part = published = self._background.submit(write, path, lengths, self._until_stop(pieces), manifest)
        if self._group.is_first:
            published = self._background.submit(_naming_checkpoint(final)(self._publish), final, part, keep)
        return _PendingCheckpoint(final=final, part=part, published=published)

    def problem(self) -> Exception | None:
        """Return this rank's error with the checkpoint under way, if any; any thread may ask, without waiting."""
        saving = self.pending
        for future in (saving.part, saving.published) if saving else ():
            error = future.exception() if future.done() else None
            if isinstance(error, Exception):
                return error
        return None

    def finish(self) -> None:
        """Wait until the checkpoint under way is published.

        Raises:
            CheckpointError: it could not be written (on all ranks); earlier ones are untouched.
            LockLost: the run is not this group's any more.
        """
        if saving := self.pending:
            # a rank that waits for its own disk may take as long, and then says so
            with self._group.collective_timeout(2 * self._limit_s):
                try:
                    self._group.run_on_all_ranks(lambda: self._result(saving.part, saving.final))
                    self._group.broadcast_from_rank0(lambda: self._result(saving.published, saving.final))
                except Exception:
                    self._stop.set()
                    raise
            self.pending = None

    def _result(self, future: concurrent.futures.Future[T], final: Path) -> T:
        """Wait for a part or a publication for as long as the disk may take."""
        if not concurrent.futures.wait([future], self._limit_s).done:
            raise CheckpointError(
                f"checkpoint {final} was not written within {self._limit_s:.0f} s; see to its disk or file server, "
                "then start the run again"
            )
        return future.result()

    def close(self) -> None:
        """Give the checkpoint under way a little time, then abandon it."""
        is_over = not self.pending or concurrent.futures.wait([self.pending.published], LAST_SAVE_TIMEOUT_S).done
        self._stop.set()
        self._background.shutdown(wait=bool(is_over))
        if self.pending and self._group.is_first:
            shutil.rmtree(partial_dir(self.pending.final), ignore_errors=True)  # a full disk must store the reason

    def _publish(self, final: Path, part: concurrent.futures.Future[Manifest], keep: Collection[Path]) -> None:
        """Wait for all parts, publish the checkpoint, and remove others, which takes long for gigabytes."""
        part.result()
        while not (parts := read_parts(partial_dir(final))):
            if self._stop.wait(POLL_S):
                return
        _publish_parts(partial_dir(final), final, parts)
        _remove_others(keep)

    def _until_stop(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield pieces until the run ends."""
        for piece in pieces:
            if self._stop.is_set():
                raise OSError("the run ended before it was written")
            yield piece


def checkpoint_shard(engine: Engine) -> dict[str, Tensor]:
    """Return the tensors that this rank writes, flat, by key: its own, or a share of what all ranks hold."""
    fragments = engine.fragments()
    if engine.options.zero_stage == 0:
        largest_first = sorted(fragments, key=lambda each: -each.numel)
        fragments = largest_first[engine.group.rank :: engine.group.world_size]
    return {f"{name}@{start}": values for name, start, values in engine.state(fragments)}


def _is_complete(final: Path, keep: Collection[Path]) -> bool:
    """Return whether a checkpoint is complete, and then remove others; if not, make the folder to write it in."""
    if read_manifest(final):
        _remove_others(keep)
        return True
    remove_dir(final)
    new_partial_dir(final)
    return False


def _remove_others(keep: Collection[Path]) -> None:
    """Remove all checkpoints but those to keep."""
    for other in next(iter(keep)).parent.iterdir():
        if other not in keep:
            remove_dir(other)


@contextlib.contextmanager
def _naming_checkpoint(final: Path) -> Iterator[None]:
    """Name the checkpoint in errors of writing it."""
    try:
        yield
    except OSError as error:
        check_writer(final)
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; free space, then start the run again "
            "(`aimscale launch --retry` where its sweep has given it up)"
        ) from error


def _publish_parts(partial: Path, final: Path, parts: Sequence[Manifest]) -> None:
    """Publish a checkpoint from the manifests of its parts, in the order of ranks."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    write_json(partial / "manifest.json", sealed(dataclasses.asdict(dataclasses.replace(parts[0], files=files))))
    if not read_manifest(partial):
        check_writer(final)
        raise CheckpointError(f"checkpoint {final} was not written wholly; start the run again")
    publish_dir(partial, final)


def _write_part(path: Path, lengths: dict[str, int], pieces: Iterable[Tensor], manifest: Manifest) -> Manifest:
    """Write one file of float32 values, or none without values, read it back, and leave the part's manifest, which is
    returned, beside it."""
    if lengths:
        crc = write_safetensors(path, {key: (length,) for key, length in lengths.items()}, pieces)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read the disk below, not the page cache
        if file_crc32(path) != crc:
            raise OSError(f"{path.name} does not read back as it was written")
        entry = {"size": path.stat().st_size, "crc32": crc}
        manifest = dataclasses.replace(manifest, files={path.name: entry})
    write_json(path.with_suffix(".json"), sealed(dataclasses.asdict(manifest)))  # and the folder with it
    return manifest
