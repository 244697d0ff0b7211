"""The planner: expands a sweep into runs, each with one configuration and one id.

Runs are all combinations of the axes that are not excluded. A warm-up-stable-decay run serves all budgets of its cell;
with cosine each budget is a run. Nothing is written.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from aimscale.aim.config import ModelConfig
from aimscale.aim.errors import did_you_mean
from aimscale.harness.data.store.dataset_info import fingerprint
from aimscale.harness.run.config import (
    EvaluationConfig,
    ModelSection,
    ObjectiveSection,
    OptimiserSection,
    RuntimeConfig,
    Section,
    TrainingConfig,
    cached_model_config,
    parse,
    run_config,
)
from aimscale.harness.run.section import Fields, count, merge
from aimscale.sweeps.planning.aim_run import AimRun, planned_init
from aimscale.sweeps.planning.costs import model_counts
from aimscale.sweeps.planning.program_run import program_run
from aimscale.sweeps.planning.recipes import Scale
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import AXIS_KEYS, Sweep, SweepError

MAX_CELLS, MAX_DEVICES = 10_000, 1_000_000
"""Upper limits of a plan."""
PATH_KEYS = ("path", "train", "test", "cache_dir")


def plan(sweep: Sweep) -> list[Run]:
    """Return all runs of a sweep, in the order of its axes, and then those that tune.

    Raises:
        SweepError: no run is left, or two cells are the same run.
        ConfigError, ModelConfigError: a field, a size or a combination does not exist.
    """
    shared = _SharedFields(sweep)
    seen: dict[str, _PlannedRun] = {}
    runs: list[Run] = []
    for planned in _planned_runs(sweep, shared):
        run: Run
        if sweep.file.trainer:
            cell = {axis: value for axis, value in planned.cell.items() if axis != "unique_images"}
            run = program_run(sweep, cell, planned.budgets, planned.changes)
        else:
            run = _build_run(sweep, planned, runs)
        before = seen.get(run.run_id)
        seen[run.run_id] = planned
        if before is None:
            runs.append(run)
        elif before.is_tuning or not planned.is_tuning:
            # the grid holds the sweep's own rate, which `tune` may name
            raise SweepError(
                f"{sweep.source}: cells {before.cell} and {planned.cell} are the same run; an axis has no effect on "
                "what is trained"
            )
    if not runs:
        raise SweepError(f"{sweep.source}: no run is left after the exclusions")
    if sweep.file.tune and not any(run.is_tuning for run in runs):
        raise SweepError(f"{sweep.source}: `tune` adds no run; name cells and rates that the grid does not hold")
    return runs


class _Extras(Section):
    """Fields of a run that are not in its configuration."""

    devices: int = Field(1, ge=1, le=MAX_DEVICES)
    """Data-parallel ranks."""
    evaluation_devices: int | None = Field(None, ge=1, le=MAX_DEVICES)
    """Ranks of the program that evaluates it; by default those of its training, of one node."""
    lr_multiplier: float = Field(1.0, gt=0, lt=math.inf)
    """Factor of the recipe's learning rate."""


class _SharedFields:
    """Fields of a sweep that are the same in every cell, with absolute paths and nested keys."""

    def __init__(self, sweep: Sweep) -> None:
        # The recipe derives other fields from the complete model, so its own model fields are merged first.
        self._sweep = sweep
        model = {} if sweep.file.trainer else {"model": sweep.recipe.base.get("model", {})}
        self.base = merge(model, self._fields(sweep.file.base))
        self.overrides = [
            (_conditions(override.when, sweep), self._fields(override.set)) for override in sweep.file.override
        ]
        self.excludes = [_conditions(exclude, sweep) for exclude in sweep.file.exclude]

    def axis_fields(self, key: str, value: Any) -> Fields:
        """Return the fields that a value of an axis sets."""
        if key == "lr_multiplier":
            return {}
        changes = self._sweep.file.variants[value] if key == "variant" else {key: value}
        return self._fields(changes)

    def _fields(self, changes: Mapping[str, Any]) -> Fields:
        is_program = self._sweep.file.trainer is not None
        return dict(changes) if is_program else _resolve_fields(_nest(changes), self._sweep)


@dataclass(frozen=True, kw_only=True)
class _PlannedRun:
    """Cell of a run, before its configuration is made."""

    cell: Fields
    budgets: tuple[int, ...]
    """Requested budgets."""
    smallest_budget: int
    """Smallest budget of the cell, also where the run serves larger ones only."""
    changes: Fields
    """Fields of base, axes and overrides."""
    is_tuning: bool


def _grids(sweep: Sweep) -> Iterator[tuple[dict[str, tuple[Any, ...]], tuple[int, ...], bool]]:
    """Yield the axes of the sweep but for the budgets, its budgets, and False; then those of `tune`, and True."""
    file = sweep.file
    variants = {"variant": tuple(file.variants)} if file.variants else {}
    axes = {"size": file.sizes, "unique_images": file.unique_images, "seed": file.seeds, **file.axes, **variants}
    yield axes, file.budgets, False
    if file.tune:
        at = _conditions(file.tune.at, sweep)
        chosen = {key: at.get(key, values if key == "size" else values[:1]) for key, values in axes.items()}
        yield chosen | file.tune.axes, at.get("budget", file.budgets), True


