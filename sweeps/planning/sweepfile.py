"""The sweep file: a whole experiment as one strict YAML document.

    name: width-and-data
    recipe: small                       # how batch, rate, schedule and devices follow from size; or my-recipe.yaml
    sizes: [rung-32, rung-64, rung-128]
    budgets: [4k, 8k, 16k]              # images seen; counts may be written 4k, 500M, 2B, 1e6
    unique_images: [1k, null]           # null: the whole pool
    seeds: [0, 1]
    axes: {model.head_rule: [proportional, none]}       # crossed with everything above
    variants: {base: {}, causal: {objective.prefix: none}}   # or whole settings side by side, under names
    base:                               # fields shared by all runs: `training`'s, `evaluation`'s, `runtime`
      data: {sources: [{path: data/train}]}
      validation: {path: data/validation}
    exclude: [{size: rung-128, unique_images: 1k}]
    override: [{when: {size: rung-128}, set: {optimiser.lr_peak: 0.0005}}]
    tune: {lr_multiplier: [0.5, 2, 4], at: {size: [rung-32, rung-64], budget: [4k, 16k]}}     # further, small runs

Relative paths are relative to the file; those of a preset, to the sweep root. A file may start from a preset:

    preset: ablation-orders             # keys that stand here replace the preset's, but `base` adds to its `base`
    sizes: [rung-64]
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from aimscale.aim.errors import UserError, did_you_mean
from aimscale.harness.run.config import Section, parse, read_yaml
from aimscale.harness.run.files import read_object
from aimscale.harness.run.section import Count, Fields, merge
from aimscale.sweeps.planning import DEFAULT_ROOT
from aimscale.sweeps.planning.recipes import Recipe, get_recipe, parse_recipe, read_recipe
from aimscale.sweeps.planning.sections import CostSection, IsoflopSection, OverrideSection, SlurmSection, TuneSection
from aimscale.sweeps.planning.trainer import TrainerSection

Place = Literal["local", "slurm"]
"""Where runs are executed: by the process that launches, or as Slurm jobs."""
PRESETS = Path(__file__).parent / "presets"
SWEEP_FILE = "sweep.yaml"
SWEEP_RECORD = "sweep.json"


class SweepError(UserError):
    """Sweep that cannot be planned, launched or read as written."""


def _check_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise ValueError(f"'{text}' names a folder: use letters, digits and . _ - alone, such as my-sweep")
    return text


class SweepFile(Section):
    """One experiment."""

    preset: str | None = None
    """Name of a preset that supplies the keys missing here; `base` is merged into the preset's. A launch stores the
    merged file."""
    name: Annotated[str, AfterValidator(_check_name)]
    """Name of the sweep and of its directory."""
    description: str = ""
    """Purpose of the sweep, one line."""
    recipe: str | Recipe = "small"
    """Rule by which batch, rate, schedule and devices follow from size and budget: `small`, `aim-paper`, `aim-l3m`, a
    file, or its keys. A launch stores the keys of a file."""
    trainer: TrainerSection | None = None
    """Command that trains the runs, in place of aimscale's own trainer. `sizes` are then sizes of this section, and
    `base`, `axes`, `variants` and `override` set its values."""
    sizes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Model sizes."""
    budgets: tuple[Count, ...] = ()
    """D: images seen, rounded to whole batches. One run serves all budgets (wsd), or each budget has its own run
    (cosine)."""
    unique_images: Annotated[tuple[Count | None, ...], Field(min_length=1)] = (None,)
    """U: number of different images in the stream; null for the whole pool."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Seeds of weights and stream."""
    axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted training or evaluation field -> values; `lr_multiplier` multiplies the recipe's learning rate."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name -> fields that this variant changes, as in `base`: one-at-a-time ablations, crossed with the axes above."""
    isoflop: IsoflopSection | None = None
    """Budgets of compute, instead of `budgets`."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Fields of every run: those of training and evaluation, `runtime`, `devices` (ranks, instead of the recipe's) and
    `lr_multiplier` (factor of the recipe's learning rate)."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Cells to leave out: axis -> value or list of values."""
    override: tuple[OverrideSection, ...] = ()
    """Changes of the cells that match."""
    tune: TuneSection | None = None
    """Runs at other learning rates beside the grid."""
    cost: CostSection = CostSection()
    """Assumptions of the plan."""
    slurm: SlurmSection = SlurmSection()
    """Resources of Slurm jobs; a file that has this section is launched on Slurm."""

    @field_validator("sizes", "budgets", "unique_images", "seeds")
    @classmethod
    def _check_distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("a value is listed twice")
        return values

    @model_validator(mode="after")
    def _check_axes(self) -> SweepFile:
        if bool(self.budgets) == bool(self.isoflop):
            raise ValueError("give either `budgets` or `isoflop`")
        axes = [*AXES, *self.axes, *(["variant"] if self.variants else [])]
        tuned = (self.tune.at, self.tune.axes) if self.tune else ({}, {})
        for key in [key for cells in (*self.exclude, *(o.when for o in self.override), tuned[0]) for key in cells]:
            if key not in axes:
                raise ValueError(f"'{key}' is no axis of this sweep; {did_you_mean(key, axes, 'the axes are')}")
        for key in self.axes:
            if written := {**AXIS_KEYS, "variant": "variants"}.get(key):
                raise ValueError(f"axis '{key}' is written as `{written}`")
            if key in tuned[1]:
                raise ValueError(f"both `tune` and `axes` vary {key}; keep one of them")
        return self

    @model_validator(mode="after")
    def _check_trainer(self) -> SweepFile:
        if self.trainer is None:
            return self
        for key in ("recipe", "unique_images", "isoflop", "tune"):
            if key in self.model_fields_set:
                raise ValueError(f"`{key}` is for aimscale's own trainer; leave it out beside `trainer`")
        for size in self.sizes:
            if size not in self.trainer.sizes:
                hint = did_you_mean(size, self.trainer.sizes, "they are")
                raise ValueError(f"size '{size}' is none of trainer.sizes; {hint}")
        return self


