"""Device that holds a rank's pooled features: its GPU or the host; all ranks decide alike."""

from __future__ import annotations

import torch

from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.tasks import HEADS_SHARE, ProbeError

HOST_SHARE = 0.4
"""Share of a rank's free host memory for the pooled features of a split."""


def choose_device(num_bytes: int, group: Group, gpu_bytes_taken: float) -> torch.device:
    """Return the GPU if it has room for `num_bytes` on every rank, else the host.

    Args:
        gpu_bytes_taken: bytes of the GPU that the backbone, its passes and other features take; heads have their share,
            and a tenth is left free.

    Raises:
        ProbeError: neither has room.
    """
    if group.device.type == "cuda":
        left = (1 - HEADS_SHARE - 0.1) * group.min_over_ranks(group.memory_bytes()) - gpu_bytes_taken
        if num_bytes <= left:
            return group.device
    if num_bytes > HOST_SHARE * group.min_over_ranks(group.host_memory_bytes()):
        raise ProbeError(
            f"pooled features need {num_bytes / 1e9:.3g} GB on a rank, more than {HOST_SHARE:.0%} of its free host "
            "memory; use more ranks"
        )
    return torch.device("cpu")
