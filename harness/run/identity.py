"""What names a run and an evaluation: the fields that differ from their defaults, and the content of the data sets,
never a path, a time or a machine.

Whoever adds a field gives it the default under which the code does what it did before: then no run is renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

Values = Mapping[str, Any]


def training_digest(training: Values, horizon: int | None) -> str:
    """Eight hex digits of what a run trains.

    Args:
        training: `TrainingConfig` as JSON values, without those that are defaults.
        horizon: images after which a cosine schedule ends; None under `wsd`, where budgets branch off one trunk.
    """
    fields = _flat(training)
    fields["data.sources"] = [
        {
            "content": source.get("fingerprint") or f"unknown: {source['path']}",
            **({"probability": source["probability"]} if "probability" in source else {}),
        }
        for source in training["data"]["sources"]
    ]
    return digest_of("training", fields | ({} if horizon is None else {"schedule.images": horizon}))


def probe_evaluation(digest: str, train: str | None, test: str | None) -> str:
    """What names a task's evaluation in files and tables: its settings, and its data by their fingerprints.

    Data that cannot be looked at now are `*`.
    """
    data = hashlib.sha256(f"{train} {test}".encode()).hexdigest()[:8] if train and test else "*"
    return f"{digest}-{data}"


def _flat(values: Values, prefix: str = "") -> dict[str, Any]:
    """Nested sections by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def digest_of(kind: Literal["training", "validation", "probe"], fields: Values) -> str:
    """Eight hex digits of what is trained or how something is measured.

    Args:
        fields: as JSON values, without those that are defaults, and without what changes no number.
    """
    text = json.dumps({"schema": 1, "kind": kind, **fields}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