AXES = ("size", "budget", "unique_images", "seed")
AXIS_KEYS = {"model.size": "sizes", "budgets": "budgets", "data.unique_images": "unique_images", "seed": "seeds"}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Sweep file with the directories that it refers to."""

    file: SweepFile
    """Parsed content of the sweep file."""
    text: str
    """YAML text, copied into the sweep's directory."""
    source: Path
    """Path from which it was read."""
    base_dir: Path
    """Directory to which its relative paths refer."""
    root: Path
    """Directory that holds the sweep directories."""
    place: Place | None = None
    """Where its runs are executed; None for what the file says."""

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return self.file.name

    @property
    def recipe(self) -> Recipe:
        """Rule by which batch, rate, schedule and devices follow from size and budget."""
        recipe = self.file.recipe
        return get_recipe(recipe) if isinstance(recipe, str) else recipe

    @property
    def unit(self) -> str:
        """What D counts."""
        return self.file.trainer.unit if self.file.trainer else "images"

    @property
    def directory(self) -> Path:
        """Directory of the sweep, `<root>/<name>`."""
        return self.root / self.file.name

    @property
    def runs_dir(self) -> Path:
        """Directory that holds the run directories."""
        return self.directory / "runs"

    @property
    def is_for_slurm(self) -> bool:
        """Whether its runs are Slurm jobs: if the file has a `slurm` section, unless `place` says otherwise."""
        return self.place == "slurm" or (self.place is None and "slurm" in self.file.model_fields_set)

    def with_target(self, place: Place | None) -> Sweep:
        """Return the sweep with its runs at another place; None leaves it to the file."""
        if place == "slurm" and "slurm" not in self.file.model_fields_set:
            raise SweepError(f"{self.source} does not say what jobs request; add `slurm: {{}}` for the defaults")
        return replace(self, place=place)

    def run_dir(self, run_id: str) -> Path:
        """Return the directory of a run."""
        return self.runs_dir / run_id

    def relative_path(self, path: str) -> str:
        """Return a data path as `sweep.json` stores it: relative to `base_dir`; a URL stays as it is."""
        return path if "://" in path else os.path.relpath(path, self.base_dir)

    @functools.cached_property
    def known_fingerprints(self) -> dict[str, str]:
        """Data path (as returned by `relative_path`) -> fingerprint of its content at the last launch."""
        with contextlib.suppress(UserError):
            return dict((read_record(self.directory) or {}).get("data", {}))
        return {}

    def with_fields(self, **fields: Any) -> Sweep:
        """Return a copy of the sweep with top-level fields of its file replaced and validated."""
        values = {**self.file.model_dump(mode="json", exclude_unset=True), **fields}
        return replace(self, file=parse(SweepFile, values, str(self.source)))


