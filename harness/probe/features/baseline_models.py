"""Models to compare with, through the same probes: any timm model, random weights, raw pixels.

    timm:NAME     a model of timm with weights from a file, from the hub, or random: whichever is asked for
    random        the run's own architecture with untrained weights
    raw-pixels    the normalised pixels themselves

Baselines see the same images as the run; a timm model gets them at its own size and normalisation.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.data.stream.augment import IMAGE_MEAN, IMAGE_STD
from aimscale.harness.probe.features.backbones import AimBackbone, Backbone, PixelBackbone
from aimscale.harness.probe.features.benchmarks import ProbeError
from aimscale.harness.run.config import ModelSection, RunConfig

TIMM = "timm:"
"""Prefix of a timm model's name."""


class TimmBackbone:
    """A timm model: all blocks of a vision transformer, or the last feature map of anything else.

    Class and register tokens are left out, as AIM has none; block outputs are raw, without the last norm.
    """

    def __init__(self, model: Any, name: str, device: torch.device):
        self.name = name
        self._in_fp32 = self._model = model.to(device).eval()
        self._device, self._dtype = device, torch.float32
        blocks = getattr(model, "blocks", None)
        self._has_blocks = isinstance(blocks, nn.Sequential | nn.ModuleList) and hasattr(blocks[0], "attn")
        self.num_blocks = len(blocks) if self._has_blocks and blocks is not None else 1
        self.num_heads = int(blocks[0].attn.num_heads) if self._has_blocks and blocks is not None else 1
        settings = model.pretrained_cfg
        mean, std = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
        # images arrive with ImageNet's mean and deviation
        self._scale = (torch.tensor(IMAGE_STD) / std).view(3, 1, 1).to(device)
        self._shift = ((torch.tensor(IMAGE_MEAN) - mean) / std).view(3, 1, 1).to(device)

    def use(self, dtype: torch.dtype) -> None:
        """Compute by the model as it was given, or by a rounded copy."""
        self._model = self._in_fp32 if dtype == torch.float32 else copy.deepcopy(self._in_fp32).to(dtype)
        self._dtype = dtype

    @torch.no_grad()
    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Outputs (len(blocks), B, N, d) for images (B, 3, H, W)."""
        images = (images.to(self._device) * self._scale + self._shift).to(self._dtype)
        if self._has_blocks:
            outputs = self._model.forward_intermediates(
                images, indices=list(blocks), norm=False, output_fmt="NLC", intermediates_only=True
            )
            return torch.stack(list(outputs))
        tokens = self._model.forward_features(images)
        if tokens.dim() == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        return tokens.expand(len(blocks), *tokens.shape)


def baseline(
    target: str, like: RunConfig, *, weights: str | None, image_size: int | None, device: torch.device
) -> tuple[Backbone, ModelSection]:
    """The baseline a user named, and the geometry of the images it gets.

    Args:
        target: `timm:NAME`, `random` or `raw-pixels`.
        like: the run whose tasks it is compared on.
        weights: of a timm model: a file, `hub` (downloaded, or from the hub's local cache) or `random`.
        image_size: side of a timm model's images; None takes the size it was trained at.

    Raises:
        ProbeError: an unknown target or timm model, or weights that cannot be had.
    """
    section = like.training.model
    if not target.startswith(TIMM) and (weights or image_size):
        raise ProbeError(f"--weights and --image-size go with {TIMM}NAME, not with '{target}'")
    if target == "raw-pixels":
        return PixelBackbone(), section
    if target == "random":
        config = model_config(**dict(section))
        return AimBackbone(lambda: AIM(config).to(device), f"random-{section.size}"), section
    if not target.startswith(TIMM):
        raise ProbeError(f"'{target}' is no baseline; use {TIMM}NAME, random or raw-pixels")
    if section.channels != 3:
        raise ProbeError(f"timm models take 3 channels, the tasks of this run have {section.channels}")
    if weights is None:
        raise ProbeError(f"say which weights {target} gets: --weights FILE, --weights hub or --weights random")
    timm_model = _create(target.removeprefix(TIMM), weights, image_size)
    size = image_size or int(timm_model.pretrained_cfg["input_size"][1])
    origin = f"{weights} weights" if weights in ("hub", "random") else weights
    geometry = ModelSection(size=target, image_size=size, patch_size=section.patch_size)
    return TimmBackbone(timm_model, f"{target} ({origin})", device), geometry


def _create(name: str, weights: str, image_size: int | None) -> Any:
    import timm
    from timm.models import load_state_dict

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "timm.list_models() lists them"
        raise ProbeError(f"timm has no model '{name}'; {hint}")
    size: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    missing: list[str] = []
    try:
        model = timm.create_model(name, pretrained=weights == "hub", num_classes=0, **size)
        if weights not in ("hub", "random"):
            # plain tensors only (no pickled code); timm unwraps 'model', 'state_dict' and 'module.' prefixes
            missing, _ = model.load_state_dict(load_state_dict(weights, weights_only=True), strict=False)
    except Exception as error:  # of many kinds: a class without that option, a hub out of reach, no file of weights
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        asked = f"weights {weights}" + (f" and --image-size {image_size}" if size else "")
        raise ProbeError(f"timm cannot make {name} with {asked} ({reason})") from error
    if missing:
        raise ProbeError(f"{weights} lacks {missing[0]} and {len(missing) - 1} more of {name}; give its own file")
    return model
