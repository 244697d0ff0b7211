"""Published frozen models as cited tables: AIM's Table 6 and its four sizes.

The figures stand in `data/*.csv` with their sources: copied from the paper (El-Nouby et al., "Scalable Pre-training of
Large Autoregressive Image Models", arXiv 2401.08541, ICML 2024), in per cent as they are printed, or counted from the
released weights; nothing is measured by this project. The tables that this module hands out hold accuracies as
fractions, like the results table.
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


def _fractions(percent: pd.DataFrame) -> pd.DataFrame:
    """Per cent as fractions, without the dust of division."""
    return (percent / 100).round(4)


@functools.cache
def table6() -> pd.DataFrame:
    """Table 6, all eleven rows: a frozen trunk under an attentive probe on the test split of fifteen benchmarks.

    Returns:
        By our short name (`aim-7B`): method, arch, data, layers (whose outputs the probe averages: `last 6`, `best 6`,
        or `as published` for the other methods), image_size, one column per task of `TASKS`, printed_mean, source, and
        mean (recomputed).
    """
    out = pd.read_csv(DATA / "table6.csv", index_col="key")
    out[[*TASKS, "printed_mean"]] = _fractions(out[[*TASKS, "printed_mean"]])
    return out.assign(mean=out[list(TASKS)].mean(axis=1))


@functools.cache
def published_frame() -> pd.DataFrame:
    """The four released sizes as a results table.

    Images seen are left out on purpose: the four losses share one number of updates, which Figure 1 does not state.

    Returns:
        size, width, depth; params_trunk (equal to the released files), params_head (never released), params_total,
        flops_per_image (3 x forward, 256 tokens); val_loss (IN-1k, Figure 1); in1k_last6, in1k_best6 (Table 6),
        in1k_lora (Table 8, not frozen); source.
    """
    out = pd.read_csv(DATA / "sizes.csv", dtype={"flops_per_image": float}).drop(columns="images_seen")
    shares = ["in1k_last6", "in1k_best6", "in1k_lora"]
    out[shares] = _fractions(out[shares])
    return out


def best_frozen(task: str) -> str:
    """Key of the row of Table 6 with the highest accuracy on a task."""
    return str(table6()[task].idxmax())
