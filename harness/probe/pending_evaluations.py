"""Pending evaluations of a run: each budget's row, updated from its files, and the list of what is still to be done.

One list for all: the trainer works it off, and launchers start runs that have one. Torch is not imported.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from aimscale.aim.errors import UserError
from aimscale.harness.data.store.dataset_info import fingerprint
from aimscale.harness.probe.files import (
    entries_of,
    finished_entries,
    task_files,
    validation_name,
    weights_content,
    weights_name,
)
from aimscale.harness.run.budgets import missing_budgets, saved_budgets
from aimscale.harness.run.config import ProbeSection, RunConfig
from aimscale.harness.run.directory import RunDir, probe_key
from aimscale.harness.run.files import read_object, write_json
from aimscale.harness.run.identity import is_measurement
from aimscale.harness.run.lock import writer_folder

VALIDATION_COLUMNS = ("val_loss", "val_loss_se", "val_num_images")
"""Columns of a row that a validation file holds under the same names."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Training or evaluation that a run lacks at one of its budgets."""

    what: Literal["training", "validation", "probe"]
    images_seen: int
    """Budget."""
    section: ProbeSection | None = None
    """Task of a probe."""

    def __str__(self) -> str:
        return f"{self.section.task if self.section else self.what} at {self.images_seen}"


def pending_work(run: RunDir, config: RunConfig) -> list[Pending]:
    """List what `config` asks of a run and is missing; a run is finished when the list is empty.

    A result is there if its file is, for the present weights, settings and data, and if the budget's row says so too.
    Data that cannot be read count as unchanged. A process that holds the run notes when nothing is missing, so that a
    look at many runs need not read their results.
    """
    note = run.path / "complete.json"
    with contextlib.suppress(UserError):  # damaged
        if (read_object(note) or {}).get("inventory") == _inventory(run, config):
            return []
    found = [Pending(what="training", images_seen=budget) for budget in missing_budgets(run, config)]
    rows = {row["images_seen"]: row for row in run.read_rows()}
    for budget in saved_budgets(run):
        if budget in config.evaluation.budgets:
            found += pending_evaluations(run, config, budget, rows.get(budget, {}))
    if not found and writer_folder(note):
        write_json(note, {"inventory": _inventory(run, config)}, durable=False)
    return found


def _inventory(run: RunDir, config: RunConfig) -> str:
    """Digest what `pending_work` depends on: what is asked for, of which data, and each file with its size and time."""
    asked = config.evaluation
    paths = [asked.validation.path, *(path for each in asked.probes for path in (each.train, each.test))]
    root, files = str(run.path), [str(run.results)]
    for name in ("budgets", "validation", "probes"):
        files += [f"{folder}/{file}" for folder, _, names in os.walk(f"{root}/{name}") for file in names]
    stats = [(file.removeprefix(root), *_size_and_time(file)) for file in sorted(files)]
    text = repr([config.run_id, asked.model_dump_json(), *map(fingerprint, paths), stats])
    return hashlib.sha256(text.encode()).hexdigest()


def _size_and_time(file: str) -> tuple[int, int]:
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    return 0, 0


def pending_evaluations(run: RunDir, config: RunConfig, images_seen: int, row: dict[str, Any]) -> Iterator[Pending]:
    """List what is to be measured at a budget whose weights are saved and whose row this is."""
    name = validation_name(run, config, images_seen)
    is_named = row.get("val_loss") is not None and is_measurement(row.get("validation"), name)
    if not is_named or not run.validation_file(images_seen).exists():
        yield Pending(what="validation", images_seen=images_seen)
    there = row.get("probes") or []
    for section in config.evaluation.probes:
        entries = finished_entries(run, config, images_seen, section)
        if entries is None or not all(entry in there for entry in entries):
            yield Pending(what="probe", images_seen=images_seen, section=section)


def update_row(run: RunDir, config: RunConfig, images_seen: int) -> dict[str, Any]:
    """Update a saved budget's row from its files and return it; the caller holds the run.

    Files of other weights are ignored. Probes replace those of the same evaluation and kind; others, of imported rows
    say, stay.
    """
    before = next((row for row in run.read_rows() if row["images_seen"] == images_seen), None)
    row = before or saved_budgets(run)[images_seen].get("row") or {"images_seen": images_seen}
    row = row | _validation_columns(run, images_seen)
    name, folder = weights_name(run, config, images_seen), run.probes_dir(images_seen)
    entries = [entry for each in task_files(folder) if each.get("backbone") == name for entry in entries_of(each)]
    measured = {probe_key(entry) for entry in entries}
    others = [entry for entry in row.get("probes") or () if probe_key(entry) not in measured]
    row["probes"] = sorted([*entries, *others], key=lambda entry: str(entry["task"]))
    if row != before:
        finished_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        run.record_row(row | {"finished_at": finished_at})
    return row


def _validation_columns(run: RunDir, images_seen: int) -> dict[str, Any]:
    """Read the columns of the validation file, if it is of the present weights."""
    try:
        with np.load(run.validation_file(images_seen)) as arrays:
            name = str(arrays["name"])
            if name.rpartition(".")[2] == weights_content(run, images_seen):
                values = {column: arrays[column].item() for column in VALIDATION_COLUMNS}
                return {"validation": name} | {k: v if math.isfinite(v) else None for k, v in values.items()}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # none, or damaged: it is measured again
    return {}
