"""Runs that a command of the sweep file trains (section `trainer`)."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.analysis.formulas import FormulaError, parse_formula
from aimscale.harness.device.speed import MFU
from aimscale.harness.results import Pending
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import read_object
from aimscale.harness.run.program import PROGRAM_FILE, ProgramConfig, ProgramSection, load_program
from aimscale.harness.run.section import Fields, Section, config_digest, parse
from aimscale.sweeps.planning.checks import check_time_limit
from aimscale.sweeps.planning.run import BudgetCost, CostCard, Notice, PlanContext, Rates, Run, problem
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError
from aimscale.sweeps.planning.trainer import TemplateError, Values, fill_words

UNKNOWN_TIME_S = 3600.0
"""Time that is assumed of a run whose N is not known."""


@dataclass(frozen=True, kw_only=True)
class ProgramRun(Run):
    """Run of the user's program."""

    config: ProgramConfig
    runs_dir: Path
    """Directory that holds the run directories."""

    @property
    def budgets(self) -> tuple[int, ...]:
        return self.config.program.budgets

    @property
    def num_params(self) -> int | None:
        if (num_params := self.config.program.num_params) is not None:
            return num_params
        for path in (
            self.runs_dir / self.run_id / PROGRAM_FILE,
            *sorted(self.runs_dir.glob(f"{self.cell['size']}_*/{PROGRAM_FILE}")),
        ):
            with contextlib.suppress(UserError):
                if isinstance(num_params := (read_object(path) or {}).get("N"), int):
                    return num_params
        return None

    @property
    def grace_s(self) -> int:
        return self.config.program.stop.seconds

    @property
    def threads(self) -> int:
        return self.config.program.threads

    @property
    def is_one_process(self) -> bool:
        return True

    @property
    def unit(self) -> str:
        return self.config.program.unit

    def flops(self, images_seen: int) -> float | None:
        program, num_params = self.config.program, self.num_params
        if num_params is None:
            return None
        return float(parse_formula(program.flops)({**_numbers(program.values), "N": num_params, "D": images_seen}))

    def columns(self) -> dict[str, Any]:
        program = self.config.program
        columns = {"run_id": self.run_id, "size": program.size, "seed": program.seed, "unit": program.unit}
        return columns | {"params_total": self.num_params, "setup": program.setup}

    def design(self) -> dict[str, Any]:
        cell = {axis: value for axis, value in self.cell.items() if axis not in ("size", "seed")}
        return cell | ({} if self.config.program.together else {"budgets": self.budgets})

    def is_configured(self, record: RunDir) -> bool:
        return load_program(record.config) == self.config

    def pending(self, record: RunDir, *, trust_note: bool = True) -> list[Pending]:
        rows = {row["images_seen"]: row.get("evaluated") or () for row in record.read_rows()}
        missing = [budget for budget in self.budgets if budget not in rows]
        unmeasured = [budget for budget in self.budgets if {*self.config.program.evaluate} - {*rows.get(budget, ())}]
        if unmeasured and not missing and RunDir(record.root).is_held():
            missing = unmeasured  # it may yet save what is measured
        if missing:
            return [Pending(what="training", images_seen=budget) for budget in missing]
        return [Pending(what="evaluation", images_seen=budget) for budget in unmeasured]

    def command(self, run_dirs: Sequence[Path]) -> list[str]:
        module = "aimscale.harness.program" + (".evaluation" if self.stage == "evaluate" else "")
        return ["-m", module, *map(str, run_dirs)]

    def card(self, context: PlanContext) -> CostCard:
        return _card(self, context)

    def check(self, context: PlanContext) -> Iterator[Notice]:
        sweep, program, first = context.sweep, self.config.program, self.config.program.words[0]
        yield from check_time_limit(self, context)
        if sweep.is_for_slurm:
            if self.devices > sweep.file.slurm.devices_per_node:
                yield problem("trainer.devices", "a program runs on one node; lower it, or raise devices_per_node")
            return
        if not os.path.isdir(program.directory):
            yield problem("trainer.directory", f"there is no folder {program.directory}")
        elif not (shutil.which(first) or os.access(os.path.join(program.directory, first), os.X_OK)):
            yield problem("trainer.command", f"there is no program '{first}'")


class _Changes(Section):
    """Values that base, axes, variants and overrides set."""

    values: Values


