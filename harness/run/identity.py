"""What names a run and an evaluation: the fields that differ from the defaults of a schema version, and the content of
the data sets, never a path, a time or a machine.

The tables below are those defaults, frozen. Whoever adds a field adds it here with the value under which the code does
what it did before the field existed: then no run is renamed. A default that changes later stays as it is here, so that
old runs keep their names and new ones get others. `tests/harness/run/test_identity.py` insists on both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

SCHEMA: Literal[1] = 1
"""Version of the tables; kept in every `config.yaml`."""

Values = Mapping[str, Any]

TRAINING_DEFAULTS: dict[str, Any] = {
    "model.image_size": 224,
    "model.patch_size": 14,
    "model.channels": 3,
    "model.head_rule": "proportional",
    "model.head_width": None,
    "model.head_depth": None,
    "model.ln_residual": False,
    "model.patch_order": "raster",
    "model.parametrisation": "standard",
    "model.norm_eps": 1e-6,
    "model.qkv_init": "fused",
    "data.unique_images": None,
    "data.crop_scale": [0.4, 1.0],
    "data.crop_ratio": [3 / 4, 4 / 3],
    "data.horizontal_flip": True,
    "data.color_jitter": False,
    "data.max_bad_fraction": 0.01,
    "data.shuffle_buffer": 1000,
    "objective.target": "normalised",
    "objective.prefix": "paired",
    "optimiser.batch_size": 4096,
    "optimiser.lr_peak": 1e-3,
    "optimiser.betas": [0.9, 0.95],
    "optimiser.eps": 1e-8,
    "optimiser.weight_decay": 0.05,
    "optimiser.clip_norm": 1.0,
    "optimiser.precision": "bf16",
    "schedule.kind": "wsd",
    "schedule.warmup_images": 128_000_000,
    "schedule.lr_start": 1e-6,
    "schedule.lr_end": 0.0,
    "schedule.decay_fraction": 0.2,
    "seed": 0,
}
"""Of `TrainingConfig`, but for the model's size and the data sets, which always count."""

EVALUATION_DEFAULTS: dict[str, dict[str, Any]] = {
    "validation": {"num_images": None, "num_prefixes": 4, "centre_crop": 1.0},
    "probe": {
        "kinds": ["linear", "attentive"],
        "augmentation": "none",
        "centre_crop": 1.0,
        "precision": "fp32",
        "epochs": 20,
        "iterations": None,
        "batch_size": 256,
        "lrs": [3e-4, 1e-3, 3e-3, 1e-2],
        "holdout_fraction": 0.2,
    },
}
"""Of `ValidationSection` and `ProbeSection`, but for the task's name and the data sets, which always count."""

GONE = {"refit": True}
"""Fields of a probe that are no more, with the value of what is done now: evaluations that had it keep their names."""

PATHS = ("path", "train", "test")
"""Fields of an evaluation that say where its data lie."""


def training_digest(training: Values, horizon: int | None) -> str:
    """Eight hex digits of what a run trains.

    Args:
        training: `TrainingConfig` as JSON values.
        horizon: images after which a cosine schedule ends; None under `wsd`, where budgets branch off one trunk.
    """
    fields = _differing(_flat(training), TRAINING_DEFAULTS)
    fields["data.sources"] = [
        {
            "content": source["fingerprint"] or f"unknown: {source['path']}",
            **({"probability": source["probability"]} if source["probability"] != 1 else {}),
        }
        for source in training["data"]["sources"]
    ]
    return _digest("training", fields | ({} if horizon is None else {"schedule.images": horizon}))


def evaluation_digest(kind: Literal["validation", "probe"], settings: Values) -> str:
    """Eight hex digits of how something is measured: `ValidationSection` or `ProbeSection`.

    Whatever the data are, and whichever kinds of probes are wanted: another kind does not change those that are there.
    """
    measured = {key: value for key, value in settings.items() if key not in (*PATHS, "kinds")}
    return _digest(kind, _differing(measured, EVALUATION_DEFAULTS[kind] | GONE))


def probe_evaluation(settings: Values, train: str | None, test: str | None) -> str:
    """What names a task's evaluation in files and tables: its settings, and its data by their fingerprints.

    Data that cannot be looked at now are `*`.
    """
    data = hashlib.sha256(f"{train} {test}".encode()).hexdigest()[:8] if train and test else "*"
    return f"{evaluation_digest('probe', settings)}-{data}"


def filled_training(training: Any) -> Any:
    """A written `training` with the defaults of the schema for fields that it lacks."""
    if not isinstance(training, dict):
        return training
    filled = {key: dict(value) if isinstance(value, dict) else value for key, value in training.items()}
    for dotted, value in TRAINING_DEFAULTS.items():
        section, _, name = dotted.partition(".")
        if not name:
            filled.setdefault(section, value)
        else:
            place = filled.setdefault(section, {})
            if isinstance(place, dict):
                place.setdefault(name, value)
    return filled


def filled_probe(task: Values) -> dict[str, Any]:
    """A written probe with the defaults of the schema for fields that it lacks, without those that are no more."""
    return {key: value for key, value in {**EVALUATION_DEFAULTS["probe"], **task}.items() if key not in GONE}


def filled_evaluation(evaluation: Any) -> Any:
    """A written `evaluation` with the defaults of the schema for fields that it lacks."""
    if not isinstance(evaluation, dict):
        return evaluation
    filled = dict(evaluation)
    if isinstance(validation := filled.get("validation"), dict):
        filled["validation"] = EVALUATION_DEFAULTS["validation"] | validation
    if isinstance(probes := filled.get("probes"), list | tuple):
        filled["probes"] = [filled_probe(task) if isinstance(task, dict) else task for task in probes]
    return filled


def _differing(values: Values, defaults: Values) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}


def _flat(values: Values, prefix: str = "") -> dict[str, Any]:
    """Nested sections by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _digest(kind: str, fields: Values) -> str:
    """Of the canonical JSON: sorted keys, no spaces; what JSON cannot say, NaN included, is an error."""
    text = json.dumps(
        {"schema": SCHEMA, "kind": kind, **fields}, sort_keys=True, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()[:8]
