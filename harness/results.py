"""What a run has measured, what it lacks, and the files that say so; torch is not imported.

`probes/<images_seen>/<task>-<settings>-<data>.json` is the source of truth, one file per evaluation, rewritten with
every kind of probe that is done; a row's `probes` follow from it. One list names what is still to be done: the programs
that train and evaluate work it off, and launchers start them.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import glob
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aimscale.aim.errors import UserError, some
from aimscale.harness.data.store.dataset_info import fingerprint
from aimscale.harness.run.config import ProbeSection, RunConfig, ValidationSection
from aimscale.harness.run.directory import WEIGHTS_CRC32, RunDir, RunDirError, probe_key
from aimscale.harness.run.files import is_intact, read_object, sealed, write_json
from aimscale.harness.run.lock import writer_folder
from aimscale.harness.run.row import configured_columns
from aimscale.harness.run.schedule import missing_budgets, saved_budgets
from aimscale.harness.run.section import is_measurement

_log = logging.getLogger(__name__)

PROTOCOL = 5
"""Version of how probes are trained and scored; results of other versions are not used."""
_PIECE = 1 << 16

Key = dict[str, str | int]
"""Everything that a task's numbers depend on: `backbone`, `protocol`, `evaluation` and `seed`, as in a task's file."""
VALIDATION_COLUMNS = ("val_loss", "val_loss_se", "val_num_images")
"""Columns of a row that a validation file holds under the same names."""
CONFIGURED_COLUMNS = ("seed", "batch_size", "lr_peak", "image_size", "patch_size", "params_total")
"""Columns of a row that every release computes alike from a run's configuration."""
NOTE = "complete.json"
"""File of a run that says that nothing was missing, and of what that depends."""
DATA_INTERVAL_S = 10.0
"""Interval between looks at whether a data set was changed, s."""


def weights_name(run: RunDir, config: RunConfig, images_seen: int) -> str:
    """Name a budget's weights in the files of its probes: by their content, which a copy shares."""
    return f"{config.run_id}@{images_seen} {weights_content(run, images_seen)}"


def weights_content(run: RunDir, images_seen: int) -> str:
    """Return 16 hex digits that identify a budget's weights.

    A process that holds the run keeps them in a file beside the weights, so that nobody has to read these to learn
    that nothing is to be done.
    """
    path = run.model_file(images_seen)
    stat = path.stat()
    size, mtime_ns, kept = stat.st_size, stat.st_mtime_ns, path.with_name("digest.json")
    with contextlib.suppress(OSError, ValueError, RecursionError):
        match json.loads(kept.read_bytes()):
            case {"size": s, "mtime_ns": t, "content": str(content)} if (s, t) == (size, mtime_ns):
                return content
    content = _content(path, size, mtime_ns)
    if writer_folder(path):
        write_json(kept, {"size": size, "mtime_ns": mtime_ns, "content": content}, durable=False)
    return content


