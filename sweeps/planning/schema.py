"""The sweep file as a JSON Schema (2020-12), for editors and for programs that write sweep files."""

from __future__ import annotations

from typing import Any

from aimscale.harness.run.config import EvaluationConfig, RuntimeConfig, TrainingConfig
from aimscale.sweeps.planning.sweepfile import SweepFile

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
COUNT = {"type": "string", "pattern": r"^\s*[0-9._]+([eE]\+?[0-9]+)?\s*[kKMGBT]?\s*$"}
"""A count with its unit, such as 4k; plain numbers are counts, too."""

EXPONENT = {"type": "string", "pattern": r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"}
"""A number such as 8.0e18, which YAML 1.1 takes for a text."""


def sweep_schema() -> Schema:
    """Make the schema of a sweep file, `base` included.

    Keys that a preset may supply are not required. Fields of `base` are those of training, evaluation and runtime, but
    beside a `trainer`, whose own values they are then.
    """
    schema = SweepFile.model_json_schema()
    schema["$defs"], base = dict(schema.get("$defs", {})), dict[str, Any]()
    for kind in (TrainingConfig, EvaluationConfig, RuntimeConfig):
        of_kind = kind.model_json_schema()
        schema["$defs"] |= of_kind.pop("$defs", {})
        if kind is RuntimeConfig:
            schema["$defs"]["RuntimeConfig"] = of_kind
            base["runtime"] = {"$ref": "#/$defs/RuntimeConfig"}
        else:
            base |= of_kind["properties"]
    base |= {"devices": {"type": "integer", "minimum": 1}, "lr_multiplier": {"type": "number", "exclusiveMinimum": 0}}
    description = schema["properties"]["base"].pop("description")
    fields = {"type": "object", "properties": base, "additionalProperties": False}
    schema["properties"]["base"] = {"type": "object", "description": description}
    required = schema.pop("required")
    schema |= {
        "$schema": DIALECT,
        "title": "aimscale sweep",
        "anyOf": [{"required": ["preset"]}, {"required": required}],
        "if": {"required": ["trainer"], "properties": {"trainer": {"type": "object"}}},
        "else": {"properties": {"base": fields}},
    }
    for part in schema["$defs"].values():
        part.pop("required", None)  # a preset's `base` may hold what is missing in this one's
    return _with_units(schema)


def _with_units(schema: Any) -> Any:
    """Let counts be written with a unit, at any depth."""
    if isinstance(schema, list):
        return [_with_units(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _with_units(value) for key, value in schema.items()}
    is_count = inner.get("format") == "count"
    if not is_count and inner.get("type") != "number":
        return inner
    described = {key: inner.pop(key) for key in ("description", "title", "default") if key in inner}
    forms = [{"type": "number", "exclusiveMinimum": 0}, COUNT] if is_count else [inner, EXPONENT]
    return {**described, "anyOf": forms}
