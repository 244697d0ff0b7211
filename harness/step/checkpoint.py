"""Checkpoints that are independent of ranks and ZeRO stages: float32 master weights, Adam moments, and counters.

A checkpoint is a folder of safetensors files and `manifest.json`. The files hold `param/<name>@<start>`, `exp_avg/..`
and `exp_avg_sq/..`: slices of flattened tensors as ranks held them, so that no rank sends or reads more than its share.
The manifest holds the files' sizes and checksums and everything else that a run needs to resume. Every rank's file has
such a manifest of its own beside it, by which `harness.step.saving` knows that it is complete.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.files import CHECKSUM, atomic_write, file_crc32, read_object, remove_dir
from aimscale.harness.step.engine import Engine, Fragment, flat_slice, param_slice

_log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """Checkpoint that cannot be written or is damaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `manifest.json`: everything in a checkpoint but its tensors."""

    run_id: str
    images_seen: int
    """Position in the stream."""
    branch: int | None
    """Budget that the run decays to; null on the trunk."""
    adam_step: int
    """Updates applied so far, for the moments' bias correction."""
    progress: dict[str, Any]
    """Counters of the run, see `harness.train.run`."""
    files: dict[str, dict[str, int]]
    """File name -> size in bytes and CRC-32."""


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a float32 safetensors file (https://huggingface.co/docs/safetensors), fsync it, and return its CRC-32.

    Args:
        shapes: name -> shape, in the order of the values.
        values: values of all tensors, one after the other, on the CPU, in pieces of any size.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.float32.itemsize * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with path.open("wb") as file:
        pieces: Iterable[Any] = (value.contiguous().view(-1).view(torch.uint8).numpy().data for value in values)
        for piece in itertools.chain([len(text).to_bytes(8, "little") + text], pieces):
            file.write(piece)
            crc = zlib.crc32(piece, crc)
        file.flush()
        os.fsync(file.fileno())
    return crc


def read_manifest(path: Path) -> Manifest | None:
    """Read the manifest of a complete checkpoint; None if there is none or its files do not have their sizes."""
    manifest = _manifest_in(path / "manifest.json")
    with contextlib.suppress(OSError, KeyError):
        if manifest and all((path / name).stat().st_size == entry["size"] for name, entry in manifest.files.items()):
            return manifest
    return None


def read_parts(path: Path) -> list[Manifest]:
    """Read the manifests of a checkpoint's parts, in the order of ranks; empty while one is missing."""
    paths = sorted(path.glob("part-*-of-*.json"))
    if not paths or len(paths) < int(paths[0].stem.rpartition("-")[2]):
        return []
    parts = [_manifest_in(each) for each in paths]
    return [] if None in parts else [part for part in parts if part]


def _manifest_in(path: Path) -> Manifest | None:
    """Read a manifest; None if it is missing or damaged."""
    with contextlib.suppress(UserError, TypeError):
        return Manifest(**{name: value for name, value in (read_object(path) or {}).items() if name != CHECKSUM})
    return None


def complete_checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """List the complete checkpoints of a run; the last one is furthest in training."""
    if not folder.is_dir():
        return []
    listed = [(path, read_manifest(path)) for path in folder.iterdir() if not path.name.startswith(".")]
    complete = [(path, manifest) for path, manifest in listed if manifest is not None]
    return sorted(complete, key=lambda pair: pair[1].progress["images_done"])


def load_checkpoint(path: Path, engine: Engine, group: Group, manifest: Manifest | None = None) -> Manifest:
    """Restore an engine from a checkpoint, whatever ranks and ZeRO stage wrote it; all ranks call this together.

    Args:
        manifest: its manifest, the same on all ranks; read by the first rank by default.

    Raises:
        CheckpointError: a file is damaged (on all ranks).
        OSError: a file cannot be read; on the other ranks, a PeerFailedError.
    """
    manifest = _checked_manifest(path, manifest or group.broadcast_from_rank0(lambda: read_manifest(path)), group)
    for owner in engine.optimiser_tensors():
        engine.adam_state(owner)["step"].fill_(manifest.adam_step)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(safetensors.safe_open(path / name, framework="pt")) for name in manifest.files]
        slices = _slices(files)
        for name, first, target in engine.state(engine.fragments()):
            for start, values in slices[name]:
                low, high = max(first, start), min(first + len(target), start + values.get_shape()[0])
                if low < high:
                    target[low - first : high - first].copy_(values[low - start : high - start])
    engine.sync_weights_from_fp32()
    group.barrier()
    return manifest


