"""Checkpoints that know nothing of ranks or ZeRO stages: float32 master weights, Adam moments, and counters.

A checkpoint is a folder: some safetensors files with `param/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>`, and
`manifest.json` with their sizes and checksums and everything else a run needs to go on. Parameters are gathered one at
a time and spread over the ranks that write them, so no rank ever holds more than its share. The folder is written
aside, made durable, and renamed: what carries the final name is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aimscale.aim.errors import UserError
from aimscale.harness.device.distributed import Group
from aimscale.harness.run.fence import aside_dir
from aimscale.harness.run.files import fsync_dir, new_dir_aside, publish_dir, remove_dir, write_json
from aimscale.harness.step.engine import ADAM_MOMENTS, Engine, Fragment, fragment_of, part_of

CHECKPOINT_VERSION = 1
MASTER = "param"
_CHUNK = 1 << 24


class CheckpointError(UserError):
    """A checkpoint that cannot be written or is damaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: what a checkpoint is, apart from its tensors."""

    version: int
    """Of the format."""
    run_id: str
    """Whose it is."""
    images_seen: int
    """Position in the stream."""
    branch: int | None
    """The budget it decays to; null on the trunk."""
    adam_step: int
    """Updates applied so far, for the moments' bias correction."""
    progress: dict[str, Any]
    """Counters of the run, see `harness.train.loop`."""
    files: dict[str, dict[str, int]]
    """File name -> size in bytes and CRC-32."""


def save_checkpoint(
    final: Path,
    engine: Engine,
    group: Group,
    *,
    run_id: str,
    images_seen: int,
    branch: int | None,
    progress: dict[str, Any],
) -> None:
    """Write a checkpoint; all ranks call this together.

    A complete checkpoint that is already there is kept: the same position of the same run holds the same values.

    Raises:
        CheckpointError: it could not be written (on all ranks); nothing is left behind, earlier ones are untouched.
    """
    aside = aside_dir(final)
    is_there = group.from_first(group.is_first and _prepare(final))
    if is_there:
        return
    tensors = _gather_share(engine, group)
    name = f"part-{group.rank:05d}-of-{group.world_size:05d}.safetensors"
    try:
        outcome = (name, *_write_part(aside / name, tensors), "")
    except (OSError, SafetensorError) as error:
        outcome = (name, 0, 0, str(error))
    del tensors
    outcomes = group.gather(outcome)
    problem = next((text for *_, text in outcomes if text), "")
    if not problem and group.is_first:
        manifest = Manifest(
            version=CHECKPOINT_VERSION,
            run_id=run_id,
            images_seen=images_seen,
            branch=branch,
            adam_step=int(engine.adam_state(engine.optimiser_tensors()[0])["step"]),
            progress=progress,
            files={name: {"size": size, "crc32": crc} for name, size, crc, _ in outcomes if size},
        )
        try:
            write_json(aside / "manifest.json", dataclasses.asdict(manifest))
            publish_dir(aside, final)
        except OSError as error:
            problem = str(error)
    problem = group.from_first(problem)
    if problem:
        if group.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {final}: {problem}; make room, then start the run again "
            "(`aimscale retry` where its sweep has given it up)"
        )


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


def _gather_share(engine: Engine, group: Group) -> dict[str, Tensor]:
    """Whole tensors (CPU) of the parameters that this rank writes."""
    fragments = engine.fragments()
    share: dict[str, Tensor] = {}
    for fragment, owner in zip(fragments, share_out(fragments, group.world_size), strict=True):
        state = engine.adam_state(fragment.flat) if fragment.numel else {}
        for kind in (MASTER, *ADAM_MOMENTS):
            flat = fragment.flat if kind == MASTER else state.get(kind)
            if group.world_size == 1 or engine.options.zero_stage == 0:
                if owner == group.rank:
                    assert flat is not None
                    share[f"{kind}/{fragment.name}"] = fragment_of(flat, fragment).view(fragment.shape).clone().cpu()
                continue
            whole = torch.zeros(fragment.shape.numel(), device=group.device)
            if flat is not None:
                part_of(whole, fragment).copy_(fragment_of(flat, fragment))
            # Every other rank holds zeros here; adding bit patterns as integers keeps even the sign of a zero.
            torch.distributed.reduce(whole.view(torch.int32), dst=owner)
            if owner == group.rank:
                share[f"{kind}/{fragment.name}"] = whole.view(fragment.shape).cpu()
    return share