def _planned_runs(sweep: Sweep, shared: _SharedFields) -> Iterator[_PlannedRun]:
    """Yield the runs of the grid, and those that tune."""
    file = sweep.file
    grids = list(_grids(sweep))
    cells = sum(math.prod([max(1, len(file.budgets)), *map(len, axes.values())]) for axes, *_ in grids)
    if cells > MAX_CELLS:
        raise SweepError(f"{sweep.source}: {cells:,} cells are more than the {MAX_CELLS:,} of a plan; split the sweep")
    for axes, wanted, is_tuning in grids:
        scale = [axes.pop(name) for name in ("size", "unique_images", "seed")]
        for values in itertools.product(*axes.values()):
            extra = dict(zip(axes, values, strict=True))
            fields = functools.reduce(merge, itertools.starmap(shared.axis_fields, extra.items()), shared.base)
            budgets_of = _isoflop_budgets(sweep, fields) if file.isoflop else dict.fromkeys(file.sizes, file.budgets)
            run_per_budget = _has_run_per_budget(sweep, fields)
            for size, unique, seed in itertools.product(*scale):
                cell = {"size": size, "unique_images": unique, "seed": seed, **extra}
                for budgets, changes in _group_budgets(cell, budgets_of.get(size, ()), shared, run_per_budget):
                    served = tuple(budget for budget in budgets if not wanted or budget in wanted)
                    if served:
                        yield _PlannedRun(
                            cell=cell,
                            budgets=served,
                            smallest_budget=min(budgets),
                            changes=functools.reduce(merge, changes, fields),
                            is_tuning=is_tuning,
                        )


def _has_run_per_budget(sweep: Sweep, fields: Fields) -> bool:
    """Return whether each budget has a run of its own."""
    if (trainer := sweep.file.trainer) is not None:
        return trainer.budgets == "apart"
    kind: str | None = merge(sweep.recipe.base, fields).get("schedule", {}).get("kind")
    return kind == "cosine"


def _group_budgets(
    cell: Fields, budgets: Iterable[int], shared: _SharedFields, run_per_budget: bool
) -> Iterator[tuple[tuple[int, ...], list[Fields]]]:
    """Group the budgets of a cell, those that the same overrides match, into runs, and yield each group with its
    overrides; with `run_per_budget` each has its own."""
    groups: dict[Any, list[int]] = {}
    for budget in budgets:
        whole = {**cell, "budget": budget}
        if any(_matches(whole, conditions) for conditions in shared.excludes):
            continue
        matched = tuple(i for i, (when, _) in enumerate(shared.overrides) if _matches(whole, when))
        groups.setdefault((matched, budget if run_per_budget else None), []).append(budget)
    for (matched, _), shared_budgets in groups.items():
        yield tuple(shared_budgets), [shared.overrides[i][1] for i in matched]


def _isoflop_budgets(sweep: Sweep, changes: Fields) -> dict[str, tuple[int, ...]]:
    """Return the budgets of each size: every C is assigned to the sizes nearest to its expected optimum."""
    isoflop = sweep.file.isoflop
    assert isoflop is not None
    budgets: dict[str, list[int]] = {size: [] for size in sweep.file.sizes}
    counts = {
        size: model_counts(_model_from({**changes.get("model", {}), "size": size}, changes, sweep)) for size in budgets
    }
    for flops in isoflop.flops:
        distance = {}
        for size, (params, cost) in counts.items():
            images = flops / cost.train
            if images >= isoflop.min_images:
                distance[size] = abs(math.log(images / params.total / isoflop.images_per_param))
        nearest = sorted(distance, key=distance.__getitem__)[: isoflop.sizes_per_budget]
        if len(nearest) < 3:
            raise SweepError(
                f"{sweep.source}: at {flops:.3g} FLOPs {len(nearest)} sizes reach min_images, and a minimum needs "
                f"three; raise the FLOPs, lower min_images or add smaller sizes"
            )
        for size in nearest:
            budgets[size].append(round(flops / counts[size][1].train))
    return {size: tuple(sorted(values)) for size, values in budgets.items()}


