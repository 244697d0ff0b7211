"""Recipes: how batch, learning rate, schedule and device count follow from size and budget.

A sweep names one recipe; its `base`, axes and overrides replace single fields. A number without a source is marked
as an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from aimscale.aim.errors import did_you_mean
from aimscale.sweeps.plan.sweepfile import Fields, SweepError, merge


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a recipe may depend on."""

    width: int
    """d of the backbone."""
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
    scaled_fields: Callable[[Scale], Fields]
    """Fields that follow from size and budget."""
    fixed_fields: Fields = field(default_factory=dict)
    """Fields that are the same at every size."""

    def fields(self, scale: Scale) -> Fields:
        """The recipe's part of a run's training fields, with `runtime` and `devices` beside them."""
        fixed = {"optimiser": {"precision": self.precision}, "schedule": {"kind": self.schedule}}
        return merge(merge(self.fixed_fields, fixed), self.scaled_fields(scale))


def _paper_fields(scale: Scale) -> Fields:
    return {
        "optimiser": {"batch_size": 4096, "lr_peak": 1e-3},
        # 31,250 of 1.25M iterations. Assumption: the same share of shorter budgets.
        "schedule": {"warmup_images": scale.budget // 40},
        # Assumption (the paper does not say): one node up to 1B, then enough GPUs for weeks, not months.
        "devices": 64 if scale.params_total > 4e9 else 32 if scale.params_total > 2e9 else 8,
    }


PAPER = Recipe(
    name="aim-paper",
    summary="AIM, Table 9: batch 4096, learning rate 1e-3 at every size, cosine after 2.5 % of warm-up, bf16",
    schedule="cosine",
    precision="bf16",
    scaled_fields=_paper_fields,
)

L3M = replace(
    PAPER,
    name="aim-l3m",
    summary="AIM as the authors' trainer (ml-l3m, configs/aimv1) sets it, where that differs from the paper's text",
    fixed_fields={
        "model": {"head_rule": "released", "ln_residual": True, "norm_eps": 1e-5, "qkv_init": "separate"},
        "data": {"crop_scale": [0.4, 1.0], "horizontal_flip": True, "color_jitter": True},
        "objective": {"target": "normalised", "prefix": "uniform"},
        "optimiser": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.05, "clip_norm": 1.0},
        "schedule": {"lr_start": 1e-6, "lr_end": 0.0},
    },
)


def _small_fields(scale: Scale) -> Fields:
    """Measured on the demo's data: at 6144 images seen, a batch of 16 beats 32 beats 64; at batch 32 the rate is near
    the best of those tried at d = 24, 64 and 128. The square root, and all beyond that, is an assumption."""
    batch_size = max(16, int(64 * 2.0 ** round(math.log2(scale.budget / 64_000) / 2)))
    return {
        "optimiser": {"batch_size": batch_size, "lr_peak": float(f"{2e-3 * (64 / scale.width) ** 0.75:.1e}")},
        # Assumption: a tenth of the smallest budget, so that its stable phase exists.
        "schedule": {"warmup_images": scale.budget // 10},
        "devices": 1,
    }


SMALL = Recipe(
    name="small",
    summary="small models on one device each: batch 16 and up, rate falling with width, warm-up-stable-decay, fp32",
    schedule="wsd",
    precision="fp32",
    scaled_fields=_small_fields,
)

RECIPES = {recipe.name: recipe for recipe in (PAPER, L3M, SMALL)}


def get_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        SweepError: unknown; names the nearest.
    """
    if name not in RECIPES:
        raise SweepError(f"unknown recipe '{name}'; {did_you_mean(name, RECIPES, 'known recipes:')}")
    return RECIPES[name]
