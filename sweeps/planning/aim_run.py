"""Runs that aimscale trains itself: what sweeps know of the configuration of its models, and what they start from."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError, did_you_mean, some
from aimscale.harness.data.store.dataset_info import fingerprint
from aimscale.harness.device.execution import DoesNotFitError
from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM
from aimscale.harness.results import Pending, check_rows, pending_work
from aimscale.harness.run.config import RunConfig, TrainingConfig, load_run_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.init import InitSection, cached_sha256, read_about
from aimscale.harness.run.row import build_model_config, planned_columns
from aimscale.harness.run.schedule import saved_budgets
from aimscale.harness.run.section import Fields, count
from aimscale.harness.run.timeouts import MIN_GRACE_S, STEP_ALLOWANCE_S
from aimscale.sweeps.planning.checks import check_config, check_data
from aimscale.sweeps.planning.costs import card_of, model_counts, plan_execution
from aimscale.sweeps.planning.run import CostCard, Notice, Once, PlanContext, Run, Stage, problem
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError

PROGRAMS: dict[Stage, str] = {"train": "aimscale.harness.train", "evaluate": "aimscale.harness.evaluate"}
"""Module of each stage of a run."""
SAVE_BYTES_PER_S = 0.5e9
"""Assumed rate at which a checkpoint is written to a shared disk."""


@dataclass(frozen=True, kw_only=True)
class AimRun(Run):
    """Run of aimscale's own trainer."""

    config: RunConfig

    @property
    def budgets(self) -> tuple[int, ...]:
        return self.config.evaluation.budgets

    @property
    def num_params(self) -> int:
        return model_counts(build_model_config(self.config.training))[0].total

    @property
    def grace_s(self) -> int:
        save_s = CHECKPOINT_BYTES_PER_PARAM * self.num_params / SAVE_BYTES_PER_S
        return max(MIN_GRACE_S, math.ceil(2 * save_s) + STEP_ALLOWANCE_S)

    @property
    def threads(self) -> int:
        return self.config.runtime.num_threads

    @property
    def wants_cpu(self) -> bool:
        return self.config.runtime.device == "cpu"

    @property
    def is_normalised(self) -> bool:
        return self.config.training.objective.target == "normalised"

    @property
    def data(self) -> Mapping[str, str]:
        training, init = self.config.training, self.config.training.init
        fingerprints = {each.path: each.fingerprint for each in training.data.sources if each.fingerprint}
        return fingerprints | ({init.weights: init.digest} if init and init.weights and init.digest else {})

    @property
    def awaited(self) -> str:
        if (init := self.config.training.init) and init.run and not init.file.is_file():
            return f"{init.run}, whose weights it starts from"
        return ""

    def requested(self, once: Once) -> Iterator[tuple[str, str]]:
        for each in {task.task: task for task in reversed(self.config.evaluation.probes)}.values():
            yield each.task, each.evaluation_id(once(fingerprint, each.train), once(fingerprint, each.test))

    def flops(self, images_seen: int) -> float:
        return model_counts(build_model_config(self.config.training))[1].train * images_seen

    def columns(self) -> dict[str, Any]:
        return planned_columns(self.config)

    def design(self) -> dict[str, Any]:
        cell = {axis: value for axis, value in self.cell.items() if axis not in ("size", "seed")}
        is_cosine = self.config.training.schedule.kind == "cosine"
        return cell | ({"budgets": self.budgets} if is_cosine else {})

    def is_measured(self, row: Mapping[str, Any]) -> bool:
        digest = self.config.evaluation.validation.digest
        return str(row.get("validation", digest)).split(".")[0] == digest

    def is_configured(self, record: RunDir) -> bool:
        return load_run_config(record.config) == self.config

    def pending(self, record: RunDir, *, trust_note: bool = True) -> list[Pending]:
        return pending_work(record, self.config, trust_note=trust_note)

    def check_rows(self, record: RunDir, rows: Sequence[dict[str, Any]]) -> None:
        check_rows(record, self.config, rows)

    def command(self, run_dirs: Sequence[Path]) -> list[str]:
        return ["-m", PROGRAMS[self.stage], *map(str, run_dirs)]

    def fits(self, num_devices: int, device_bytes: int) -> bool:
        with contextlib.suppress(DoesNotFitError):
            return bool(plan_execution(self.config, num_devices, device_bytes, is_gpu=True))
        return False

    def card(self, context: PlanContext) -> CostCard:
        return card_of(self, self.config, context)

    def check(self, context: PlanContext) -> Iterator[Notice]:
        yield from check_config(self, self.config, context)
        yield from check_data(self.config, context)
        yield from check_start(self.config, context)