def _write_part(path: Path, tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Write and fsync one file; returns its size and checksum (nothing to write: zeros)."""
    if not tensors:
        return 0, 0
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    fsync_dir(path.parent)
    return path.stat().st_size, file_crc32(path)


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a complete checkpoint; None when there is none or its files do not have their sizes."""
    try:
        manifest = Manifest(**json.loads((path / "manifest.json").read_text()))
        if all((path / name).stat().st_size == entry["size"] for name, entry in manifest.files.items()):
            return manifest
    except (OSError, ValueError, TypeError):
        pass
    return None


def is_complete(path: Path) -> bool:
    """Whether a folder holds a checkpoint with all its files."""
    return read_manifest(path) is not None


def complete_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """Complete checkpoints of a run, the furthest along its walk last."""
    if not folder.is_dir():
        return []
    found = [(path, read_manifest(path)) for path in folder.iterdir() if not path.name.startswith(".")]
    complete = [(path, manifest) for path, manifest in found if manifest is not None]
    return sorted(complete, key=lambda pair: pair[1].progress["images_done"])


def load_checkpoint(path: Path, engine: Engine, group: Group) -> Manifest:
    """Bring an engine to a checkpoint's state, whatever ranks and ZeRO stage wrote it; all ranks call this together.

    Raises:
        CheckpointError: a file is damaged (on all ranks).
    """
    manifest = read_manifest(path)
    names = sorted(manifest.files) if manifest else []
    own = [
        name
        for name in names[group.rank :: group.world_size]
        if manifest and file_crc32(path / name) != manifest.files[name]["crc32"]
    ]
    damaged = [name for part in group.gather(own) for name in part]
    if manifest is None or damaged:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({', '.join(damaged) or 'incomplete'}); restore it, or delete checkpoints/ "
            "and budgets/ of this run to train it again"
        )
    readers = [safe_open(path / name, framework="pt") for name in names]
    where = {key: reader for reader in readers for key in reader.keys()}  # noqa: SIM118 (a reader is no mapping)
    for owner in engine.optimiser_tensors():
        engine.adam_state(owner)["step"].fill_(manifest.adam_step)
    for fragment in engine.fragments():
        if not fragment.numel:
            continue
        state = engine.adam_state(fragment.flat)
        for kind in (MASTER, *ADAM_MOMENTS):
            key = f"{kind}/{fragment.name}"
            flat = fragment.flat if kind == MASTER else state[kind]
            fragment_of(flat, fragment).copy_(part_of(where[key].get_tensor(key), fragment))
    engine.publish_masters()
    group.wait()
    return manifest


def load_newest(folder: Path, engine: Engine, group: Group, *, beyond: int) -> tuple[Manifest | None, list[str]]:
    """Load the checkpoint furthest along the walk, or an earlier one where that is damaged (which is then deleted).

    Args:
        folder: the run's checkpoints.
        engine: to bring to its state.
        group: all ranks call this together.
        beyond: only checkpoints with more images done than this.

    Returns:
        Its manifest (None when there is none), and a sentence for every damaged one.

    Raises:
        CheckpointError: all of them are damaged; nobody asked to train from the start.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path, manifest in reversed(group.from_first(complete_checkpoints(folder))):
        if manifest.progress["images_done"] <= beyond:
            break
        try:
            load_checkpoint(path, engine, group)
        except CheckpointError as error:
            damaged[path] = error
            continue
        if group.is_first:
            for bad in damaged:
                remove_dir(bad)
        return manifest, [f"{error}; going on from {path.name} instead" for error in damaged.values()]
    if damaged:
        raise next(iter(damaged.values()))
    return None, []


def save_weights(path: Path, engine: Engine, group: Group) -> None:
    """Write the float32 weights alone, under the model's own names, into one file; all ranks call this together.

    Rank 0 gathers them one by one.
    """
    fragments = engine.fragments()
    weights: dict[str, Tensor] = {}
    for fragment in fragments:
        if group.world_size == 1 or engine.options.zero_stage == 0:
            whole = fragment_of(fragment.flat, fragment).clone()
        else:
            whole = torch.zeros(fragment.shape.numel(), device=group.device)
            if fragment.numel:
                part_of(whole, fragment).copy_(fragment_of(fragment.flat, fragment))
            torch.distributed.reduce(whole.view(torch.int32), dst=0)
        if group.is_first:
            weights[fragment.name] = whole.view(fragment.shape).cpu()
    if group.is_first:
        save_file(weights, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
