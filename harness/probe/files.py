"""The files of probes in a run directory: when a task counts as done, who works on it, how it gets into the rows.

`probes/<images_seen>/<task>.json` is the truth; a row's `probes` follow from it. A probe job, the trainer and a person
may come to one task at the same time: the first holds its lock, the others wait and then find it done.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aimscale.harness.data.store.card import fingerprint
from aimscale.harness.device.distributed import Group
from aimscale.harness.run.config import ProbeSection, RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import locked
from aimscale.harness.run.identity import evaluation_digest

SCHEMA_VERSION = 1
"""Of `probes/<images_seen>/<task>.json`."""
PROTOCOL = 2
"""How probes are trained and scored. 2: the query starts with a deviation of 0.02, statistics and pooled features come
from one pass, LoRA adapts query, value and output projection. What an earlier one left is not taken for this one's."""
LOCK_POLL_S = 1.0
"""How often a process that waits for another's task looks again."""

_PIECE = 1 << 16

Pause = Callable[[], None]
"""Called by all ranks together wherever a probe's work is saved; raises to stop there."""


def weights_name(run: RunDir, config: RunConfig, images_seen: int) -> str:
    """Identifies a budget's weights in the files of its probes: by their content, which a copy shares."""
    return f"{config.run_id}@{images_seen} {weights_content(run, images_seen)}"


def weights_content(run: RunDir, images_seen: int) -> str:
    """16 hex digits of a budget's weights."""
    path = run.model_file(images_seen)
    found = path.stat()
    return _content(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _content(path: Path, size: int, mtime_ns: int) -> str:
    """16 hex digits of a file's size, start, end and 64 pieces between: training changes every weight."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for number in range(65):
            file.seek(number * max(0, size - _PIECE) // 64)
            digest.update(file.read(_PIECE))
    return digest.hexdigest()


def task_key(backbone: str, section: ProbeSection, train: str, test: str, seed: int) -> str:
    """All that a task's numbers depend on: weights, protocol, settings, both data fingerprints and the seed."""
    settings = evaluation_digest("probe", section.model_dump(mode="json"))
    return "/".join([backbone, f"protocol {PROTOCOL}", settings, train, test, str(seed)])


def validation_name(run: RunDir, config: RunConfig, images_seen: int) -> str:
    """Settings, images (`*` where they cannot be looked at) and weights of a budget's validation, with dots between."""
    section = config.evaluation.validation
    settings = evaluation_digest("validation", section.model_dump(mode="json"))
    return f"{settings}.{fingerprint(section.path) or '*'}.{weights_content(run, images_seen)}"


def is_probed(run: RunDir, config: RunConfig, images_seen: int, section: ProbeSection) -> bool:
    """Whether a task was probed with these settings; data that cannot be looked at now count as unchanged."""
    try:
        key = str(json.loads((run.probes_dir(images_seen) / f"{section.task}.json").read_text())["key"])
        _, old_train, old_test, _ = key.rsplit("/", 3)
    except (OSError, ValueError, KeyError):
        return False
    train, test = fingerprint(section.train) or old_train, fingerprint(section.test) or old_test
    return key == task_key(weights_name(run, config, images_seen), section, train, test, config.training.seed)


def finished_probes(path: Path, key: str | None = None, *, since: float = 0.0) -> list[dict[str, Any]] | None:
    """Probes of a finished task file; None where there is none, or one of another key, or one older than `since`."""
    try:
        if path.stat().st_mtime < since:
            return None
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    probes: list[dict[str, Any]] = document["probes"]
    return probes if key in (None, document.get("key")) else None


def as_entry(detail: dict[str, Any]) -> dict[str, Any]:
    """The part of a task file's probe that goes into a results row."""
    return {name: value for name, value in detail.items() if name not in ("per_class", "grid")}


@contextlib.contextmanager
def task_lock(folder: Path | None, task: str, group: Group, pause: Pause = lambda: None) -> Iterator[None]:
    """Hold a task of one folder for this group of ranks, after any other that has it; the kernel drops it at death."""
    if folder is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        path, told = folder / f".{task}.lock", False
        while not group.from_first(stack.enter_context(locked(path, wait=False)) if group.is_first else None):
            if group.is_first and not told:
                print(f"waiting: another process probes {task} in {folder}", file=sys.stderr, flush=True)
            told = True
            pause()
            time.sleep(LOCK_POLL_S)
        yield


def with_probes_of_files(run: RunDir, config: RunConfig, row: dict[str, Any]) -> dict[str, Any]:
    """A budget's row with the probes that the budget's task files hold for its present weights.

    They replace those of the same task and kind; other entries (of imported rows, say) stay.
    """
    images_seen = row["images_seen"]
    folder = run.probes_dir(images_seen)
    if not folder.is_dir() or not run.model_file(images_seen).exists():
        return row
    name = weights_name(run, config, images_seen)
    entries = {(entry["task"], entry["kind"]): entry for entry in row.get("probes") or []}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if document.get("backbone") == name:
            entries |= {(each["task"], each["kind"]): as_entry(each) for each in document["probes"]}
    return {**row, "probes": list(entries.values())}


def merge_into_rows(run: RunDir, config: RunConfig, images_seen: int) -> None:
    """Bring a budget's row up to its task files; a budget without a row has its files until the trainer writes one."""
    run.update_row(images_seen, lambda row: None if row is None else with_probes_of_files(run, config, row))
