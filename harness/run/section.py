"""Strict sections of YAML and JSON files, and what identifies them.

Sections are frozen and typed, and an unknown key is an error that names the nearest one. Counts may be written as
people write them: `4k`, `500M`.

A run or an evaluation is identified by the fields that differ from their defaults, and the content of its data sets,
never by a path, a time or a machine. A new field must default to what the code did before: then no run is renamed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from aimscale.aim.errors import UserError, did_you_mean
from aimscale.harness.run.files import read_file

SectionT = TypeVar("SectionT", bound="Section")
Fields = dict[str, Any]
"""Keys of a YAML mapping with their values."""

_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kKMB]?)")
_UNIT = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
Values = Mapping[str, Any]


class ConfigError(UserError):
    """Run or sweep configuration that cannot be used as written."""


class Section(BaseModel):
    """Base of every section: frozen, and strict about keys (an unknown key is an error)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` and `yes` for a number, which pydantic takes for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise ValueError(f"must be a number, not {str(value).lower()}")
        return value


MAX_NODES = 200_000
"""Maximum number of values of a YAML document, each alias counted as what it stands for."""


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a repeated key, of which YAML readers silently take the last, and too many values."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _num_nodes(node, {}) > MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"it has more than {MAX_NODES:,} values, aliases expanded")
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node: yaml.ScalarNode = super().compose_scalar_node(anchor)
        node.value.encode()  # a ValueError if an escape stands for half of a character
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"the key '{key.value}' stands twice", key.start_mark)
                seen.add(key.value)
        return node


def _num_nodes(node: Any, counts: dict[int, int]) -> int:
    """Count the nodes of a document, each alias as what it stands for; a node that contains itself has too many."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = MAX_NODES + 1  # until it is counted
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        counts[id(node)] = 1 + sum(_num_nodes(part, counts) for part in inner)
    return counts[id(node)]


def read_yaml(path: Path) -> Any:
    """Read one YAML document; a missing or malformed file is a ConfigError."""
    try:
        return yaml.load(read_file(path).decode("utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no UTF-8, or thousands of digits, are ValueErrors
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error


def parse(kind: type[SectionT], values: Any, where: str) -> SectionT:
    """Validate `values` as `kind`, turning pydantic's report into one sentence."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, not {type(values).__name__}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(kind, error)}") from error


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    # A misspelt key also leaves the right one missing: report the spelling first, and do not count missing keys.
    """Turn pydantic's report into one sentence."""
    errors = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    first, others = errors[0], [entry for entry in errors[1:] if entry["type"] not in ("missing", "too_short")]
    place, said = first["loc"], first["msg"].removeprefix("Value error, ")
    if place and str(place[-1]).startswith("literal["):  # each alternative of a field gives an error of its own
        place = place[:-1]
        said = " or ".join(
            [said, *(entry["msg"].removeprefix("Input should be ") for entry in others if entry["loc"][:-1] == place)]
        )
        others = [entry for entry in others if entry["loc"][:-1] != place]
    key = ".".join(str(part) for part in place)
    if first["type"] == "literal_error" and place == first["loc"] and isinstance(typed := first["input"], str):
        choices = re.findall("'([^']+)'", first["ctx"]["expected"])
        said = f"unknown '{typed}'; {did_you_mean(typed, choices, 'use')}"
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        choices = _known_keys(kind, first["loc"][:-1])
        return f"unknown key '{key}'; {did_you_mean(str(first['loc'][-1]), choices, 'known keys:')}{more}"
    return f"{key}: {said}{more}" if key else f"{said}{more}"


def refuse_unknown(fields: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raise ConfigError for the first key that is not known."""
    names = list(names)
    for key in fields:
        if key not in names:
            raise ConfigError(f"{where}: unknown key '{key}'; {did_you_mean(key, names, 'known keys:')}")


def _known_keys(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """List the field names of the section that `location` leads to."""
    schema = kind.model_json_schema()
    node: dict[str, Any] = schema
    for part in location:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        node = next((each for each in node.get("anyOf", []) if "$ref" in each), node)  # an optional section
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return list(node.get("properties", {}))


def count(value: Any) -> Any:
    """Turn `4k`, `500M`, `2B`, `1e6` or `4096` into an integer; anything else is left for the caller to report."""
    if isinstance(value, bool):
        raise ValueError("must be a count such as 4096, 4k or 500M")
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip().replace("_", ""))):
        value = round(float(match[1]) * _UNIT[match[2]], 6)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(count), Field(gt=0, le=10**15, json_schema_extra={"format": "count"})]
"""Number of images or parameters, with an optional unit."""


def merge(base: Fields, changes: Fields) -> Fields:
    """Merge nested mappings; `changes` win, lists are replaced as a whole. Neither argument is changed."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged


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