def program_run(sweep: Sweep, cell: Fields, budgets: tuple[int, ...], changes: Fields) -> ProgramRun:
    """Return the run of a cell.

    Args:
        changes: values of base, axes, variants and overrides.

    Raises:
        SweepError: a template or a formula cannot be filled in.
    """
    trainer = sweep.file.trainer
    assert trainer is not None
    size, seed, where = cell["size"], cell["seed"], f"{sweep.source}: trainer"
    changes = dict(parse(_Changes, {"values": changes}, str(sweep.source)).values)
    trained = trainer.sizes[size] | changes
    budgets = tuple(sorted(budgets))
    identity, slug = {"command": trainer.command, "values": trained, "seed": seed, "version": trainer.version}, size
    if trainer.budgets == "apart":
        identity["budget"], slug = budgets[-1], f"{size}_d{budgets[-1]}"
    run_id = f"{slug}_s{seed}_{config_digest('program', identity)}"
    run_dir = sweep.run_dir(run_id)
    values = {**trained, **trainer.runtime, "size": size, "seed": seed, "devices": trainer.devices}
    values |= {"run_dir": str(run_dir), "budget": budgets[-1], "budgets": list(budgets)}
    try:
        params = None if trainer.params is None else round(float(parse_formula(trainer.params)(_numbers(trained))))
        evaluate = {
            name: {
                budget: fill_words(
                    text, values | {"budget": budget, "result": f"{run_dir}/evaluations/{budget}/{name}.json"}
                )
                for budget in budgets
            }
            for name, text in trainer.evaluate.items()
        }
        program = ProgramSection(
            run_id=run_id,
            size=size,
            seed=seed,
            directory=str(sweep.base_dir / os.path.expanduser(trainer.directory)),
            words=fill_words(trainer.command, values),
            resume_if_exists=trainer.resume.if_exists if trainer.resume else None,
            resume_words=fill_words(trainer.resume.add, values) if trainer.resume else (),
            metrics=trainer.metrics,
            budgets=budgets,
            together=trainer.budgets == "together",
            num_params=params,
            flops=trainer.flops,
            unit=trainer.unit,
            evaluate=evaluate,
            stop=trainer.stop,
            devices=trainer.devices,
            threads=trainer.threads,
            values=trained,
            setup=changes,
        )
    except (TemplateError, FormulaError) as error:
        raise SweepError(f"{where}: {error}") from error
    return ProgramRun(
        run_id=run_id,
        config=ProgramConfig(program=program),
        cell=cell,
        devices=trainer.devices,
        evaluation_devices=trainer.devices,
        lr_multiplier=None,
        is_tuning=False,
        runs_dir=sweep.runs_dir,
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _card(run: ProgramRun, context: PlanContext) -> CostCard:
    """Price a run by its FLOPs, at the speed of the sweep's runs so far or else at the stated MFU."""
    device = context.device
    precision = "bf16" if device.is_gpu else "fp32"
    budgets = run.budgets
    flops = [run.flops(budget) for budget in budgets]
    executed, num_images = flops[-1], budgets[-1]
    speed, num_measured = context.once(_measured_speed, context.sweep.runs_dir)
    mfu = context.sweep.file.cost.mfu or MFU
    if num_measured == 0:
        speed = mfu * device.flops_per_s(precision) * (1 if device.is_gpu else run.threads)
    training_s = UNKNOWN_TIME_S if executed is None else executed / (speed * run.devices)
    rate = num_images / training_s
    return CostCard(
        run=run,
        params_total=run.num_params,
        budgets=tuple(
            BudgetCost(images_seen=budget, epochs=None, flops=each, flops_6nd=None)
            for budget, each in zip(budgets, flops, strict=True)
        ),
        images_executed=num_images,
        flops_executed=executed or 0.0,
        device=device,
        precision=precision,
        rates=Rates(mfu=mfu, flops_per_image=0.0, compute_per_s=rate, loaded_per_s=rate, num_measured=num_measured),
        stop_s=run.grace_s,
        training_s=training_s,
        wall_s=training_s,
        device_hours=training_s * run.devices / 3600,
    )


def _measured_speed(runs_dir: Path) -> tuple[float, int]:
    """Return the median FLOP/s of a device over the finished rows of a sweep, and their number."""
    speeds = []
    for path in runs_dir.glob("*/results.json"):
        with contextlib.suppress(UserError):
            for row in RunDir(path.parent).read_rows():
                if row.get("flops_train") and row.get("device_hours"):
                    speeds.append(row["flops_train"] / (3600 * row["device_hours"]))
    return (statistics.median(speeds), len(speeds)) if speeds else (0.0, 0)
