"""Checkpoints that know nothing of ranks or ZeRO stages: float32 master weights, Adam moments, and counters.

A checkpoint is a folder: safetensors files with `param/<name>`, `exp_avg/<name>` and `exp_avg_sq/<name>`, and
`manifest.json` with their sizes and checksums and everything else a run needs to go on. What a rank held only a part of
is stored as `<key>@<start>`, a flat stretch of the tensor, so that no rank ever sends or reads more than its share.
`harness.step.saving` writes them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aimscale.aim.errors import UserError
from aimscale.harness.device.distributed import Group
from aimscale.harness.run.files import remove_dir
from aimscale.harness.step.engine import ADAM_MOMENTS, Engine, fragment_of

CHECKPOINT_VERSION = 2
"""1 held whole tensors only."""
MASTER = "param"
_CHUNK = 1 << 24


class CheckpointError(UserError):
    """A checkpoint that cannot be written or is damaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: what a checkpoint is, apart from its tensors."""

    version: int
    run_id: str
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
    for owner in engine.optimiser_tensors():
        engine.adam_state(owner)["step"].fill_(manifest.adam_step)
    stretches = _stretches([path / name for name in names])
    for fragment in engine.fragments():
        if not fragment.numel:
            continue
        state = engine.adam_state(fragment.flat)
        for kind in (MASTER, *ADAM_MOMENTS):
            target = fragment_of(fragment.flat if kind == MASTER else state[kind], fragment)
            first = fragment.param_start
            for stretch in stretches[f"{kind}/{fragment.name}"]:
                start, stop = max(first, stretch.start), min(first + fragment.numel, stretch.stop)
                if start < stop:
                    target[start - first : stop - first].copy_(torch.from_numpy(stretch.read(start, stop)))
    engine.publish_masters()
    group.wait()
    return manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Values start..stop-1 of a flattened tensor, in a file."""

    path: Path
    offset: int
    """Where they start in it, bytes."""
    start: int
    """Of the first value."""
    stop: int
    """Behind the last."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Some of them, float32; reads no other byte."""
        return np.fromfile(self.path, "<f4", stop - start, offset=self.offset + 4 * (start - self.start))


def _stretches(files: list[Path]) -> dict[str, list[_Stretch]]:
    """Key of a tensor -> where its values are (https://huggingface.co/docs/safetensors: a length, JSON, values)."""
    found: dict[str, list[_Stretch]] = {}
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for key, entry in header.items():
            name, _, start = key.partition("@")
            first, numel = int(start or 0), math.prod(entry["shape"])
            offset = 8 + size + entry["data_offsets"][0]
            found.setdefault(name, []).append(_Stretch(path=path, offset=offset, start=first, stop=first + numel))
    return found


def load_newest(folder: Path, engine: Engine, group: Group, *, beyond: int) -> tuple[Manifest | None, list[str]]:
    """Load the checkpoint furthest along the walk, or an earlier one where that is damaged (which is then deleted).

    Args:
        group: all ranks call this together.
        beyond: only checkpoints with more images done than this.

    Returns:
        Its manifest (None when there is none), and a sentence for every damaged one.

    Raises:
        CheckpointError: all of them are damaged; starting over is the caller's decision.
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
