"""From run directories to one typed table: `results.parquet`, `results.csv` and `collect.json`.

Partial sweeps collect: a budget without a row is a row without results, marked `unfinished`, `diverged` or `failed`.
Baselines probed like a run (`aimscale baseline NAME --like RUN`) go to `baselines.parquet` by the same columns:
they are no runs, and no law should take them for some. The files depend on the run directories alone, so collecting
twice writes the same bytes.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.schema import results_table, write_table
from aimscale.harness.data.store.card import fingerprint
from aimscale.harness.probe.files import entries_of
from aimscale.harness.run.config import ProbeSection, Section, TrainingConfig
from aimscale.harness.run.files import write_json
from aimscale.harness.run.identity import evaluation_digest, probe_evaluation
from aimscale.harness.run.provenance import is_imported
from aimscale.harness.run.row import configured_columns
from aimscale.sweeps.plan.costs import CostCard
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.state.claims import RunRecord

COLLECT_VERSION = 1
Values = dict[str, Any]
"""A row, or an entry of its probes."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collect found."""

    table: Path
    """The Parquet file; the CSV lies beside it."""
    num_runs: int
    """Runs of the plan."""
    num_rows: int
    """Rows written: runs x budgets, but those of damaged runs."""
    num_complete: int
    """Rows with results."""
    damaged: dict[str, str]
    """Runs skipped -> one sentence why."""
    num_baselines: int
    """Baselines found in the runs' folders."""
    unplanned: tuple[str, ...]
    """Run directories left out: another sweep file, or another version's fields, gave them their names."""


def collect(sweep: Sweep, runs: Sequence[Run], cards: Sequence[CostCard]) -> Collected:
    """Gather the rows of all runs of the plan.

    Raises:
        SweepError: the sweep was never launched here, its directory cannot be written, or all runs there are of another
            plan (the table is left as it was).
    """
    if not sweep.runs_dir.is_dir():
        raise SweepError(f"sweep '{sweep.name}' has no runs under {sweep.directory}; launch it first, or check --root")
    damaged: dict[str, str] = {}
    planned = list(_planned_rows(sweep, runs, cards, damaged))
    whole = [run for run in runs if run.run_id not in damaged]
    known = {run.run_id for run in runs}
    imported = _imported(sweep, known)
    unplanned = _unplanned(sweep, runs, known | {record.path.name for record in imported})
    rows = _with_task_names([*planned, *_imported_rows(sweep, imported, damaged)], runs)
    num_complete = sum(row["status"] == "complete" for row in rows)
    table = results_table(rows)
    write_table(table, sweep.directory / "results.csv")
    write_table(table, sweep.directory / "results.parquet")
    baselines = _with_task_names(_baselines(sweep, damaged), runs)
    _write_baselines(sweep, baselines)
    summary = {
        "version": COLLECT_VERSION,
        "sweep": sweep.name,
        "description": sweep.file.description,
        "recipe": sweep.file.recipe,
        "created": max((str(row["finished_at"]) for row in planned if row.get("finished_at")), default=None),
        "num_runs": len(runs),
        "num_rows": len(rows),
        "num_complete": num_complete,
        "completions": [each for run in whole for each in _completions(sweep, run)],
        "damaged": damaged,
        "machines": _machines([RunRecord(sweep.run_dir(run.run_id)) for run in whole]),
    }
    try:
        write_json(sweep.directory / "collect.json", summary)
    except OSError as error:
        raise SweepError(f"cannot write {sweep.directory / 'collect.json'}: {error.strerror}") from error
    return Collected(
        table=sweep.directory / "results.parquet",
        num_runs=len(runs),
        num_rows=len(rows),
        num_complete=num_complete,
        damaged=damaged,
        num_baselines=len(baselines),
        unplanned=unplanned,
    )


def _unplanned(sweep: Sweep, runs: Sequence[Run], known: set[str]) -> tuple[str, ...]:
    """Directories of no known run.

    Raises:
        SweepError: there are some, and none of a planned run.
    """
    found = (path.name for path in sweep.runs_dir.iterdir() if path.is_dir() and path.name not in known)
    unplanned = tuple(sorted(found))
    if unplanned and not any((sweep.run_dir(run.run_id) / "config.yaml").exists() for run in runs):
        raise SweepError(
            f"none of the {len(runs)} planned runs is under {sweep.runs_dir}, which holds {len(unplanned)} others: the "
            f"sweep file was edited since they were launched"
        )
    return unplanned


