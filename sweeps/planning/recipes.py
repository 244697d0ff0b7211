"""Recipes: rules for batch size, learning rate, schedule and device count, given model size and budget.

A sweep names one that is built in (`presets/recipes`) or a file, or holds the keys itself:

    summary: small models on our photographs
    like: small                     # its keys stand where this recipe has none
    lr_peak:                        # .0021 (width / 64)^-.75 (D / 64k)^-.3, and at least .0001
      {coefficient: 0.0021, width: -0.75, D: -0.3, at: {width: 64, D: 64k}, min: 0.0001, source: aimscale rates t.csv}
    batch_size: {coefficient: 0.25, D: 0.5, min: 16, source: an assumption}
    warmup_images: {coefficient: 0.1, D: 1, source: a tenth of the smallest budget}
    weight_decay: {coefficient: 0.05, source: "AIM, Table 9"}
    devices: {0: 8, 2B: 32}         # 8 ranks, and above 2B parameters 32; or one number
    base: {schedule: {kind: wsd}}   # fields that are the same at every size, instead of a law's, too
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from aimscale.aim.errors import did_you_mean
from aimscale.harness.run.config import DataSection, ModelSection, ObjectiveSection, OptimiserSection, ScheduleSection
from aimscale.harness.run.section import (
    ConfigError,
    Count,
    Fields,
    Section,
    count,
    merge,
    parse,
    read_yaml,
    refuse_unknown,
)

DIRECTORY = Path(__file__).parent / "presets" / "recipes"
SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "data": DataSection,
    "objective": ObjectiveSection,
    "optimiser": OptimiserSection,
    "schedule": ScheduleSection,
}
"""Sections of `training` that a recipe's `base` may set."""
Exponent = Annotated[float, Field(ge=-4, le=4)]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Inputs of a recipe."""

    width: int
    """Width d of the backbone."""
    params_total: int
    """Parameters N, pixel head included."""
    budget: int
    """Budget D in images: under cosine the run's own; under wsd, where a run serves several, the smallest."""


class ReferenceScale(Section):
    """Scale at which a power law has the value of its coefficient."""

    width: Count = 1
    """Width of the backbone."""
    N: Count = 1
    """Parameters, pixel head included."""
    D: Count = 1
    """Images seen."""


class PowerLaw(Section):
    """Power law of the model's size and its data: coefficient (width/at.width)^width (N/at.N)^N (D/at.D)^D."""

    coefficient: float = Field(ge=1e-99, le=1e99)
    """Value at the scale `at`."""
    width: Exponent = 0.0
    """Exponent of the backbone's width."""
    N: Exponent = 0.0
    """Exponent of the parameters, pixel head included."""
    D: Exponent = 0.0
    """Exponent of the images seen: a run's smallest budget, so that a larger one never trains again."""
    at: ReferenceScale = ReferenceScale()
    """Scale at which the law has the value of its coefficient."""
    tuned_for: Count | None = None
    """D to take instead of the smallest budget, for a rate that suits the larger ones."""
    min: float | None = Field(None, gt=0)
    """Lowest value."""
    max: float | None = Field(None, gt=0)
    """Highest value."""
    source: str = Field(min_length=1)
    """Where the numbers come from, or that they are an assumption."""

    def __call__(self, scale: Scale) -> float:
        """Return the value at a scale."""
        powers = (scale.width / self.at.width) ** self.width * (scale.params_total / self.at.N) ** self.N
        value = self.coefficient * powers * ((self.tuned_for or scale.budget) / self.at.D) ** self.D
        return min(max(value, self.min or 0.0), self.max or math.inf)


class Recipe(Section):
    """Rule to train a model of any size."""

    name: str = "of its own"
    """Name; a file's own is that of the file."""
    summary: str = ""
    """Description in one line."""
    like: str | None = None
    """Recipe whose keys stand where this one has none; `base` adds to its `base`."""
    lr_peak: PowerLaw
    """Learning rate after warm-up, rounded to two digits."""
    batch_size: PowerLaw
    """Images per step, rounded to a power of two."""
    warmup_images: PowerLaw
    """Images of warm-up."""
    weight_decay: PowerLaw | None = None
    """Decoupled decay of matrices, rounded to two digits; null leaves the default."""
    devices: Count | Annotated[dict[Annotated[int, BeforeValidator(count)], Count], Field(min_length=1)] = 1
    """Data-parallel ranks: one number, or number of parameters above which -> number of ranks."""
    base: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Fields of training that are the same at every size, also in place of a law's."""

    @model_validator(mode="before")
    @classmethod
    def _with_keys_of_another(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("like") is None:
            return values
        start = get_recipe(str(values["like"])).model_dump(exclude_unset=True, exclude={"name", "summary"})
        base = values.get("base", {})
        return {**start, **values, "base": merge(start["base"], base) if isinstance(base, dict) else base}

    def fields(self, scale: Scale) -> Fields:
        """Return the fields of training that the recipe sets, and `devices`."""
        batch_size = max(1, 2 ** round(math.log2(self.batch_size(scale))))
        optimiser = {"batch_size": batch_size, "lr_peak": _two_digits(self.lr_peak(scale))}
        if self.weight_decay is not None:
            optimiser["weight_decay"] = _two_digits(self.weight_decay(scale))
        schedule = {"warmup_images": int(self.warmup_images(scale))}
        scaled = {"optimiser": optimiser, "schedule": schedule, "devices": self._num_devices(scale.params_total)}
        return merge(scaled, self.base)

    def _num_devices(self, params_total: int) -> int:
        if isinstance(self.devices, int):
            return self.devices
        return self.devices[max((size for size in self.devices if size < params_total), default=min(self.devices))]


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


def recipe_names() -> list[str]:
    """Return the names of the recipes that are built in."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


@functools.cache
def get_recipe(name: str) -> Recipe:
    """Return a built-in recipe."""
    if name not in recipe_names():
        hint = did_you_mean(name, recipe_names(), "known recipes:")
        raise ConfigError(f"unknown recipe '{name}' (a file's name ends in .yaml); {hint}")
    return read_recipe(DIRECTORY / f"{name}.yaml")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe's file."""
    values = read_yaml(path)
    return parse_recipe({"name": path.stem, **values} if isinstance(values, dict) else values, str(path))


def parse_recipe(values: Any, where: str) -> Recipe:
    """Validate the keys of a recipe."""
    recipe = parse(Recipe, values, where)
    refuse_unknown(recipe.base, SECTIONS, f"{where}: base")
    for section, fields in recipe.base.items():
        refuse_unknown(fields, SECTIONS[section].model_fields, f"{where}: base.{section}")
    return recipe
