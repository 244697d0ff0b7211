"""Frozen models as seen by probes: raw block outputs of images, in fp32 or bf16.

AIM, and the models it is compared with through the same probes on the same images:

    timm:NAME     a vision transformer of timm with weights from a file, from the hub, or untrained
    random        the run's own architecture with untrained weights
    raw-pixels    the normalised pixels themselves
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from aimscale.aim.config import model_config
from aimscale.aim.errors import did_you_mean
from aimscale.aim.model import AIM
from aimscale.harness.data.images import IMAGE_MEAN, IMAGE_STD
from aimscale.harness.probe.features.tasks import ProbeError
from aimscale.harness.run.config import ModelSection, RunConfig


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let GPUs multiply fp32 matrices (of heads and neighbours) in TF32 if features are bf16; exactly otherwise."""
    before = torch.get_float32_matmul_precision()  # always set under this name: torch refuses to mix its two interfaces
    torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Backbone(Protocol):
    """Frozen model as seen by probes."""

    name: str
    """Name written into results."""
    num_blocks: int
    """Number of blocks with outputs."""
    num_heads: int
    """Number of heads of the attentive probe: those of the trunk."""
    impossible: Sequence[str]
    """Kinds of probe that it cannot have."""

    def use(self, dtype: torch.dtype) -> None:
        """Compute in this type from now on; the weights were loaded in fp32."""

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Compute outputs (len(blocks), B, N, d) for normalised images (B, C, H, W)."""


class AimBackbone:
    """AIM with bidirectional attention, unless `is_causal`; raw block outputs, no final norm, as the released probe
    reads them.

    Only one copy of the weights is held: for bf16 they are rounded in place, and for fp32 loaded again.
    """

    impossible: Sequence[str] = ()
    is_causal = False
    """Whether tokens attend only to those before them."""

    def __init__(self, load: Callable[[], AIM], name: str = "aim"):
        """Load the model; each call of `load` returns a fresh float32 model on its device."""
        self.name = name
        self._load = load
        self.model = self._loaded()
        self.config = self.model.config
        self.num_blocks = self.config.depth
        self.num_heads = self.config.num_heads
        self._dtype = torch.float32

    def _loaded(self) -> AIM:
        """Load the model without its pixel head."""
        model = self._load().eval()
        model.pixel_head.to("meta")  # no probe reads it: a third of the weights of aim-7B
        return model

    def use(self, dtype: torch.dtype) -> None:
        """Round the weights to bf16, or load them again in fp32."""
        if dtype != self._dtype and dtype == torch.float32:
            del self.model  # never two copies
            self.model = self._loaded()
        self.model.to(dtype)
        self._dtype = dtype

    @torch.no_grad()
    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Compute outputs (len(blocks), B, N, d); moves the images to the model's device and type."""
        weight = next(self.model.trunk.parameters())
        return self.model.features(images.to(weight.device, weight.dtype), blocks, is_causal=self.is_causal)


class PixelBackbone:
    """Raw pixels as features: the accuracy of a probe without any model."""

    name = "raw-pixels"
    num_blocks = 1
    num_heads = 1
    impossible: Sequence[str] = ("attentive", "efficient", "lora")  # one token an image: nothing to attend over

    def __init__(self) -> None:
        self._dtype = torch.float32

    def use(self, dtype: torch.dtype) -> None:
        """Return pixels in this type from now on."""
        self._dtype = dtype

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Flatten each image to one token of width C H W: (len(blocks), B, 1, C H W)."""
        return images.to(self._dtype).flatten(1)[None, :, None].expand(len(blocks), -1, -1, -1)


TIMM = "timm:"
"""Prefix of a timm model's name."""


