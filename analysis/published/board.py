"""Published frozen models as one list, dated: AIM's Table 6 (2024), AIMv2's gallery (2024), a standing board (2026).

Nothing here is measured by this project. `published_results` gives one entry per model, task and probe kind, so that a
result is put beside entries of its own task and kind only.
"""

from __future__ import annotations

from dataclasses import dataclass

from aimscale.analysis.published.published import BASELINES, TASKS

BOARD_SOURCE = "Psomas et al., board 'Probing Frozen Encoders' (github.com/billpsomas/efficient-probing), November 2026"
BOARD_CAVEAT = (
    "the board prints the best of 90 epochs on the very images that are scored, and the best k and temperature of its "
    "k-NN; ours chooses on a hold-out of the training split"
)
GALLERY_SOURCE = "Fini et al. 2024, arXiv 2411.14402, model gallery (github.com/apple/ml-aim)"


@dataclass(frozen=True, kw_only=True)
class Published:
    """The accuracy of one frozen model on one task under one kind of probe."""

    model: str
    """Method and architecture."""
    data: str
    task: str
    """One of `TASKS`."""
    kind: str
    """attentive, linear, knn or efficient."""
    image_size: int
    """Side of the input, pixels."""
    top1: float
    """Accuracy, fraction."""
    source: str
    blocks: str = ""
    """`last 6` or `best 6` of AIM's rows."""
    caveat: str = ""
    """What its protocol does that ours does not."""


_BOARD = """
DINOv3 ViT-7B/16 | LVD-1689M | 224 | 84.2 88.0 88.4
MetaCLIP2 ViT-bigG/14 | MetaCLIP2-worldwide | 378 | 80.6 88.1 88.1
EVA02-CLIP E-14-plus | LAION-2B, 9B seen | 224 | 82.9 87.8 88.0
EVA02-CLIP E-14 | LAION-2B, 4B seen | 224 | 82.2 87.4 87.7
SigLIP2 SO400M/14 | WebLI | 224 | 77.5 86.3 87.7
PE-Core L-14 | MetaCLIP-curated 5.4B | 336 | 49.1 85.4 87.2
MetaCLIP2 ViT-bigG/14 | MetaCLIP2-worldwide | 224 | 79.6 87.1 87.1
SigLIP2 ViT-L/16 | WebLI | 256 | 76.2 85.3 87.1
DINOv3 ViT-L/16 | LVD-1689M | 224 | 83.4 86.6 87.0
AIMv2 ViT-L/14 | DFN-2B + COYO + HQITP | 224 | 76.0 84.7 85.9
SigLIP ViT-L/16 | WebLI | 256 | 72.9 84.2 85.9
DINOv2 ViT-L/14 | LVD-142M | 224 | 81.0 85.2 85.6
Franca ViT-L/14 | LAION-600M | 224 | 78.0 83.6 84.3
DINOv3 ViT-B/16 | LVD-1689M | 224 | 79.6 83.9 84.1
DINOv2 ViT-B/14 | LVD-142M | 224 | 79.3 83.5 84.0
RADIO ViT-L/16 | distilled | 224 | 78.2 84.4 83.9
EVA02 ViT-L/14 | IN-22k | 224 | 74.0 82.8 83.6
CLIP ViT-L/14 | WIT-400M | 224 | 73.5 82.5 83.2
CAPI ViT-L/14 | IN-1k | 224 | 72.9 81.9 83.0
BEiTv2 ViT-B/16 | IN-1k | 224 | 70.1 79.0 81.4
RADIO ViT-B/16 | distilled | 224 | 70.4 79.7 80.3
iBOT ViT-L/16 | IN-1k | 224 | 73.9 80.5 80.0
Hiera ViT-H/16 | IN-1k | 224 | 34.7 77.3 79.9
MAE ViT-L/16 | IN-1k | 224 | 48.1 76.0 79.5
I-JEPA ViT-H/14 | IN-1k | 224 | 68.1 78.1 79.0
iBOT ViT-B/16 | IN-1k | 224 | 73.6 78.7 79.0
Hiera ViT-L/16 | IN-1k | 224 | 38.8 74.1 78.5
CLIP ViT-B/16 | WIT-400M | 224 | 65.7 77.9 77.8
DINO ViT-B/16 | IN-1k | 224 | 71.6 77.2 77.4
MoCov3 ViT-B/16 | IN-1k | 224 | 66.8 75.7 76.5
Hiera ViT-B/16 | IN-1k | 224 | 39.8 69.2 75.7
MAE ViT-B/16 | IN-1k | 224 | 35.6 67.8 75.5
MaskFeat ViT-B/16 | IN-1k | 224 | 15.9 62.2 71.8
MaskFeat ViT-L/16 | IN-1k | 224 | 5.7 40.9 69.6
SimMIM ViT-B/16 | IN-1k | 224 | 8.6 47.1 64.9
MAE ViT-S/16 | IN-1k | 224 | 18.0 47.1 64.6
DiT-XL/2 | IN-1k | 256 | 5.2 32.7 57.0
"""
"""Model, pre-training data, pixels; ImageNet-1k top-1 by k-NN, linear and efficient probe, per cent: all 37 rows."""

_GALLERY = {
    224: {"L": 86.6, "H": 87.5, "1B": 88.1, "3B": 88.5},
    336: {"L": 87.6, "H": 88.2, "1B": 88.7, "3B": 89.2},
    448: {"L": 87.9, "H": 88.6, "1B": 89.0, "3B": 89.5},
}
"""AIMv2 by pixels and size: ImageNet-1k top-1 of an attentive probe on the frozen trunk, per cent."""


def published_results() -> list[Published]:
    """Table 6 on fifteen tasks, AIMv2's gallery and the board on ImageNet-1k."""
    found = [
        Published(
            model=f"{row.method} {row.arch.removeprefix('aim-')}", data=row.data, task=task, kind="attentive",
            image_size=row.image_size, top1=top1, source=row.source,
            blocks=row.layers if row.method == "AIM" else "",
        )
        for row in BASELINES
        for task, top1 in zip(TASKS, row.top1, strict=True)
    ]  # fmt: skip
    found += [
        Published(
            model=f"AIMv2-{size}/14", data="DFN-2B + COYO + HQITP", task="imagenet-1k", kind="attentive",
            image_size=side, top1=round(percent / 100, 4), source=GALLERY_SOURCE,
            caveat="AIMv2 trains on captions, too",
        )
        for side, sizes in _GALLERY.items()
        for size, percent in sizes.items()
    ]  # fmt: skip
    for line in _BOARD.strip().splitlines():
        model, data, side, values = (part.strip() for part in line.split("|"))
        found += [
            Published(
                model=model, data=data, task="imagenet-1k", kind=kind, image_size=int(side),
                top1=round(float(value) / 100, 4), source=BOARD_SOURCE, caveat=BOARD_CAVEAT,
            )
            for kind, value in zip(("knn", "linear", "efficient"), values.split(), strict=True)
        ]  # fmt: skip
    return found
