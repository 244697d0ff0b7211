"""Saving: the state is copied aside, and written, checked and published while training goes on.

A rank stops for the copy alone, its own share of the state, into host memory that is allocated once, behind the start
(page-locked where there is a card). A thread writes the copy, makes it durable, and reads it again. Where the host has
no room for a copy, the same thread writes the state from where it is, piece by piece, and the rank waits for it. When
all ranks are done, the first publishes the checkpoint by renaming its folder: what carries the final name is complete.
At most one is under way.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimscale.aim.weights import write_safetensors
from aimscale.harness.device.distributed import Group
from aimscale.harness.run.fence import aside_dir
from aimscale.harness.run.files import fsync_dir, new_dir_aside, publish_dir, remove_dir, write_json, written_aside
from aimscale.harness.step.checkpoint import MASTER, CheckpointError, Manifest, file_crc32, is_complete
from aimscale.harness.step.engine import ADAM_MOMENTS, Engine, Fragment, fragment_of, part_of

_CHUNK_VALUES = 1 << 24  # 64 MiB, a power of two


@dataclasses.dataclass(frozen=True, kw_only=True)
class _UnderWay:
    """The checkpoint that is being written."""

    final: Path
    """Its name."""
    manifest: Manifest
    """Without its files."""
    keep: frozenset[Path]
    """Checkpoints that stay when it is there; the others go."""
    part: concurrent.futures.Future[tuple[str, int, int, str]]
    """Of this rank: file name, size in bytes, checksum, and what went wrong."""


class CheckpointWriter:
    """Writes the checkpoints of one engine; all ranks call its methods together."""

    def __init__(self, engine: Engine, group: Group, check: Callable[[], None], *, copies: bool = True) -> None:
        """Allocate nothing yet.

        Args:
            check: called before anything is published; raises where the run is not this group's any more.
            copies: whether the state is copied aside; otherwise ranks wait until it is written.
        """
        self._engine, self._group, self._check, self._copies = engine, group, check, copies
        self._under_way: _UnderWay | None = None
        self._dropping: concurrent.futures.Future[None] | None = None
        self._stop = threading.Event()
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copy: concurrent.futures.Future[list[Tensor]] | None = None

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
        """Copy the engine's state and begin to write it, or write it; the one before is finished first.

        A complete checkpoint that is already there is kept: the same position of the same run holds the same values.

        Args:
            final: the folder that it becomes.
            run_id: as the other words up to `progress`, see `Manifest`.
            keep: checkpoints that stay; the others go once this one is complete.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.finish()
        self._check()
        if self._group.from_first(lambda: _prepare(final)):
            self._drop_all_but({final, *keep})
            return
        share = self._own_share()
        pieces = self._copied(share) if self._copies else _pieces(share.values())
        manifest = Manifest(
            run_id=run_id,
            images_seen=images_seen,
            branch=branch,
            adam_step=int(self._engine.adam_state(self._engine.optimiser_tensors()[0])["step"]),
            progress=progress,
            files={},
        )
        name = f"part-{self._group.rank:05d}-of-{self._group.world_size:05d}.safetensors"
        lengths = {key: len(values) for key, values in share.items()}
        part = self._background.submit(_write_part, aside_dir(final) / name, lengths, self._until_stop(pieces))
        if not self._copies:
            concurrent.futures.wait([part])
        self._under_way = _UnderWay(final=final, manifest=manifest, keep=frozenset({final, *keep}), part=part)

    def poll(self) -> None:
        """Publish what all ranks have written by now; costs one exchange while there is something to publish.

        The first call, from a run that has started, has the copy's memory allocated.

        Raises:
            CheckpointError: as `finish` says.
        """
        if self._copies:
            self._allocated()
        if self._under_way and not self._group.any(not self._under_way.part.done()):
            self._publish(self._under_way)

    def finish(self) -> None:
        """Wait for what is under way, and publish it.

        Raises:
            CheckpointError: it could not be written (on all ranks); nothing is left behind, earlier ones are untouched.
            LeaseLost: the run is not this group's any more.
        """
        if self._under_way:
            self._publish(self._under_way)
        if self._dropping:
            self._dropping.result()

    def _publish(self, saving: _UnderWay) -> None:
        self._under_way = None
        aside, parts = aside_dir(saving.final), self._group.gather(saving.part.result())
        problem = next((text for *_, text in parts if text), "")
        self._check()
        if not problem and self._group.is_first:
            files = {name: {"size": size, "crc32": crc} for name, size, crc, _ in parts if size}
            try:
                manifest = dataclasses.replace(saving.manifest, files=files)
                write_json(aside / "manifest.json", dataclasses.asdict(manifest))
                publish_dir(aside, saving.final)
            except OSError as error:
                problem = str(error)
        if problem and self._group.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        problem = self._group.from_first(lambda: problem)
        if problem:
            raise CheckpointError(
                f"cannot write checkpoint {saving.final}: {problem}; make room, then start the run again "
                "(`aimscale launch --retry` where its sweep has given it up)"
            )
        self._drop_all_but(saving.keep)

    def close(self) -> None:
        """Give up what is under way, and the memory of the copy."""
        self._stop.set()
        self._background.shutdown()
        self._copy = None

    def _until_stop(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        for piece in pieces:
            if self._stop.is_set():
                raise OSError("the run ended before it was written")
            yield piece

    def _drop_all_but(self, keep: Collection[Path]) -> None:
        """Remove the other checkpoints, in the background: that of gigabytes takes long."""
        if self._group.is_first:
            self._dropping = self._background.submit(_remove_others, keep)

    def _own_share(self) -> dict[str, Tensor]:
        """What this rank writes, flat, by its key: what it holds, or its share where all hold everything."""
        fragments = self._engine.fragments()
        if self._engine.options.zero_stage == 0:
            owners = share_out(fragments, self._group.world_size)
            fragments = [each for each, owner in zip(fragments, owners, strict=True) if owner == self._group.rank]
        share = {}
        for fragment in fragments:
            for kind in (MASTER, *ADAM_MOMENTS) if fragment.numel else ():
                flat = fragment.flat if kind == MASTER else self._engine.adam_state(fragment.flat)[kind]
                share[f"{kind}/{fragment.name}@{fragment.param_start}"] = fragment_of(flat, fragment)
        return share

    def _allocated(self) -> concurrent.futures.Future[list[Tensor]]:
        """The copy's memory, which is made ready beside training."""
        if self._copy is None:
            num_values = sum(values.numel() for values in self._own_share().values())
            self._copy = self._background.submit(_allocate, num_values, self._group.device)
        return self._copy

    def _copied(self, share: dict[str, Tensor]) -> Sequence[Tensor]:
        """Copies of these values, one after the other."""
        copy = self._allocated().result()
        _fill(copy, share.values())
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        return copy


def _pieces(share: Iterable[Tensor]) -> Iterable[Tensor]:
    """These values one after the other, in copies on the host: a tensor that numpy saw cannot give its memory back."""
    return (piece.to("cpu", copy=True) for values in share for piece in values.split(_CHUNK_VALUES))


def _allocate(num_values: int, device: torch.device) -> list[Tensor]:
    """float32 host memory, its pages already there, in pieces of _CHUNK_VALUES; the last may be shorter.

    PyTorch rounds page-locked memory up to a power of two: 13 GB in one piece would take 17, and 10 as much.
    """
    sizes = [min(_CHUNK_VALUES, num_values - start) for start in range(0, num_values, _CHUNK_VALUES)]
    return [torch.empty(size, pin_memory=device.type == "cuda").zero_() for size in sizes]


def _fill(pieces: Sequence[Tensor], share: Iterable[Tensor]) -> None:
    """Copy values, one after the other, into the pieces of `_allocate`."""
    start = 0
    for values in share:
        left = values
        while len(left):
            number, offset = divmod(start, _CHUNK_VALUES)
            fitting = left[: _CHUNK_VALUES - offset]
            pieces[number][offset : offset + len(fitting)].copy_(fitting, non_blocking=True)
            left, start = left[len(fitting) :], start + len(fitting)


def _remove_others(keep: Collection[Path]) -> None:
    for other in next(iter(keep)).parent.iterdir():
        if other not in keep:
            remove_dir(other)


def _prepare(final: Path) -> bool:
    """Clear the way for writing; True when the checkpoint is already there."""
    if is_complete(final):
        return True
    remove_dir(final)
    new_dir_aside(final)
    return False


def share_out(fragments: Sequence[Fragment], world_size: int) -> list[int]:
    """Which rank writes each parameter: always the one with the least to write so far."""
    load = [0] * world_size
    owners = []
    for fragment in fragments:
        owner = load.index(min(load))
        load[owner] += fragment.shape.numel()
        owners.append(owner)
    return owners


def _write_part(path: Path, lengths: dict[str, int], pieces: Iterable[Tensor]) -> tuple[str, int, int, str]:
    """Write one file of float32 values and read it again; returns name, size, checksum and the problem.

    Nothing to write: size 0.
    """
    if not lengths:
        return path.name, 0, 0, ""
    try:
        layout = {key: (torch.float32, (length,)) for key, length in lengths.items()}
        crc = write_safetensors(path, layout, pieces)
        fsync_dir(path.parent)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the cache
        if file_crc32(path) != crc:
            return path.name, 0, 0, f"{path.name} reads otherwise than it was written"
        return path.name, path.stat().st_size, crc, ""
    except OSError as error:
        return path.name, 0, 0, str(error)


def save_weights(path: Path, engine: Engine, group: Group, metadata: dict[str, str] | None = None) -> None:
    """Write the float32 weights alone, under the model's own names, into one file; all ranks call this together.

    Rank 0 gathers and writes them one by one, aside first.
    """
    fragments = engine.fragments()
    layout = {fragment.name: (torch.float32, tuple(fragment.shape)) for fragment in fragments}

    def gathered() -> Iterator[Tensor]:
        for fragment in fragments:
            if group.world_size == 1 or engine.options.zero_stage == 0:
                whole = fragment_of(fragment.flat, fragment)
            else:
                whole = torch.zeros(fragment.shape.numel(), device=group.device)
                if fragment.numel:
                    part_of(whole, fragment).copy_(fragment_of(fragment.flat, fragment))
                torch.distributed.reduce(whole.view(torch.int32), dst=0)
            yield whole.to("cpu", copy=True)  # a tensor that numpy saw cannot give its memory back

    if group.is_first:
        with written_aside(path) as aside:
            write_safetensors(aside, layout, gathered(), metadata)
    else:
        for _ in gathered():
            pass
    group.wait()