class TimmBackbone:
    """Vision transformer of timm: raw outputs of all blocks, without the last norm and without class and register
    tokens."""

    impossible: Sequence[str] = ("lora",)

    def __init__(self, model: Any, name: str, device: torch.device):
        self.name = name
        self._in_fp32 = self._model = model.to(device).eval()
        self._device, self._dtype = device, torch.float32
        self.num_blocks, self.num_heads = len(model.blocks), int(model.blocks[0].attn.num_heads)
        settings = model.pretrained_cfg
        mean, std = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
        # images arrive with ImageNet's mean and deviation
        self._scale = (torch.tensor(IMAGE_STD) / std).view(3, 1, 1).to(device)
        self._shift = ((torch.tensor(IMAGE_MEAN) - mean) / std).view(3, 1, 1).to(device)

    def use(self, dtype: torch.dtype) -> None:
        """Compute with the original model, or with a rounded copy."""
        self._model = self._in_fp32 if dtype == torch.float32 else copy.deepcopy(self._in_fp32).to(dtype)
        self._dtype = dtype

    @torch.no_grad()
    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Compute outputs (len(blocks), B, N, d) for images (B, 3, H, W)."""
        images = (images.to(self._device) * self._scale + self._shift).to(self._dtype)
        outputs = self._model.forward_intermediates(
            images, indices=list(blocks), norm=False, output_fmt="NLC", intermediates_only=True
        )
        return torch.stack(list(outputs))


def baseline(
    target: str, like: RunConfig, *, weights: str | None, device: torch.device
) -> tuple[Backbone, ModelSection]:
    """Return the baseline that a user named, and the geometry of its images: a timm model's at the size of its
    training.

    Args:
        like: the run whose tasks it is compared on.
        weights: weights of a timm model: a file, `hub` (downloaded, or from the hub's local cache) or `random`.
    """
    section = like.training.model
    if target.startswith(TIMM) != (weights is not None):
        raise ProbeError(f"--weights (a file, hub or random) is needed for {TIMM}NAME, and for no other baseline")
    if target == "raw-pixels":
        return PixelBackbone(), section
    if target == "random":
        config = model_config(**dict(section))
        return AimBackbone(lambda: AIM(config).to(device), f"random-{section.size}"), section
    if weights is None:
        hint = did_you_mean(target, (f"{TIMM}NAME", "random", "raw-pixels"), "use")
        raise ProbeError(f"there is no baseline '{target}'; {hint}")
    if section.channels != 3:
        raise ProbeError(f"timm models take 3 channels, the tasks of this run have {section.channels}")
    model = _create(target.removeprefix(TIMM), weights, like.training.seed)
    size = int(model.pretrained_cfg["input_size"][1])
    name = f"{target} ({f'{weights} weights' if weights in ('hub', 'random') else weights})"
    return TimmBackbone(model, name, device), ModelSection(size=target, image_size=size, patch_size=section.patch_size)


def _create(name: str, weights: str, seed: int) -> Any:
    """Create a timm model with its weights; random ones are those of the seed, on every rank."""
    import timm
    from timm.models import load_state_dict

    if ":" not in name and not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), "timm has")
        raise ProbeError(f"timm has no model '{name}'; {hint}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(name, pretrained=weights == "hub", num_classes=0)
        # plain tensors only (no pickled code); timm unwraps 'model', 'state_dict' and 'module.' prefixes
        loaded = {} if weights in ("hub", "random") else load_state_dict(weights, weights_only=True)
        missing = model.load_state_dict(loaded, strict=False).missing_keys if loaded else []
    except Exception as error:  # of many types: the hub is out of reach, the file holds no weights
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ProbeError(f"timm cannot make {name} with weights {weights} ({reason})") from error
    if missing:
        raise ProbeError(f"{weights} lacks {missing[0]} and {len(missing) - 1} more of {name}; give its own file")
    blocks: Any = getattr(model, "blocks", None)
    if blocks is None or not hasattr(blocks[0], "attn"):
        raise ProbeError(f"{name} of timm is no vision transformer; probes read a transformer's blocks")
    return model
