"""Files of probes in a run directory, and the test of whether a task is done.

`probes/<images_seen>/<task>-<settings>-<data>.json` is the source of truth, one file per evaluation, rewritten with
every kind of probe that is done; a row's `probes` follow from it (`harness.results.pending`).
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aimscale.aim.errors import some
from aimscale.harness.data.store.dataset_info import fingerprint
from aimscale.harness.run.config import ProbeSection, RunConfig, ValidationSection
from aimscale.harness.run.directory import RunDir, RunDirError
from aimscale.harness.run.files import is_intact, sealed, write_json
from aimscale.harness.run.lock import writer_folder
from aimscale.harness.run.section import is_measurement

_log = logging.getLogger(__name__)

PROTOCOL = 5
"""Version of how probes are trained and scored; results of other versions are not used."""
_PIECE = 1 << 16

Key = dict[str, str | int]
"""Everything that a task's numbers depend on: `backbone`, `protocol`, `evaluation` and `seed`, as in a task's file."""


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