def preset_names() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_sweep(name: str | Path, root: str | Path = DEFAULT_ROOT) -> Sweep:
    """Read a sweep by file, by sweep directory, by the name of one launched under `root`, or by that of a preset.

    Args:
        name: path of a YAML file or of a sweep directory, or a name.
        root: folder that holds the sweep directories.

    Returns:
        The checked file with its directories; nothing is planned yet.

    Raises:
        SweepError: nothing of that name; a sweep directory that was moved.
        ConfigError: the file does not validate.

    Example:
        >>> sweep = load_sweep("mysweep.yaml")
        >>> sweep.file.budgets, sweep.directory
    """
    root, path = Path(os.path.abspath(root)), Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.exists() and (files := [str(each) for each in path.parent.glob("*.yaml")]):
            raise SweepError(f"there is no file {path}; {did_you_mean(str(path), files, 'there are')}")
        return _read(path, base_dir=Path(os.path.abspath(path)).parent, root=root)
    if (path / SWEEP_FILE).is_file():
        return _read_directory(Path(os.path.abspath(path)))
    if (root / path / SWEEP_FILE).is_file():
        return _read_directory(root / path)
    if str(name) in preset_names():
        return _read(PRESETS / f"{name}.yaml", base_dir=root, root=root)
    names = [each.parent.name for each in root.glob(f"*/{SWEEP_FILE}")]
    hint = did_you_mean(str(name), [*names, *preset_names()], "there are")
    raise SweepError(f"no sweep '{name}': it is no YAML file, no preset and no sweep under {root}; {hint}")


def _read(path: Path, *, base_dir: Path, root: Path) -> Sweep:
    values, text = read_yaml(path), path.read_text()
    if isinstance(values, dict) and values.get("preset") is not None:
        values = _merge_preset(values, path)
        text = yaml.safe_dump(values, sort_keys=False)
    recipe = values.get("recipe", "") if isinstance(values, dict) else ""
    if isinstance(recipe, str) and recipe.endswith((".yaml", ".yml")):
        values["recipe"] = read_recipe(base_dir / recipe).model_dump(mode="json", exclude_unset=True)
        text = yaml.safe_dump(values, sort_keys=False)
    elif not isinstance(recipe, str):
        values["recipe"] = parse_recipe(recipe, f"{path}: recipe")
    return Sweep(file=parse(SweepFile, values, str(path)), text=text, source=path, base_dir=base_dir, root=root)


def _merge_preset(values: Fields, where: Path) -> Fields:
    """Merge the keys of a file into those of the preset that it names, recursively."""
    if (name := values.get("preset")) is None:
        return values
    if name not in preset_names():
        raise SweepError(f"{where}: no preset '{name}'; {did_you_mean(str(name), preset_names(), 'presets:')}")
    path = PRESETS / f"{name}.yaml"
    start = _merge_preset(read_yaml(path), path)
    whole = {**start, **{key: value for key, value in values.items() if key != "preset"}}
    if isinstance(base := values.get("base"), dict):
        whole["base"] = merge(start.get("base", {}), base)
    return whole


def _read_directory(directory: Path) -> Sweep:
    record = read_record(directory)
    if record is None:
        raise SweepError(f"{directory} has a {SWEEP_FILE} but no {SWEEP_RECORD}; name the original sweep file instead")
    return _read(directory / SWEEP_FILE, base_dir=Path(record["base_dir"]), root=directory.parent)


def read_record(directory: Path) -> dict[str, Any] | None:
    """Read `sweep.json` of a sweep directory; None if there is none."""
    path = directory / SWEEP_RECORD
    if (record := read_object(path)) is None:
        return None
    data = record.get("data", {})
    texts = [record.get("base_dir"), *data, *data.values()] if isinstance(data, dict) else [None]
    if record.get("version") != 1 or not all(isinstance(text, str) for text in texts):
        raise SweepError(f"{path} is damaged or of another version; restore it, or launch into another --root")
    return record
