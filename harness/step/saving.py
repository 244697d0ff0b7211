"""Saving of checkpoints: the state is copied, then written, verified and published while training goes on.

A rank stops only while it copies its own share of the state into host memory, which is allocated once, during the start
(page-locked with a GPU). A thread writes the copy, fsyncs it, reads it back, and then leaves the part's manifest beside
it. If the host lacks the memory for a copy, the same thread writes the state from where it is, piece by piece, and the
rank waits. The first rank's thread publishes the checkpoint, by renaming its folder, once the manifests of all parts
are there: whatever has the final name is complete. At most one checkpoint is under way. Whoever takes over a run
publishes a checkpoint that its ranks had written completely but not published (`recover_checkpoints`).
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

import torch
from torch import Tensor

from aimscale.harness.distributed.group import Group, write_timeout_s
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import new_partial_dir, partial_dir, publish_dir, remove_dir, write_json
from aimscale.harness.run.lock import check_writer
from aimscale.harness.step.checkpoint import MASTER, CheckpointError, Manifest, file_crc32, read_manifest, read_parts
from aimscale.harness.step.engine import ADAM_MOMENTS, Engine, fragment_of
from aimscale.harness.step.feed import run_on_all_ranks
from aimscale.harness.step.safetensors import write_safetensors

T = TypeVar("T")

POLL_S = 0.5
"""Seconds between the first rank's checks for the other ranks' parts."""
LEAVE_S = 10.0
"""Seconds that a rank which ends with an error waits for a checkpoint under way."""
_CHUNK_VALUES = 1 << 24  # 64 MiB, a power of two


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PendingCheckpoint:
    """Checkpoint that is being written."""

    final: Path
    """Final path."""
    part: concurrent.futures.Future[Manifest]
    """This rank's part, done when it is on the disk."""
    published: concurrent.futures.Future[Any]
    """Publication of the whole checkpoint on the first rank, done when older ones are removed; on the others the same
    as `part`."""
    all_parts: concurrent.futures.Future[list[Manifest]]
    """Manifests of all parts, set once the ranks have exchanged them: a file server may show them later."""


