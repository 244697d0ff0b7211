"""Bring run directories of earlier versions along: the names of today, and everything that is kept under them.

Each file is rewritten by itself and the directory renamed last, so that a migration that was cut off is begun again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.data.store.card import with_fingerprints
from aimscale.harness.run.config import ProbeSection, RunConfig, parse
from aimscale.harness.run.files import write_json, write_text
from aimscale.harness.run.identity import filled_probe
from aimscale.harness.run.provenance import is_imported
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.state.claims import RunRecord


def misnamed(sweep: Sweep) -> list[str]:
    """Run directories whose `config.yaml` is of an earlier version."""
    found = []
    for path in sorted(sweep.runs_dir.glob("*/config.yaml")):
        try:
            is_old = "\nresult:" in path.read_text() and not is_imported(RunRecord(path.parent))
        except (OSError, ValueError):
            continue
        if is_old:
            found.append(path.parent.name)
    return found


def migrate(sweep: Sweep, *, dry_run: bool = False) -> Iterator[tuple[str, str | None, str]]:
    """Rename the runs of earlier versions and rewrite what names them; what cannot be brought along stays as it is.

    Yields:
        (old name, new name or None where it stays, a sentence).
    """
    for name in misnamed(sweep):
        record = RunRecord(sweep.run_dir(name))
        try:
            config = _named(record)
            target = sweep.run_dir(config.run_id)
            if target != record.path and target.exists():
                raise SweepError(f"{target} holds the same run already; compare the two and move one away")
            if record.is_held() or record.read_claim() is not None:
                raise SweepError(f"{record.path} runs or waits in a queue; cancel it first")
            if not dry_run:
                _rewrite(record, config)
                record.path.rename(target)
        except (UserError, OSError, ValueError, KeyError, TypeError) as error:
            yield name, None, str(error)
            continue
        yield name, config.run_id, "would become" if dry_run else "is now"


def _named(record: RunRecord) -> RunConfig:
    """The run's configuration with the fingerprints of the data that it was trained on."""
    config = with_fingerprints(record.load_config())
    prints = [source.fingerprint for source in config.training.data.sources]
    if None in prints:
        missing = config.training.data.sources[prints.index(None)].path
        raise SweepError(f"{record.path} was trained on {missing}, which cannot be read now; make it readable first")
    mixture = hashlib.blake2b(" ".join(map(str, prints)).encode(), digest_size=8).hexdigest()
    if any(row.get("data_fingerprint", mixture) != mixture for row in record.read_rows()):
        raise SweepError(f"the data of {record.path} are not those that it was trained on; put those back first")
    return config


def _rewrite(record: RunRecord, config: RunConfig) -> None:
    new = {"run_id": config.run_id, "config_hash": config.training_hash}
    rows = [row | new for row in record.read_rows()]
    for path in record.path.glob("budgets/*/model.json"):
        budget = json.loads(path.read_text())
        row = next((row for row in rows if row["images_seen"] == budget["images_seen"]), None)
        write_json(path, budget | {"run_id": config.run_id} | ({} if row is None else {"row": row}))
    for path in record.path.glob("checkpoints/*/manifest.json"):
        write_json(path, json.loads(path.read_text()) | {"run_id": config.run_id})
    for path in record.path.glob("probes/*/*.json"):
        _rewrite_probe(record, config, path)
    if rows:
        write_json(record.results, json.loads(record.results.read_text()) | {"rows": rows})
    write_text(record.config, config.to_yaml())


def _rewrite_probe(record: RunRecord, config: RunConfig, path: Path) -> None:
    """Name the weights of a task's file by their content; one of other weights than those there is left alone."""
    from aimscale.harness.probe.files import task_key, weights_name

    document: dict[str, Any] = json.loads(path.read_text())
    images_seen, (_, train, test, seed) = int(path.parent.name), document["key"].rsplit("/", 3)
    backbone, size = document["backbone"], record.model_file(images_seen).stat().st_size
    if f"({size} bytes of " not in backbone:
        return
    section = parse(ProbeSection, filled_probe(document["task"]), str(path))
    name = weights_name(record, config, images_seen)
    protocol = document["probes"][0].get("protocol", 1)
    key = task_key(name, section, train, test, int(seed), protocol=protocol)
    write_json(path, document | {"backbone": name, "key": key})
