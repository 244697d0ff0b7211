"""Collection of run directories into one typed table: `results.parquet`, `results.csv` and `collect.json`.

Values measured during training go to `curves.parquet`, and baselines that were probed like a run (`aimscale baseline`)
to `baselines.parquet`, with the same columns, so that no law takes them for budgets or runs. A budget without results
is a row with status `unfinished`, `diverged` or `failed`. The tables depend only on the run directories: collecting
twice writes the same bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from aimscale.aim.errors import UserError
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.schema import OF_CURVES, results_table, write_table
from aimscale.harness.results import entries_of
from aimscale.harness.run.directory import WEIGHTS_CRC32
from aimscale.harness.run.files import read_object, write_json
from aimscale.harness.run.section import is_measurement
from aimscale.sweeps.planning.run import CostCard, Run, new_once
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord, imported_runs

Values = dict[str, Any]
"""Row, or an entry of its probes."""


@dataclass(frozen=True, kw_only=True)
class CollectResult:
    """Result of a collection."""

    table: Path
    """Path of the Parquet file; the CSV file is beside it."""
    num_rows: int
    """Number of rows written: runs x budgets, without damaged runs."""
    num_complete: int
    """Number of rows with results."""
    damaged: dict[str, str]
    """Skipped run -> reason."""
    num_baselines: int
    """Number of baselines found in the run directories."""
    unplanned: tuple[str, ...]
    """Run directories outside the plan, which are left out."""


def collect(planned: PlannedSweep) -> CollectResult:
    """Collect the rows of all planned runs.

    Raises:
        SweepError: the sweep was never launched here, or all its runs belong to another plan (the table is not
            changed).
        OSError: its directory cannot be written.
    """
    sweep, runs = planned.sweep, planned.runs
    if not sweep.runs_dir.is_dir():
        where = f"launch it first, or name its folder, ROOT/{sweep.name}"
        raise SweepError(f"sweep '{sweep.name}' has no runs under {sweep.directory}; {where}")
    left_out = planned.unplanned
    if left_out and not any((sweep.run_dir(run.run_id) / "config.yaml").exists() for run in runs):
        raise SweepError(
            f"none of the {len(runs)} planned runs is under {sweep.runs_dir}, which holds {len(left_out)} others: the "
            f"sweep file was edited since they were launched"
        )
    damaged: dict[str, str] = {}
    rows: list[Values] = []
    points: list[Values] = []
    for card in planned.cards:
        rows += _read_rows(damaged, card.run.run_id, _run_rows, sweep, card)
        if card.run.run_id not in damaged:
            points += _read_rows(damaged, card.run.run_id, _curve_rows, sweep, card)
    for record in imported_runs(sweep, runs):
        rows += _read_rows(damaged, record.name, _imported_rows, sweep, record)
    baselines: list[Values] = []
    for folder in sorted(sweep.runs_dir.glob("*/baselines/*/")):
        baselines += _read_rows(damaged, str(folder.relative_to(sweep.runs_dir)), _baseline_rows, sweep, folder)
    requested = _requested_evaluations(runs)
    _write(sweep, "results", results_table(_name_tasks(rows, requested)))
    _write(sweep, "curves", results_table(_name_tasks(points, requested), OF_CURVES))
    _write(sweep, "baselines", results_table(_name_tasks(baselines, requested)))
    machines = _machines([RunRecord(sweep.run_dir(run.run_id)) for run in runs if run.run_id not in damaged])
    write_json(sweep.directory / "collect.json", {"description": sweep.file.description, "machines": machines})
    return CollectResult(
        table=sweep.directory / "results.parquet",
        num_rows=len(rows),
        num_complete=sum(row["status"] == "complete" for row in rows),
        damaged=damaged,
        num_baselines=len(baselines),
        unplanned=left_out,
    )


def _write(sweep: Sweep, name: str, table: pa.Table) -> None:
    """Write the table in its formats; remove the files of an empty table, except those of `results`."""
    for path in (sweep.directory / f"{name}{suffix}" for suffix in (".csv", ".parquet")):
        if table.num_rows or name == "results":
            write_table(table, path)
        else:
            path.unlink(missing_ok=True)


def _read_rows(
    damaged: dict[str, str], name: str, function: Callable[..., list[Values]], *arguments: Any
) -> list[Values]:
    """Read rows and check that they fit into a table; on an error return none and note the reason in `damaged`."""
    try:
        rows = function(*arguments)
        results_table(rows)
    except (UserError, OSError, ValueError, TypeError, KeyError, AnalysisError) as error:
        damaged[name] = f"the files of {name} are damaged ({error}); move them away or make them again"
        return []
    return rows


def _imported_rows(sweep: Sweep, record: RunRecord) -> list[Values]:
    return [{**row, "sweep": sweep.name, "status": "complete"} for row in record.read_rows()]


def _baseline_rows(sweep: Sweep, folder: Path) -> list[Values]:
    """Return one row for each baseline that was probed like one of the sweep's runs."""
    probes: dict[str, list[Values]] = {}
    for path in sorted(folder.glob("*.json")):
        document = read_object(path) or {}
        if not all(isinstance(entry["task"], str) for entry in entries_of(document)):
            raise ValueError(f"{path.name} names no task")
        probes.setdefault(document["backbone"], []).extend(entries_of(document))
    origin = {"sweep": sweep.name, "run_id": folder.parent.parent.name}
    return [{**origin, "size": name, "probes": entries} for name, entries in probes.items()]


