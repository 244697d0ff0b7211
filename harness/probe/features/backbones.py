"""Frozen models as the probes see them: raw block outputs of images, in fp32 or bf16."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from aimscale.aim.model import AIM
from aimscale.harness.probe.features.benchmarks import ProbeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""A task's `precision` -> the type that the backbone computes in and features are kept in."""


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let cards multiply fp32 matrices (of heads and neighbours) in TF32 where features are bf16; exactly otherwise."""
    before = torch.get_float32_matmul_precision()  # set by its name throughout: torch refuses to read a mix of names
    torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Backbone(Protocol):
    """A frozen model as the probes see it."""

    name: str
    """Written into results."""
    num_blocks: int
    """Blocks whose outputs can be asked for."""
    num_heads: int
    """Heads of the attentive probe: those of the trunk."""

    def use(self, dtype: torch.dtype) -> None:
        """Compute in this type from now on; fp32 is what the weights were given in."""
        ...

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Outputs (len(blocks), B, N, d) for normalised images (B, C, H, W)."""
        ...


class AimBackbone:
    """An AIM with bidirectional attention; raw block outputs, no final norm (as the released probe reads them).

    Only one copy of the weights is held: for bf16 they are rounded in place, and loaded again when fp32 is asked for.
    """

    def __init__(self, load: Callable[[], AIM], name: str = "aim"):
        """`load` gives the float32 model on its device, a fresh one at each call."""
        self.name = name
        self._load = load
        self.model = load().eval()
        self.config = self.model.config
        self.num_blocks = self.config.depth
        self.num_heads = self.config.num_heads
        self._dtype = torch.float32

    def use(self, dtype: torch.dtype) -> None:
        """Round the weights to bf16, or load them again in fp32."""
        if dtype != self._dtype and dtype == torch.float32:
            del self.model  # never two copies
            self.model = self._load().eval()
        self.model.to(dtype)
        self._dtype = dtype

    @torch.no_grad()
    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """Outputs (len(blocks), B, N, d); moves the images to the model's device and type."""
        weight = next(self.model.trunk.parameters())
        return self.model.features(images.to(weight.device, weight.dtype), blocks)


class PixelBackbone:
    """Raw pixels as the features: what a probe reaches without any model."""

    name = "raw-pixels"
    num_blocks = 1
    num_heads = 1

    def __init__(self) -> None:
        self._dtype = torch.float32

    def use(self, dtype: torch.dtype) -> None:
        """Give the pixels in this type."""
        self._dtype = dtype

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        """The flattened image as one token of width C H W: (len(blocks), B, 1, C H W)."""
        return images.to(self._dtype).flatten(1)[None, :, None].expand(len(blocks), -1, -1, -1)


def precision_difference(backbone: Backbone, images: Tensor, dtype: torch.dtype) -> float:
    """How far features in `dtype` are from those in fp32 on some images; the backbone is left in either.

    Returns:
        Root mean square of the difference over that of the features' deviation from their mean over images and tokens,
        channel by channel: 0.01 is 1 % of what distinguishes one token from another.

    Raises:
        ProbeError: the features are not finite.
    """
    backbone.use(torch.float32)
    exact = backbone.features(images, range(backbone.num_blocks)).float()
    if not exact.isfinite().all():
        raise ProbeError(f"the features of {backbone.name} are not finite: its weights diverged, or are damaged")
    if dtype == torch.float32:
        return 0.0
    backbone.use(dtype)
    difference = backbone.features(images, range(backbone.num_blocks)).float() - exact
    spread = exact - exact.mean((1, 2), keepdim=True)
    return float(difference.square().mean().sqrt() / spread.square().mean().sqrt().clamp_min(1e-30))