class CheckpointWriter:
    """Writer of one engine's checkpoints; all ranks call `save` and `finish` together."""

    def __init__(self, engine: Engine, group: Group, *, copies: bool = True) -> None:
        """Start to allocate the memory of the copy, in the background.

        Args:
            copies: whether the state is copied first; otherwise ranks wait until it is written.
        """
        self._engine, self._group = engine, group
        self._pending: _PendingCheckpoint | None = None
        self._stop = threading.Event()
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copy: concurrent.futures.Future[list[Tensor]] | None = None
        num_values = sum(values.numel() for values in self._own_share().values())
        self._limit_s = write_timeout_s(2 * 4 * num_values)  # it is written, and read back
        if copies:
            self._copy = self._background.submit(_allocate, num_values, group.device)

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
        """Copy the engine's state and start to write it, or write it; a checkpoint under way is finished first.

        A complete checkpoint that is already there is kept: the same position of the same run holds the same values.

        Args:
            final: final folder of the checkpoint.
            run_id: see `Manifest` for this and the following arguments up to `progress`.
            keep: checkpoints that stay; the others go once this one is complete.

        Raises:
            CheckpointError: as `finish` says.
        """
        self.finish()
        with self._group.collectives_within(self._limit_s):
            keep = {final, *keep}
            if self._group.from_first(lambda: _is_complete(final, keep)):
                return
            about = {"run_id": run_id, "images_seen": images_seen, "branch": branch, "progress": progress}
            self._pending = self._begin(final, about, keep)
            self._group.wait()  # here and not in the next step's collectives, whose time is short

    def _begin(self, final: Path, about: dict[str, Any], keep: Collection[Path]) -> _PendingCheckpoint:
        """Copy this rank's share of the state, and start to write it; see `save`."""
        share = self._own_share()
        pieces = _pieces(share.values())
        if self._copy is not None:
            pieces = _copy_into(share.values(), self._copy.result(), self._group.device)
        manifest = Manifest(
            **about, adam_step=int(self._engine.adam_state(self._engine.optimiser_tensors()[0])["step"]), files={}
        )
        path = partial_dir(final) / f"part-{self._group.rank:05d}-of-{self._group.world_size:05d}.safetensors"
        lengths = {key: len(values) for key, values in share.items()}
        all_parts: concurrent.futures.Future[list[Manifest]] = concurrent.futures.Future()
        published: concurrent.futures.Future[Any]
        write = _naming_checkpoint(final)(_write_part)
        part = published = self._background.submit(write, path, lengths, self._until_stop(pieces), manifest)
        if self._group.is_first:
            published = self._background.submit(_naming_checkpoint(final)(self._publish), final, part, all_parts, keep)
        if self._copy is None:
            concurrent.futures.wait([part], self._limit_s)
        return _PendingCheckpoint(final=final, part=part, published=published, all_parts=all_parts)

    def problem(self) -> Exception | None:
        """Return this rank's error with the checkpoint under way, if any; any thread may ask, without waiting."""
        saving = self._pending
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
        if saving := self._pending:
            # a rank that waits for its own disk may take as long, and then says so
            with self._group.collectives_within(2 * self._limit_s):
                part = run_on_all_ranks(self._group, lambda: self._result(saving.part, saving.final))
                saving.all_parts.set_result(self._group.gather(part))
                self._group.from_first(lambda: self._result(saving.published, saving.final))
            self._pending = None

    def _result(self, future: concurrent.futures.Future[T], final: Path) -> T:
        """Wait for a part or a publication for as long as the disk may take."""
        if not concurrent.futures.wait([future], self._limit_s).done:
            raise CheckpointError(
                f"checkpoint {final} was not written within {self._limit_s:.0f} s; see to its disk or file server, "
                "then start the run again"
            )
        return future.result()

    def leave(self) -> None:
        """Give the checkpoint under way a little time, on a rank that ends with an error unknown to the others."""
        if self._pending:
            concurrent.futures.wait([self._pending.published], LEAVE_S)

    def close(self) -> None:
        """Abandon the checkpoint under way, and free the memory of the copy."""
        self._stop.set()
        is_over = not self._pending or concurrent.futures.wait([self._pending.published], LEAVE_S).done
        self._background.shutdown(wait=bool(is_over))
        if self._pending and self._group.is_first:
            shutil.rmtree(partial_dir(self._pending.final), ignore_errors=True)  # a full disk must store the reason
        self._copy = None

    def _publish(
        self,
        final: Path,
        part: concurrent.futures.Future[Manifest],
        all_parts: concurrent.futures.Future[list[Manifest]],
        keep: Collection[Path],
    ) -> None:
        """Wait for all parts, publish the checkpoint, and remove others, which takes long for gigabytes."""
        part.result()
        while not all_parts.done() and not (parts := read_parts(partial_dir(final))):
            concurrent.futures.wait([all_parts], POLL_S)
            if self._stop.is_set():
                return
        publish_parts(partial_dir(final), final, all_parts.result() if all_parts.done() else parts)
        _remove_others(keep)

    def _until_stop(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield pieces until the run ends."""
        for piece in pieces:
            if self._stop.is_set():
                raise OSError("the run ended before it was written")
            yield piece

    def _own_share(self) -> dict[str, Tensor]:
        """Return the tensors that this rank writes, flat, by key: its own, or its share if all ranks hold
        everything."""
        fragments = self._engine.fragments()
        if self._engine.options.zero_stage == 0:
            largest_first = sorted(fragments, key=lambda each: -each.numel)
            fragments = largest_first[self._group.rank :: self._group.world_size]
        share = {}
        for fragment in fragments:
            for kind in (MASTER, *ADAM_MOMENTS) if fragment.numel else ():
                flat = fragment.flat if kind == MASTER else self._engine.adam_state(fragment.flat)[kind]
                share[f"{kind}/{fragment.name}@{fragment.param_start}"] = fragment_of(flat, fragment)
        return share


def _pieces(share: Iterable[Tensor]) -> Iterable[Tensor]:
    """Yield values in host copies of at most `_CHUNK_VALUES`: a tensor that numpy has seen cannot free its memory."""
    return (piece.to("cpu", copy=True) for values in share for piece in values.split(_CHUNK_VALUES))


def _allocate(num_values: int, device: torch.device) -> list[Tensor]:
    """Allocate and touch float32 host memory in pieces of _CHUNK_VALUES; the last may be shorter.

    PyTorch rounds page-locked memory up to a power of two: 13 GB in one piece would take 17, and 10 as much.
    """
    sizes = [min(_CHUNK_VALUES, num_values - start) for start in range(0, num_values, _CHUNK_VALUES)]
    return [torch.empty(size, pin_memory=device.type == "cuda").zero_() for size in sizes]


def _copy_into(share: Iterable[Tensor], pieces: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copy values, one after the other, into the pieces of `_allocate`, and return those."""
    start = 0
    for values in share:
        left = values
        while len(left):
            number, offset = divmod(start, _CHUNK_VALUES)
            fitting = left[: _CHUNK_VALUES - offset]
            pieces[number][offset : offset + len(fitting)].copy_(fitting, non_blocking=True)
            left, start = left[len(fitting) :], start + len(fitting)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return pieces


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


def publish_parts(partial: Path, final: Path, parts: Sequence[Manifest]) -> None:
    """Publish a checkpoint from the manifests of its parts, in the order of ranks."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    write_json(partial / "manifest.json", dataclasses.asdict(dataclasses.replace(parts[0], files=files)))
    if not read_manifest(partial):
        check_writer(final)
        raise CheckpointError(f"checkpoint {final} was not written wholly; start the run again")
    publish_dir(partial, final)


def recover_checkpoints(run: RunDir, folders: Iterable[Path]) -> None:
    """Publish the checkpoint that earlier holders of a run left with all its parts, and remove their folders.

    Its files' checksums are verified when it is loaded.
    """
    for folder in folders:
        for partial in [*folder.rglob(f"writing-{run.checkpoints.name}-*")]:
            final = run.checkpoints / partial.name.removeprefix(f"writing-{run.checkpoints.name}-")
            if (parts := read_parts(partial)) and not read_manifest(final):
                new_partial_dir(final).rmdir()
                with contextlib.suppress(CheckpointError):
                    publish_parts(partial.rename(partial_dir(final)), final, parts)
        shutil.rmtree(folder, ignore_errors=True)


def _write_part(path: Path, lengths: dict[str, int], pieces: Iterable[Tensor], manifest: Manifest) -> Manifest:
    """Write one file of float32 values, read it back, and leave the part's manifest beside it; returns the manifest.

    Without values there is no file, only a manifest.
    """
    if lengths:
        crc = write_safetensors(path, {key: (length,) for key, length in lengths.items()}, pieces)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # read the disk below, not the page cache
        if file_crc32(path) != crc:
            raise OSError(f"{path.name} does not read back as it was written")
        entry = {"size": path.stat().st_size, "crc32": crc}
        manifest = dataclasses.replace(manifest, files={path.name: entry})
    write_json(path.with_suffix(".json"), dataclasses.asdict(manifest))  # and the folder with it
    return manifest