def _checked_manifest(path: Path, manifest: Manifest | None, group: Group) -> Manifest:
    """Verify the checksums of a checkpoint's files, of which each rank reads some, and return its manifest."""
    crcs = {name: entry["crc32"] for name, entry in sorted(manifest.files.items())} if manifest else {}
    mine = [*crcs][group.rank :: group.world_size]
    damaged_here = group.run_on_all_ranks(lambda: [name for name in mine if file_crc32(path / name) != crcs[name]])
    damaged = [name for part in group.all_gather_object(damaged_here) for name in part]
    if manifest is None or damaged:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({', '.join(damaged) or 'incomplete'}); restore it, or delete checkpoints/ "
            "and budgets/ of this run to train it again"
        )
    return manifest


def _slices(files: list[Any]) -> dict[str, list[tuple[int, Any]]]:
    """Map kind and name of a tensor to its slices: index of the first value, and a lazy reader of the values."""
    slices = collections.defaultdict(list)
    for file in files:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name, _, start = key.rpartition("@")
            slices[name].append((int(start), file.get_slice(key)))
    return slices


def load_newest(folder: Path, engine: Engine, group: Group, *, branches: Collection[int]) -> Manifest | None:
    """Load the checkpoint furthest in training, or if it is damaged an earlier one; damaged ones are then deleted.

    All ranks call this together. Returns the manifest; None if there is no checkpoint.

    Args:
        branches: budgets still to be trained; a checkpoint on the decay to another one leads nowhere.

    Raises:
        CheckpointError: all of them are damaged; starting over is the caller's decision.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path, manifest in reversed(group.broadcast_from_rank0(lambda: complete_checkpoints(folder))):
        if manifest.branch is not None and manifest.branch not in branches:
            continue
        try:
            load_checkpoint(path, engine, group, manifest)
        except CheckpointError as error:
            damaged[path] = error
            continue
        for bad, reason in damaged.items() if group.is_first else ():
            _log.warning("%s; going on from %s instead", reason, path.name)
            remove_dir(bad)
        return manifest
    if damaged:
        raise next(iter(damaged.values()))
    return None


def copied_model(engine: Engine, group: Group, dtype: torch.dtype) -> AIM:
    """Copy the engine's float32 weights into a model of this type, whole on every rank's device.

    All ranks call this together. It takes the bytes of its weights and of the largest one in float32, and shares no
    memory with the trained model, which measurements therefore cannot change.
    """
    with torch.device("meta"):
        model = AIM(engine.config)
    model = model.to(dtype).to_empty(device=group.device).requires_grad_(False).eval()
    model.fill_constants()
    for fragment, whole in _whole_weights(engine, group):
        model.get_parameter(fragment.name).copy_(whole.view(fragment.shape))
    return model


def _whole_weights(engine: Engine, group: Group) -> Iterator[tuple[Fragment, Tensor]]:
    """Yield the float32 weights one after the other, flat, on the device, whole on every rank; each until the next."""
    fragments = engine.fragments()
    if group.world_size == 1 or engine.options.zero_stage == 0:
        for fragment in fragments:
            yield fragment, flat_slice(fragment.flat, fragment)
        return
    buffer = torch.empty(max(fragment.shape.numel() for fragment in fragments), device=group.device)
    for fragment in fragments:
        whole = buffer[: fragment.shape.numel()].zero_()
        if fragment.numel:
            param_slice(whole, fragment).copy_(flat_slice(fragment.flat, fragment))
        torch.distributed.all_reduce(whole.view(torch.int32))
        yield fragment, whole


def save_weights(path: Path, engine: Engine, group: Group, metadata: dict[str, str] | None = None) -> int:
    """Write the float32 weights alone, under the model's own names, to one file; all ranks call this, and rank 0
    gathers and writes, and returns the file's CRC-32."""
    crc = 0
    shapes = {fragment.name: tuple(fragment.shape) for fragment in engine.fragments()}
    # a tensor that numpy has seen cannot free its memory
    gathered = (whole.to("cpu", copy=True) for _, whole in _whole_weights(engine, group))
    if group.is_first:
        with atomic_write(path) as partial:
            crc = write_safetensors(partial, shapes, gathered, metadata)
    else:
        for _ in _whole_weights(engine, group):
            pass
    group.barrier()
    return crc
