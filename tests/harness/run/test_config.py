"""Mistakes in a run's configuration are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from aimscale.harness.run.config import ConfigError, RunConfig, RuntimeConfig, parse, read_yaml, run_config

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
