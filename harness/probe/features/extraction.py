"""Frozen features of a task's images: one backbone pass gives pooled vectors, statistics and, if they fit, all tokens.

Linear and k-NN probes then never run the backbone again. Attentive heads need tokens: kept in memory if they fit (small
tasks), else computed batch by batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.backbones import DTYPES, Backbone
from aimscale.harness.probe.features.images import LabelledImages, ProgressCallback, ignore_progress
from aimscale.harness.probe.features.moments import Moments
from aimscale.harness.probe.features.sources import (
    EXTRACT_BATCH,
    CachedTokens,
    PooledFeatures,
    StreamedTokens,
    own_indices,
)
from aimscale.harness.probe.features.tasks import CACHE_SHARE, ProbeError

HOST_SHARE = 0.4
"""Share of a rank's free host memory for the pooled features of a split."""


@dataclass(frozen=True, kw_only=True)
class SplitFeatures:
    """Results of one pass over a split."""

    pooled: PooledFeatures
    """Means over tokens, of every block."""
    tokens: StreamedTokens | CachedTokens
    """Tokens, kept in memory or computed again when asked for."""
    token_moments: tuple[Moments, Moments]
    """Statistics of tokens, of the images to fit and of the hold-out, of all ranks; empty without `for_tokens`."""
    pooled_moments: tuple[Moments, Moments]
    """Statistics of the pooled vectors, likewise."""


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    images: LabelledImages,
    group: Group,
    *,
    precision: str,
    for_tokens: bool = True,
    fit: np.ndarray | None = None,
    report_progress: ProgressCallback = ignore_progress,
) -> SplitFeatures:
    """Compute the features of a split in one pass over its images.

    Args:
        backbone: on its device and in the task's precision.
        precision: precision in which pooled features are kept, `fp32` or `bf16`.
        for_tokens: whether any head reads single tokens; else they are not kept, and have no statistics.
        fit: images whose statistics are summed, apart from those of all others; None sums none.
    """
    stream = StreamedTokens(backbone, images, group)
    centre = stream.centre()
    own = own_indices(range(len(images)), group)
    most = -(-len(images) // group.world_size)  # images per rank: all ranks take as many turns
    dtype = DTYPES[precision]
    num_bytes = most * centre.numel() * dtype.itemsize
    if num_bytes > HOST_SHARE * group.min_over_ranks(group.host_memory_bytes()):
        raise ProbeError(
            f"pooled features need {num_bytes / 1e9:.3g} GB on a rank, more than {HOST_SHARE:.0%} of its free host "
            "memory; use more ranks"
        )
    # written at once, so that later allocations of any process see that the host has less memory
    pooled = PooledFeatures(torch.empty(len(own), *centre.shape, dtype=dtype).zero_(), centre, group)
    kept = None
    if for_tokens and images.views is None:  # views change by epoch
        fits = most * stream.image_bytes <= CACHE_SHARE * group.min_over_ranks(group.memory_bytes())
        kept = stream.empty(most)[:, : len(own)] if fits else None
    sums = [Moments.around(centre) for _ in range(4)]  # tokens: to fit, held out; pooled: to fit, held out
    is_fit = np.isin(np.arange(len(images)), [] if fit is None else fit)
    chunks = [own[first : first + EXTRACT_BATCH] for first in range(0, most, EXTRACT_BATCH)]
    for number, (chunk, outputs) in enumerate(zip(chunks, stream.parts(chunks), strict=True)):
        first, means = number * EXTRACT_BATCH, outputs.float().mean(2)
        pooled.put(first, means)
        if kept is not None:
            kept[:, first : first + len(chunk)] = outputs
        for part, chosen in enumerate((is_fit[chunk], ~is_fit[chunk]) if fit is not None else ()):
            rows = torch.from_numpy(np.flatnonzero(chosen)).to(outputs.device)
            if for_tokens:
                sums[part].add(outputs.index_select(1, rows).flatten(1, 2))
            sums[2 + part].add(means.index_select(1, rows))
        seen = min(len(images), group.world_size * (first + len(chunk)))
        report_progress(f"features of {images.dataset.info.name}", seen, len(images))
    for moments in sums if fit is not None else ():
        moments.over_ranks(group)
    return SplitFeatures(
        pooled=pooled,
        tokens=stream if kept is None else CachedTokens(kept, group),
        token_moments=(sums[0], sums[1]),
        pooled_moments=(sums[2], sums[3]),
    )