def _run_rows(sweep: Sweep, card: CostCard) -> list[Values]:
    """Return a run's rows, one per planned budget."""
    run, record = card.run, RunRecord(sweep.run_dir(card.run.run_id))
    status = record.read_status()
    measured = {row["images_seen"]: row for row in record.read_rows()}
    other_run_ids = {row.get("run_id") for row in measured.values()} - {run.run_id}
    if other_run_ids:
        raise SweepError(
            f"{record.results} holds rows of {', '.join(map(str, other_run_ids))}; move the directory away"
        )
    run.check_rows(record, [*measured.values()])
    missing = status.state if status.state in ("diverged", "failed") else "unfinished"
    planned = run.columns()
    rows = []
    for budget in card.budgets:
        if budget.images_seen in measured:
            row: Values = {key: planned[key] for key in ("head_width", "head_depth", "setup") if key in planned}
            row |= _drop_other_validation(run, measured[budget.images_seen])
            row.pop(WEIGHTS_CRC32, None)  # of the run, not of its table
        else:
            row = {**planned, "images_seen": budget.images_seen, "epochs": budget.epochs}
            row |= {"flops_train": budget.flops, "flops_6nd": budget.flops_6nd}
        row["status"] = missing if row.get("val_loss") is None else "complete"
        row["flops_executed"] = card.rates.flops_per_image * budget.images_seen or None
        rows.append({**row, "sweep": sweep.name, "lr_multiplier": run.lr_multiplier})
    return rows


def _curve_rows(sweep: Sweep, card: CostCard) -> list[Values]:
    """Return the values measured in a run's stable phase, with the columns of a budget at that point."""
    run, planned = card.run, card.run.columns()
    last, points = card.budgets[-1], []
    for measured in RunRecord(sweep.run_dir(run.run_id)).read_curve():
        share = measured["images_seen"] / last.images_seen
        origin = {"status": "during", "sweep": sweep.name, "lr_multiplier": run.lr_multiplier}
        point = {**planned, **origin, **_drop_other_validation(run, measured)}
        point["epochs"] = None if last.epochs is None else share * last.epochs
        point["flops_train"] = None if last.flops is None else share * last.flops
        point["flops_6nd"] = None if last.flops_6nd is None else share * last.flops_6nd
        points.append(point | {"flops_executed": card.rates.flops_per_image * measured["images_seen"] or None})
    return points


def _drop_other_validation(run: Run, row: Values) -> Values:
    """Remove the validation loss if it was measured with other settings than the plan's."""
    if run.is_measured(row):
        return row
    return {key: value for key, value in row.items() if key not in ("val_loss", "val_loss_se", "val_num_images")}


def _requested_evaluations(runs: Sequence[Run]) -> dict[str, set[str]]:
    """Return task -> evaluations that the planned runs request, the first of each run's task."""
    requested, once = dict[str, set[str]](), new_once()
    for run in runs:
        for task, evaluation in run.requested(once):
            requested.setdefault(task, set()).add(evaluation)
    return requested


def _name_tasks(rows: Sequence[Values], requested: Mapping[str, Collection[str]]) -> list[Values]:
    """Rename the tasks of rows' `probes` to `task@evaluation`, except for evaluations that were requested, or the only
    one of a task of which none was."""
    evaluations: dict[str, set[str | None]] = {}
    for entry in (entry for row in rows for entry in row.get("probes") or ()):
        evaluations.setdefault(entry["task"], set()).add(entry.get("evaluation"))

    def named(entry: Values) -> Values:
        task, evaluation = entry["task"], entry.get("evaluation")
        is_only = task not in requested and len(evaluations[task]) == 1
        if evaluation is None or is_only or any(is_measurement(evaluation, each) for each in requested.get(task, ())):
            return entry
        return entry | {"task": f"{task}@{evaluation}"}

    return [row | {"probes": [*map(named, row["probes"])]} if row.get("probes") else row for row in rows]


def _machines(records: Sequence[RunRecord]) -> list[Values]:
    """Return the machines of the runs' last starts, equal ones once."""
    kept = ("device", "cpu", "num_cpus", "python", "packages")
    machines: dict[str, Values] = {}
    for record in records:
        with contextlib.suppress(UserError, IndexError):
            machine = {key: value for key, value in record.read_starts()[-1].items() if key in kept}
            machines[json.dumps(machine, sort_keys=True)] = machine
    return list(machines.values())
