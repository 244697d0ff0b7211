"""Model configurations: the four published sizes, a ladder of small rungs below them, and any free width and depth.

The published sizes and every default follow El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image
Models" (arXiv 2401.08541), section 3 and Table 1. Torch is not imported here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from aimscale.aim.errors import UserError, did_you_mean

HeadRule = Literal["released", "proportional", "none"]
HeadKind = Literal["mlp", "transformer"]
PatchOrder = Literal["raster", "outward_spiral", "inward_spiral", "checkerboard", "hashed"]
QkvInit = Literal["fused", "separate"]
Target = Literal["normalised", "raw"]
Parametrisation = Literal["standard", "mup"]

RELEASED_SIZES: dict[str, tuple[int, int, int]] = {
    "aim-600M": (1536, 24, 12),
    "aim-1B": (2048, 24, 16),
    "aim-3B": (3072, 24, 24),
    "aim-7B": (4096, 32, 32),
}
"""Name -> (width, depth, number of attention heads)."""

RUNG_WIDTHS = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Widths of the named rungs below aim-600M."""

LARGEST = {
    **{"width": 2**17, "depth": 2**12, "image_size": 2**16, "channels": 2**10},
    **{"head.width": 2**17, "head.depth": 2**12},
}
"""Upper bounds of `ModelConfig` fields: far beyond any model, yet small enough that no number overflows."""

MLP_RATIO = 4
"""Channels inside an MLP over those of its block."""

RELEASED_HEAD_WIDTH, RELEASED_HEAD_DEPTH = 2048, 12
"""The pixel head of every published size (paper, section 3.2)."""


class ModelConfigError(UserError):
    """Model that does not exist or whose parts do not divide."""


@dataclass(frozen=True, kw_only=True)
class PixelHeadConfig:
    """Shape of the pixel head, which maps trunk tokens to the pixels of patches."""

    width: int
    """Channels of the blocks; with `is_linear`, unused and equal to the trunk's width."""
    depth: int
    """Number of blocks: residual MLPs, or with `num_heads` transformer blocks like the trunk's."""
    num_heads: int | None = None
    """Attention heads of a transformer head (Table 5): the widest that divide its width and the trunk's heads."""
    ln_residual: bool = False
    """Whether each block first adds LayerNorm(x), as the authors' trainer does in place of attention."""
    is_linear: bool = False
    """Whether one linear layer on the trunk's last norm is all there is (the paper's "None" head, Table 5)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that defines the shape and the objective of one AIM."""

    name: str
    """The size's name, e.g. `aim-600M` or `rung-64`."""
    image_size: int
    """Side of the square input, pixels."""
    patch_size: int
    """Side of a square patch, pixels."""
    channels: int
    width: int
    """d: channels of the trunk's residual stream."""
    depth: int
    """L: number of transformer blocks."""
    num_heads: int
    head: PixelHeadConfig
    patch_order: PatchOrder = "raster"
    """Order in which patches are read and predicted."""
    target: Target = "normalised"
    """`normalised`: pixels standardised per patch; `raw`: pixels as given."""
    masked: float | None = None
    """Share of the patches that a masked model predicts behind mask tokens; None: autoregressive."""
    parametrisation: Parametrisation = "standard"
    """`standard`, or `mup`: learning rates and scales that follow the width."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm: 1e-6 in the authors' released inference code, 1e-5 in their trainer."""
    qk_norm: bool = False
    """Whether each attention head normalises its queries and keys by LayerNorms; no released AIM does."""
    qkv_init: QkvInit = "fused"
    """Xavier bounds of query, key and value: of one (3 d, d) matrix, or of three (d, d), sqrt(2) times as wide."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N: patches of an image."""
        return self.grid**2

    @property
    def num_masked(self) -> int:
        """Patches of an image that a masked model predicts, one at least and not all; 0 if autoregressive."""
        return 0 if self.masked is None else min(max(1, round(self.masked * self.num_tokens)), self.num_tokens - 1)

    @property
    def patch_dim(self) -> int:
        """o: values of one patch."""
        return self.channels * self.patch_size**2

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    def __post_init__(self) -> None:
        _check_choices(get_type_hints(ModelConfig), vars(self))
        for part, most in LARGEST.items():
            if (value := operator.attrgetter(part)(self)) > most:
                raise ModelConfigError(f"{self.name}: {part} {value} is more than {most}, the most that is planned for")
        if self.image_size % self.patch_size:
            near = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ModelConfigError(
                f"an image of {self.image_size} px does not divide into patches of {self.patch_size} px; "
                f"use image_size {near} or another patch_size"
            )
        if self.num_tokens < 2:
            raise ModelConfigError(
                f"an image of {self.image_size} px holds one patch of {self.patch_size} px, and nothing is left to "
                f"predict; use a smaller patch_size"
            )
        if self.width % self.num_heads:
            raise ModelConfigError(f"{self.name}: width {self.width} does not divide into {self.num_heads} heads")
        for part, width in (("width", self.width), ("head width", self.head.width)):
            if width < 4 or width % 4:
                raise ModelConfigError(
                    f"{self.name}: {part} {width} must be a multiple of 4, which the 2-D sin-cos positions need"
                )
        if self.masked is not None and not 0 < self.masked < 1:
            raise ModelConfigError(f"{self.name}: masked is a share of the patches between 0 and 1, not {self.masked}")
        if self.target == "normalised" and self.patch_dim < 2:
            raise ModelConfigError(
                f"{self.name}: a patch of one value cannot be normalised; use a larger patch_size or target 'raw'"
            )


