"""The pre-training loss on held-out images, and next-patch predictions to look at.

Every run of a sweep sees the same images with the same prefixes, and per-image losses are kept, so that two models can
be compared image by image: the published losses of 0.6B to 7B differ by 0.013 in all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimscale.aim.model import AIM
from aimscale.aim.objective import in_prefix, unpatchify
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.data.stream.augment import denormalise
from aimscale.harness.data.stream.held_out import eval_images, fixed_given, usable_indices
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.images import Pause
from aimscale.harness.probe.owed import VALIDATION_COLUMNS
from aimscale.harness.run.config import ModelSection, ValidationSection
from aimscale.harness.run.files import written_aside

EVAL_TOKENS = 16_384
"""Tokens per forward pass."""
NUM_COMPLETIONS = 8
"""Images whose predictions are kept as pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationLosses:
    """Losses of single images, of each prefix and summed over them; one row per image, in the folder's order."""

    index: np.ndarray
    """int64: sample number in the validation folder."""
    loss_sum: np.ndarray
    """float64: sum over scored targets of their mean squared errors."""
    num_targets: np.ndarray
    """float64: scored targets."""
    prefix_len: np.ndarray
    """int64 (images, prefixes): how many patches are given."""
    prefix_loss_sum: np.ndarray
    """float64 (images, prefixes): `loss_sum` by prefix, from which the noise of the drawn prefixes can be told."""

    @property
    def loss(self) -> float:
        """Mean over all scored targets."""
        return float(self.loss_sum.sum() / self.num_targets.sum())

    @property
    def standard_error(self) -> float:
        """Of `loss` as a ratio of two sums over images (delta method); images are the sampling unit."""
        residual = self.loss_sum - self.loss * self.num_targets
        num_images = len(residual)
        if num_images < 2:
            return float("inf")
        return float(np.sqrt((residual**2).sum() / (num_images - 1) / num_images) / self.num_targets.mean())

    def save(self, path: Path, name: str = "", pictures: dict[str, np.ndarray] | None = None) -> None:
        """Write them to an npz file in one step: what they are of, a row's columns, and the model's `completions`."""
        columns = (self.loss, self.standard_error, len(self.index))
        arrays: dict[str, Any] = {"name": name, **dict(zip(VALIDATION_COLUMNS, columns, strict=True))}
        arrays |= dataclasses.asdict(self) | (pictures or {})
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays)


@torch.no_grad()
def validate(
    model: AIM,
    dataset: ShardDataset,
    section: ValidationSection,
    model_section: ModelSection,
    group: Group,
    pause: Pause = lambda: None,
) -> ValidationLosses:
    """Per-image losses; ranks share the images, and every rank returns all of them.

    Args:
        pause: called by all ranks together after each pass; raises to stop there.

    Raises:
        DataError: an image cannot be read, or there are fewer than asked for.
    """
    indices = usable_indices(dataset, section.num_images)
    given = fixed_given(len(indices), section.num_prefixes, model.config)
    own = np.arange(len(indices))[group.rank :: group.world_size]
    per_pass = max(1, EVAL_TOKENS // (model.config.num_tokens * section.num_prefixes))
    sums, counts = [], []
    for start in range(0, -(-len(indices) // group.world_size), per_pass):
        pause()
        rows = own[start : start + per_pass]
        if not len(rows):
            continue
        images = eval_images(dataset, indices[rows], model_section, section.centre_crop).to(group.device)
        repeated = images.repeat_interleave(section.num_prefixes, dim=0)
        loss_sum, num_targets = model.per_image_loss(repeated, given[rows].flatten(0, 1))
        shape = (len(rows), section.num_prefixes)
        sums.append(loss_sum.double().view(shape))
        counts.append(num_targets.double().view(shape).sum(1))
    mine = (
        own,
        torch.cat(sums).cpu().numpy() if sums else np.zeros((0, section.num_prefixes)),
        torch.cat(counts).cpu().numpy() if counts else np.zeros(0),
    )
    rows, losses, targets = (np.concatenate(part) for part in zip(*group.gather(mine), strict=True))
    order = np.argsort(rows)
    return ValidationLosses(
        index=indices,
        loss_sum=losses[order].sum(1),
        num_targets=targets[order],
        prefix_len=(given if model.config.masked is None else given.sum(2)).numpy(),
        prefix_loss_sum=losses[order],
    )


@torch.no_grad()
def completions(
    model: AIM, dataset: ShardDataset, section: ValidationSection, model_section: ModelSection, device: torch.device
) -> dict[str, np.ndarray]:
    """Pictures of a few validation images, spread over the folder: seen to their middle, or masked.

    Returns:
        uint8 (n, H, W, C) arrays `truth`, `prefix` (mid-grey where the model must predict) and `prediction`, and int64
        `picture_index` (n,), sample numbers.
    """
    usable = usable_indices(dataset, section.num_images)
    chosen = usable[np.linspace(0, len(usable) - 1, min(NUM_COMPLETIONS, len(usable))).round().astype(int)]
    config = model.config
    images = eval_images(dataset, chosen, model_section, section.centre_crop).to(device)
    half = torch.full((len(chosen),), config.num_tokens // 2)
    given = half if config.masked is None else fixed_given(len(chosen), 1, config)[:, 0]
    is_given = in_prefix(half, config.num_tokens) if config.masked is None else given
    sequence = is_given[:, :, None].expand(-1, -1, config.patch_dim).to(device)
    raster = torch.empty_like(sequence).index_copy(1, model.preprocessor.order, sequence)
    is_prefix = unpatchify(raster, config.patch_size, config.channels).cpu()
    truth = denormalise(images.cpu())
    return {
        "picture_index": chosen,
        "truth": _channels_last(truth),
        "prefix": _channels_last(torch.where(is_prefix, truth, torch.full_like(truth, 128))),
        "prediction": _channels_last(denormalise(model.complete(images, given).float().cpu())),
    }


def _channels_last(images: Tensor) -> np.ndarray:
    array: np.ndarray = images.permute(0, 2, 3, 1).contiguous().numpy()
    return array
