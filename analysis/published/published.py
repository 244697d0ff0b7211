"""Published results of AIM and of its baselines as typed, cited data.

Everything here is copied from the paper (El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image
Models", arXiv 2401.08541, ICML 2024) or counted from the released weights; nothing is measured by this project.
Accuracies are stored as fractions, as in the results table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

PAPER = "El-Nouby et al. 2024, arXiv 2401.08541"

TASK_TITLES = {
    "imagenet-1k": "IN-1k",
    "inat18": "iNAT-18",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "food101": "Food101",
    "dtd": "DTD",
    "pets": "Pets",
    "cars": "Cars",
    "iwildcam": "iWildCam",
    "camelyon17": "Camelyon17",
    "pcam": "PCAM",
    "rxrx1": "RxRx1",
    "eurosat": "EuroSAT",
    "fmow": "fMoW",
    "infographic": "Infographic",
}
"""Our name -> the paper's column heading."""
TASKS = tuple(TASK_TITLES)
"""The fifteen benchmarks by the names that a sweep's `probes` must use to be compared, in the order of Table 6."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One row of Table 6: a frozen trunk under an attentive probe on the fifteen benchmarks."""

    key: str
    """Our short name, e.g. `aim-7B`."""
    method: str
    arch: str
    data: str
    layers: str
    """Which blocks' outputs the probe averages: `last 6`, `best 6`, or `as published` for the other methods."""
    image_size: int
    top1: tuple[float, ...]
    """Accuracy per task of `TASKS`, fractions."""
    printed_mean: float
    """The mean that the table prints, fraction."""
    source: str = f"{PAPER}, Table 6"
    protocol: str = "frozen trunk, attentive probe, test split of each benchmark"

    @property
    def mean(self) -> float:
        """Mean over the fifteen tasks, recomputed."""
        return float(np.mean(self.top1))

    def accuracy(self, task: str) -> float:
        """Accuracy on one task of `TASKS`."""
        return self.top1[TASKS.index(task)]


def _row(
    key: str, method: str, arch: str, data: str, layers: str, values: str, mean: float, size: int = 224
) -> Baseline:
    top1 = tuple(round(float(value) / 100, 4) for value in values.split())
    assert len(top1) == len(TASKS), key
    return Baseline(
        key=key, method=method, arch=arch, data=data, layers=layers, image_size=size, top1=top1, printed_mean=mean / 100
    )


BASELINES = (
    _row(
        "dino-b8", "DINO", "ViT-B/8", "IN-1k", "as published",
        "80.1 66.0 97.8 87.3 89.5 78.4 92.3 89.2 58.5 93.7 90.2 6.1 98.2 57.0 41.1", 75.0,
    ),
    _row(
        "ibot-l16", "iBOT", "ViT-L/16", "IN-21k", "as published",
        "83.5 70.5 99.2 93.3 93.5 81.6 92.8 90.8 61.8 94.5 90.0 5.9 98.0 60.3 47.7", 77.6,
    ),
    _row(
        "dinov2-g14", "DINOv2", "ViT-g/14", "LVD-142M", "as published",
        "86.4 84.5 99.6 95.2 96.3 86.3 96.4 95.6 68.2 96.5 90.7 8.0 98.6 66.7 58.8", 81.9, 516,
    ),
    _row(
        "beit-l14", "BEiT", "ViT-L/14", "IN-21k", "as published",
        "62.2 44.4 94.4 78.7 79.0 64.0 80.9 69.5 52.0 92.8 88.2 4.2 97.5 47.7 25.9", 65.4,
    ),
    _row(
        "mae-h14", "MAE", "ViT-H/14", "IN-1k", "as published",
        "80.9 64.6 97.1 85.8 90.2 78.1 95.0 93.7 58.1 94.2 89.8 5.4 98.1 56.9 42.2", 75.3,
    ),
    _row(
        "mae-2b14", "MAE", "ViT-2B/14", "IG-3B", "as published",
        "82.2 70.8 97.5 87.3 93.4 81.2 95.1 94.9 57.8 94.4 90.3 7.3 98.2 60.1 50.2", 77.4,
    ),
    _row(
        "aim-600M", "AIM", "aim-600M", "DFN-2B+", "last 6",
        "78.5 64.0 97.2 86.8 90.1 80.1 93.0 93.0 57.9 94.3 90.0 7.8 98.4 58.3 45.2", 75.6,
    ),
    _row(
        "aim-1B", "AIM", "aim-1B", "DFN-2B+", "last 6",
        "80.6 67.2 98.2 88.3 91.6 81.8 93.4 93.9 58.6 94.5 90.0 9.0 98.6 59.8 47.5", 76.9,
    ),
    _row(
        "aim-3B", "AIM", "aim-3B", "DFN-2B+", "last 6",
        "82.2 69.7 98.4 89.9 92.7 81.9 94.1 93.8 58.8 94.3 90.4 9.7 98.5 60.9 48.9", 77.6,
    ),
    _row(
        "aim-7B", "AIM", "aim-7B", "DFN-2B+", "last 6",
        "82.4 70.9 98.6 90.0 93.1 82.3 93.8 92.1 59.5 93.6 90.7 10.1 98.6 61.7 49.6", 77.8,
    ),
    _row(
        "aim-7B-best", "AIM", "aim-7B", "DFN-2B+", "best 6",
        "84.0 75.5 98.9 91.8 94.1 85.6 95.4 95.0 61.4 94.2 90.5 8.4 98.5 63.5 57.7", 79.6,
    ),
)  # fmt: skip
"""All eleven rows of Table 6."""

