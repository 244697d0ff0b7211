"""Published results as cited tables: AIM's Table 6, and its four sizes.

`data/*.csv` hold the figures with their sources: copied from the paper (El-Nouby et al., arXiv 2401.08541) in per cent
as printed, or counted from the released weights. The tables made of them hold accuracies as fractions.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd

DATA = Path(__file__).parent / "data"
TASKS = (
    *("imagenet-1k", "inat18", "cifar10", "cifar100", "food101", "dtd", "pets", "cars", "iwildcam", "camelyon17"),
    *("pcam", "rxrx1", "eurosat", "fmow", "infographic"),
)
"""The fifteen benchmarks by the names that a sweep's `probes` must use to be compared, in the order of Table 6."""


def _read(name: str, shares: list[str]) -> pd.DataFrame:
    """Read a table whose shares are printed in per cent."""
    out = pd.read_csv(DATA / name)
    return out.assign(**(out[shares] / 100).round(4))


@functools.cache
def table6() -> pd.DataFrame:
    """Read Table 6, all eleven rows: a frozen backbone, an attentive probe, the test splits of fifteen benchmarks.

    Returns:
        By our short name (`aim-7B`): method, arch, data, layers (whose outputs the probe averages: `last 6`, `best 6`,
        or `as published`), image_size, one column per task of `TASKS`, printed_mean, source, and mean (recomputed).
    """
    out = _read("table6.csv", [*TASKS, "printed_mean"]).set_index("key")
    return out.assign(mean=out[list(TASKS)].mean(axis=1))


@functools.cache
def published_frame() -> pd.DataFrame:
    """Read the four released sizes as a results table.

    Images seen are left out: the four losses share one number of updates, which Figure 1 does not state.

    Returns:
        size, width, depth; params_trunk (equal to the released files), params_head (never released), params_total,
        flops_per_image (3 x forward, 256 tokens); val_loss (IN-1k, Figure 1); in1k_last6, in1k_best6 (Table 6),
        in1k_lora (Table 8, not frozen); source.
    """
    out = _read("sizes.csv", ["in1k_last6", "in1k_best6", "in1k_lora"]).drop(columns="images_seen")
    return out.astype({"flops_per_image": float})


def best_frozen(task: str) -> str:
    """Find the row of Table 6 with the highest accuracy on a task."""
    return str(table6()[task].idxmax())
