"""Recipes: how batch, learning rate, schedule, ZeRO stage and device count follow from size and budget.

A sweep names one recipe; its `base`, axes and overrides replace single fields. A number without a source is marked
as an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from aimscale.aim.errors import did_you_mean
from aimscale.sweeps.plan.sweepfile import SweepError


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a recipe may depend on."""

    width: int
    """d of the trunk."""
    params_total: int
    """N with the pixel head."""
    budget: int
    """D that batch and warm-up are fitted to, images: a run's own under cosine; under wsd, where later budgets extend a
    run, its smallest."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named way to train any size."""

    name: str
    """As the sweep file writes it."""
    summary: str
    """One line for the reader."""
    schedule: Literal["wsd", "cosine"]
    precision: Literal["fp32", "bf16"]
    """Of parameters and activations."""
    batch_size: Callable[[Scale], int]
    """Images per optimiser step; even, because prefixes come in pairs."""
    lr_peak: Callable[[Scale], float]
    warmup_images: Callable[[Scale], int]
    zero_stage: Callable[[Scale], Literal[0, 1, 2, 3] | Literal["auto"]]
    devices: Callable[[Scale], int]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Section -> fields that are the same at every size."""

    def fields(self, scale: Scale) -> dict[str, Any]:
        """The recipe's part of a run's training fields, with `runtime` beside them."""
        by_size: dict[str, dict[str, Any]] = {
            "optimiser": {
                "batch_size": self.batch_size(scale),
                "lr_peak": self.lr_peak(scale),
                "precision": self.precision,
            },
            "schedule": {"kind": self.schedule, "warmup_images": self.warmup_images(scale)},
            "runtime": {"zero_stage": self.zero_stage(scale)},
        }
        return {name: {**self.settings.get(name, {}), **by_size.get(name, {})} for name in {**by_size, **self.settings}}


def _paper_devices(scale: Scale) -> int:
    """Assumption (the paper does not say): one node up to 1B, then enough cards for weeks, not months."""
    return 8 if scale.params_total < 2e9 else 32 if scale.params_total < 4e9 else 64


PAPER = Recipe(
    name="aim-paper",
    summary="AIM, Table 9: batch 4096, learning rate 1e-3 at every size, cosine after 2.5 % of warm-up, bf16",
    schedule="cosine",
    precision="bf16",
    batch_size=lambda scale: 4096,
    lr_peak=lambda scale: 1e-3,
    # 31,250 of 1.25M iterations. Assumption: the same share of shorter budgets.
    warmup_images=lambda scale: scale.budget // 40,
    # bytes per parameter at W = 8: stage 1 fits 80 GB up to 3B, at 7B stage 2 takes 27 GB where stage 1 takes 51-65
    zero_stage=lambda scale: 2 if scale.params_total > 4e9 else 1,
    devices=_paper_devices,
)


L3M = replace(
    PAPER,
    name="aim-l3m",
    summary="AIM as the authors' trainer (ml-l3m, configs/aimv1) sets it, where that differs from the paper's text",
    settings={
        "model": {"head_rule": "released", "ln_residual": True, "norm_eps": 1e-5, "qkv_init": "separate"},
        "data": {"crop_scale": [0.4, 1.0], "horizontal_flip": True, "color_jitter": True},
        "objective": {"target": "normalised", "prefix": "uniform"},
        "optimiser": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.05, "clip_norm": 1.0},
        "schedule": {"lr_start": 1e-6, "lr_end": 0.0},
    },
)


def _small_batch(scale: Scale) -> int:
    """64 images at 64k images seen, then with the square root of the smallest budget, in powers of two from 16.

    Measured on the demo's data: at 6144 images seen 16 beats 32 beats 64. The square root is an assumption.
    """
    return max(16, int(64 * 2.0 ** round(math.log2(scale.budget / 64_000) / 2)))


def _small_lr(scale: Scale) -> float:
    """2e-3 (64 / d)^0.75, two digits kept: near the best of the rates tried at d = 24, 64 and 128.

    Measured on the demo's data at batch 32 and D = 6144; beyond that an assumption.
    """
    return float(f"{2e-3 * (64 / scale.width) ** 0.75:.1e}")


SMALL = Recipe(
    name="small",
    summary="small models on one device each: batch 16 and up, rate falling with width, warm-up-stable-decay, fp32",
    schedule="wsd",
    precision="fp32",
    batch_size=_small_batch,
    lr_peak=_small_lr,
    # Assumption: a tenth of the smallest budget, so that its stable phase exists.
    warmup_images=lambda scale: scale.budget // 10,
    zero_stage=lambda scale: "auto",  # aimscale.harness.device.memory's rule
    devices=lambda scale: 1,
)

RECIPES = {recipe.name: recipe for recipe in (PAPER, L3M, SMALL)}


def recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        SweepError: unknown; names the nearest.
    """
    if name not in RECIPES:
        raise SweepError(f"unknown recipe '{name}'; {did_you_mean(name, RECIPES, 'known recipes:')}")
    return RECIPES[name]
