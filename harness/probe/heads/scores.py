"""Scores of probes: candidates on the hold-out, and accuracies on the test split with their uncertainty."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.tasks import BlockSet
from aimscale.harness.probe.heads.stacks import HeadStack

MAX_GROWTH = 4
"""Maximum number of values by which a grid may grow at either end."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Trained probe of one kind, block set and value."""

    kind: str
    """A key of `STACKS`, `knn` or `lora`."""
    blocks: BlockSet
    """Blocks whose outputs it averages."""
    value: float
    """Value that distinguishes it within its kind: peak learning rate, strength of L2, or k."""
    holdout_top1: float
    holdout_loss: float
    """Cross-entropy on the hold-out (0 for k-NN and LoRA, which are chosen without)."""
    head: HeadStack | None = None
    """Head that learned from all images, alone in its stack; of the chosen candidates only."""


def best(candidates: Sequence[Candidate], kind: str, blocks: BlockSet | None = None) -> Candidate:
    """Return the candidate of a kind, optionally on one block set, with the highest hold-out accuracy, ties by loss,
    then by order; linear heads by loss alone, which follows the accuracy with less noise."""
    pool = [c for c in candidates if c.kind == kind and blocks in (None, c.blocks)]
    return max(pool, key=lambda c: (c.holdout_top1 if kind != "linear" else 0, -c.holdout_loss))


def tried_values(candidates: Sequence[Candidate], like: Candidate) -> list[float]:
    """Return the values of a candidate's kind that were tried on its block set."""
    return [each.value for each in candidates if (each.kind, each.blocks) == (like.kind, like.blocks)]


def next_values(asked: Sequence[float], values: Sequence[float], chosen: float) -> list[float]:
    """Return the next value, by the mean ratio of the grid asked for, if the chosen one is at an end of those tried and
    less than `MAX_GROWTH` steps beyond the grid."""
    low, high = min(asked), max(asked)
    if low == high or min(values) < chosen < max(values):
        return []
    ratio = (high / low) ** (1 / (len(set(asked)) - 1))
    steps = round(math.log(chosen / high if chosen > low else low / chosen, ratio))
    return [chosen * (ratio if chosen > low else 1 / ratio)] if steps < MAX_GROWTH else []


@dataclass(frozen=True)
class Predictions:
    """Predictions for each test image: little enough to keep for any number of classes."""

    predicted: Tensor
    """Class with the highest score (n,)."""
    in_top5: Tensor
    """Whether the label is among the five highest scores (n,), bool."""


def to_predictions(scores: Tensor, labels: Tensor) -> Predictions:
    """Turn class scores (n, K) into predictions, given labels (n,)."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices
    return Predictions(top[:, 0].cpu(), (top == labels[:, None].to(top.device)).any(1).cpu())


def gather_predictions(
    indices: Sequence[int], parts: Sequence[Predictions], num_images: int, group: Group
) -> Predictions:
    """Gather predictions on every rank about all images that some rank has seen; the others stay zero.

    Args:
        own: images that this rank's `parts` predict, in order.
    """
    mine = [(part.predicted, part.in_top5) for part in parts]
    whole = Predictions(torch.zeros(num_images, dtype=torch.int64), torch.zeros(num_images, dtype=torch.bool))
    for images, of_rank in group.all_gather_object((indices, mine)):
        if images:
            whole.predicted[images], whole.in_top5[images] = (torch.cat(each) for each in zip(*of_rank, strict=True))
    return whole


def _wilson(num_correct: int, n: int) -> tuple[float, float]:
    """Compute Wilson's interval at 95 %: inside [0, 1] and honest near both ends (scipy takes a second to import)."""
    z2 = 1.959963984540054**2
    middle, half = num_correct + z2 / 2, math.sqrt(z2 * (num_correct * (n - num_correct) / n + z2 / 4))
    return max(0.0, (middle - half) / (n + z2)), min(1.0, (middle + half) / (n + z2))


def score(predictions: Predictions, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Score predictions: top-1 with its interval, top-5 for more than five classes, mean over classes, chance, per
    class.

    Chance is the share of the commonest class: what always naming it scores. `hits`, base64 of `np.packbits`, has one
    bit per image in the data set's order, set where the answer is right: models can be compared image by image.
    """
    correct = predictions.predicted == labels
    n, num_correct = len(labels), int(correct.sum())
    low, high = _wilson(num_correct, n)
    totals = np.bincount(labels.numpy(), minlength=len(classes))
    rights = np.bincount(labels[correct].numpy(), minlength=len(classes))
    present = totals > 0
    return {
        "n": n,
        "top1": num_correct / n,
        "top1_lo95": low,
        "top1_hi95": high,
        "top5": float(predictions.in_top5.float().mean()) if len(classes) > 5 else None,
        "mean_class": float((rights[present] / totals[present]).mean()),
        "chance": float(totals.max() / n),
        "hits": base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode("ascii"),
        "per_class": [
            {"class": name, "n": int(total), "correct": int(right)}
            for name, total, right in zip(classes, totals, rights, strict=True)
        ],
    }
