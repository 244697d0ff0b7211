"""Mistakes in a run's configuration are named."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import aimscale
from aimscale.aim.config import model_config
from aimscale.harness.run.config import ConfigError, RunConfig, RuntimeConfig, Section, parse, read_yaml, run_config

PACKAGE = Path(next(iter(aimscale.__path__)))
FIELDS = {
    "model": {"size": "w16-d2", "image_size": 16, "patch_size": 4},
    "data": {"sources": [{"path": "train"}]},
    "budgets": [4096],
    "validation": {"path": "validation"},
}


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"data": FIELDS["data"] | {"unique_image": 3}}, r"data\.unique_image'"),
        ({"optimizer": {}}, "optimizer"),
        ({"model": FIELDS["model"] | {"size": 3}}, r"model\.size"),
        ({"budgets": [8192, 4096]}, r"budgets \[8192, 4096\]"),
        ({"budgets": [5000]}, "5000.*4096"),
        ({"schedule": {"kind": "cosine"}, "budgets": [4096, 8192]}, "cosine"),
    ],
)
def test_a_mistake_is_one_sentence(changes: dict, subject: str) -> None:
    with pytest.raises(ConfigError, match=subject):
        run_config({**FIELDS, **changes}, "the test")


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    for each in kind.__subclasses__():
        if each.__module__.startswith("aimscale.harness."):  # those of sweep files are read by their keys
            yield each
        yield from sections(each)


def test_every_field_is_read_somewhere() -> None:
    """A field that nothing reads is accepted, documented, and without effect."""
    files = [path for folder in ("aim", "harness", "sweeps") for path in (PACKAGE / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text()) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= set(inspect.signature(model_config).parameters)  # which are given all fields of `model` at once
    fields = {f"{kind.__name__}.{name}" for kind in sections(Section) for name in kind.model_fields}
    assert len(fields) > 100
    assert {field for field in fields if field.split(".")[1] not in read} == set()


def test_budgets_are_checked_in_a_file_too() -> None:
    values = {"training": {"model": FIELDS["model"], "data": FIELDS["data"]}}
    with pytest.raises(ConfigError, match=r"config\.yaml.* 7 "):
        parse(RunConfig, {**values, "evaluation": {"budgets": [7], "validation": {"path": "v"}}}, "config.yaml")


def test_aliases_that_expand_without_end_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)))
    with pytest.raises(ConfigError, match="200,000 values"):
        read_yaml(path)
    path.write_text("a: &a [*a]\n")
    with pytest.raises(ConfigError, match="200,000 values"):
        read_yaml(path)


def test_a_key_that_stands_twice_is_refused_and_a_merged_one_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("base: &base {seeds: [0], sizes: [a]}\nmore: {<<: *base, seeds: [1]}\n")
    assert read_yaml(path)["more"] == {"seeds": [1], "sizes": ["a"]}
    path.write_text("budgets: [1k]\nsizes: [a]\nbudgets: [2k]\n")
    with pytest.raises(ConfigError, match=r"'budgets'.* line 3"):
        read_yaml(path)


def test_loader_processes_are_chosen_by_the_cores_beside_a_gpu() -> None:
    auto, given = RuntimeConfig(), RuntimeConfig(num_workers=3)
    assert [auto.loader_processes(is_gpu=True, cores=cores) for cores in (1, 2, 12, 100)] == [0, 1, 11, 16]
    assert auto.loader_processes(is_gpu=False, cores=12) == 0
    assert given.loader_processes(is_gpu=False, cores=1) == given.loader_processes(is_gpu=True, cores=100) == 3