@functools.cache
def _content(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a safetensors file's size, start, end and 64 pieces between to 16 hex digits: training changes every weight.

    Its header does not count, since it holds the budget's row, with times.
    """
    with path.open("rb") as file:
        start = min(size, 8 + int.from_bytes(file.read(8), "little"))
        digest = hashlib.blake2b(str(size - start).encode(), digest_size=8)
        for number in range(65):
            file.seek(start + number * max(0, size - start - _PIECE) // 64)
            digest.update(file.read(_PIECE))
    return digest.hexdigest()


def validation_settings(section: ValidationSection) -> str:
    """Name settings and images (`*` if they cannot be read) of a validation, with a dot between."""
    return f"{section.digest}.{fingerprint(section.path) or '*'}"


def validation_name(run: RunDir, config: RunConfig, images_seen: int) -> str:
    """Name a budget's validation: `validation_settings` and the weights."""
    return f"{validation_settings(config.evaluation.validation)}.{weights_content(run, images_seen)}"


def task_key(backbone: str, section: ProbeSection, train: str | None, test: str | None, seed: int) -> Key:
    """Return a task's key on data of these fingerprints; if one is None, its evaluation ends with `*`."""
    return {"backbone": backbone, "protocol": PROTOCOL, "evaluation": section.evaluation_id(train, test), "seed": seed}


def finished_entries(
    run: RunDir, config: RunConfig, images_seen: int, section: ProbeSection
) -> list[dict[str, Any]] | None:
    """Return a task's entries if all are done for a budget's weights, else None; data not here count as unchanged."""
    name, prints = weights_name(run, config, images_seen), (fingerprint(section.train), fingerprint(section.test))
    key = task_key(name, section, *prints, config.training.seed)
    finished = finished_probes(run.probes_dir(images_seen), section.task, key)
    return [as_entry(finished[kind]) for kind in section.kinds] if set(section.kinds) <= finished.keys() else None


def finished_probes(folder: Path, task: str, key: Key) -> dict[str, dict[str, Any]]:
    """Return the probes, by kind, in a task's files of this key."""
    finished: dict[str, dict[str, Any]] = {}
    evaluation, rest = str(key["evaluation"]), {name: value for name, value in key.items() if name != "evaluation"}
    for document in task_files(folder, f"{glob.escape(task)}-*.json"):
        is_same = is_measurement(document.get("evaluation"), evaluation)
        if is_same and all(document.get(name) == value for name, value in rest.items()):
            finished |= {detail["kind"]: detail for detail in document["probes"] if detail["task"] == task}
    return finished


def task_files(folder: Path, pattern: str = "*.json") -> Iterator[dict[str, Any]]:
    """Yield the contents of the tasks' files in a folder, in order of names; a damaged one is reported and skipped."""
    for path in sorted(folder.glob(pattern)):
        try:
            document = json.loads(path.read_bytes())
            if not all(isinstance(detail[name], str) for detail in document["probes"] for name in ("task", "kind")):
                raise TypeError("a probe without a name")
            if not is_intact(document):
                raise ValueError("its checksum is another")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("%s is damaged (%s) and not used", path, error)
        else:
            yield document


def add_probes(folder: Path, section: ProbeSection, key: Key, probes: dict[str, dict[str, Any]], **about: Any) -> None:
    """Add probes, by kind, and further fields to a task's file; probes of other kinds under the same key are kept."""
    whole = finished_probes(folder, section.task, key) | probes
    whole = {kind: whole[kind] for kind in [*section.kinds, *whole] if kind in whole}  # in the order asked for
    task = section.model_dump(mode="json") | {"kinds": list(whole)}
    path = folder / f"{section.task}-{key['evaluation']}.json"
    write_json(path, sealed({**key, "task": task, **about, "probes": list(whole.values())}))


def probe_head(run: RunDir, images_seen: int, probe: str) -> Path:
    """Return the file of a task's attentive head, or of `<task>-<evaluation>` if there are several evaluations."""
    folder, end = run.probes_dir(images_seen), ".attentive.safetensors"
    names = [path.name.removesuffix(end) for path in sorted(folder.glob(f"*{end}"))]
    matches = [name for name in names if name == probe or re.fullmatch(re.escape(probe) + r"-\w{8}-\w{8}", name)]
    if len(matches) != 1:
        raise RunDirError(f"{folder} has {len(matches)} attentive heads of '{probe}'; it has {some(names) or 'none'}")
    return folder / f"{matches[0]}{end}"


def as_entry(detail: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a task file's probe that goes into a results row."""
    return {name: value for name, value in detail.items() if name not in ("per_class", "grid", "hits")}


def entries_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a results row's entries of a task's file."""
    return [as_entry(detail) for detail in document["probes"]]


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Training or evaluation that a run lacks at one of its budgets."""

    what: Literal["training", "validation", "probe", "evaluation"]
    images_seen: int
    """Budget."""
    section: ProbeSection | None = None
    """Task of a probe."""

    def __str__(self) -> str:
        return f"{self.section.task if self.section else self.what} at {self.images_seen}"


def pending_work(run: RunDir, config: RunConfig, *, trust_note: bool = True) -> list[Pending]:
    """List what `config` asks of a run and is missing; a run is finished when the list is empty.

    A result is there if its file is, for the present weights, settings and data, and if the budget's row says so too.
    Data that cannot be read count as unchanged. A process that holds the run notes when nothing is missing, so that a
    look at many runs need not read their results.

    Args:
        trust_note: whether that note counts, while `results.json` is as it was and the same is asked for.
    """
    if trust_note and _is_noted(run, config):
        return []
    pending = [Pending(what="training", images_seen=budget) for budget in missing_budgets(run, config)]
    rows = {row["images_seen"]: row for row in run.read_rows()}
    for budget in saved_budgets(run):
        if budget in config.evaluation.budgets:
            pending += pending_evaluations(run, config, budget, rows.get(budget, {}))
    if not pending and writer_folder(run.root / NOTE):
        write_json(run.root / NOTE, {"digest": _digest(run, config)}, durable=False)
    return pending


def _is_noted(run: RunDir, config: RunConfig) -> bool:
    """Return whether a note says that nothing was missing, and results and what is asked for are as they were then."""
    with contextlib.suppress(UserError):  # damaged
        return (read_object(run.root / NOTE) or {}).get("digest") == _digest(run, config)
    return False


def check_rows(run: RunDir, config: RunConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Compare rows with the validation files and the configuration that they follow from; a noted run was compared.

    Raises:
        RunDirError: a value differs, or a validation file is damaged.
    """
    for row in () if _is_noted(run, config) else rows:
        path, planned = run.validation_file(row["images_seen"]), configured_columns(config)
        if (measured := _read_validation(path)) is None and path.exists():
            raise RunDirError(f"{path} is damaged; remove it, and launch to measure it again")
        is_same = measured is not None and measured["validation"] == row.get("validation")
        expected = {name: planned[name] for name in CONFIGURED_COLUMNS} | ((is_same and measured) or {})
        if wrong := [name for name, value in expected.items() if row.get(name) not in (None, value)]:
            raise RunDirError(
                f"{run.results} is damaged ({wrong[0]} {row[wrong[0]]} at {row['images_seen']} images is "
                f"{expected[wrong[0]]} in other files); restore it, or move it away and launch to make it again"
            )


def _digest(run: RunDir, config: RunConfig) -> str:
    """Digest what is asked for, of which data, and the size and time of the run's results."""
    asked, written = config.evaluation, tuple[int, ...]()
    paths = [asked.validation.path, *(path for each in asked.probes for path in (each.train, each.test))]
    for path in (run.root / "results.json", run.evaluation.results):
        with contextlib.suppress(FileNotFoundError):
            results = os.stat(path)
            written += results.st_size, results.st_mtime_ns
    data = [_fingerprint_at(path, int(time.monotonic() / DATA_INTERVAL_S)) for path in paths]
    return hashlib.sha256(repr([config.run_id, asked.model_dump_json(), data, written or (0, 0)]).encode()).hexdigest()


@functools.lru_cache(1024)
def _fingerprint_at(path: str, interval: int) -> str | None:
    """Return the fingerprint of a data set, which is read once in an interval: thousands of runs ask for it."""
    return fingerprint(path)


def pending_evaluations(run: RunDir, config: RunConfig, images_seen: int, row: dict[str, Any]) -> Iterator[Pending]:
    """List what is to be measured at a budget whose weights are saved and whose row this is."""
    name = validation_name(run, config, images_seen)
    is_named = row.get("val_loss") is not None and is_measurement(row.get("validation"), name)
    measured = _read_validation(run.validation_file(images_seen)) if is_named else None
    if not measured or not measured.items() <= row.items():
        yield Pending(what="validation", images_seen=images_seen)
    probed = row.get("probes") or []
    for section in config.evaluation.probes:
        entries = finished_entries(run, config, images_seen, section)
        if entries is None or not all(entry in probed for entry in entries):
            yield Pending(what="probe", images_seen=images_seen, section=section)


def record_trained(run: RunDir, images_seen: int, **columns: Any) -> None:
    """Record what training knows of a saved budget's row, by its weights and `columns`; the caller holds the run."""
    before = run.read_own_rows().get(images_seen)
    row = (before or saved_budgets(run)[images_seen].get("row") or {"images_seen": images_seen}) | columns
    if row != before:
        run.record_row(row | {"finished_at": _now()})


def update_row(run: RunDir, config: RunConfig, images_seen: int) -> dict[str, Any]:
    """Update what evaluation knows of a saved budget's row from its files, and return the row; the caller holds
    `run.evaluation`.

    Files of other weights are ignored. Probes replace those of the same evaluation and kind; others, of imported rows
    say, stay. A row that training has lost is made again from the weights.
    """
    before = next((row for row in run.read_rows() if row["images_seen"] == images_seen), None)
    row = before or saved_budgets(run)[images_seen].get("row") or {"images_seen": images_seen, "run_id": config.run_id}
    row = row | _validation_columns(run, images_seen)
    name, folder = weights_name(run, config, images_seen), run.probes_dir(images_seen)
    entries = [entry for each in task_files(folder) if each.get("backbone") == name for entry in entries_of(each)]
    measured = {probe_key(entry) for entry in entries}
    others = [entry for entry in row.get("probes") or () if probe_key(entry) not in measured]
    row["probes"] = sorted([*entries, *others], key=lambda entry: str(entry["task"]))
    if row != before:
        row["finished_at"], trained = _now(), RunDir(run.root).read_own_rows().get(images_seen, {})
        changed = {key: value for key, value in row.items() if key not in trained or trained[key] != value}
        of_weights = {key: trained[key] for key in (WEIGHTS_CRC32,) if key in trained}
        run.evaluation.record_row({"images_seen": images_seen} | of_weights | changed)
    return row


def _now() -> str:
    """Return the time of day that a row is stamped with."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _validation_columns(run: RunDir, images_seen: int) -> dict[str, Any]:
    """Read the columns of the validation file, if it is whole and of the present weights."""
    columns = _read_validation(run.validation_file(images_seen))
    if columns and columns["validation"].rpartition(".")[2] == weights_content(run, images_seen):
        return columns
    return {}


def _read_validation(path: Path) -> dict[str, Any] | None:
    """Read the name and the columns of a validation file; None if there is none, or it is damaged."""
    try:
        with np.load(path) as file:
            arrays = dict(file)  # all of them, since each has a checksum
            values = {column: arrays[column].item() for column in VALIDATION_COLUMNS}
    except Exception:  # zipfile, zlib and numpy raise many types on damaged files; it is measured again
        return None
    return {"validation": str(arrays["name"])} | {k: v if math.isfinite(v) else None for k, v in values.items()}