BY_KEY = {row.key: row for row in BASELINES}


@dataclass(frozen=True, kw_only=True)
class PublishedSize:
    """One released AIM size: its counts, its pre-training loss and its ImageNet accuracy."""

    key: str
    width: int
    depth: int
    images_seen: int
    """Images seen by the released weights (paper, Table 9)."""
    val_loss: float
    """IN-1k validation loss after the same number of updates for every size (Figure 1, tick labels)."""
    in1k_last6: float
    """IN-1k attentive top-1, last six blocks averaged, fraction (Table 6)."""
    in1k_best6: float
    """IN-1k attentive top-1, best six blocks averaged, fraction."""
    in1k_lora: float
    """IN-1k top-1 after rank-8 LoRA fine-tuning, fraction (Table 8); not frozen features."""

    @property
    def params_trunk(self) -> int:
        """Trunk parameters, L(12 d^2 + 4 d) + 2 d: equal to the released files."""
        return self.depth * (12 * self.width**2 + 4 * self.width) + 2 * self.width

    @property
    def params_head(self) -> int:
        """Pixel-head parameters (12 residual MLP blocks of width 2048, one LayerNorm each): never released."""
        head, blocks, patch = 2048, 12, 588
        return self.width * head + head + blocks * (8 * head**2 + 2 * head) + 2 * head + head * patch + patch

    @property
    def params_total(self) -> int:
        """Preprocessor, trunk and head."""
        return self.width * (588 + 3) + self.params_trunk + self.params_head

    @property
    def flops_per_image(self) -> float:
        """Training FLOPs per image (3 x forward) at 256 tokens: patch embedding, trunk and head."""
        tokens, patch, head, blocks = 256, 588, 2048, 12
        trunk = self.depth * (12 * tokens * self.width**2 + 2 * tokens**2 * self.width)
        pixel_head = tokens * (self.width * head + 8 * blocks * head**2 + head * patch)
        return 3.0 * 2 * (tokens * patch * self.width + trunk + pixel_head)


PUBLISHED_SIZES = (
    PublishedSize(
        key="aim-600M", width=1536, depth=24, images_seen=2_000_000_000, val_loss=0.3119,
        in1k_last6=0.785, in1k_best6=0.794, in1k_lora=0.810,
    ),
    PublishedSize(
        key="aim-1B", width=2048, depth=24, images_seen=5_000_000_000, val_loss=0.3084,
        in1k_last6=0.806, in1k_best6=0.823, in1k_lora=0.836,
    ),
    PublishedSize(
        key="aim-3B", width=3072, depth=24, images_seen=5_000_000_000, val_loss=0.3039,
        in1k_last6=0.822, in1k_best6=0.833, in1k_lora=0.855,
    ),
    PublishedSize(
        key="aim-7B", width=4096, depth=32, images_seen=5_000_000_000, val_loss=0.2989,
        in1k_last6=0.824, in1k_best6=0.840, in1k_lora=0.863,
    ),
)  # fmt: skip
"""The four released sizes; the losses come from runs of one common length that the figure does not state in images."""

LOSS_SOURCE = f"{PAPER}, Figure 1 (tick labels; 'same number of updates'; which prefixes were scored is not said)"

PAPER_EXPONENTS = {"params_trunk": 0.0188, "params_total": 0.0228}
"""a in L ~ N^-a, log-log line through the paper's four points, N without and with the pixel head."""


def published_frame() -> pd.DataFrame:
    """The four sizes as a results table: counts, val_loss, and accuracies (mean15 is Table 6's, last six blocks).

    `images_seen` is left out on purpose: the four losses share one number of updates that Figure 1 does not state.
    """
    return pd.DataFrame(
        [
            {
                "size": size.key,
                "params_trunk": size.params_trunk,
                "params_head": size.params_head,
                "params_total": size.params_total,
                "flops_per_image": size.flops_per_image,
                "val_loss": size.val_loss,
                "in1k_last6": size.in1k_last6,
                "in1k_best6": size.in1k_best6,
                "mean15_last6": BY_KEY[size.key].mean,
            }
            for size in PUBLISHED_SIZES
        ]
    )


def best_frozen(task: str) -> Baseline:
    """The published row with the highest accuracy on a task."""
    return max(BASELINES, key=lambda row: row.accuracy(task))