def planned_init(values: Any, cell: Fields, sweep: Sweep, before: Sequence[Run]) -> Any:
    """Return a run's `init` with its file, the identity of its source and what trained it; None for a drawn start.

    Args:
        values: the section as written.
        before: runs that are planned already, which it may start from.

    Raises:
        SweepError: it names two sources, or a run that is not there, or has no such budget.
    """
    if not isinstance(values, dict):
        return values  # what is no section is reported where it is parsed
    fields = {name: value for name, value in values.items() if value is not None}
    written = [str(fields.pop(name)) for name in ("weights", "run") if name in fields]
    if not written:
        return None
    if len(written) > 1:
        raise SweepError(f"{sweep.source}: init names a file and a run; keep one of them")
    text = written[0].replace("{size}", cell["size"]).replace("{seed}", str(cell["seed"]))
    if values.get("run") is not None:
        return {"name": written[0], **_source_run(text, cell, sweep, before), **fields}
    path = sweep.base_dir / Path(text).expanduser()
    digest = fields.get("digest") or (cached_sha256(path) if path.is_file() else None)
    digest = digest or sweep.known_fingerprints.get(sweep.relative_path(str(path)))
    return {"name": Path(written[0]).stem, **_told_by(path), **fields, "digest": digest, "weights": str(path)}


def _told_by(path: Path) -> Fields:
    """Read the images and FLOPs that trained the weights in one of aimscale's own files."""
    row = read_about(path).get("row", {})
    flops = row.get("flops_train")
    return {"images_seen": row.get("images_seen"), "flops": flops and flops + (row.get("flops_init") or 0.0)}


def _source_run(text: str, cell: Fields, sweep: Sweep, before: Sequence[Run]) -> Fields:
    """Find the run and the budget that `RUN_ID@D` or `SWEEP/RUN_ID@D` names."""
    (of_sweep, _, name), (_, _, budget) = text.partition("@")[0].rpartition("/"), text.partition("@")
    where, images_seen = f"{sweep.source}: init.run: {text}", count(budget)
    if not isinstance(images_seen, int):
        raise SweepError(f"{where} names no budget; write RUN_ID@D, such as w32-d2_*@16k")
    runs_dir = sweep.root / of_sweep / "runs" if of_sweep else sweep.runs_dir
    runs_by_id: dict[str, Run | None] = {run.run_id: run for run in before}
    if of_sweep:
        runs_by_id = {path.name: None for path in sorted(runs_dir.glob("*/")) if path.name[:1] != "."}
    chosen = [each for each in runs_by_id if fnmatch.fnmatchcase(each, name)]
    chosen = chosen or [each for each, run in runs_by_id.items() if run and _is_of_variant(run, name, cell)]
    if len(chosen) != 1:
        hint = f"write more of its id; {some(chosen)}" if chosen else "no run comes before it"
        hint = did_you_mean(name, runs_by_id, "there are") if runs_by_id and not chosen else hint
        raise SweepError(f"{where} names {len(chosen)} runs, not one; {hint}")
    source, source_dir = runs_by_id[chosen[0]], RunDir(runs_dir / chosen[0])
    file, budgets = source_dir.model_file(images_seen), source.budgets if source else [*saved_budgets(source_dir)]
    if images_seen not in budgets:
        has = f"it has {some(budgets)}" if budgets else "it has none"
        raise SweepError(f"{where}: {chosen[0]} has no {'' if source else 'finished '}budget {images_seen}; {has}")
    told = _told_by(file)
    if source and told["flops"] is None:  # it is not trained yet
        told["flops"] = (source.flops(images_seen) or 0.0) + (source.columns().get("flops_init") or 0.0)
    return {**told, "images_seen": images_seen, "run": f"{chosen[0]}@{images_seen}", "weights": str(file)}


def _is_of_variant(run: Run, name: str, cell: Fields) -> bool:
    """Tell whether a run is the one of a variant at a cell's size and seed."""
    return run.cell.get("variant") == name and all(run.cell[key] == cell[key] for key in ("size", "seed"))


def check_start(config: RunConfig, context: PlanContext) -> Iterator[Notice]:
    """Yield why a run cannot start from its `init`, and what its rates are."""
    training = config.training
    if (init := training.init) is None:
        return
    if init.file.is_file():
        yield from context.once(_check_file, training.model_copy(update={"seed": 0}), init)
    elif init.run is None:
        yield problem("init.weights", f"there is no weight file {init.file}")


def _check_file(training: TrainingConfig, init: InitSection) -> list[Notice]:
    from aimscale.harness.step.initial import find_initial

    try:
        find_initial(training, init, with_values=False)
    except UserError as error:
        return [problem("init", str(error))]
    return []
