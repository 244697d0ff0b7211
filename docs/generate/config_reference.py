"""Every field of a run's `config.yaml` and of a sweep file, as Markdown, from the classes that parse them.

The site's build writes what `markdown()` returns to `docs/configuration.md`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml

from aimscale.aim.config import HeadRule, known_sizes, model_config
from aimscale.aim.cost import param_count
from aimscale.harness.run.config import EvaluationConfig, RuntimeConfig, Section, TrainingConfig
from aimscale.sweeps.planning.recipes import get_recipe, recipe_names
from aimscale.sweeps.planning.sweepfile import SweepFile

Schema = dict[str, Any]
"""JSON schema of a section or a field."""

INTRODUCTION = """\
# Configuration

Every field of a sweep file and of a run. A key that is not listed here is an error, which names the nearest known
one. A *count* is above 0 and may be written `4096`, `4k`, `500M`, `2B` or `1e6`.

A [sweep file](#the-sweep-file) makes a grid of runs. What they share is under `base`: fields of a run, `devices`
(data-parallel ranks, instead of the recipe's) and `lr_multiplier` (a factor of the recipe's learning rate). A run's
`config.yaml` has `version` and three kinds of fields:

- [`training`](#a-run-what-is-trained) names the run: a changed field is another run.
- [`evaluation`](#a-run-what-is-measured) says what is measured: more of it never trains a run again.
- [`runtime`](#a-run-how-it-is-executed) changes no result: a run moved to other hardware stays the same run.
"""


def markdown() -> str:
    """Write the page."""
    in_sweep = "One YAML document, which `aimscale plan` and `launch` read. Relative paths are relative to it."
    in_training = "Under `base` in a sweep file, under `training` in `config.yaml`."
    in_evaluation = "Under `base` in a sweep file, under `evaluation` in `config.yaml`."
    in_runtime = "Under `base.runtime` in a sweep file, under `runtime` in `config.yaml`."
    parts = [
        INTRODUCTION,
        *_page("The sweep file", SweepFile, "", in_sweep),
        *_page("A run: what is trained", TrainingConfig, "", in_training),
        *_page("A run: what is measured", EvaluationConfig, "", in_evaluation),
        *_page("A run: how it is executed", RuntimeConfig, "runtime", in_runtime),
        *_recipes(),
        *_sizes(),
    ]
    return "\n".join(parts).rstrip() + "\n"


def sections() -> Iterator[tuple[str, Schema]]:
    """(dotted place, schema) of every section that the page must list: of a sweep file and of the parts of a run."""
    for kind, where in ((SweepFile, ""), (TrainingConfig, ""), (EvaluationConfig, ""), (RuntimeConfig, "runtime")):
        schema = kind.model_json_schema()
        yield from _nested(schema, where, schema.get("$defs", {}))


def _nested(schema: Schema, where: str, parts: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield a section and those in it, each at the first place where it stands."""
    yield where, schema
    seen = set[str]()
    for name, field in schema["properties"].items():
        if (inner := _section_in(field)) and inner not in seen:
            seen.add(inner)
            yield from _nested(parts[inner], f"{where}.{name}".strip("."), parts)


def _section_in(field: Schema) -> str | None:
    """Return the section that a field holds, alone, in a list or as an alternative to null."""
    inside = [field, field.get("items", {}), *field.get("anyOf", [])]
    return next((part["$ref"].rsplit("/", 1)[-1] for part in inside if "$ref" in part), None)


def _page(title: str, kind: type[Section], where: str, note: str) -> Iterator[str]:
    schema = kind.model_json_schema()
    yield f"## {title}\n\n{inspect.getdoc(kind)} {note}\n"
    for place, section in _nested(schema, where, schema.get("$defs", {})):
        if section is not schema:
            yield f"### `{place}`\n\n{section['description']}\n"
        yield _table(section, place)


def _table(section: Schema, place: str) -> str:
    lines, first = ["| field | value | default | meaning |", "|---|---|---|---|"], dict[str, str]()
    for name, field in section["properties"].items():
        dotted = f"{place}.{name}".strip(".")
        default = "*required*" if name in section.get("required", []) else f"`{_yaml(field.get('default', {}))}`"
        if inner := _section_in(field):
            shown = first.setdefault(inner, dotted)
            slug = "".join(letter for letter in shown.lower() if letter.isalnum() or letter in "_- ")  # GitHub's
            text = "text or " * ({"type": "string"} in field.get("anyOf", []))
            value = f"{'list of ' if 'items' in field else text}[`{shown}`](#{slug})"
            default = "as below" if isinstance(field.get("default"), dict) else default
        else:
            value = words(field)
        lines.append(f"| `{name}` | {value} | {default} | {_cell(field.get('description', ''))} |")
    return "\n".join(lines) + "\n"


NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true` or `false`", "null": "null"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def words(field: Schema) -> str:
    """Describe the values that a field takes: `integer ≥ 1 or null`."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(map(words, field["anyOf"])))
    if "enum" in field or "const" in field:
        return " or ".join(f"`{_yaml(value)}`" for value in field.get("enum", [field.get("const")]))
    if "prefixItems" in field:
        parts = dict.fromkeys(map(words, field["prefixItems"]))
        return f"list of {len(field['prefixItems'])}: {', '.join(parts)}"
    if field.get("type") == "array":
        return f"list of {words(field['items'])}"
    if field.get("type") == "object":
        of = field.get("additionalProperties", True)
        return f"mapping of text to {'value' if of is True else words(of)}"
    name = field.get("format") or NAMES[field["type"]] if "type" in field else "value"
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    return f"{name} {', '.join(bounds)}".strip()


def _yaml(value: Any) -> str:
    """Write a value as in the file."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


EXAMPLE = """\
A recipe of its own is a file beside the sweep file (`recipe: my-recipe.yaml`), or stands in the sweep file. Each law is
`coefficient (width/at.width)^width (N/at.N)^N (D/at.D)^D`: of the backbone's width, the parameters with the head, and a
run's smallest budget in images. An exponent that is not given is 0, and a scale in `at` 1. `aimscale rates --write`
writes a recipe from tuned runs.

<!-- not run: a recipe, no sweep file -->
```yaml
like: small                         # its keys stand where this recipe has none
lr_peak: {coefficient: 0.0021, N: -0.4, D: -0.3, at: {N: 120k, D: 64k}, min: 0.0001, source: aimscale rates t.csv}
batch_size: {coefficient: 64, D: 0.5, at: {D: 64k}, min: 16, source: an assumption}
devices: {0: 1, 100M: 8}            # from the number of parameters
base: {optimiser: {precision: bf16}}
```
"""


def _recipes() -> Iterator[str]:
    yield "## Recipes\n\nWhat follows from the size. A sweep's `base`, `axes` and `override` replace single fields.\n"
    yield "| recipe | schedule | precision | what it does |\n|---|---|---|---|"
    for recipe in map(get_recipe, recipe_names()):
        kinds = f"{recipe.base['schedule']['kind']} | {recipe.base['optimiser']['precision']}"
        yield f"| `{recipe.name}` | {kinds} | {_cell(recipe.summary)} |"
    yield f"\n{EXAMPLE}"


def _sizes() -> Iterator[str]:
    yield (
        "## Sizes\n\n`size` is one of these, or `w<width>-d<depth>` for any other shape. N at 224 px and patch 14 with "
        "the pixel head of each `head_rule`.\n\nAttention heads of other shapes are as wide as possible: a power of "
        "two from 2 to 64 channels that gives at least two heads. Width 32 has 2 heads of 16, width 52 has 13 of 4. "
        "Loss depends on that, so `aimscale plan` names sizes where the number jumps. `w52-d2-h4` sets it to four.\n"
    )
    rules = get_args(HeadRule)
    heads = " | ".join(f"N, {rule} head" for rule in rules)
    yield f"| size | width | depth | heads | N, backbone | {heads} |\n|---|---|---|---|---|{'---|' * len(rules)}"
    for name in known_sizes():
        shape = model_config(name)
        counts = [param_count(model_config(name, head_rule=rule)) for rule in rules]
        totals = " | ".join(f"{count.total:,}" for count in counts)
        yield f"| `{name}` | {shape.width} | {shape.depth} | {shape.num_heads} | {counts[0].trunk:,} | {totals} |"
    yield ""


if __name__ == "__main__":
    Path(__file__).parents[1].joinpath("configuration.md").write_text(markdown())