def model_config(
    size: str,
    *,
    image_size: int = 224,
    patch_size: int = 14,
    channels: int = 3,
    head_rule: HeadRule = "proportional",
    head_width: int | None = None,
    head_depth: int | None = None,
    head_kind: HeadKind = "mlp",
    ln_residual: bool = False,
    **variant: Any,
) -> ModelConfig:
    """Look a size up and attach its pixel head.

    `size` is `aim-600M`, `aim-1B`, `aim-3B`, `aim-7B`, a rung `rung-<width>` of the ladder, or `w<width>-d<depth>`,
    with `-h<heads>` for another number of attention heads than the ladder's.
    `head_rule` gives the pixel head, whose width and depth can be overridden:

    - `released`: 12 blocks of width 2048, as in all published sizes;
    - `proportional`: width 4/3 d (nearest multiple of 16) and half of the trunk's blocks, which is aim-600M's own
      ratio, so that every size spends the same share of its FLOPs on the head;
    - `none`: one linear layer.

    `head_kind` is the kind of its blocks. `variant` holds fields of `ModelConfig` that have a default there.

    Raises:
        ModelConfigError: an unknown size or option (names the nearest known one), or parts that do not divide.
    """
    _check_choices(get_type_hints(model_config), {"head_rule": head_rule, "head_kind": head_kind})
    width, depth, num_heads = _shape(size)
    return ModelConfig(
        name=size,
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        width=width,
        depth=depth,
        num_heads=num_heads,
        head=_pixel_head(
            (width, depth, num_heads), head_rule, head_width, head_depth, ln_residual=ln_residual, kind=head_kind
        ),
        **variant,
    )


def _check_choices(hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ModelConfigError if a value is none of those that its annotation lists."""
    for name, value in values.items():
        if get_origin(hints[name]) is Literal and value not in (choices := get_args(hints[name])):
            raise ModelConfigError(f"unknown {name} '{value}'; {did_you_mean(value, choices, 'use')}")


def known_sizes() -> tuple[str, ...]:
    """Return the named sizes, smallest first."""
    return (*(f"rung-{width}" for width in RUNG_WIDTHS), *RELEASED_SIZES)


def _shape(size: str) -> tuple[int, int, int]:
    """Parse the name of a size into (width, depth, number of heads)."""
    if size in RELEASED_SIZES:
        return RELEASED_SIZES[size]
    if size in known_sizes():
        width = int(size.removeprefix("rung-"))
        return width, _rung_depth(width), width // _head_dim(width)
    free = re.fullmatch(r"w([1-9]\d*)-d([1-9]\d*)(?:-h([1-9]\d*))?", size)
    if free:
        width, depth = int(free[1]), int(free[2])
        return width, depth, int(free[3]) if free[3] else width // _head_dim(width)
    wanted = re.fullmatch(r"rung-(\d+)", size)
    nearest = sorted(RUNG_WIDTHS, key=lambda width: abs(width - int(wanted[1])))[:2] if wanted else ()
    near = " or ".join(f"'rung-{width}'" for width in sorted(nearest))
    hint = f"did you mean {near}?" if near else did_you_mean(size, known_sizes()[::-1], "known sizes:")
    raise ModelConfigError(
        f"unknown size '{size}'; {hint} (any other shape is w<width>-d<depth> or w<width>-d<depth>-h<heads>)"
    )


def size_of(width: int, depth: int, num_heads: int) -> str:
    """Return the name of a shape: a named size, or `w<width>-d<depth>`, with `-h<heads>` if not the ladder's."""
    free = f"w{width}-d{depth}"
    names = (*known_sizes(), free, f"{free}-h{num_heads}")
    return next(name for name in names if _shape(name) == (width, depth, num_heads))


def _rung_depth(width: int) -> int:
    """Return the even number nearest to 24 sqrt(d / 1536): below aim-600M, depth shrinks as the root of the width."""
    return max(2, 2 * round(12 * math.sqrt(width / RELEASED_SIZES["aim-600M"][0])))


def _head_dim(width: int) -> int:
    """Return the largest power of two up to 64 that gives two heads or more; the width itself if there is none."""
    fits = [dim for dim in (64, 32, 16, 8, 4, 2) if width % dim == 0 and width // dim >= 2]
    return fits[0] if fits else width


def _pixel_head(
    trunk: tuple[int, int, int],
    rule: HeadRule,
    head_width: int | None,
    head_depth: int | None,
    *,
    ln_residual: bool,
    kind: HeadKind,
) -> PixelHeadConfig:
    width, depth, num_heads = trunk
    if rule == "none":
        if head_width is not None or head_depth is not None or ln_residual or kind != "mlp":
            raise ModelConfigError(
                "head_rule 'none' is one linear layer; leave head_width, head_depth, head_kind and ln_residual out"
            )
        return PixelHeadConfig(width=width, depth=0, is_linear=True)
    if rule == "released":
        rule_width, rule_depth = RELEASED_HEAD_WIDTH, RELEASED_HEAD_DEPTH
    else:
        rule_width, rule_depth = 16 * max(1, round(width / 12)), max(1, depth // 2)
    chosen_width = rule_width if head_width is None else head_width
    chosen_depth = rule_depth if head_depth is None else head_depth
    if kind == "mlp":
        return PixelHeadConfig(width=chosen_width, depth=chosen_depth, ln_residual=ln_residual)
    if ln_residual or not chosen_depth:
        raise ModelConfigError("a transformer head needs a block and has no ln_residual, which is of MLP heads alone")
    # Assumption (the paper does not say): heads as wide as the trunk's where they divide the width.
    head_dim = math.gcd(chosen_width, width // num_heads)
    return PixelHeadConfig(width=chosen_width, depth=chosen_depth, num_heads=chosen_width // head_dim)
