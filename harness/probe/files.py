"""The files of probes in a run directory: when a task counts as done, who works on it, how it gets into the rows.

`probes/<images_seen>/<task>-<settings>-<data>.json` is the truth, one for every evaluation; a row's `probes` follow
from it. A probe job, the trainer and a person may come to one task at the same time: the first holds its lock, the
others wait and then find it done.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aimscale.harness.data.store.card import fingerprint
from aimscale.harness.device.distributed import Group
from aimscale.harness.run.config import ProbeSection, RunConfig
from aimscale.harness.run.directory import RunDir, RunDirError
from aimscale.harness.run.files import locked
from aimscale.harness.run.identity import EVALUATION_DEFAULTS, evaluation_digest, probe_evaluation

SCHEMA_VERSION = 1
"""Of a task's file."""
PROTOCOL = 3
"""How probes are trained and scored. 2: the query starts with a deviation of 0.02, statistics and pooled features come
from one pass, LoRA adapts query, value and output projection. 3: heads that the hold-out judges and heads that are kept
train together. What an earlier one left is not taken for this one's."""
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


def evaluation_of(section: ProbeSection, train: str | None, test: str | None) -> str:
    """The name of a task's evaluation on data of these fingerprints."""
    return probe_evaluation(section.model_dump(mode="json"), train, test)


def task_key(
    backbone: str, section: ProbeSection, train: str, test: str, seed: int, *, protocol: int = PROTOCOL
) -> str:
    """All that a task's numbers depend on: weights, protocol, settings, both data fingerprints and the seed."""
    settings = evaluation_digest("probe", section.model_dump(mode="json"))
    return "/".join([backbone, f"protocol {protocol}", settings, train, test, str(seed)])


def _key_of(document: dict[str, Any]) -> tuple[str, ...]:
    """The parts of a file's key, with the settings as they are called today."""
    backbone, _, *rest = document["key"].rsplit("/", 4)
    return backbone, evaluation_digest("probe", EVALUATION_DEFAULTS["probe"] | document["task"]), *rest


def validation_name(run: RunDir, config: RunConfig, images_seen: int) -> str:
    """Settings, images (`*` where they cannot be looked at) and weights of a budget's validation, with dots between."""
    section = config.evaluation.validation
    settings = evaluation_digest("validation", section.model_dump(mode="json"))
    return f"{settings}.{fingerprint(section.path) or '*'}.{weights_content(run, images_seen)}"


def is_probed(run: RunDir, config: RunConfig, images_seen: int, section: ProbeSection) -> bool:
    """Whether a task was probed with these settings; data that cannot be looked at now count as unchanged."""
    train, test = fingerprint(section.train) or "*", fingerprint(section.test) or "*"
    key = task_key(weights_name(run, config, images_seen), section, train, test, config.training.seed)
    return set(section.kinds) <= finished_probes(run.probes_dir(images_seen), section, key).keys()


def finished_probes(folder: Path, section: ProbeSection, key: str, *, since: float = 0.0) -> dict[str, dict[str, Any]]:
    """Kind -> probe, of those of a task's kinds that files of this key hold; a fingerprint of `*` stands for any.

    Args:
        since: files older than this Unix time do not count.
    """
    wanted = key.rsplit("/", 4)
    found: dict[str, dict[str, Any]] = {}
    earlier = folder / f"{section.task}.json"  # as files were called while a task had one evaluation
    for path in [earlier, *folder.glob(f"{glob.escape(section.task)}-{wanted[1]}-*.json")]:
        try:
            if path.stat().st_mtime < since:
                continue
            document = json.loads(path.read_text())
            if all(want in ("*", part) for part, want in zip(_key_of(document), wanted, strict=True)):
                found |= {detail["kind"]: detail for detail in document["probes"]}
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path} is damaged ({error}) and not used", file=sys.stderr, flush=True)
    return {kind: found[kind] for kind in section.kinds if kind in found}


def probe_head(run: RunDir, images_seen: int, probe: str) -> Path:
    """The attentive head of a task, or of `<task>-<evaluation>` where there are several cards.

    Raises:
        RunDirError: none, or several.
    """
    folder, end = run.probes_dir(images_seen), ".attentive.safetensors"
    names = [path.name.removesuffix(end) for path in sorted(folder.glob(f"*{end}"))]
    found = [name for name in names if name == probe or re.fullmatch(re.escape(probe) + r"-\w{8}-\w{8}", name)]
    if len(found) != 1:
        raise RunDirError(
            f"{folder} has {len(found)} attentive heads of '{probe}'; it has {', '.join(names) or 'none'}"
        )
    return folder / f"{found[0]}{end}"


def as_entry(detail: dict[str, Any]) -> dict[str, Any]:
    """The part of a task file's probe that goes into a results row."""
    return {name: value for name, value in detail.items() if name not in ("per_class", "grid")}


def entries_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries for a results row of a task's file, each with the name of its evaluation."""
    evaluation = {}
    if "key" in document:
        _, _, train, test, _ = _key_of(document)
        evaluation = {"evaluation": probe_evaluation(EVALUATION_DEFAULTS["probe"] | document["task"], train, test)}
    return [evaluation | as_entry(detail) for detail in document["probes"]]


@contextlib.contextmanager
def task_lock(folder: Path | None, name: str, group: Group, pause: Pause = lambda: None) -> Iterator[None]:
    """Hold an evaluation in a folder for this group of ranks, after any other that has it; its death drops it."""
    if folder is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        path, told = folder / f".{name}.lock", False
        while not group.from_first(stack.enter_context(locked(path, wait=False)) if group.is_first else None):
            if group.is_first and not told:
                print(f"waiting: another process probes {name} in {folder}", file=sys.stderr, flush=True)
            told = True
            pause()
            time.sleep(LOCK_POLL_S)
        yield


def with_probes_of_files(run: RunDir, config: RunConfig, row: dict[str, Any]) -> dict[str, Any]:
    """A budget's row with the probes that the budget's task files hold for its present weights.

    They replace those of the same evaluation and kind; other entries (of imported rows, say) stay.
    """
    images_seen = row["images_seen"]
    folder = run.probes_dir(images_seen)
    if not folder.is_dir() or not run.model_file(images_seen).exists():
        return row
    name = weights_name(run, config, images_seen)
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    entries = [entry for each in documents if each.get("backbone") == name for entry in entries_of(each)]
    measured = {(entry["task"], entry["kind"]) for entry in entries}
    known = {_place(entry): entry for entry in row.get("probes") or []}
    # earlier rows did not say which evaluation an entry is of: the files do
    kept = {place: entry for place, entry in known.items() if "evaluation" in entry or place[:2] not in measured}
    return {**row, "probes": list((kept | {_place(entry): entry for entry in entries}).values())}


def _place(entry: dict[str, Any]) -> tuple[str, str, str | None]:
    return entry["task"], entry["kind"], entry.get("evaluation")


def merge_into_rows(run: RunDir, config: RunConfig, images_seen: int) -> None:
    """Bring a budget's row up to its task files; a budget without a row has its files until the trainer writes one."""
    run.update_row(images_seen, lambda row: None if row is None else with_probes_of_files(run, config, row))
