"""Identities of runs and evaluations: the fields that differ from their defaults, and the content of the data sets,
never a path, a time or a machine.

A new field must default to what the code did before: then no run is renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

Values = Mapping[str, Any]


def training_digest(training: Values, horizon: int | None) -> str:
    """Compute eight hex digits that identify what a run trains.

    Args:
        training: `TrainingConfig` as JSON values, without those that are defaults.
        horizon: images after which a cosine schedule ends; None under `wsd`, where budgets branch off one trunk.
    """
    fields = flatten({**training, "init": _identity_of(training.get("init"))})
    fields["data.sources"] = [
        {
            "content": source.get("fingerprint") or f"unknown: {source['path']}",
            **({"probability": source["probability"]} if "probability" in source else {}),
        }
        for source in training["data"]["sources"]
    ]
    return config_digest("training", fields | ({} if horizon is None else {"schedule.images": horizon}))


def _identity_of(init: Values | None) -> Values:
    """Return what identifies the start of a run: its source by content and not by path, and what is done with it."""
    if not init:
        return {}
    source = init.get("run") or init.get("digest") or f"unknown: {init['weights']}"
    return {"source": source, **{name: init[name] for name in ("parts", "freeze_images") if name in init}}


def flatten(values: Values, prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def config_digest(kind: Literal["training", "validation", "probe", "program", "clock"], fields: Values) -> str:
    """Compute eight hex digits of what is trained or how something is measured."""
    text = json.dumps({"schema": 1, "kind": kind, **fields}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return short_hash(text)


def is_measurement(measurement: str | None, wanted: str) -> bool:
    """Return whether the name of a measurement is the one wanted, field by field.

    Fields are separated by dots or dashes. `*` in `wanted` is data that cannot be read, which count as unchanged.
    """
    fields, wanted_fields = (re.split(r"[.-]", name) for name in (measurement or "", wanted))
    return len(fields) == len(wanted_fields) and all(
        pattern in ("*", field) for field, pattern in zip(fields, wanted_fields, strict=True)
    )


def short_hash(text: str) -> str:
    """Compute eight hex digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
