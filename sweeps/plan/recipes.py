"""Recipes: rules for batch size, learning rate, schedule and device count, given model size and budget.

A sweep names one recipe; its `base`, axes and overrides replace single fields. A number without a source is marked as
an assumption.
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
    """Inputs of a recipe."""

    width: int
    """Width d of the backbone."""
    params_total: int
    """Parameters N, pixel head included."""
    budget: int
    """Budget D in images from which batch and warm-up follow: under cosine the run's own; under wsd, where a run serves
    several budgets, the smallest."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Named rule to train a model of any size."""

    name: str
    """Name in the sweep file."""
    summary: str
    """Description in one line."""
    schedule: Literal["wsd", "cosine"]
    precision: Literal["fp32", "bf16"]
    """Precision of parameters and activations."""
    scaled_fields: Callable[[Scale], Fields]
    """Function from size and budget to the fields that depend on them."""
    fixed_fields: Fields = field(default_factory=dict)
    """Fields that are the same at every size."""

    def fields(self, scale: Scale) -> Fields:
        """Return the training fields that the recipe sets, `runtime` and `devices` included."""
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
    """Return the fields of recipe `small`.

    Measured on the demo's data: at 6144 images seen, batch 16 is better than 32, and 32 than 64; at batch 32 the
        learning
    rate is near the best of those tried at d = 24, 64 and 128. The square root, and values beyond that range, are
    assumptions.
    """
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
    """Return a recipe by name.

    Raises:
        SweepError: there is no such recipe; the message names the nearest.
    """
    if name not in RECIPES:
        raise SweepError(f"unknown recipe '{name}'; {did_you_mean(name, RECIPES, 'known recipes:')}")
    return RECIPES[name]
