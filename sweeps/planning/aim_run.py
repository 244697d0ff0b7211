"""Runs that aimscale trains itself: all that sweeps know of the configuration of its models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimscale.harness.data.store.dataset_info import fingerprint
from aimscale.harness.device.execution import DoesNotFitError
from aimscale.harness.results.pending import Pending, check_rows, pending_work
from aimscale.harness.run.config import RunConfig, load_run_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.row import build_model_config, planned_columns
from aimscale.sweeps.planning.checks import check_config, check_data
from aimscale.sweeps.planning.costs import card_of, grace_period_s, model_counts, plan_execution
from aimscale.sweeps.planning.notices import Notice
from aimscale.sweeps.planning.run import CostCard, Once, PlanContext, Run, Stage
from aimscale.sweeps.planning.warm_start import check_start

PROGRAMS: dict[Stage, str] = {"train": "aimscale.harness.train", "evaluate": "aimscale.harness.evaluate"}
"""Module of each stage of a run."""


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
        return grace_period_s(self.num_params)

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

    def create(self, path: Path) -> None:
        RunDir.create(path, self.config)

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
