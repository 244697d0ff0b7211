"""Place of a rank's pooled features: its GPU, the host's memory, or a mapped file; all ranks decide alike."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.tasks import HEADS_SHARE, ProbeError

HOST_SHARE = 0.4
"""Share of a rank's free host memory for the pooled features of a split."""


def choose_place(num_bytes: int, group: Group, gpu_bytes_taken: float, folder: Path | None) -> torch.device | Path:
    """Return the first place with room for `num_bytes` on every rank: the GPU, the host, or the disk of `folder`.

    Args:
        gpu_bytes_taken: bytes of the GPU that the backbone, its passes and other features take; heads have their share,
            and a tenth is left free.

    Raises:
        ProbeError: there is no room, and no folder.
    """
    if group.device.type == "cuda":
        left = (1 - HEADS_SHARE - 0.1) * group.min_over_ranks(group.memory_bytes()) - gpu_bytes_taken
        if num_bytes <= left:
            return group.device
    if num_bytes <= HOST_SHARE * group.min_over_ranks(group.host_memory_bytes()):
        return torch.device("cpu")
    if folder is None:
        raise ProbeError(
            f"pooled features need {num_bytes / 1e9:.3g} GB on a rank, more than its memory; use more ranks"
        )
    return folder


def allocate(shape: tuple[int, ...], dtype: torch.dtype, place: torch.device | Path) -> Tensor:
    """Allocate values on a device, or in a file without a name, which goes with the process, however that ends.

    All of the file's space is allocated now, so that no write can fail.

    Raises:
        ProbeError: the disk has no room.
    """
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    if isinstance(place, torch.device) or not num_bytes:
        at = place if isinstance(place, torch.device) else None
        # zeroed, so that later allocations of any process see that the host has less memory
        return torch.empty(shape, dtype=dtype, device=at).zero_()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return torch.from_numpy(np.memmap(file, mode="r+", shape=num_bytes)).view(dtype).view(shape)
    except OSError as error:
        raise ProbeError(
            f"pooled features need {num_bytes / 1e9:.3g} GB in {place}, which cannot hold them ({error.strerror}); "
            "free space there, or use more ranks or memory"
        ) from error
