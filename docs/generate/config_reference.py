"""Every field of a run's `config.yaml` and of a sweep file, as Markdown, from the classes that parse them.

    python docs/generate/config_reference.py > docs/configuration.md

The site's build calls `markdown()`; a test compares the committed page with it.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from aimscale.aim.config import HeadRule, known_sizes, model_config
from aimscale.aim.cost import param_count
from aimscale.harness.run.config import EvaluationConfig, RuntimeConfig, Section, TrainingConfig
from aimscale.sweeps.plan.recipes import RECIPES
from aimscale.sweeps.plan.sweepfile import Count, SweepFile

INTRODUCTION = """\
# Configuration

Every field, written by `python docs/generate/config_reference.py`. Keys are strict: one that is not listed
here is an error that names the nearest known one. A *count* may be written `4096`, `4k`, `500M`, `2B` or `1e6`.

A [sweep file](#the-sweep-file) holds the fields that make the grid. What all runs share stands under `base`: a run's
[training](#a-run-what-is-trained) and [evaluation](#a-run-what-is-measured) fields, `runtime` (the
[runtime fields](#a-run-how-it-is-executed)), `devices` (data-parallel ranks, instead of the recipe's) and
`lr_multiplier` (a factor of the recipe's learning rate). A run directory's `config.yaml` has `version`,
`identity_schema`, `training`, `evaluation` and `runtime`. The *training* fields name the run: a changed one is another
run. The *evaluation* fields say what is measured on it: more of them never trains it again. The *runtime* fields do
not change a result, so a run moved to other hardware stays itself.
"""


def markdown() -> str:
    """The page."""
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


def sections() -> Iterator[tuple[str, type[Section]]]:
    """(dotted place, class) of every section that the page must list: of a sweep file and of the parts of a run."""
    for kind, where in ((SweepFile, ""), (TrainingConfig, ""), (EvaluationConfig, ""), (RuntimeConfig, "runtime")):
        yield from _nested(kind, where)


def _nested(kind: type[Section], where: str) -> Iterator[tuple[str, type[Section]]]:
    yield where, kind
    for name, field in kind.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from _nested(inner, f"{where}.{name}".strip("."))


def section_of(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as `tuple[ProbeSection, ...]`, or None."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part)) is not None), None)


def _page(title: str, kind: type[Section], where: str, note: str) -> Iterator[str]:
    yield f"## {title}\n\n{inspect.getdoc(kind)} {note}\n"
    for place, section in _nested(kind, where):
        if section is not kind:
            yield f"### `{place}`\n\n{inspect.getdoc(section)}\n"
        yield _table(section, place)


def _table(section: type[Section], place: str) -> str:
    lines = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        dotted = f"{place}.{name}".strip(".")
        value = type_words(field) if inner is None else f"{_container(field.annotation)}[`{dotted}`](#{_slug(dotted)})"
        lines.append(f"| `{name}` | {value} | {_default(field, inner)} | {_cell(field.description or '')} |")
    return "\n".join(lines) + "\n"


def _container(annotation: Any) -> str:
    return "list of " if get_origin(_bare(annotation)) is tuple else ""


def _slug(text: str) -> str:
    """GitHub's anchor of a heading that is one code span."""
    return "".join(letter for letter in text.lower() if letter.isalnum() or letter in "_- ")


def type_words(field: FieldInfo) -> str:
    """What may be written in a field, in words: `integer >= 1 or null`."""
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    if annotation == Count:
        return "count > 0"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], (*arguments[1:], *metadata))
    bounds = _bounds(metadata)
    if origin is Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part, metadata) for part in arguments))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {_words(arguments[0])}"
        return f"list of {len(arguments)}: {', '.join(dict.fromkeys(_words(part) for part in arguments))}"
    if origin is dict:
        return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", type(None): "null", Any: "value"}
    if annotation is int and any(isinstance(part, BeforeValidator) for part in metadata):  # a bare `Count`
        return f"count{bounds}"
    if annotation not in names:
        raise TypeError(f"no words for the type {annotation}")
    return names[annotation] + (bounds if annotation in (int, float) else "")


def _bounds(metadata: list[Any] | tuple[Any, ...]) -> str:
    signs = {annotated_types.Gt: ">", annotated_types.Ge: "≥", annotated_types.Lt: "<", annotated_types.Le: "≤"}
    found = []
    for part in metadata:
        for inner in getattr(part, "metadata", None) or [part]:  # a FieldInfo inside Annotated keeps its own list
            if type(inner) in signs:
                found.append(f"{signs[type(inner)]} {getattr(inner, type(inner).__name__.lower())}")
    return " " + ", ".join(found) if found else ""


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _default(field: FieldInfo, inner: type[Section] | None) -> str:
    if field.default is not PydanticUndefined:
        if isinstance(field.default, Section):
            return "as below"
        return f"`{_yaml(field.default)}`"
    if field.default_factory is not None:
        return f"`{_yaml(typing.cast(Any, field.default_factory)())}`"
    return "*required*"


def _yaml(value: Any) -> str:
    """A value as one writes it in the file."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _recipes() -> Iterator[str]:
    yield "## Recipes\n\nWhat follows from the size. A sweep's `base`, `axes` and `override` replace single fields.\n"
    yield "| recipe | schedule | precision | what it does |\n|---|---|---|---|"
    for recipe in RECIPES.values():
        yield f"| `{recipe.name}` | {recipe.schedule} | {recipe.precision} | {_cell(recipe.summary)} |"
    yield ""


def _sizes() -> Iterator[str]:
    yield (
        "## Sizes\n\n`size` is one of these, or `w<width>-d<depth>` for any other shape. N at 224 px and patch 14 with "
        "the pixel head of each `head_rule`.\n"
    )
    rules = get_args(HeadRule)
    heads = " | ".join(f"N, {rule} head" for rule in rules)
    yield f"| size | width | depth | heads | N, trunk | {heads} |\n|---|---|---|---|---|{'---|' * len(rules)}"
    for name in known_sizes():
        shape = model_config(name)
        counts = [param_count(model_config(name, head_rule=rule)) for rule in rules]
        totals = " | ".join(f"{count.total:,}" for count in counts)
        yield f"| `{name}` | {shape.width} | {shape.depth} | {shape.num_heads} | {counts[0].trunk:,} | {totals} |"
    yield ""


def main() -> None:
    """Print the page."""
    print(markdown(), end="")


if __name__ == "__main__":
    main()