def _build_run(sweep: Sweep, planned: _PlannedRun, before: Sequence[Run]) -> AimRun:
    cell, changes = planned.cell, planned.changes
    section = {**changes.get("model", {}), "size": cell["size"]}
    model = _model_from(section, changes, sweep)
    scale = Scale(width=model.width, params_total=model_counts(model)[0].total, budget=planned.smallest_budget)
    fields = merge(sweep.recipe.fields(scale), changes)
    fields["model"] = section
    fields["data"] = {**fields.get("data", {}), "unique_images": cell["unique_images"]}
    fields["seed"] = cell["seed"]
    fields["init"] = planned_init(fields.get("init"), cell, sweep, before)
    where = str(sweep.source)
    optimiser = parse(OptimiserSection, fields["optimiser"], f"{where}: optimiser")
    extras = parse(_Extras, {name: fields.pop(name) for name in _Extras.model_fields if name in fields}, where)
    axis = parse(_Extras, {"lr_multiplier": cell.get("lr_multiplier", 1.0)}, where)
    lr_multiplier = extras.lr_multiplier * axis.lr_multiplier
    if (extras.lr_multiplier, axis.lr_multiplier) != (1.0, 1.0):
        fields["optimiser"]["lr_peak"] = float(f"{optimiser.lr_peak * lr_multiplier:.6g}")
    batch = optimiser.batch_size
    fields["budgets"] = tuple(sorted({max(1, round(budget / batch)) * batch for budget in planned.budgets}))
    runtime = parse(RuntimeConfig, fields.pop("runtime", {}), f"{where}: runtime")
    config, devices = run_config(fields, where, runtime), extras.devices
    on_one_node = min(devices, sweep.file.slurm.devices_per_node) if sweep.is_for_slurm else devices
    return AimRun(
        run_id=config.run_id,
        config=config,
        cell=cell,
        devices=devices,
        evaluation_devices=min(extras.evaluation_devices or on_one_node, on_one_node),
        lr_multiplier=float(f"{lr_multiplier:.6g}"),
        is_tuning=planned.is_tuning,
    )


def _model_from(section: Fields, changes: Fields, sweep: Sweep) -> ModelConfig:
    """Return the model of raw `model` fields, with the objective among `changes`."""
    checked = parse(ModelSection, section, f"{sweep.source}: model")
    return cached_model_config(
        checked, parse(ObjectiveSection, changes.get("objective", {}), f"{sweep.source}: objective")
    )


def _nest(fields: Mapping[str, Any]) -> Fields:
    """Turn dotted keys into nested mappings: `{a.b: 1}` -> `{a: {b: 1}}`."""
    nested: Fields = {}
    for dotted, value in fields.items():
        key, _, rest = str(dotted).partition(".")
        inner = _nest({rest: value}) if rest else _nest(value) if isinstance(value, dict) else value
        nested = merge(nested, {key: inner})
    return nested


def _conditions(cell: Mapping[str, Any], sweep: Sweep) -> dict[str, tuple[Any, ...]]:
    """Return axis -> accepted values of a condition, with counts such as `4k` read as numbers."""
    file = sweep.file
    choices = {"size": file.sizes, "budget": file.budgets, "unique_images": file.unique_images, "seed": file.seeds}
    choices |= {"variant": tuple(file.variants), **file.axes}
    conditions = {}
    for key, values in cell.items():
        listed = values if isinstance(values, list | tuple) else [values]
        if key in ("budget", "unique_images"):
            listed = [each if isinstance(each, bool) else count(each) for each in listed]
        conditions[key] = tuple(listed)
        for value in listed:
            if value not in choices[key] and not (key == "budget" and file.isoflop):
                hint = did_you_mean(str(value), [*map(str, choices[key])], "the sweep's are")
                raise SweepError(
                    f"{sweep.source}: exclude, override or tune names {key} {value!r}, which no cell has; {hint}"
                )
    return conditions


def _matches(cell: Fields, conditions: Mapping[str, tuple[Any, ...]]) -> bool:
    return all(cell[key] in values for key, values in conditions.items())


def _resolve_fields(fields: Fields, sweep: Sweep) -> Fields:
    """Make paths absolute (relative to the sweep file) and add the fingerprints of data sources."""
    for key, value in fields.items():
        if key in SECTIONS and not isinstance(value, dict):
            raise SweepError(f"{sweep.source}: {key} must be a mapping of keys to values, not {value!r}")
    for dotted, axis in AXIS_KEYS.items():  # each cell has its own
        section, _, name = dotted.rpartition(".")
        if name in (fields.get(section, {}) if section else fields):
            raise SweepError(f"{sweep.source}: {dotted} is written as `{axis}`, at the top of the file")
    placed: Fields = _absolute_paths(fields, sweep)
    sources = placed.get("data", {}).get("sources")
    if isinstance(sources, list):
        placed["data"]["sources"] = [_with_fingerprint(source, sweep) for source in sources]
    return placed


def _absolute_paths(value: Any, sweep: Sweep) -> Any:
    if isinstance(value, list | tuple):
        return [_absolute_paths(each, sweep) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(sweep.base_dir / inner)
        if key in PATH_KEYS and isinstance(inner, str) and "://" not in inner
        else _absolute_paths(inner, sweep)
        for key, inner in value.items()
    }


def _with_fingerprint(source: Any, sweep: Sweep) -> Any:
    """Add the fingerprint of a source: as given, else as its folder states now, else as recorded at the last launch."""
    if not isinstance(source, dict) or "fingerprint" in source or not isinstance(path := source.get("path"), str):
        return source
    return {**source, "fingerprint": fingerprint(path) or sweep.known_fingerprints.get(sweep.relative_path(path))}


SECTIONS = {
    name
    for kind in (TrainingConfig, EvaluationConfig)
    for name, field in kind.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
} | {"runtime"}
"""Names of the fields of a run that are mappings."""