def _planned_rows(
    sweep: Sweep, runs: Sequence[Run], cards: Sequence[CostCard], damaged: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Rows of the planned runs; runs whose rows cannot be read go to `damaged`."""
    for run, card in zip(runs, cards, strict=True):
        try:
            found = _rows(sweep, run, card, RunRecord(sweep.run_dir(run.run_id)))
            results_table(found)
        except (UserError, AnalysisError) as error:
            damaged[run.run_id] = str(error)
            continue
        yield from found


def _imported_rows(sweep: Sweep, imported: Sequence[RunRecord], damaged: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of imported weights; runs whose rows cannot be read go to `damaged`."""
    for record in imported:
        try:
            found = [{**row, "sweep": sweep.name, "status": "complete"} for row in record.read_rows()]
            results_table(found)
        except (UserError, OSError, ValueError, TypeError, KeyError, AnalysisError) as error:
            damaged[record.path.name] = f"{record.results} is damaged ({error}); import the weights again"
            continue
        yield from found


def _baselines(sweep: Sweep, damaged: dict[str, str]) -> list[dict[str, Any]]:
    """A row per baseline that was probed like one of the sweep's runs."""
    rows = []
    for folder in sorted(sweep.runs_dir.glob("*/baselines/*/")):
        run = RunRecord(folder.parent.parent)
        try:
            documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
            by_name: dict[str, list[dict[str, Any]]] = {}
            for document in documents:
                by_name.setdefault(document["backbone"], []).extend(entries_of(document))
            found = [
                {"sweep": sweep.name, "run_id": run.path.name, "size": name, "probes": entries}
                for name, entries in by_name.items()
            ]
            results_table(found)
        except (UserError, OSError, ValueError, TypeError, KeyError, AnalysisError) as error:
            damaged[f"{run.path.name}/baselines/{folder.name}"] = f"{folder} is damaged ({error}); probe it again"
            continue
        rows += found
    return rows


def _write_baselines(sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    for suffix in ("csv", "parquet"):
        path = sweep.directory / f"baselines.{suffix}"
        if rows:
            write_table(results_table(rows), path)
        else:
            path.unlink(missing_ok=True)


def _rows(sweep: Sweep, run: Run, card: CostCard, record: RunRecord) -> list[dict[str, Any]]:
    """A run's rows, one per planned budget.

    Raises:
        SweepError: the directory is damaged, or holds another run.
    """
    status = record.checked_status()
    try:
        found = {row["images_seen"]: row for row in record.read_rows()}
    except (UserError, OSError, ValueError, TypeError, KeyError) as error:
        raise record.damaged(record.results, error) from error
    strangers = {row.get("run_id") for row in found.values()} - {run.run_id}
    if strangers:
        raise SweepError(f"{record.results} holds rows of {', '.join(map(str, strangers))}; move the directory away")
    missing = status.state if status.state in ("diverged", "failed") else "unfinished"
    planned = {**configured_columns(run.config), "setup": setup_of(run.config.training)}
    rows = []
    for budget in card.budgets:
        if budget.images_seen in found:
            known = {key: planned[key] for key in ("head_width", "head_depth", "setup")}
            row = _as_planned(run, found[budget.images_seen])
            rows.append({**known, **row, "status": missing if row.get("val_loss") is None else "complete"})
        else:
            rows.append({**planned, "images_seen": budget.images_seen, "epochs": budget.epochs})
            rows[-1] |= {"flops_train": budget.flops, "flops_6nd": budget.flops_6nd}
            rows[-1] |= {"status": missing}
        executed = card.flops_executed / card.images_executed * budget.images_seen
        rows[-1] |= {"sweep": sweep.name, "flops_executed": executed}
    return rows


def _as_planned(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """The row without a loss that was measured by other settings than the plan's."""
    settings = evaluation_digest("validation", run.config.evaluation.validation.model_dump(mode="json"))
    if str(row.get("validation", settings)).split(".")[0] == settings:
        return row
    return {key: value for key, value in row.items() if key not in ("val_loss", "val_loss_se", "val_num_images")}


def _imported(sweep: Sweep, planned: set[str]) -> list[RunRecord]:
    """Finished runs beside the planned ones whose weights came from elsewhere (`aimscale weights import`).

    Other directories that the plan does not name are of an earlier version of the sweep file and stay out.
    """
    others = (RunRecord(path) for path in sorted(sweep.runs_dir.iterdir()) if path.name not in planned)
    return [record for record in others if is_imported(record)]


def _with_task_names(rows: Sequence[Values], runs: Sequence[Run]) -> list[Values]:
    """The rows with every probe's task named.

    The bare name is for the evaluation that the plan asks for (the first of that task), or for the only one that there
    is of a task that it does not name; others are `task@evaluation`. So a table keeps apart what was measured with
    other settings or on other images, whoever reads it.
    """
    bare = _planned_evaluations(runs)
    found: dict[str, set[str]] = {}
    for row in rows:
        for entry in row.get("probes") or ():
            found.setdefault(entry["task"], set()).add(entry.get("evaluation", "*"))
    bare |= {task: names for task, names in found.items() if task not in bare and len(names) == 1}

    def named(entry: Values) -> Values:
        task, evaluation = entry["task"], entry.get("evaluation")
        if evaluation is None or any(fnmatch.fnmatch(evaluation, own) for own in bare.get(task, ())):
            return entry
        return {**entry, "task": f"{task}@{evaluation}"}

    return [{**row, "probes": [named(entry) for entry in row["probes"]]} if row.get("probes") else row for row in rows]


def _planned_evaluations(runs: Sequence[Run]) -> dict[str, set[str]]:
    """Task -> evaluations that runs of the plan ask for."""
    names: dict[ProbeSection, str] = {}
    planned: dict[str, set[str]] = {}
    for run in runs:
        for section in {task.task: task for task in reversed(run.config.evaluation.probes)}.values():
            if section not in names:
                train, test = fingerprint(section.train), fingerprint(section.test)
                names[section] = probe_evaluation(section.model_dump(mode="json"), train, test)
            planned.setdefault(section.task, set()).add(names[section])
    return planned


SCALE_FIELDS = {
    "model.size",
    "data.sources",
    "data.unique_images",
    "optimiser.batch_size",
    "optimiser.lr_peak",
    "schedule.warmup_images",
    "seed",
}
"""What a recipe makes follow from scale, or what has a column of its own: not part of a row's `setup`."""


def setup_of(training: TrainingConfig) -> dict[str, Any]:
    """Dotted training fields that differ from their defaults, but for `SCALE_FIELDS`: equal where only scale differs.

    Analysis pairs runs by it, so that nothing which a sweep varied is mistaken for noise.
    """
    setup: dict[str, Any] = {}
    for name in TrainingConfig.model_fields:
        value = getattr(training, name)
        if name in SCALE_FIELDS or not isinstance(value, Section):
            continue
        for key, field in type(value).model_fields.items():
            dotted = f"{name}.{key}"
            if dotted not in SCALE_FIELDS and getattr(value, key) != field.get_default(call_default_factory=True):
                setup[dotted] = getattr(value, key)
    return setup


def _completions(sweep: Sweep, run: Run) -> list[dict[str, Any]]:
    """Pictures for the report, by paths relative to the sweep's directory."""
    record = RunRecord(sweep.run_dir(run.run_id))
    return [
        {
            "run_id": run.run_id,
            "size": run.config.training.model.size,
            "images_seen": budget,
            "path": str(record.completions_file(budget).relative_to(sweep.directory)),
        }
        for budget in run.budgets
        if record.completions_file(budget).exists()
    ]


def _machines(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The machines of the runs' last starts, equal ones once."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        try:
            start = json.loads(record.provenance.read_text())["starts"][-1]
            machine = {key: start[key] for key in ("device", "cpu", "num_cpus", "python", "packages") if key in start}
        except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
            continue
        found[json.dumps(machine, sort_keys=True)] = machine
    return list(found.values())
